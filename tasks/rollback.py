"""Go back to an earlier version, and check it where it counts: by an answer of every server. Works without Prefect."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from registry import promotions, rollbacks, states
from registry.database import Database
from registry.routes import Desired
from registry.store import ArtifactStore
from tasks import answering, lease, observation, servers
from tasks.answering import Answer
from tasks.promoting import Ended, Promoting, Stint

FOLLOW_SECONDS = 30.0
DWELL_SECONDS = 10.0
"""How long each step of a gradual rollback lasts at most; a policy with shorter stages has shorter steps."""
_ASK_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class RollbackResult:
    """What a rollback came to. `followed` answer by the target, `behind` do not, with why.

    `seconds` are from the beginning to each server's first answer by the target; `notes` what was odd about it. `registry` is why it
    was done without one; the servers in `held` then hold the target by themselves.
    """

    model: str
    environment: str
    from_version: str | None
    to_version: str
    generation: int | None
    followed: tuple[str, ...]
    behind: dict[str, str]
    withdrawn: str | None = None
    strategy: str = "instant"
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    registry: str | None = None
    held: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return not self.behind

    def summary(self) -> str:
        text = f"{self.model} is back from {self.from_version} to {self.to_version} in {self.environment}"
        if self.from_version == self.to_version:
            text = f"{self.model} stays on {self.to_version} in {self.environment}"
        if self.registry is not None:
            text += ", without the registry"
        if self.withdrawn is not None:
            text += f", the promotion of {self.withdrawn} is withdrawn"
        if not self.followed and not self.behind:
            return f"{text}; no server answers now, it takes effect when one comes"
        text += f"; {len(self.followed)} server(s) answer by it"
        if self.seconds:
            text += f", the last after {max(self.seconds.values()):.2f} s"
        text += "".join(f"; {replica}: {note}" for replica, note in self.notes.items())
        return text + "".join(f"; {replica} does not: {why}" for replica, why in self.behind.items())

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "environment": self.environment,
            "strategy": self.strategy,
            "from": self.from_version,
            "to": self.to_version,
            "withdrawn": self.withdrawn,
            "generation": self.generation,
            "followed": list(self.followed),
            "behind": self.behind,
            "seconds": self.seconds,
            "notes": self.notes,
            "registry": self.registry,
            "held": list(self.held),
        }

    def as_markdown(self) -> str:
        rows = [
            f"| {replica} | answers by {self.to_version} | {self.seconds.get(replica, '')} | {self.notes.get(replica, '')} |"
            for replica in self.followed
        ]
        rows += [f"| {replica} | does not | | {why} |" for replica, why in self.behind.items()]
        head = ["| server | | first answer after (s) | |", "| --- | --- | --- | --- |"]
        table = "\n".join([*head, *rows]) if rows else "No server answers now."
        return f"# Rollback of {self.model}\n\n{self.summary()}.\n\n{table}\n"


def change(
    database: Database,
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    ttl_seconds: float,
    emergency: bool = False,
    flow_run_id: str | None = None,
    actor: str | None = None,
) -> dict[str, Any]:
    """Set the route back, in one transaction; a lease whose holder has died is ended first. Raises LockedError, NotFoundError, RefusedError."""
    return lease.taken(
        database,
        environment,
        model,
        lambda: rollbacks.roll_back(
            database,
            environment=environment,
            model=model,
            to=to,
            reason=reason,
            ttl_seconds=ttl_seconds,
            emergency=emergency,
            flow_run_id=flow_run_id,
            actor=actor,
        ),
    )


def follow(
    database: Database,
    result: dict[str, Any],
    *,
    artifacts: ArtifactStore | None = None,
    strategy: str = "instant",
    began: float | None = None,
    timeout_seconds: float = FOLLOW_SECONDS,
) -> RollbackResult:
    """Ask every living server for an inference until it answers by the target: who does has followed.

    `began` is `time.monotonic()` of when the rollback was asked for. With `artifacts` the input is the version's first golden case,
    else zeros.
    """
    began = time.monotonic() if began is None else began
    environment, model, target = result["environment"], result["model"], result["to"]
    living = servers.alive(database, environment)
    shown = servers.access(database)
    tensors = answering.golden_row(database, artifacts, model, target) if artifacts is not None else None
    with ThreadPoolExecutor(1, thread_name_prefix="nudge") as pool:
        pool.submit(servers.nudge, list(living.values()), access=shown)
        answers = answering.first_answers(
            living, model, target, tensors=tensors, access=shown, since=began,
            deadline=time.monotonic() + timeout_seconds,
        )  # fmt: skip
    followed, behind, seconds, notes = _sorted(answers)
    return RollbackResult(
        model, environment, result["from"], target, result["generation"], followed, behind, result.get("withdrawn"),
        strategy=strategy, seconds=seconds, notes=notes,
    )  # fmt: skip


def gradual(work: Promoting, *, reason: str, dwell_seconds: float | None = None) -> dict[str, Any]:
    """Move the traffic back share by share, both versions serving. Each step waits for the servers; errors of the target stop it.

    Raises Ended where it was stopped: the stable version then has all traffic again, and the record says why. Raises FencedError
    once another operation has taken the lease.
    """
    operation, policy = work.operation, work.policy
    dwell = min(policy.dwell_seconds, DWELL_SECONDS) if dwell_seconds is None else dwell_seconds
    for share in [share for share in policy.stages if share < 1]:
        stage = f"back at {share:.0%}"
        opened = observation.opened(operation)
        if stage in opened[:-1]:
            continue  # an earlier process of this run has passed it
        if stage not in opened:
            _step(work, stage, share, first=not opened, reason=reason)
        stint = Stint(work.monotonic)
        while True:
            work.hear(stint)
            found = _failing(work, stage)
            if found:
                raise work.end("withdrawn", f"The rollback to {operation.version} is stopped", found)
            if work.paused is None and (stint.judged >= dwell or stint.advanced is not None):
                break
            work.rest()
        if (given := stint.advanced) is not None:
            promotions.note(
                work.database, operation, "rollback", f"{stage} passed", f"Passed at the word of {given}.", taken=given.number
            )  # fmt: skip
        work.tell(f"{operation.model} {operation.version} answers {share:.0%} of the requests")
    detail = f"all traffic is back on {operation.version}"
    return rollbacks.finish_gradual(work.database, operation, reason=reason or "gradual rollback", detail=detail)


def at_servers(
    addresses: Sequence[str],
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    claimed: str | None,
    why: str,
    access: servers.Access = servers.NOBODY,
    began: float,
    timeout_seconds: float = FOLLOW_SECONDS,
) -> RollbackResult:
    """An emergency at each server's own API, all at a time once the version is known: what is left when the registry does not answer.

    `why` it does not.
    """
    asked: dict[str, dict[str, Any] | str] = {}
    body = {"model": model, "to": to, "strategy": "emergency", "reason": reason, "claimed": claimed}
    rest = list(addresses)
    # Servers may reach the registry where this process does not, and each would go one further back: the first that answers
    # says to which version, for all.
    while body["to"] is None and rest:
        asked[rest[0]] = found = _ask(rest[0], body, access)
        if isinstance(found, dict):
            body = {**body, "to": str(found["to"])}
        del rest[0]
    with ThreadPoolExecutor(max(1, len(rest)), thread_name_prefix="rollback") as pool:
        futures = {address: pool.submit(_ask, address, body, access) for address in rest}
        for address, future in futures.items():
            asked[address] = future.result()
    behind = {address: found for address, found in asked.items() if isinstance(found, str)}
    done = {address: found for address, found in asked.items() if isinstance(found, dict)}
    answers: dict[str, Answer] = {}
    deadline = time.monotonic() + timeout_seconds
    with ThreadPoolExecutor(max(1, len(done)), thread_name_prefix="answer") as pool:
        waiting = {
            address: pool.submit(
                answering.first_answer, address, model, found["to"], tensors=None, access=access, since=began,
                deadline=deadline,
            )
            for address, found in done.items()
        }  # fmt: skip
        answers = {address: future.result() for address, future in waiting.items()}
    followed, late, seconds, notes = _sorted(answers)
    targets = sorted({str(found["to"]) for found in done.values()})
    if len(targets) > 1:
        notes = {**notes, **{address: f"went back to {found['to']}" for address, found in done.items()}}
    for address, found in done.items():
        if found.get("not_kept"):
            notes[address] = f"a restart of this server would forget it: {found['not_kept']}"
    first = next(iter(done.values()), {})
    return RollbackResult(
        model,
        environment,
        first.get("from"),
        targets[0] if targets else str(to),
        None,
        followed,
        {**behind, **late},
        first.get("withdrawn"),
        strategy="emergency",
        seconds=seconds,
        notes=notes,
        registry=why,
        held=tuple(address for address, found in done.items() if found["by"] == "hold"),
    )


def release_at(
    addresses: Sequence[str], *, model: str, reason: str, access: servers.Access = servers.NOBODY
) -> dict[str, str]:
    """Let go of the holds of a model by hand: {address: what came of it}."""
    found = {}
    for address in addresses:
        try:
            answer = httpx.delete(
                f"{address}/api/v2/rollback/{model}", params={"reason": reason}, headers=access.headers(address),
                timeout=_ASK_SECONDS,
            )  # fmt: skip
            found[address] = "released" if answer.status_code == 200 else f"{answer.status_code}: {_text(answer)}"
        except httpx.HTTPError as error:
            found[address] = f"does not answer: {error}"
    return found


def _ask(address: str, body: Mapping[str, Any], access: servers.Access) -> dict[str, Any] | str:
    try:
        answer = httpx.post(
            f"{address}/api/v2/rollback", json=body, headers=access.headers(address), timeout=_ASK_SECONDS
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"does not answer: {error}"
    if answer.status_code != 200:
        return f"refused ({answer.status_code}): {_text(answer)}"
    return dict(answer.json())


def _text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


def _step(work: Promoting, stage: str, share: float, *, first: bool, reason: str) -> None:
    operation = work.operation
    moves: list[tuple[str, states.PlacementStatus]] = [(operation.environment, "candidate")] if first else []
    epoch, generation = promotions.stage(
        work.database,
        operation,
        Desired(stable=operation.stable, candidate=operation.version, weight=share, watch=True),
        step="rollback",
        kind="canary",
        title=f"{share:.0%} of the requests go back to {operation.version}",
        detail=reason,
        placements=moves,
        window={"stage": stage, "weight": share},
    )
    following = servers.follow(
        work.database, operation.environment, epoch=epoch, generation=generation, timeout_seconds=FOLLOW_SECONDS,
        sleep=work.sleep, monotonic=work.monotonic,
    )  # fmt: skip
    work.keeper.check()
    errors = following.errors_of(operation.model, operation.version)
    if errors or following.behind:
        why = "; ".join(errors) or f"not followed within {FOLLOW_SECONDS:g} s: {', '.join(following.behind)}"
        raise work.end("withdrawn", f"The rollback to {operation.version} is stopped", f"at {share:.0%}: {why}")


def _failing(work: Promoting, stage: str) -> str | None:
    """Why the target is no better: in this step it fails at the share that stops a canary at once, and the other does not."""
    operation, policy = work.operation, work.policy
    counts = observation.counts(work.database, operation, observation.window_of(operation, stage))
    back, there = (
        observation.live(counts.get(version or "", []))["error"] for version in (operation.version, operation.stable)
    )
    if back.requests < policy.sudden_requests or back.bad < policy.sudden_share * back.requests:
        return None
    if there.requests and there.bad / there.requests >= back.bad / back.requests / 2:
        return None  # both fail: then it is not the version, and to stop would help nobody
    return (
        f"{stage}: {back.bad} of {back.requests} requests failed on {operation.version}, {there.bad} of {there.requests} on "
        f"{operation.stable}"
    )


def _sorted(
    answers: Mapping[str, Answer],
) -> tuple[tuple[str, ...], dict[str, str], dict[str, float], dict[str, str]]:
    """(who follows, who does not and why, seconds, notes)."""
    followed = tuple(name for name, answer in answers.items() if answer.follows)
    behind = {name: answer.why for name, answer in answers.items() if not answer.follows}
    seconds = {name: answer.seconds for name, answer in answers.items() if answer.seconds is not None}
    notes = {name: answer.why for name, answer in answers.items() if answer.follows and answer.why}
    return followed, behind, seconds, notes


__all__ = ["Ended", "RollbackResult", "at_servers", "change", "follow", "gradual", "release_at"]
