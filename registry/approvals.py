"""Approvals: what a promotion asks a person for, the answers, and which of them count. Who may answer at all is the caller's to check."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock, leases, promotions, routes, versions
from registry.actor import Who
from registry.database import Database, Transaction
from registry.errors import ConflictError, UsageError
from registry.policy import PromotionPolicy
from registry.promotions import AWAITING, RUNNING, Operation
from registry.schema import NAME, ApiKey, Approval, Environment, Lease, Promotion

Verdict = Literal["approve", "reject"]
STEP = "approval"
CARRY_ON_SECONDS = 3600.0
"""An approved promotion that nobody goes on with is ended after this time, or at its deadline where that is later."""
NOTE_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Waiting:
    """A promotion that waits, as whoever goes on with it needs to know it."""

    promotion: str
    environment: str
    flow_run_id: str | None
    approved: bool
    beat: leases.Beat | None


def asks(policy: PromotionPolicy) -> bool:
    """Whether the policy wants a person's approval. Four eyes are two approvals, so they ask for one too."""
    return policy.approval or policy.four_eyes


def needed(policy: PromotionPolicy) -> int:
    return 2 if policy.four_eyes else 1


def ask(database: Database, operation: Operation, *, deadline_seconds: float) -> dict[str, Any]:
    """Let a promotion wait for a person: nobody has to beat its lease from here on. Returns its state (`state_of`).

    Raises FencedError. The deadline is by the database's clock. Who repeats it (the first call got no answer) asks nothing new.
    """
    with database.write(flow_run_id=operation.flow_run_id) as transaction:
        leases.check(transaction, operation.held)
        session = transaction.session
        row = session.get_one(Promotion, operation.id)
        if row.state == AWAITING:
            return _state(session, row)
        leases.wait_for_approval(transaction, operation.held)
        by = clock.of_database(session) + dt.timedelta(seconds=deadline_seconds)
        row.state, row.step, row.approve_by = AWAITING, STEP, by
        row.asked = {**_facts(session, row), "needed": needed(operation.policy), "forms": []}
        detail = f"{_in_words(row)}; {_whom(operation.policy)}, until {clock.text(by)}: modelkeep approve {row.id} --note TEXT"
        promotions.add_step(transaction, row, STEP, "waits for an approval", detail, row.asked)
        transaction.record(
            "approval.asked",
            operation.subject,
            after={"fingerprint": row.asked["fingerprint"], "needed": row.asked["needed"], "until": clock.text(by)},
            reason=detail,
        )
        session.flush()
        operation.step = STEP
        return _state(session, row)


def give(
    database: Database,
    promotion_id: str,
    *,
    verdict: Verdict,
    who: Who,
    note: str,
    seen: str | None = None,
    form: str | None = None,
) -> dict[str, Any]:
    """Answer. Every answer is on record; the result says whether it counts, and if not, why.

    `seen`: the fingerprint that the answer is about, where the person was shown another question than the one of record.
    `form`: the form that it comes from, which is taken once. Raises NotFoundError, ConflictError where nothing waits for an
    answer, UsageError.
    """
    if verdict not in ("approve", "reject"):
        raise UsageError(f"verdict {verdict!r}: approve or reject is needed")
    if len(note) > NOTE_CHARACTERS:
        raise UsageError(f"a note of {len(note)} characters: at most {NOTE_CHARACTERS} are kept")
    with database.write(actor=who.actor) as transaction:
        session = transaction.session
        row = _locked(transaction, promotion_id)
        if row.state != AWAITING or row.asked is None:
            raise ConflictError(
                f"promotion {row.id} ({row.model} {row.version}) waits for no approval: it is {row.state}"
                + (f" ({row.reason})" if row.reason else "")
            )
        if verdict == "approve" and "approved" in row.progress:
            raise ConflictError(f"promotion {row.id} ({row.model} {row.version}) is approved already")
        if form is not None:
            if form in row.asked["forms"]:
                raise ConflictError(f"the answer of form {form} is on record already")
            row.asked = {**row.asked, "forms": [*row.asked["forms"], form]}
        policy = PromotionPolicy.model_validate(row.policy)
        stale, late = _stale(session, row), clock.of_database(session) > _by(row)
        why_not = ""
        if late:
            why_not = f"it came after the deadline, {clock.text(_by(row))}"
        elif verdict == "approve":
            why_not = stale or _why_not(session, row, policy, who, seen)
        answer = Approval(
            promotion=row.id,
            number=len(_answers(session, row.id)) + 1,
            verdict=verdict,
            actor=who.actor,
            key_id=who.key_id,
            via=who.via,
            claimed=(who.claimed or "")[:NAME] or None,
            note=note,
            fingerprint=seen or row.asked["fingerprint"],
            counts=not why_not,
            why_not=why_not,
            at=clock.now(),
        )
        session.add(answer)
        session.flush()
        _record(transaction, row, answer)
        if late:
            _end(transaction, row, "rejected", _too_late(row), f"nobody approved it by {clock.text(_by(row))}")
        elif verdict == "reject":
            _end(transaction, row, "rejected", f"rejected by {_name(answer)}", note or "no reason was given")
        elif stale:
            _end(transaction, row, "withdrawn", "what was to be approved has changed", stale)
        elif len(_counted(session, row, policy)) >= needed(policy):
            _approve(transaction, row, policy)
        session.flush()
        return {**_state(session, row), "verdict": verdict, "counts": not why_not, "why_not": why_not}


def take_form(database: Database, promotion_id: str, form: str) -> None:
    """Note that a form was sent without an answer, so that the next one is asked for."""
    with database.write() as transaction:
        row = _locked(transaction, promotion_id)
        if row.asked is not None and form not in row.asked["forms"]:
            row.asked = {**row.asked, "forms": [*row.asked["forms"], form]}


def state_of(session: Session, promotion_id: str) -> dict[str, Any]:
    """What is asked, until when, what was answered. Raises NotFoundError."""
    return _state(session, promotions.get(session, promotion_id))


def carry_on(database: Database, promotion_id: str, *, ttl_seconds: float, flow_run_id: str | None) -> Operation | None:
    """Go on with a promotion that is approved: a new token, so that of several that try only one does.

    Looks again whether what was approved is what there is. Returns None where it is over now (stale; `state_of` says so). Raises
    ConflictError where it does not wait or is not approved, FencedError.
    """
    with database.write(flow_run_id=flow_run_id) as transaction:
        session = transaction.session
        row = _locked(transaction, promotion_id)
        if row.state != AWAITING or "approved" not in row.progress:
            raise ConflictError(
                f"promotion {row.id} cannot go on: it is "
                + ("not approved yet" if row.state == AWAITING else f"{row.state} by now")
            )
        if stale := _stale(session, row):
            _end(transaction, row, "withdrawn", "what was approved has changed", stale)
            return None
        policy = PromotionPolicy.model_validate(row.policy)
        if len(_counted(session, row, policy)) < needed(policy):
            row.progress = {name: value for name, value in row.progress.items() if name != "approved"}
            gone = "a key that approved it was revoked since: another approval is needed"
            promotions.add_step(transaction, row, STEP, "is not approved any more", gone, {})
            return None
        row.state, row.approve_by = RUNNING, None
        holder = f"promotion of {row.model} {row.version} by {transaction.actor}"
        return promotions.carried(transaction, row, holder=holder, ttl_seconds=ttl_seconds, flow_run_id=flow_run_id)


def withdraw(database: Database, promotion_id: str, *, reason: str, actor: str | None = None) -> bool:
    """End a promotion that waits, without an answer. False where it does not wait any more."""
    with database.write(actor=actor) as transaction:
        row = _locked(transaction, promotion_id)
        if row.state != AWAITING:
            return False
        _end(transaction, row, "withdrawn", "no longer asked for", reason)
        return True


def expire_due(database: Database, *, observer: str | None = None) -> list[str]:
    """End the promotions whose deadline has passed, by the database's clock. Returns a line for each."""
    with database.read() as session:
        now = clock.of_database(session)
        due = session.scalars(select(Promotion.id).where(Promotion.state == AWAITING, Promotion.approve_by < now)).all()
    lines = []
    for identity in due:
        with database.write(actor=observer) as transaction:
            row = _locked(transaction, identity)
            if row.state != AWAITING or clock.of_database(transaction.session) <= _by(row):
                continue
            approved = "approved" in row.progress
            detail = f"{'it was approved, but nobody went on with it' if approved else 'nobody approved it'} by {clock.text(_by(row))}"
            _end(transaction, row, "withdrawn" if approved else "rejected", _too_late(row), detail)
            lines.append(f"promotion {row.id} of {row.model} {row.version}: {detail}")
    return lines


def waiting(session: Session) -> list[Waiting]:
    """Every promotion that waits for an approval, or, approved, for somebody to go on with it."""
    beats = {
        row.subject: leases.Beat(row.subject, row.token, row.heartbeat, row.ttl_seconds)
        for row in session.scalars(select(Lease).where(Lease.state == leases.AWAITING))
    }
    rows = session.scalars(select(Promotion).where(Promotion.state == AWAITING).order_by(Promotion.created_at))
    return [
        Waiting(
            row.id,
            row.environment,
            row.flow_run_id,
            "approved" in row.progress,
            beats.get(leases.subject_of(row.environment, row.model)),
        )
        for row in rows
    ]


def _locked(transaction: Transaction, identity: str) -> Promotion:
    """The promotion, with its environment's row locked first."""
    session = transaction.session
    routes.lock_environment(transaction, promotions.get(session, identity).environment)
    query = select(Promotion).where(Promotion.id == identity).with_for_update()
    return session.execute(query.execution_options(populate_existing=True)).scalar_one()


def _facts(session: Session, row: Promotion) -> dict[str, Any]:
    """What an approval is about, and its fingerprint: SHA-256 of the canonical JSON."""
    version = versions.get(session, row.model, row.version)
    route = routes.read(session, row.environment, row.model)
    environment = session.get(Environment, row.environment)
    facts: dict[str, Any] = {
        "promotion": row.id,
        "model": row.model,
        "version": row.version,
        "strategy": row.strategy,
        "forced": row.progress.get("forced"),
        "artifact": {"digest": version.digest, "files": version.files, "golden": version.golden_digest},
        "route": {
            "environment": row.environment,
            "epoch": environment.epoch if environment is not None else None,
            "generation": route.generation if route is not None else None,
            "stable": route.stable if route is not None else None,
        },
        "policy": row.policy,
    }
    canonical = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {**facts, "fingerprint": hashlib.sha256(canonical.encode()).hexdigest()}


def _stale(session: Session, row: Promotion) -> str:
    """What has changed since the question, in words; empty where nothing has."""
    asked, now = row.asked or {}, _facts(session, row)
    if asked.get("fingerprint") == now["fingerprint"]:
        return ""
    parts = []
    if asked.get("artifact") != now["artifact"]:
        parts.append("the artifact (its digest is another)")
    if asked.get("route") != now["route"]:
        before = asked.get("route", {})
        parts.append(
            f"the route (stable {before.get('stable')} at generation {before.get('generation')} of epoch {before.get('epoch')}, "
            f"now {now['route']['stable']} at {now['route']['generation']} of {now['route']['epoch']})"
        )
    if asked.get("policy") != now["policy"]:
        names = {*asked.get("policy", {}), *now["policy"]}
        changed = sorted(name for name in names if asked.get("policy", {}).get(name) != now["policy"].get(name))
        parts.append(f"the policy ({', '.join(changed)})")
    return f"it is stale: since it was asked for, there has changed {' and '.join(parts) or 'what is promoted'}"


def _why_not(session: Session, row: Promotion, policy: PromotionPolicy, who: Who, seen: str | None) -> str:
    assert row.asked is not None
    if seen is not None and seen != row.asked["fingerprint"]:
        return "it is stale: it answers an earlier question"
    if not policy.four_eyes:
        return ""
    if who.via == "form":
        return "four eyes are asked for, and a form has no key: approve with a key, from the command line or by the API"
    if who.key_id is None:
        return (
            f"four eyes are asked for, and {who.actor} has no key: set MODELKEEP_API_KEY to one with the role operate"
        )
    if not _good_key(session, who.key_id):
        return f"the key {who.actor} is revoked, expired or unknown"
    if who.key_id in {answer.key_id for answer in _counted(session, row, policy)}:
        return f"{who.actor} has approved it already: four eyes are two different keys"
    return ""


def _good_key(session: Session, key_id: str) -> bool:
    key = session.get(ApiKey, key_id)
    if key is None or key.revoked_at is not None or key.role != "operate":
        return False
    return key.expires_at is None or clock.of_database(session) < key.expires_at


def _answers(session: Session, identity: str) -> list[Approval]:
    return list(session.scalars(select(Approval).where(Approval.promotion == identity).order_by(Approval.number)))


def _counted(session: Session, row: Promotion, policy: PromotionPolicy) -> list[Approval]:
    """The approvals that count now: of this question, and with four eyes one for each key that is still good."""
    assert row.asked is not None
    found = [
        answer
        for answer in _answers(session, row.id)
        if answer.counts and answer.verdict == "approve" and answer.fingerprint == row.asked["fingerprint"]
    ]
    if not policy.four_eyes:
        return found
    by_key = {answer.key_id: answer for answer in found if answer.key_id and _good_key(session, answer.key_id)}
    return list(by_key.values())


def _approve(transaction: Transaction, row: Promotion, policy: PromotionPolicy) -> None:
    counted = _counted(transaction.session, row, policy)
    by = [_name(answer) for answer in counted]
    row.progress = {**row.progress, "approved": {"by": by, "answers": [answer.number for answer in counted]}}
    now = clock.of_database(transaction.session)
    row.approve_by = max(_by(row), now + dt.timedelta(seconds=CARRY_ON_SECONDS))
    title = f"approved by {' and '.join(by)}"
    promotions.add_step(transaction, row, STEP, title, "; ".join(a.note for a in counted if a.note), {"by": by})


def _end(transaction: Transaction, row: Promotion, outcome: promotions.Outcome, title: str, detail: str) -> None:
    subject = leases.subject_of(row.environment, row.model)
    promotions.close(transaction, row, outcome, f"{row.model} {row.version}: {title}"[:255], detail, {})
    leases.end_waiting(transaction, subject, row.environment, promotion=row.id, reason=title)


def _record(transaction: Transaction, row: Promotion, answer: Approval) -> None:
    """The answer in the audit trail and, where it decides nothing by itself, in the story."""
    facts = {
        "answer": answer.number,
        "via": answer.via,
        "key": answer.key_id,
        "claimed": answer.claimed,
        "fingerprint": answer.fingerprint,
        "counts": answer.counts,
        "why_not": answer.why_not,
    }
    action = "refused" if not answer.counts else "rejected" if answer.verdict == "reject" else "given"
    transaction.record(f"approval.{action}", f"promotion:{row.id}", after=facts, reason=answer.note)
    verb = "approval" if answer.verdict == "approve" else "rejection"
    title = f"{verb} by {_name(answer)}" + ("" if answer.counts else " does not count")
    promotions.add_step(transaction, row, STEP, title, answer.why_not or answer.note, facts)


def _state(session: Session, row: Promotion) -> dict[str, Any]:
    policy = PromotionPolicy.model_validate(row.policy)
    asked = row.asked or {}
    answers = _answers(session, row.id)
    return {
        "promotion": row.id,
        "model": row.model,
        "version": row.version,
        "environment": row.environment,
        "state": row.state,
        "reason": row.reason,
        "approved": "approved" in row.progress,
        "question": _in_words(row) if row.asked else None,
        "whom": _whom(policy) if row.asked else None,
        "fingerprint": asked.get("fingerprint"),
        "until": clock.text(row.approve_by) if row.approve_by else None,
        "seconds_left": _seconds_left(session, row),
        "needed": asked.get("needed", needed(policy) if asks(policy) else 0),
        "given": len(_counted(session, row, policy)) if row.asked else 0,
        "forms": asked.get("forms", []),
        "flow_run_id": row.flow_run_id,
        "answers": [
            {
                "number": answer.number,
                "verdict": answer.verdict,
                "actor": answer.actor,
                "via": answer.via,
                "claimed": answer.claimed,
                "note": answer.note,
                "counts": answer.counts,
                "why_not": answer.why_not,
                "at": clock.text(answer.at),
            }
            for answer in answers
        ],
    }


def _seconds_left(session: Session, row: Promotion) -> float | None:
    if row.state != AWAITING or row.approve_by is None:
        return None
    return max(0.0, (row.approve_by - clock.of_database(session)).total_seconds())


def _in_words(row: Promotion) -> str:
    asked = row.asked or {}
    stable = asked.get("route", {}).get("stable")
    against = f"in place of {stable}" if stable else "as the first version"
    how = "all of the traffic at once, forced" if asked.get("forced") else row.strategy
    digest = asked.get("artifact", {}).get("digest", "")[:12]
    return f"{row.model} {row.version} ({digest}) may take traffic in {row.environment} {against} ({how})"


def _whom(policy: PromotionPolicy) -> str:
    if policy.four_eyes:
        return "two people, with two different keys of the role operate (a form does not count)"
    return "one person, by the command line, the API or the form of its run"


def _name(answer: Approval) -> str:
    return answer.actor + (f" (claims to be {answer.claimed})" if answer.claimed else "")


def _too_late(row: Promotion) -> str:
    return "approved, but left lying" if "approved" in row.progress else "nobody approved it in time"


def _by(row: Promotion) -> dt.datetime:
    assert row.approve_by is not None
    return row.approve_by
