"""The steps of a promotion up to all of the traffic: validate, shadow, canary, promote. flows.promote puts them in order; then tasks.soak."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from sqlalchemy.orm import Session

from registry import orders, promotions, states, store, versions
from registry.database import Database
from registry.policy import PromotionPolicy
from registry.promotions import STAGING
from registry.routes import Desired
from registry.schema import Promotion, Version
from tasks import judgement, observation, probe, servers, validation
from tasks.facts import Budget, Subject
from tasks.judgement import Judgement, Window
from tasks.promoting import Ended, Promoting, Stint
from tasks.slices import Sliced

FOLLOW_SECONDS = 60.0


def validate(work: Promoting) -> validation.ValidationReport:
    """Load the candidate in the probe beside the stable version, compare, and put the figures on record.

    Raises Ended("rejected") where a check fails and nobody forced the promotion.
    """
    operation, database, started = work.operation, work.database, work.monotonic()
    if operation.progress.get("validated") is False:
        raise work.end(
            "rejected",
            f"{work.name} is rejected",
            f"it has failed the validation: see modelkeep promotions show {operation.id}",
        )
    report = measure(
        database, work.artifacts, work.cache, model=operation.model, version=operation.version, stable=operation.stable,
        environment=operation.environment, policy=work.policy, budget=work.budget, together=operation.strategy != "replay",
    )  # fmt: skip
    work.keeper.check()
    passed = report.passed or operation.forced is not None
    title = f"{work.name} " + ("passed" if report.passed else "failed") + " the validation"
    if operation.forced is not None and not report.passed:
        title += f", forced on: {operation.forced}"
    promotions.note_validation(
        database,
        operation,
        passed=passed,
        report=report.as_dict(),
        signature=report.candidate.signature if report.candidate else None,
        rows_independent=report.rows_independent,
        title=title[:255],
        detail=report.summary,
        seconds=round(work.monotonic() - started, 3),
    )
    work.tell(f"{title}: {report.summary}")
    if not passed:
        raise work.end("rejected", f"{work.name} is rejected", report.summary, report.as_dict())
    return report


def measure(
    database: Database,
    artifacts: store.ArtifactStore,
    cache: Path,
    *,
    model: str,
    version: str,
    stable: str | None,
    environment: str,
    policy: PromotionPolicy,
    budget: Budget | None = None,
    together: bool = True,
) -> validation.ValidationReport:
    """Run the probe over a version (beside the stable one, where there is one) and decide by the policy. Writes nothing.

    `budget` is what it must fit, `together` with the stable version or alone.
    """
    with database.read() as session:
        row = versions.get(session, model, version)
        golden = versions.golden_for(session, row, environment)
        base = versions.get(session, model, stable) if stable is not None else None
        subject = Subject(dict(row.tags), budget, together)
        candidate = probe_model(row, artifacts, cache)
        compared = probe_model(base, artifacts, cache) if base is not None else None
    job = probe.ProbeJob(
        candidate=candidate,
        stable=compared,
        golden=artifacts.path(golden) if golden is not None else None,
        metric=policy.metric,
        tolerances=policy.tolerances,
    )
    result = probe.run_probe(
        job, timeout_seconds=policy.validation_timeout_seconds, memory_mb=policy.validation_memory_mb
    )
    return validation.decide(result, policy, has_stable=base is not None, subject=subject)


def without_comparison(work: Promoting, why: str) -> Ended:
    """Give the version all of the traffic at once, because there is nothing to compare it with or nobody to ask."""
    if not work.operation.progress.get("promoted"):  # not the second try after the end got no answer
        _promote(work, why, watch=False)
    return work.end("promoted", f"{work.name} takes all of the traffic", why)


def baseline(work: Promoting) -> None:
    """Measure the stable version alone under its live traffic, and freeze its p95.

    Alone, because a candidate that is loaded and busy beside it would make it slower and so hide its own slowness.
    """
    operation, policy = work.operation, work.policy
    if "slow_threshold_seconds" in operation.progress:
        return  # an earlier process of this run has passed it
    if not observation.opened(operation):
        _route(
            work,
            Desired(stable=operation.stable, watch=True),
            step="baseline",
            kind="baseline",
            title=f"{operation.model} {operation.stable} is measured alone",
            detail=f"for {policy.baseline_seconds:g} s, to freeze its p95",
            stage="baseline",
            weight=0.0,
        )
    stint, looks = Stint(work.monotonic), list[list[dict[str, Any]]]()
    while True:
        work.hear(stint)
        over = work.paused is None and (stint.judged >= policy.baseline_seconds or stint.advanced is not None)
        if over and _freeze(work, stint, looks):
            return
        if stint.total >= (len(looks) + 1) * policy.baseline_seconds / observation.BASELINE_SLICES:
            looks.append(observation.baseline_rows(work.database, work.operation))
        work.rest()


def _freeze(work: Promoting, stint: Stint, looks: list[list[dict[str, Any]]]) -> bool:
    """Put the baseline on record. False where the word to end it was called off meanwhile, by a pause."""
    policy = work.policy
    work.sleep(2 * work.poll_seconds)  # the servers' last reports
    rows = observation.baseline_rows(work.database, work.operation)
    requests = sum(int(row["requests"]) for row in rows)
    p95 = observation.calm_percentile([*looks, rows], 0.95) if requests >= observation.P95_LEAST_REQUESTS else None
    threshold = None if p95 is None else p95 * policy.slow_factor
    detail = (
        f"{requests} requests; its p95 is frozen at {p95 * 1000:.2f} ms, slow is what takes more than {threshold * 1000:.2f} ms"
        if p95 is not None and threshold is not None
        else f"{requests} requests are too few to freeze a p95 (at least {observation.P95_LEAST_REQUESTS}), so slowness is not judged"
    )
    try:
        promotions.note(
            work.database,
            work.operation,
            "baseline",
            "baseline measured",
            detail,
            {"requests": requests, "stable_p95_seconds": p95, "slow_threshold_seconds": threshold},
            progress={"slow_threshold_seconds": threshold},
            taken=stint.advanced.number if stint.advanced else None,
        )
    except orders.OvertakenError:
        return False
    work.tell(detail)
    return True


def shadow(work: Promoting) -> None:
    """Staging on one box: the candidate sees copies of live requests at weight 0.

    Raises Ended("withdrawn") where it fails on copies and the policy says that this counts, or where no server can load it.
    """
    operation, policy = work.operation, work.policy
    if observation.opened(operation)[-1:] not in (["baseline"], ["shadow"]):
        return  # an earlier process of this run has passed it
    if "shadow" not in observation.opened(operation):
        place_staging(work)
        _route(
            work,
            Desired(
                stable=operation.stable,
                candidate=operation.version,
                shadow=True,
                shadow_share=policy.shadow_share,
                watch=True,
                slow_threshold_seconds=operation.progress.get("slow_threshold_seconds"),
            ),
            step="shadow",
            kind="shadow",
            title=f"{work.name} sees copies of the live requests",
            detail=f"for {policy.shadow_seconds:g} s; nobody gets its answers",
            stage="shadow",
            weight=0.0,
        )
    stint = Stint(work.monotonic)
    while True:
        work.hear(stint)
        verdict = judgement.judge_shadow(
            [observation.shadow_window(work.database, work.operation)],
            policy,
            stage_seconds=stint.judged,
            streams=observation.judged_streams(work.operation),
            agreement=observation.agreement(work.database, work.operation, policy.agreement),
        )
        if verdict.verdict == "withdraw":
            raise _withdrawn(work, verdict)
        if _passed(work, stint, verdict) and _shadow_passed(work, stint, verdict):
            return
        work.rest()


def _shadow_passed(work: Promoting, stint: Stint, verdict: Judgement) -> bool:
    agreed = {kind: observation.agreement(work.database, work.operation, kind) for kind in observation.AGREEMENTS}
    seen, disagreed = agreed["top"].requests, agreed["top"].bad
    detail = verdict.reason + (f" Same top answer in {1 - disagreed / seen:.1%} of {seen} copies." if seen else "")
    figures = {
        **verdict.as_dict(),
        "copies": seen,
        "disagreements": disagreed,
        "agreement": {kind: 1 - found.bad / found.requests for kind, found in agreed.items() if found.requests},
    }
    return _note_passed(work, stint, "shadow", "shadow passed", detail, figures)


def canary(work: Promoting) -> None:
    """Give the candidate its shares of the traffic, stage by stage, judged at each. Raises Ended("withdrawn" | "held")."""
    stages = work.policy.stages if work.operation.strategy == "canary" else [1.0]
    for share in stages:
        _stage(work, share)


def promote(work: Promoting) -> None:
    """Make the candidate the stable version, and go on counting for the soak."""
    if work.operation.progress.get("promoted"):
        return
    passed = "the replay" if work.operation.strategy == "replay" else f"every stage up to {work.policy.stages[-1]:.0%}"
    _promote(work, f"{passed} is passed", watch=work.policy.soak_seconds > 0)


def promoted_by(database: Database, flow_run_id: str | None) -> tuple[str, Ended] | None:
    """The promotion that a flow run has brought to its good end already: it was killed before it could say so.

    Any other end may be tried again by the same run.
    """
    with database.read() as session:
        row = promotions.of_run(session, flow_run_id) if flow_run_id else None
        if row is None or row.state not in ("promoted", "shadowed"):
            return None
        return row.id, Ended(
            cast(promotions.Outcome, row.state), f"{row.reason}; this run had done it before it was started again"
        )


def ended_meanwhile(database: Database, identity: str) -> Ended | None:
    """How a promotion ended that this process no longer holds; None where it is still under way in other hands."""
    with database.read() as session:
        return ended_in(session, identity)


def ended_in(session: Session, identity: str) -> Ended | None:
    """The same, in a session."""
    row = session.get(Promotion, identity)
    if row is None or row.state in promotions.ACTIVE:  # gone: the registry went back in time
        return None
    return Ended(
        cast(promotions.Outcome, row.state), f"{row.reason}; so it is on record, and this process does nothing more"
    )


def failed(work: Promoting, error: BaseException) -> Ended:
    """Close a promotion that an error ended: the candidate is taken out, the record says what happened.

    In the soak the version is stable, and an error of this process says nothing against it: the watch is left to the next carrier.
    """
    why = f"{type(error).__name__}: {error}" if str(error) else f"interrupted ({type(error).__name__})"
    if work.operation.progress.get("promoted"):
        promotions.let_go(work.database, work.operation, why)
        return Ended("failed", f"{why}; the soak of {work.name} goes on without this process")
    return work.end("failed", f"the promotion of {work.name} failed", why)


def probe_model(row: Version, artifacts: store.ArtifactStore, cache: Path) -> probe.ProbeModel:
    """The files of a version, at hand for the probe. Raises StorageError."""
    path = store.materialise(artifacts, versions.stored_files(row), cache)
    return probe.ProbeModel(path=path, format=row.format, signature=versions.signature_of(row))


def place_staging(work: Promoting) -> None:
    """On one box, staging is having been loaded by the probe, and then the shadow."""
    operation = work.operation
    with work.database.read() as session:
        place = states.placement(session, operation.model, operation.version, STAGING)
    if place is None or place.status != "testing":
        promotions.note(
            work.database,
            operation,
            "stage",
            f"{work.name} is in staging",
            "loaded by the probe; copies of live requests are next",
            placements=[(STAGING, "testing")],
        )


def _route(
    work: Promoting,
    desired: Desired,
    *,
    step: str,
    kind: str,
    title: str,
    detail: str,
    stage: str,
    weight: float,
    moves: list[tuple[str, states.PlacementStatus]] | None = None,
) -> None:
    """Set the route, open the window of its generation, and wait until the servers follow."""
    operation = work.operation
    epoch, generation = promotions.stage(
        work.database,
        operation,
        desired,
        step=step,
        kind=kind,
        title=title,
        detail=detail,
        placements=moves or [],
        window={"stage": stage, "weight": weight},
    )
    work.tell(f"{title} ({detail})")
    _followed(work, epoch, generation)


def _followed(work: Promoting, epoch: str, generation: int) -> None:
    operation = work.operation
    following = servers.follow(
        work.database,
        operation.environment,
        epoch=epoch,
        generation=generation,
        timeout_seconds=FOLLOW_SECONDS,
        sleep=work.wait,
        monotonic=work.monotonic,
    )
    work.keeper.check()
    if errors := following.errors_of(operation.model, operation.version):
        raise work.end("withdrawn", f"{work.name} is withdrawn", "a server cannot serve it: " + "; ".join(errors))
    if following.behind and not following.reached:
        raise work.end(
            "held",
            f"{work.name} is held",
            f"no server has followed to generation {generation} within {FOLLOW_SECONDS:g} s: {', '.join(following.behind)}",
        )


def _stage(work: Promoting, share: float) -> None:
    operation, policy = work.operation, work.policy
    stage = f"canary at {share:.0%}"
    opened = observation.opened(operation)
    if stage in opened[:-1]:
        return  # an earlier process of this run has passed it
    if stage not in opened:
        production: list[tuple[str, states.PlacementStatus]] = [
            (STAGING, "passed"),
            (operation.environment, "candidate"),
        ]
        _route(
            work,
            Desired(
                stable=operation.stable,
                candidate=operation.version,
                weight=share,
                watch=True,
                slow_threshold_seconds=operation.progress.get("slow_threshold_seconds"),
            ),
            step="canary",
            kind="canary",
            title=f"{work.name} answers {share:.0%} of the requests",
            detail=f"at least {policy.minimum_requests} of them and {policy.dwell_seconds:g} s",
            stage=stage,
            weight=share,
            moves=production if not any(name.startswith("canary") for name in opened) else [],
        )
    if share == 1:
        work.has_all_traffic()
    stint = Stint(work.monotonic)
    earlier: list[tuple[float, Window]] = []
    sliced = Sliced()
    while True:
        work.hear(stint)
        windows = observation.canary_windows(work.database, work.operation)
        windows[-1] = sliced.look(windows[-1], stint.total)
        frozen = observation.frozen_counts(work.database, work.operation, windows)
        verdict = judgement.judge(
            windows,
            frozen,
            policy,
            stage_seconds=stint.judged,
            recent=observation.recent(earlier, windows[-1], stint.total),
            streams=observation.judged_streams(work.operation, windows, frozen),
            not_judged=observation.not_judged(work.operation, windows, frozen),
        )
        if verdict.verdict == "withdraw":
            raise _withdrawn(work, verdict)
        passed = _passed(work, stint, verdict)
        if passed and _note_passed(work, stint, "canary", f"{stage} passed", verdict.reason, verdict.as_dict()):
            return
        if work.paused is None and stint.judged >= policy.deadline_seconds:
            raise work.end(
                "held",
                f"{work.name} is held at {share:.0%}",
                f"no decision within {policy.deadline_seconds:g} s: {verdict.reason} Promote it again when there is traffic, "
                "replay the golden cases instead (--strategy replay), or force it with --force --reason TEXT.",
                verdict.as_dict(),
            )
        work.rest()


def _passed(work: Promoting, stint: Stint, verdict: Judgement) -> bool:
    """By the figures, or by the word of a person; not while it is paused."""
    return work.paused is None and (verdict.verdict == "advance" or stint.advanced is not None)


def _note_passed(work: Promoting, stint: Stint, step: str, title: str, detail: str, figures: dict[str, Any]) -> bool:
    """False where the word that it passed by was called off meanwhile, by a pause."""
    given = stint.advanced
    if given is not None:
        detail = f"Passed at the word of {given}. {detail}"
    try:
        promotions.note(
            work.database, work.operation, step, title, detail, figures, taken=given.number if given else None
        )  # fmt: skip
    except orders.OvertakenError:
        return False
    work.tell(detail)
    return True


def _promote(work: Promoting, why: str, *, watch: bool) -> None:
    operation = work.operation
    title = f"{work.name} becomes the stable version"
    generation = promotions.promote(
        work.database, operation, title=title, detail=why, watch=watch, window={"stage": "soak", "weight": 1.0}
    )
    work.tell(f"{title}: {why}")
    _followed(work, operation.progress["soak"]["epoch"], generation)
    work.has_all_traffic()


def _withdrawn(work: Promoting, verdict: Judgement) -> Ended:
    return work.end("withdrawn", f"{work.name} is withdrawn", verdict.reason, verdict.as_dict())
