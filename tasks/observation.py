"""What the replicas counted, as the judge wants it: windows, slices, frozen rates, percentiles. Who decides is tasks.judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from registry import replicas
from registry.database import Database
from registry.promotions import Operation
from tasks import judgement
from tasks.judgement import StreamCounts, Window

P95_LEAST_REQUESTS = 50
"""A baseline of fewer requests freezes no p95."""

BASELINE_SLICES = 5
_SLICE_LEAST_REQUESTS = 20


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


def recent(earlier: list[tuple[float, Window]], current: Window, elapsed: float, span: float = 30.0) -> Window | None:
    """What the current window gained in the last `span` seconds, so that a sudden failure shows in a long stage."""
    earlier.append((elapsed, current))
    while len(earlier) > 1 and earlier[1][0] <= elapsed - span:
        earlier.pop(0)
    return current.since(earlier[0][1]) if elapsed - earlier[0][0] >= span / 2 else None


def judged_streams(operation: Operation) -> tuple[str, ...]:
    """Without a frozen p95 there is no "slow"; the record of the baseline says why."""
    return judgement.STREAMS if operation.progress.get("slow_threshold_seconds") else ("error",)


def counts(database: Database, operation: Operation, window: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    with database.read() as session:
        return replicas.counts(session, operation.model, window["epoch"], window["generation"])


def summed(rows: list[dict[str, Any]], total: str, bad: dict[str, str]) -> dict[str, StreamCounts]:
    requests = sum(int(row[total]) for row in rows)
    return {stream: StreamCounts(requests, sum(int(row[name]) for row in rows)) for stream, name in bad.items()}


def live(rows: list[dict[str, Any]]) -> dict[str, StreamCounts]:
    return summed(rows, "requests", {"error": "errors", "slow": "slow"})


def canary_windows(database: Database, operation: Operation) -> list[Window]:
    windows = []
    for window in operation.progress.get("windows", []):
        if window["stage"] in ("baseline", "shadow"):
            continue
        found = counts(database, operation, window)
        windows.append(
            Window(
                window["stage"],
                window["weight"],
                candidate=live(found.get(operation.version, [])),
                stable=live(found.get(operation.stable or "", [])),
            )
        )
    return windows


def soak_window(database: Database, operation: Operation) -> Window:
    window = operation.progress["soak"]
    found = counts(database, operation, window)
    return Window(window["stage"], 1.0, candidate=live(found.get(operation.version, [])))


def shadow_window(database: Database, operation: Operation) -> Window:
    found = counts(database, operation, window_of(operation, "shadow"))
    bad = {"error": "shadow_errors", "slow": "shadow_slow"}
    copies = summed(found.get(operation.version, []), "shadow_requests", bad)
    return Window("shadow", 0.0, candidate=copies, stable=live(found.get(operation.stable or "", [])))


def frozen_counts(database: Database, operation: Operation, windows: list[Window]) -> dict[str, StreamCounts]:
    """The stable version's counts from the windows in which it still had traffic beside the candidate; where it never had
    (blue-green), those of its baseline."""
    none = StreamCounts()
    shared = [window for window in windows if window.weight < 1]
    if shared:
        return {stream: sum((w.stable.get(stream, none) for w in shared), none) for stream in judgement.STREAMS}
    rows = counts(database, operation, window_of(operation, "baseline")).get(operation.stable or "", [])
    threshold = operation.progress.get("slow_threshold_seconds") or float("inf")
    slow = sum(int(n) for row in rows for bound, n in row["latency"].items() if float(bound) > threshold)
    error = live(rows)["error"]
    return {"error": error, "slow": StreamCounts(error.requests, slow)}


def window_of(operation: Operation, stage: str) -> dict[str, Any]:
    return dict(next(w for w in reversed(operation.progress["windows"]) if w["stage"] == stage))


def opened(operation: Operation) -> list[str]:
    """The stages that this promotion has come to, in order."""
    return [window["stage"] for window in operation.progress.get("windows", [])]


def baseline_rows(database: Database, operation: Operation) -> list[dict[str, Any]]:
    return counts(database, operation, window_of(operation, "baseline")).get(operation.stable or "", [])


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
