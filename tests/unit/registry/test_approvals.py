"""Approvals of record: which answers count, until when, and what an approved promotion may still do."""

from __future__ import annotations

import datetime as dt
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from registry import actor, approvals, clock, leases, promotions, rollbacks
from registry.actor import Who
from registry.database import Database
from registry.errors import ConflictError, FencedError, LockedError, NotFoundError, UsageError
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from registry.schema import ApiKey, Approval, Lease, Promotion, Route, Version
from tests.unit.registry import kit

ANN = Who("os:ann")
FORM = Who("prefect-ui", via="form", claimed="Ann")
ONE = PromotionPolicy(approval=True)
FOUR_EYES = PromotionPolicy(four_eyes=True)


def add_key(database: Database, name: str, *, role: str = "operate", **columns: Any) -> Who:
    with database.write(actor="test") as transaction:
        number = transaction.session.scalar(select(func.count()).select_from(ApiKey)) or 0
        identity = f"{number:012x}"
        transaction.session.add(
            ApiKey(
                id=identity, name=name, role=role, hash="0" * 64, created_at=clock.now(), created_by="test", **columns
            )
        )
        transaction.record("key.created", f"key:{identity}")
    return Who(f"key:{name}", key_id=identity, via="api")


def asked(database: Database, policy: PromotionPolicy = ONE, *, deadline_seconds: float = 60.0) -> Operation:
    """A promotion of 2, where 1 is stable, that waits."""
    for version in ("1", "2"):
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    operation = kit.begin(database, "2", policy=policy, flow_run_id="run-1")
    approvals.ask(database, operation, deadline_seconds=deadline_seconds)
    return operation


def answer(database: Database, operation: Operation, who: Who = ANN, verdict: Any = "approve", **more: Any) -> Any:
    return approvals.give(database, operation.id, verdict=verdict, who=who, note="looked at it", **more)


def go_on(database: Database, operation: Operation) -> Operation | None:
    return approvals.carry_on(database, operation.id, ttl_seconds=30.0, flow_run_id="run-2")


def state_of(database: Database, operation: Operation) -> dict[str, Any]:
    with database.read() as session:
        return approvals.state_of(session, operation.id)


def lease(database: Database) -> Lease:
    with database.read() as session:
        return session.scalars(select(Lease)).one()


def put_off(database: Database, operation: Operation, seconds: float) -> None:
    """Move the deadline to `seconds` from now."""
    with database.write(actor="test") as transaction:
        row = transaction.session.get_one(Promotion, operation.id)
        row.approve_by = clock.of_database(transaction.session) + dt.timedelta(seconds=seconds)


def test_the_clock_of_the_database_is_utc_and_near_ours(database: Database) -> None:
    with database.read() as session:
        found = clock.of_database(session)
    assert abs((found - clock.now()).total_seconds()) < 60


def test_who_asks_waits_without_a_heartbeat_and_locks_the_model(database: Database) -> None:
    operation = asked(database)
    row, held = state_of(database, operation), lease(database)
    assert (row["state"], row["approved"], row["needed"], row["given"]) == ("awaiting", False, 1, 0)
    assert row["question"] == "digits 2 (000000000000) may take traffic in production in place of 1 (canary)"
    assert held.state == leases.AWAITING
    with database.read() as session:
        assert leases.beats(session, kit.ENVIRONMENT) == []
        assert [beat.token for beat in leases.waiting(session, kit.ENVIRONMENT)] == [operation.held.token]
    with pytest.raises(FencedError):
        leases.beat(database, operation.held)
    with pytest.raises(LockedError, match=operation.id):
        kit.begin(database, "2", flow_run_id="another")
    assert kit.actions(database)[-3:] == ["lease.awaiting-approval", "promotion.approval", "approval.asked"]
    assert kit.verdict(database).faults == []


@pytest.mark.parametrize(
    "again",
    [
        lambda database, operation: kit.begin(database, "2", flow_run_id="run-1"),
        lambda database, operation: promotions.carry_on(database, operation.id, ttl_seconds=30.0, flow_run_id="run-1"),
        lambda database, operation: go_on(database, operation),
    ],
    ids=["begun again by its run", "carried on", "carried on by the approval"],
)
def test_it_does_not_go_on_without_an_approval(database: Database, again: Callable[[Database, Operation], Any]) -> None:
    operation = asked(database)
    with pytest.raises(ConflictError, match="approv"):
        again(database, operation)
    assert lease(database).state == leases.AWAITING


@pytest.mark.parametrize("who", [ANN, FORM, Who("key:ann", key_id="1", via="api")], ids=["command", "form", "api"])
def test_one_approval_is_enough_and_the_promotion_goes_on_under_a_new_token(database: Database, who: Who) -> None:
    operation = asked(database)
    given_ = answer(database, operation, who)
    assert (given_["counts"], given_["approved"], given_["state"], given_["given"]) == (True, True, "awaiting", 1)
    carried = go_on(database, operation)
    assert carried is not None and carried.resumed
    assert carried.progress["approved"]["by"] == ["prefect-ui (claims to be Ann)" if who is FORM else who.actor]
    assert state_of(database, operation)["state"] == "running"
    assert lease(database).state == leases.HELD
    with pytest.raises(FencedError):
        kit.shadow(database, operation)
    kit.canary(database, carried)
    with pytest.raises(ConflictError, match="running"):
        go_on(database, operation)
    with database.read() as session:
        kept = session.scalars(select(Approval)).one()
        assert (kept.actor, kept.via, kept.key_id, kept.claimed) == (who.actor, who.via, who.key_id, who.claimed)
    assert "approval.given" in kit.actions(database)


def test_a_rejection_ends_it_and_frees_the_model(database: Database) -> None:
    operation = asked(database)
    given_ = answer(database, operation, verdict="reject")
    assert (given_["state"], given_["counts"], given_["approved"]) == ("rejected", True, False)
    assert given_["reason"] == "digits 2: rejected by os:ann"
    assert lease(database).state == leases.RELEASED
    assert kit.route(database).stable == "1"
    with pytest.raises(ConflictError, match="rejected"):
        answer(database, operation)
    kit.begin(database, "2")


def test_who_rejects_after_the_approval_is_heard_while_nobody_went_on(database: Database) -> None:
    operation = asked(database)
    answer(database, operation)
    assert answer(database, operation, Who("os:bob"), "reject")["state"] == "rejected"
    with pytest.raises(ConflictError):
        go_on(database, operation)


def test_it_is_approved_once(database: Database) -> None:
    operation = asked(database)
    answer(database, operation)
    with pytest.raises(ConflictError, match="approved already"):
        answer(database, operation)


def test_four_eyes_are_two_keys_even_of_one_name_and_never_one_key_twice(database: Database) -> None:
    operation = asked(database, FOUR_EYES)
    first, second = add_key(database, "ops"), add_key(database, "ops")
    assert state_of(database, operation)["needed"] == 2
    assert answer(database, operation, first)["counts"]
    again = answer(database, operation, first)
    assert (again["counts"], again["approved"], again["given"]) == (False, False, 1)
    assert "has approved it already" in again["why_not"]
    assert answer(database, operation, second)["approved"]
    assert go_on(database, operation) is not None


@pytest.mark.parametrize(
    ("who", "why_not"),
    [
        (FORM, "a form has no key"),
        (Who("prefect-ui", key_id="0" * 12, via="form"), "a form has no key"),
        (ANN, "os:ann has no key"),
        (Who("key:gone", key_id="f" * 12, via="api"), "revoked, expired or unknown"),
    ],
    ids=["form", "form that names a key", "system's user", "unknown key"],
)
def test_four_eyes_do_not_count_who_has_no_key(database: Database, who: Who, why_not: str) -> None:
    operation = asked(database, FOUR_EYES)
    add_key(database, "ops")
    found = answer(database, operation, who)
    assert (found["counts"], found["given"], found["state"]) == (False, 0, "awaiting")
    assert why_not in found["why_not"]
    assert kit.actions(database)[-2:] == ["approval.refused", "promotion.approval"]


@pytest.mark.parametrize(
    "columns",
    [{"role": "infer"}, {"revoked_at": clock.now()}, {"expires_at": clock.now() - dt.timedelta(seconds=5)}],
    ids=["weak", "revoked", "expired"],
)
def test_four_eyes_do_not_count_a_key_that_is_not_good(database: Database, columns: dict[str, Any]) -> None:
    operation = asked(database, FOUR_EYES)
    assert not answer(database, operation, add_key(database, "bad", **columns))["counts"]


@pytest.mark.parametrize("when", ["before the second", "before it goes on"])
def test_an_approval_of_a_key_that_was_revoked_since_does_not_count(database: Database, when: str) -> None:
    operation = asked(database, FOUR_EYES)
    first, second, third = (add_key(database, name) for name in "abc")

    def revoke() -> None:
        with database.write(actor="test") as transaction:
            transaction.session.get_one(ApiKey, first.key_id).revoked_at = clock.now()

    answer(database, operation, first)
    if when == "before the second":
        revoke()
        assert not answer(database, operation, second)["approved"]
    else:
        assert answer(database, operation, second)["approved"]
        revoke()
        assert go_on(database, operation) is None
        assert state_of(database, operation)["state"] == "awaiting"
    assert answer(database, operation, third)["approved"]
    assert go_on(database, operation) is not None


def _other_artifact(session: Any) -> None:
    session.get_one(Version, (kit.MODEL, "2")).digest = "1" * 64


def _other_route(session: Any) -> None:
    session.get_one(Route, (kit.ENVIRONMENT, kit.MODEL)).generation += 1


def _other_policy(session: Any) -> None:
    row = session.scalars(select(Promotion).where(Promotion.state == "awaiting")).one()
    row.policy = {**row.policy, "margin": 5.0}


CHANGES = {"the artifact": _other_artifact, "the route": _other_route, "the policy (margin)": _other_policy}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("approved", [False, True], ids=["before the approval", "after it"])
def test_a_stale_approval_does_not_count_and_ends_the_promotion(database: Database, what: str, approved: bool) -> None:
    operation = asked(database)
    if approved:
        answer(database, operation)
    with database.write(actor="test") as transaction:
        CHANGES[what](transaction.session)
    if approved:
        assert go_on(database, operation) is None
    else:
        found = answer(database, operation)
        assert not found["counts"] and what in found["why_not"]
        assert "approval.refused" in kit.actions(database)
    ended = state_of(database, operation)
    assert ended["state"] == "withdrawn" and "has changed" in ended["reason"]
    assert lease(database).state == leases.RELEASED


def test_an_answer_to_an_earlier_question_does_not_count_and_the_question_stands(database: Database) -> None:
    operation = asked(database)
    found = answer(database, operation, seen="0" * 64)
    assert (found["counts"], found["state"]) == (False, "awaiting")
    assert "an earlier question" in found["why_not"]
    assert answer(database, operation, seen=found["fingerprint"])["approved"]


def test_an_approval_after_the_deadline_does_not_count_and_ends_it(database: Database) -> None:
    operation = asked(database)
    put_off(database, operation, -1)
    found = answer(database, operation)
    assert (found["counts"], found["state"]) == (False, "rejected")
    assert "after the deadline" in found["why_not"]


def test_nobody_approved_by_the_deadline_and_whoever_looks_ends_it(database: Database) -> None:
    operation = asked(database)
    assert approvals.expire_due(database) == []
    put_off(database, operation, -1)
    (line,) = approvals.expire_due(database, observer="watch")
    assert "nobody approved it" in line
    assert state_of(database, operation)["state"] == "rejected"
    assert lease(database).state == leases.RELEASED
    assert approvals.expire_due(database) == []


def test_an_approved_promotion_that_nobody_goes_on_with_is_ended_later(database: Database) -> None:
    operation = asked(database, deadline_seconds=5.0)
    answer(database, operation)
    with database.read() as session:
        row = session.get_one(Promotion, operation.id)
        assert row.approve_by is not None
        left = (row.approve_by - clock.of_database(session)).total_seconds()
    assert left > approvals.CARRY_ON_SECONDS - 60
    put_off(database, operation, -1)
    (line,) = approvals.expire_due(database)
    assert "nobody went on with it" in line
    assert state_of(database, operation)["state"] == "withdrawn"


@pytest.mark.parametrize("jump", [-3600, 3600])
def test_a_jump_of_the_clock_may_let_it_expire_but_never_approves(
    database: Database, monkeypatch: pytest.MonkeyPatch, jump: int
) -> None:
    operation = asked(database, FOUR_EYES)
    answer(database, operation, add_key(database, "a"))
    there = clock.of_database
    monkeypatch.setattr(clock, "of_database", lambda session: there(session) + dt.timedelta(seconds=jump))
    assert len(approvals.expire_due(database)) == (1 if jump > 0 else 0)
    assert state_of(database, operation)["approved"] is False
    with pytest.raises(ConflictError):
        go_on(database, operation)


def test_a_form_is_taken_once(database: Database) -> None:
    operation = asked(database, FOUR_EYES)
    assert not answer(database, operation, FORM, form="f-1")["counts"]
    with pytest.raises(ConflictError, match="f-1 is on record"):
        answer(database, operation, FORM, form="f-1")
    approvals.take_form(database, operation.id, "f-2")
    approvals.take_form(database, operation.id, "f-2")
    assert state_of(database, operation)["forms"] == ["f-1", "f-2"]


def test_who_asks_again_after_a_lost_answer_asks_nothing_new(database: Database) -> None:
    operation = asked(database)
    before = kit.last_event(database)
    approvals.ask(database, operation, deadline_seconds=60.0)
    assert kit.actions(database, before) == []


def test_an_emergency_rollback_takes_the_model_from_a_promotion_that_waits(database: Database) -> None:
    for version in ("1", "2", "3"):
        kit.add_version(database, version)
    kit.stable_by(database, "1", "2")
    operation = kit.begin(database, "3", policy=ONE)
    approvals.ask(database, operation, deadline_seconds=60)
    rollbacks.roll_back(
        database, environment=kit.ENVIRONMENT, model=kit.MODEL, to="1", reason="off", ttl_seconds=30, emergency=True
    )
    assert kit.route(database).stable == "1"
    with pytest.raises(ConflictError, match="withdrawn"):
        answer(database, operation)


def test_who_withdraws_frees_the_model_once(database: Database) -> None:
    operation = asked(database)
    assert approvals.withdraw(database, operation.id, reason="its run was cancelled")
    assert not approvals.withdraw(database, operation.id, reason="its run was cancelled")
    assert lease(database).state == leases.RELEASED


def test_a_process_that_waits_says_so_and_hears_when_it_is_over(database: Database) -> None:
    operation = asked(database)
    assert leases.beat_waiting(database, operation.held.subject, operation.held.token)
    with database.read() as session:
        (waiting,) = approvals.waiting(session)
    assert waiting.beat is not None
    assert (waiting.promotion, waiting.approved, waiting.beat.heartbeat) == (operation.id, False, 1)
    answer(database, operation, verdict="reject")
    assert not leases.beat_waiting(database, operation.held.subject, operation.held.token)
    with database.read() as session:
        assert approvals.waiting(session) == []


@pytest.mark.parametrize("verdict", ["approved", ""])
def test_an_unknown_verdict_is_refused(database: Database, verdict: Any) -> None:
    operation = asked(database)
    with pytest.raises(UsageError, match="approve or reject"):
        answer(database, operation, verdict=verdict)


def test_what_does_not_wait_takes_no_answer(database: Database) -> None:
    kit.add_version(database, "1")
    operation = kit.begin(database, "1")
    with pytest.raises(ConflictError, match="waits for no approval: it is running"):
        answer(database, operation)
    with pytest.raises(NotFoundError):
        approvals.give(database, "nothing", verdict="approve", who=ANN, note="")


def test_the_first_version_and_a_forced_one_say_what_they_would_do(database: Database) -> None:
    kit.add_version(database, "1")
    operation = kit.begin(database, "1", policy=ONE, strategy="forced", force_reason="hot fix")
    found = approvals.ask(database, operation, deadline_seconds=60)
    assert found["question"].endswith("in production as the first version (all of the traffic at once, forced)")


def test_who_promotes_by_a_key_is_on_record_by_it(database: Database) -> None:
    kit.add_version(database, "1")
    actor.act_as(add_key(database, "ops"))
    try:
        operation = kit.begin(database, "1")
    finally:
        actor.act_as(None)
    with database.read() as session:
        assert promotions.get(session, operation.id).actor == "key:ops"


ACTS = st.sampled_from(
    ["key a", "key b", "form", "user", "reject", "revoke a", "revoke b", "artifact", "route", "expire", "go on"]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=st.lists(ACTS, max_size=9), four_eyes=st.booleans())
def test_it_never_goes_on_without_enough_fresh_approvals_of_different_keys(
    template: Path, acts: list[str], four_eyes: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = kit.prepared(Path(folder), template)
        try:
            _try(database, acts, four_eyes)
        finally:
            database.dispose()


def _try(database: Database, acts: list[str], four_eyes: bool) -> None:
    """Do what is allowed of `acts`, beside a model of what must be: who approved it with what, and whether that is fresh."""
    operation = asked(database, FOUR_EYES if four_eyes else ONE)
    keys = {name: add_key(database, name) for name in "ab"}
    approved: set[str] = set()
    good, fresh, over, went_on = {"a", "b"}, True, False, False
    for act in acts:
        kind, _, name = act.partition(" ")
        try:
            if kind in ("key", "form", "user"):
                who = {"key": keys.get(name, ANN), "form": FORM, "user": ANN}[kind]
                found = answer(database, operation, who)
                assert not over and not went_on
                assert found["counts"] == (
                    fresh and (not four_eyes or (kind == "key" and name in good and name not in approved))
                )
                over = not fresh
                if found["counts"]:
                    approved.add(name or kind)
            elif kind == "reject":
                answer(database, operation, verdict="reject")
                over = True
            elif kind == "revoke":
                good.discard(name)
                with database.write(actor="test") as transaction:
                    transaction.session.get_one(ApiKey, keys[name].key_id).revoked_at = clock.now()
            elif kind in ("artifact", "route"):
                if not went_on:
                    fresh = False
                with database.write(actor="test") as transaction:
                    {"artifact": _other_artifact, "route": _other_route}[kind](transaction.session)
            elif kind == "expire" and not went_on:
                put_off(database, operation, -1)
                over = bool(approvals.expire_due(database)) or over
            elif kind == "go":
                carried = go_on(database, operation)
                if carried is not None:
                    went_on = True
                    enough = len(approved & good) == 2 if four_eyes else len(approved) >= 1
                    assert enough and fresh and not over
                else:
                    over = over or not fresh
        except ConflictError:
            pass
    if not went_on:
        assert kit.route(database).stable == "1"
    assert kit.verdict(database).faults == []


@pytest.mark.parametrize("step", [kit.shadow, kit.promote])
def test_the_process_that_asked_gives_no_traffic_before_the_answer(database: Database, step: Any) -> None:
    operation = asked(database)
    before = kit.places(database)
    with pytest.raises(ConflictError, match="waits for an approval"):
        step(database, operation)
    assert kit.places(database) == before
