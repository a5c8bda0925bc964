"""The ways of a promotion other than by stages: shadow only, and the replay of requests where no traffic can judge it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from registry import promotions, versions
from registry.promotions import STAGING
from tasks import captured, judgement, probe, promotion
from tasks.judgement import StreamCounts, Window
from tasks.promoting import Ended, Promoting

LEAST_REQUESTS = judgement.AGREEMENT_COPIES_LEAST
"""A replay of fewer requests decides nothing."""


def shadowed(work: Promoting) -> Ended:
    """End a promotion that was to see copies only: the version has passed staging, and nothing is promoted."""
    return work.end(
        "shadowed",
        f"{work.name} has passed the shadow",
        f"nothing was promoted; to go on: modelkeep promote {work.operation.model} {work.operation.version}",
    )


def no_shadow(work: Promoting, why: str) -> Ended:
    """End one that nobody could show copies to. Without copies there is no verdict."""
    return work.end("held", f"{work.name} is held", f"{why}: there are no requests to copy, so nothing was judged")


def replay(work: Promoting) -> None:
    """Run captured requests or golden inputs through both versions, one after the other, and judge the counts as a shadow's.

    Raises Ended("withdrawn") where the candidate fails, is slow or disagrees by the policy, Ended("held") where there is too little to
    judge by.
    """
    operation, policy = work.operation, work.policy
    if operation.progress.get("replayed"):
        return  # an earlier process of this run has passed it
    promotion.place_staging(work)
    with captured.folder(work.cache / "replays") as folder:
        job, where = _job(work, folder)
        work.tell(f"{work.name} and {operation.stable} get the same requests, one after the other: {where}")
        result = probe.run_probe(
            job, timeout_seconds=policy.validation_timeout_seconds, memory_mb=policy.validation_memory_mb
        )
    work.keeper.check()
    found = dict(result.replay or {})
    problem = result.problem or found.get("problem")
    if problem:
        # Only what the candidate did counts against it: the phase says who was under way.
        guilty = str(found.get("problem") or "").startswith("the candidate ") or (
            result.outcome == "crashed" and str(result.phase).endswith("the candidate")
        )
        outcome: promotions.Outcome = "withdrawn" if guilty else "held"
        raise work.end(outcome, f"{work.name} is {outcome}", f"the replay: {problem}", {"log_tail": result.log_tail})
    requests = int(found["requests"])
    if requests < LEAST_REQUESTS:
        raise work.end(
            "held",
            f"{work.name} is held",
            f"{requests} requests are too few to judge a replay by, at least {LEAST_REQUESTS} are needed: register it with more golden "
            "cases, capture live requests (capture.share), promote it by canary where there is traffic, or force it with --force --reason TEXT",
            {"replay": found},
        )
    verdict = judgement.judge_replay(
        window_of(found), policy, streams=_streams(found), agreement=_agreement(found, policy.agreement)
    )
    figures = {**verdict.as_dict(), "replay": found}
    if verdict.verdict == "withdraw":
        raise work.end("withdrawn", f"{work.name} is withdrawn", verdict.reason, figures)
    detail = f"{verdict.reason} {_in_words(found, where)}"
    promotions.note(
        work.database, operation, "replay", "replay passed", detail, figures,
        progress={"replayed": True}, placements=[(STAGING, "passed")],
    )  # fmt: skip
    work.tell(detail)


def window_of(found: dict[str, Any]) -> Window:
    """The counts of a replay as the judge wants them."""
    return Window("replay", 0.0, candidate=_side(found, "candidate"), stable=_side(found, "stable"))


def _side(found: dict[str, Any], who: str) -> dict[str, StreamCounts]:
    requests, counts = int(found["requests"]), found[who]
    sides = {"error": StreamCounts(requests, int(counts["errors"]))}
    if counts["slow"] is not None:
        sides["slow"] = StreamCounts(requests, int(counts["slow"]))
    return sides


def _streams(found: dict[str, Any]) -> tuple[str, ...]:
    return judgement.STREAMS if found["slow_threshold_seconds"] is not None else ("error",)


def _agreement(found: dict[str, Any], kind: str) -> StreamCounts:
    return StreamCounts(int(found["compared"]), int(found["disagreements"][kind]))


def _in_words(found: dict[str, Any], where: str) -> str:
    compared, agreed = (
        int(found["compared"]),
        {k: int(found["compared"]) - n for k, n in found["disagreements"].items()},
    )
    words = (
        ", ".join(f"{kind} {count / compared:.1%}" for kind, count in agreed.items()) if compared else "none compared"
    )
    gap = "" if found["slow_threshold_seconds"] is not None else " Slowness is not judged: too few answers for a p95."
    return f"Agreement of {compared} answers: {words}.{gap} The requests: {found['requests']} of {where}."


def _job(work: Promoting, folder: Path) -> tuple[probe.ProbeJob, str]:
    """What the probe is to do, and in words where its requests are from. `folder` takes the captured ones.

    Raises Ended("held") where there is nothing to replay.
    """
    operation, policy = work.operation, work.policy
    if operation.stable is None:
        raise ValueError("a replay needs a stable version to compare with")
    with work.database.read() as session:
        row = versions.get(session, operation.model, operation.version)
        base = versions.get(session, operation.model, operation.stable)
        golden = versions.golden_for(session, row, operation.environment)
        candidate = promotion.probe_model(row, work.artifacts, work.cache)
        stable = promotion.probe_model(base, work.artifacts, work.cache)
    gathered = None
    if policy.replay_inputs != "golden":
        gathered = captured.gather(
            work.database, operation.environment, operation.model, folder, newest=policy.replay_requests
        )
        work.keeper.check()
    job = probe.ProbeJob(
        candidate=candidate, stable=stable, replay=policy.replay_requests, slow_factor=policy.slow_factor
    )
    if gathered is not None and gathered.requests >= (LEAST_REQUESTS if policy.replay_inputs == "auto" else 1):
        words = f"{gathered.requests} requests captured by {', '.join(gathered.servers)}"
        missing = f" (without {'; '.join(gathered.problems)})" if gathered.problems else ""
        return replace(job, captured=folder), words + missing
    without = "" if gathered is None else _without(gathered)
    if golden is None or policy.replay_inputs == "captured":
        cases = "it has no golden cases" if golden is None else "the policy wants captured ones (replay_inputs)"
        raise work.end(
            "held",
            f"{work.name} is held",
            f"there is nothing to replay: {cases}{without}; register it with --golden, or have the servers capture live requests "
            "(capture.share)",
        )
    return replace(job, golden=work.artifacts.path(golden)), f"its golden inputs{without}"


def _without(gathered: captured.Gathered) -> str:
    """Why there are no captured requests to replay."""
    if gathered.requests:
        return f"; {gathered.requests} captured requests are fewer than the {LEAST_REQUESTS} that are needed"
    return f"; no captured requests: {'; '.join(gathered.problems) or 'no server is alive'}"
