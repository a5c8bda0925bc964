"""The steps of a promotion: validate, shadow, canary, promote, soak. Plain functions; flows.promote puts them in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry import promotions, replicas, states, store, versions
from registry.database import Database
from registry.policy import PromotionPolicy
from registry.promotions import STAGING, Operation
from registry.routes import Desired
from registry.schema import Version
from tasks import judgement, probe, servers, validation
from tasks.judgement import Judgement, StreamCounts, Window
from tasks.lease import Keeper

FOLLOW_SECONDS = 60.0
_P95_LEAST_REQUESTS = 50
_SLICE_LEAST_REQUESTS = 20
_BASELINE_SLICES = 5


class Ended(Exception):
    """The promotion is over and on record. `outcome` is what registry.promotions knows: promoted, rejected, withdrawn, held."""

    def __init__(self, outcome: promotions.Outcome, reason: str) -> None:
        super().__init__(reason)
        self.outcome, self.reason = outcome, reason


class Promoting:
    """What the steps need of the world: the registry, the artifacts, a clock, and where the progress is told."""

    def __init__(
        self,
        database: Database,
        artifacts: store.ArtifactStore,
        cache: Path,
        operation: Operation,
        keeper: Keeper,
        *,
        poll_seconds: float = 1.0,
        tell: Callable[[str], None] = print,
        sleep: Callable[[float], None] = time.sleep,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database, self.artifacts, self.cache = database, artifacts, cache
        self.operation, self.keeper = operation, keeper
        self.poll_seconds, self.tell, self.sleep, self.monotonic = poll_seconds, tell, sleep, monotonic

    @property
    def policy(self) -> PromotionPolicy:
        return self.operation.policy

    @property
    def name(self) -> str:
        return f"{self.operation.model} {self.operation.version}"

    def end(self, outcome: promotions.Outcome, title: str, detail: str, figures: dict[str, Any] | None = None) -> Ended:
        promotions.end(self.database, self.operation, outcome, title=title, detail=detail, figures=figures)
        self.tell(f"{title}: {detail}")
        return Ended(outcome, f"{title}: {detail}")


def validate(work: Promoting) -> validation.ValidationReport:
    """Load the candidate in the probe beside the stable version, compare, and put the figures on record.

    Raises Ended("rejected") where a check fails and nobody forced the promotion.
    """
    operation, database = work.operation, work.database
    report = measure(
        database, work.artifacts, work.cache, model=operation.model, version=operation.version, stable=operation.stable,
        environment=operation.environment, policy=work.policy,
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
) -> validation.ValidationReport:
    """Run the probe over a version (beside the stable one, where there is one) and decide by the policy. Writes nothing."""
    with database.read() as session:
        row = versions.get(session, model, version)
        golden = versions.golden_for(session, row, environment)
        base = versions.get(session, model, stable) if stable is not None else None
        candidate = _subject(row, artifacts, cache)
        compared = _subject(base, artifacts, cache) if base is not None else None
    job = probe.ProbeJob(
        candidate=candidate,
        stable=compared,
        golden=artifacts.path(golden) if golden is not None else None,
    )
    result = probe.run_probe(
        job, timeout_seconds=policy.validation_timeout_seconds, memory_mb=policy.validation_memory_mb
    )
    return validation.decide(result, policy, has_stable=base is not None)


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
    if not _opened(operation):
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
    started, looks = work.monotonic(), list[list[dict[str, Any]]]()
    while (elapsed := work.monotonic() - started) < policy.baseline_seconds:
        _pause(work)
        if elapsed >= (len(looks) + 1) * policy.baseline_seconds / _BASELINE_SLICES:
            looks.append(_baseline_rows(work))
    work.sleep(2 * work.poll_seconds)  # the servers' last reports
    rows = _baseline_rows(work)
    requests = sum(int(row["requests"]) for row in rows)
    p95 = calm_percentile([*looks, rows], 0.95) if requests >= _P95_LEAST_REQUESTS else None
    threshold = None if p95 is None else p95 * policy.slow_factor
    detail = (
        f"{requests} requests; its p95 is frozen at {p95 * 1000:.2f} ms, slow is what takes more than {threshold * 1000:.2f} ms"
        if p95 is not None and threshold is not None
        else f"{requests} requests are too few to freeze a p95 (at least {_P95_LEAST_REQUESTS}), so slowness is not judged"
    )
    promotions.note(
        work.database,
        operation,
        "baseline",
        "baseline measured",
        detail,
        {"requests": requests, "stable_p95_seconds": p95, "slow_threshold_seconds": threshold},
        progress={"slow_threshold_seconds": threshold},
    )
    work.tell(detail)


def shadow(work: Promoting) -> None:
    """Staging on one box: the candidate sees copies of live requests at weight 0.

    Raises Ended("withdrawn") where it fails on copies and the policy says that this counts, or where no server can load it.
    """
    operation, policy = work.operation, work.policy
    if _opened(operation)[-1:] not in (["baseline"], ["shadow"]):
        return  # an earlier process of this run has passed it
    if "shadow" not in _opened(operation):
        _place_staging(work)
        _route(
            work,
            Desired(
                stable=operation.stable,
                candidate=operation.version,
                shadow=True,
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
    started = work.monotonic()
    while True:
        verdict = judgement.judge_shadow(
            [_shadow_window(work)], policy, stage_seconds=work.monotonic() - started, streams=_streams(work)
        )
        if verdict.verdict == "withdraw":
            raise _withdrawn(work, verdict)
        if verdict.verdict == "advance":
            break
        _pause(work)
    copies = _counts(work, _window(operation, "shadow")).get(operation.version, [])
    seen = sum(int(row["shadow_requests"]) for row in copies)
    disagreed = sum(int(row["shadow_disagreements"]) for row in copies)
    detail = verdict.reason + (f" Same top answer in {1 - disagreed / seen:.1%} of {seen} copies." if seen else "")
    figures = {**verdict.as_dict(), "copies": seen, "disagreements": disagreed}
    promotions.note(work.database, operation, "shadow", "shadow passed", detail, figures)
    work.tell(detail)


def canary(work: Promoting) -> None:
    """Give the candidate its shares of the traffic, stage by stage, judged at each. Raises Ended("withdrawn" | "held")."""
    stages = work.policy.stages if work.operation.strategy == "canary" else [1.0]
    for share in stages:
        _stage(work, share)


def promote(work: Promoting) -> None:
    """Make the candidate the stable version, and go on counting for the soak."""
    if work.operation.progress.get("promoted"):
        return
    _promote(work, f"every stage up to {work.policy.stages[-1]:.0%} is passed", watch=work.policy.soak_seconds > 0)


def soak(work: Promoting) -> Ended:
    """Watch the new stable version; take it back where it turns out bad. Returns how the promotion ended."""
    started, policy, parts = work.monotonic(), work.policy, Parts(work.policy.dwell_seconds)
    verdict = None
    while policy.soak_seconds > 0:
        elapsed = work.monotonic() - started
        windows = [*_canary_windows(work), *parts.look(_soak_window(work), elapsed)]
        verdict = judgement.judge_soak(
            windows, _frozen(work, windows), policy, stage_seconds=elapsed, streams=_streams(work)
        )
        if verdict.verdict == "withdraw":
            return _withdrawn(work, verdict)
        if verdict.verdict == "advance":
            break
        _pause(work)
    return work.end(
        "promoted",
        f"{work.name} is the stable version",
        verdict.reason if verdict else "no soak was asked for",
        verdict.as_dict() if verdict else None,
    )


def failed(work: Promoting, error: BaseException) -> Ended:
    """Close a promotion that an error ended: the candidate is taken out, the record says what happened."""
    why = f"{type(error).__name__}: {error}" if str(error) else f"interrupted ({type(error).__name__})"
    return work.end("failed", f"the promotion of {work.name} failed", why)


def _subject(row: Version, artifacts: store.ArtifactStore, cache: Path) -> probe.ProbeModel:
    path = store.materialise(artifacts, versions.stored_files(row), cache)
    return probe.ProbeModel(path=path, format=row.format, signature=versions.signature_of(row))


def _place_staging(work: Promoting) -> None:
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
        sleep=work.sleep,
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
    opened = _opened(operation)
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
    started = work.monotonic()
    earlier: list[tuple[float, Window]] = []
    sliced = Sliced()
    while True:
        windows = _canary_windows(work)
        elapsed = work.monotonic() - started
        windows[-1] = sliced.look(windows[-1], elapsed)
        verdict = judgement.judge(
            windows,
            _frozen(work, windows),
            policy,
            stage_seconds=elapsed,
            recent=_recent(earlier, windows[-1], elapsed),
            streams=_streams(work),
        )
        if verdict.verdict == "withdraw":
            raise _withdrawn(work, verdict)
        if verdict.verdict == "advance":
            promotions.note(work.database, operation, "canary", f"{stage} passed", verdict.reason, verdict.as_dict())
            work.tell(verdict.reason)
            return
        if elapsed >= policy.deadline_seconds:
            raise work.end(
                "held",
                f"{work.name} is held at {share:.0%}",
                f"no decision within {policy.deadline_seconds:g} s: {verdict.reason} Promote it again when there is traffic, "
                "or force it with --force --reason TEXT.",
                verdict.as_dict(),
            )
        _pause(work)


class Sliced:
    """Cuts a window of weight 1 into time slices, look by look."""

    def __init__(self) -> None:
        self._slices: list[Mapping[str, StreamCounts]] = []
        self._at, self._before = 0.0, Window("", 1.0)

    def look(self, window: Window, elapsed: float) -> Window:
        if window.weight < 1:
            return window
        if elapsed - self._at >= judgement.SLICE_SECONDS:
            self._slices.append(window.since(self._before).candidate)
            self._at, self._before = elapsed, window
        return replace(window, slices=tuple(self._slices))


class Parts:
    """Cuts the soak into windows of a dwell, so that a version that turns bad late is not covered by its good time before."""

    def __init__(self, dwell_seconds: float) -> None:
        self._length = max(dwell_seconds, 10 * judgement.SLICE_SECONDS)
        self._done: list[Window] = []
        self._at, self._total, self._sliced = 0.0, Window("soak", 1.0), Sliced()

    def look(self, total: Window, elapsed: float) -> list[Window]:
        current = self._sliced.look(total.since(self._total), elapsed - self._at)
        if elapsed - self._at < self._length:
            return [*self._done, current]
        self._done.append(current)
        self._at, self._total, self._sliced = elapsed, total, Sliced()
        return list(self._done)


def _recent(earlier: list[tuple[float, Window]], current: Window, elapsed: float, span: float = 30.0) -> Window | None:
    """What the current window gained in the last `span` seconds, so that a sudden failure shows in a long stage."""
    earlier.append((elapsed, current))
    while len(earlier) > 1 and earlier[1][0] <= elapsed - span:
        earlier.pop(0)
    return current.since(earlier[0][1]) if elapsed - earlier[0][0] >= span / 2 else None


def _promote(work: Promoting, why: str, *, watch: bool) -> None:
    operation = work.operation
    title = f"{work.name} becomes the stable version"
    generation = promotions.promote(
        work.database, operation, title=title, detail=why, watch=watch, window={"stage": "soak", "weight": 1.0}
    )
    work.tell(f"{title}: {why}")
    _followed(work, operation.progress["soak"]["epoch"], generation)


def _withdrawn(work: Promoting, verdict: Judgement) -> Ended:
    return work.end("withdrawn", f"{work.name} is withdrawn", verdict.reason, verdict.as_dict())


def _pause(work: Promoting) -> None:
    work.sleep(min(work.poll_seconds, 1.0))
    work.keeper.check()


def _streams(work: Promoting) -> tuple[str, ...]:
    """Without a frozen p95 there is no "slow"; the record of the baseline says why."""
    return judgement.STREAMS if work.operation.progress.get("slow_threshold_seconds") else ("error",)


def _counts(work: Promoting, window: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    with work.database.read() as session:
        return replicas.counts(session, work.operation.model, window["epoch"], window["generation"])


def _sum(rows: list[dict[str, Any]], total: str, bad: dict[str, str]) -> dict[str, StreamCounts]:
    requests = sum(int(row[total]) for row in rows)
    return {stream: StreamCounts(requests, sum(int(row[name]) for row in rows)) for stream, name in bad.items()}


def _live(rows: list[dict[str, Any]]) -> dict[str, StreamCounts]:
    return _sum(rows, "requests", {"error": "errors", "slow": "slow"})


def _canary_windows(work: Promoting) -> list[Window]:
    operation = work.operation
    windows = []
    for window in operation.progress.get("windows", []):
        if window["stage"] in ("baseline", "shadow"):
            continue
        found = _counts(work, window)
        windows.append(
            Window(
                window["stage"],
                window["weight"],
                candidate=_live(found.get(operation.version, [])),
                stable=_live(found.get(operation.stable or "", [])),
            )
        )
    return windows


def _soak_window(work: Promoting) -> Window:
    window = work.operation.progress["soak"]
    found = _counts(work, window)
    return Window(window["stage"], 1.0, candidate=_live(found.get(work.operation.version, [])))


def _shadow_window(work: Promoting) -> Window:
    found = _counts(work, _window(work.operation, "shadow"))
    bad = {"error": "shadow_errors", "slow": "shadow_slow"}
    copies = _sum(found.get(work.operation.version, []), "shadow_requests", bad)
    return Window("shadow", 0.0, candidate=copies, stable=_live(found.get(work.operation.stable or "", [])))


def _frozen(work: Promoting, windows: list[Window]) -> dict[str, StreamCounts]:
    """The stable version's counts from the windows in which it still had traffic beside the candidate; where it never had
    (blue-green), those of its baseline."""
    none = StreamCounts()
    shared = [window for window in windows if window.weight < 1]
    if shared:
        return {stream: sum((w.stable.get(stream, none) for w in shared), none) for stream in judgement.STREAMS}
    operation = work.operation
    rows = _counts(work, _window(operation, "baseline")).get(operation.stable or "", [])
    threshold = operation.progress.get("slow_threshold_seconds") or float("inf")
    slow = sum(int(n) for row in rows for bound, n in row["latency"].items() if float(bound) > threshold)
    error = _live(rows)["error"]
    return {"error": error, "slow": StreamCounts(error.requests, slow)}


def _window(operation: Operation, stage: str) -> dict[str, Any]:
    return dict(next(w for w in reversed(operation.progress["windows"]) if w["stage"] == stage))


def _opened(operation: Operation) -> list[str]:
    """The stages that this promotion has come to, in order."""
    return [window["stage"] for window in operation.progress.get("windows", [])]


def _baseline_rows(work: Promoting) -> list[dict[str, Any]]:
    return _counts(work, _window(work.operation, "baseline")).get(work.operation.stable or "", [])


def calm_percentile(looks: list[list[dict[str, Any]]], share: float) -> float | None:
    """The median of a percentile over the slices between successive looks at cumulative counts.

    A stall of the machine falls into one slice or two and does not move it; over the whole it would, and a slow candidate would
    pass beneath. Slices with few requests are left out; where no slice has enough, the percentile over the whole.
    """
    found, before = [], _histogram([])
    for rows in looks:
        now = _histogram(rows)
        gained = {bound: count - before.get(bound, 0) for bound, count in now.items()}
        if sum(gained.values()) >= _SLICE_LEAST_REQUESTS:
            found.append(_percentile(gained, share))
            before = now
    known = sorted(value for value in found if value is not None)
    return known[len(known) // 2] if known else percentile(looks[-1], share)


def percentile(rows: list[dict[str, Any]], share: float) -> float | None:
    """The upper bound, in seconds, of the histogram bucket that holds a percentile, over the counts of all replicas."""
    return _percentile(_histogram(rows), share)


def _histogram(rows: list[dict[str, Any]]) -> dict[float, int]:
    merged: dict[float, int] = {}
    for row in rows:
        for bound, count in row["latency"].items():
            merged[float(bound)] = merged.get(float(bound), 0) + int(count)
    return merged


def _percentile(merged: dict[float, int], share: float) -> float | None:
    total, seen = sum(merged.values()), 0
    for bound in sorted(merged):
        seen += merged[bound]
        if seen >= share * total:
            return None if bound == float("inf") else bound
    return None
