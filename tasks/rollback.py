"""Go back to an earlier version, and check it where it counts: by an answer of every server. Works without Prefect."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from registry import orders, promotions, rollbacks, states
from registry.database import Database
from registry.errors import ConflictError, FencedError, UnavailableError
from registry.policy import PromotionPolicy
from registry.rollbacks import Aim, Seen
from registry.routes import Desired
from registry.store import ArtifactStore
from tasks import answering, lease, observation, outage, servers
from tasks.answering import Answer
from tasks.promoting import Ended, Promoting, Stint

FOLLOW_SECONDS = 30.0
DWELL_SECONDS = 10.0
"""How long each step of a gradual rollback lasts at most; a policy with shorter stages has shorter steps."""
_BEGIN_SECONDS = 60.0
_UNDO_SECONDS = 15.0
"""How long a registry is waited for where there is nothing to lose yet, and where what went wrong waits to be told."""


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
    seen: Seen | None = None,
    flow_run_id: str | None = None,
) -> dict[str, Any]:
    """Set the route back, in one transaction; a lease whose holder has died is ended first.

    With `seen` it can be repeated where no answer came. Raises LockedError, NotFoundError, RefusedError, ConflictError.
    """
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
            seen=seen,
            flow_run_id=flow_run_id,
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
    followed, behind, seconds, notes = sorted_answers(answers)
    return RollbackResult(
        model, environment, result["from"], target, result["generation"], followed, behind, result.get("withdrawn"),
        strategy=strategy, seconds=seconds, notes=notes,
    )  # fmt: skip


def begin_gradual(
    database: Database,
    aim: Aim,
    *,
    environment: str,
    model: str,
    policy: PromotionPolicy,
    ttl_seconds: float,
    reason: str,
    flow_run_id: str | None,
    tell: Callable[[str], None] = print,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> promotions.Operation:
    """Take the lease for a gradual rollback; a lease whose holder has died is ended first, and a lost answer is asked for again.

    Raises what registry.rollbacks.begin_gradual raises, and ConflictError where another version has become stable since the aim.
    """
    away = outage.Outage(tell=tell, patience_seconds=_BEGIN_SECONDS, sleep=sleep, monotonic=monotonic)

    def begin() -> promotions.Operation:
        return rollbacks.begin_gradual(
            database, environment=environment, model=model, to=aim.to, policy=policy, ttl_seconds=ttl_seconds,
            reason=reason, flow_run_id=flow_run_id,
        )  # fmt: skip

    while True:
        try:
            operation = lease.taken(database, environment, model, begin, sleep=sleep, monotonic=monotonic)
            break
        except UnavailableError as error:
            away.met(error)
    if operation.stable != aim.seen.stable:
        why = f"{operation.stable} has become the stable version since this rollback from {aim.seen.stable} was decided"
        promotions.end(database, operation, "withdrawn", title="Not begun", detail=why)
        raise ConflictError(
            f"{model}: {why}; nothing was moved: look at it (modelkeep status), then ask for a new rollback"
        )
    return operation


def carry(work: Promoting, steps: Callable[[Promoting], dict[str, Any]]) -> dict[str, Any]:
    """Do the steps of a gradual rollback, and bring it to an end that is on record, whatever happens on the way.

    A registry that goes away is waited for. What was done though nobody heard so is done. Any error undoes it: the stable version
    has all traffic again, the record says why, the lease is free. Where even that cannot be written the lease runs out, to the same
    effect. Raises Ended where it was stopped, FencedError where another process carries it on, and the error that ended it.
    """
    from tasks import promotion  # late: an emergency, which has no steps, shall not wait for what it imports

    operation = work.operation
    try:
        found = outage.steadfast(work, steps)
        if found is None:
            raise FencedError(
                f"promotion {operation.id} waits for an approval, which a rollback does not: nothing was written"
            )
        return found
    except Ended:
        raise
    except FencedError:
        away = outage.Outage(tell=work.tell, sleep=work.sleep, monotonic=work.monotonic)
        done, ended = outage.answered(
            work.database,
            lambda session: (rollbacks.finished(session, operation.id), promotion.ended_in(session, operation.id)),
            away,
        )
        if done is not None:
            return done
        if ended is not None:
            raise ended from None
        raise
    except BaseException as error:
        _undo(work, error)
        raise


def _undo(work: Promoting, error: BaseException) -> None:
    why = f"{type(error).__name__}: {error}" if str(error) else f"interrupted ({type(error).__name__})"
    away = outage.Outage(tell=work.tell, patience_seconds=_UNDO_SECONDS, sleep=work.sleep, monotonic=work.monotonic)
    while True:
        try:
            work.end("failed", f"The rollback to {work.operation.version} failed", why)
            return
        except FencedError:
            return  # it has ended: by another, or by us before an answer that was lost
        except UnavailableError as unavailable:
            try:
                away.met(unavailable)
            except UnavailableError:
                work.tell(
                    f"that the rollback ended ({why}) could not be written: {unavailable}; its lease runs out instead"
                )
                return
        except Exception as other:
            work.tell(
                f"that the rollback ended ({why}) could not be written: {type(other).__name__}: {other}; its lease runs out instead"
            )
            return


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
            if (
                work.paused is None
                and (stint.judged >= dwell or stint.advanced is not None)
                and _noted(work, stint, stage)
            ):
                break
            work.rest()
        work.tell(f"{operation.model} {operation.version} answers {share:.0%} of the requests")
    detail = f"all traffic is back on {operation.version}"
    return rollbacks.finish_gradual(work.database, operation, reason=reason or "gradual rollback", detail=detail)


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
        sleep=work.wait, monotonic=work.monotonic,
    )  # fmt: skip
    work.keeper.check()
    errors = following.errors_of(operation.model, operation.version)
    if errors or following.behind:
        why = "; ".join(errors) or f"not followed within {FOLLOW_SECONDS:g} s: {', '.join(following.behind)}"
        raise work.end("withdrawn", f"The rollback to {operation.version} is stopped", f"at {share:.0%}: {why}")


def _noted(work: Promoting, stint: Stint, stage: str) -> bool:
    """Put on record that a person passed the step. False where that was called off meanwhile, by a pause."""
    if (given := stint.advanced) is None:
        return True
    detail = f"Passed at the word of {given}."
    try:
        promotions.note(
            work.database, work.operation, "rollback", f"{stage} passed", detail, taken=given.number
        )  # fmt: skip
    except orders.OvertakenError:
        return False
    return True


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


def sorted_answers(
    answers: Mapping[str, Answer],
) -> tuple[tuple[str, ...], dict[str, str], dict[str, float], dict[str, str]]:
    """(who follows, who does not and why, seconds, notes)."""
    followed = tuple(name for name, answer in answers.items() if answer.follows)
    behind = {name: answer.why for name, answer in answers.items() if not answer.follows}
    seconds = {name: answer.seconds for name, answer in answers.items() if answer.seconds is not None}
    notes = {name: answer.why for name, answer in answers.items() if answer.follows and answer.why}
    return followed, behind, seconds, notes


__all__ = ["Ended", "RollbackResult", "begin_gradual", "carry", "change", "follow", "gradual", "sorted_answers"]
