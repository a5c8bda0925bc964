"""What the replicas counted, as the judge wants it: windows, slices, frozen rates, percentiles. Who decides is tasks.judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from registry import feedback, replicas
from registry.database import Database
from registry.promotions import Operation
from tasks import judgement
from tasks.judgement import StreamCounts, Window

P95_LEAST_REQUESTS = 50
"""A baseline of fewer requests freezes no p95."""

BASELINE_SLICES = 5
_SLICE_LEAST_REQUESTS = 20


def recent(earlier: list[tuple[float, Window]], current: Window, elapsed: float, span: float = 30.0) -> Window | None:
    """What the current window gained in the last `span` seconds, so that a sudden failure shows in a long stage."""
    earlier.append((elapsed, current))
    while len(earlier) > 1 and earlier[1][0] <= elapsed - span:
        earlier.pop(0)
    return current.since(earlier[0][1]) if elapsed - earlier[0][0] >= span / 2 else None


def judged_streams(
    operation: Operation, windows: Sequence[Window] = (), frozen: Mapping[str, StreamCounts] | None = None
) -> tuple[str, ...]:
    """The streams that there is something to judge by. `not_judged` says why the others are not among them."""
    gaps = not_judged(operation, windows, frozen)
    return tuple(stream for stream in (*judgement.STREAMS, *sorted(judgement.OPTIONAL)) if stream not in gaps)


def not_judged(
    operation: Operation, windows: Sequence[Window] = (), frozen: Mapping[str, StreamCounts] | None = None
) -> dict[str, str]:
    """The streams that cannot be judged, and why.

    Without a frozen p95 there is no "slow". "feedback" and "quality" need verdicts on both sides: of the candidate, and of the
    stable version beside it or, where it has no traffic any more, from before (`frozen`).
    """
    gaps = {}
    if not operation.progress.get("slow_threshold_seconds"):
        gaps["slow"] = "there is no frozen p95"
    none, least = StreamCounts(), judgement.VERDICTS_LEAST
    for stream in sorted(judgement.OPTIONAL):
        candidate = sum((w.candidate.get(stream, none) for w in windows), none).requests
        stable = sum((w.stable.get(stream, none) for w in windows), none).requests
        stable = max(stable, (frozen or {}).get(stream, none).requests)
        if candidate < least or stable < least:
            what = "verdicts" if stream == "feedback" else "scored answers"
            gaps[stream] = (
                f"{candidate} {what} on the candidate and {stable} on the stable version, at least {least} each are needed"
                if candidate or stable
                else f"there are no {what}"
            )
    return gaps


def counts(database: Database, operation: Operation, window: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    with database.read() as session:
        return replicas.counts(session, operation.model, window["epoch"], window["generation"])


def summed(rows: list[dict[str, Any]], total: str, bad: dict[str, str]) -> dict[str, StreamCounts]:
    requests = sum(int(row[total]) for row in rows)
    return {
        stream: StreamCounts(requests, sum(int(row[name]) for row in rows), _clustered(rows, stream, total))
        for stream, name in bad.items()
    }


def live(rows: list[dict[str, Any]]) -> dict[str, StreamCounts]:
    """The streams that servers count. "quality" is there where a scorer has counted: none is part of this release."""
    found = summed(rows, "requests", {"error": "errors", "slow": "slow"})
    scored = sum(int(row.get("quality_requests", 0)) for row in rows)
    if scored:
        found["quality"] = StreamCounts(scored, sum(int(row.get("quality_bad", 0)) for row in rows))
    return found


def _clustered(rows: list[dict[str, Any]], stream: str, total: str) -> int:
    """The sum of size x size - size over the clusters of bad requests: by batch or by key, whichever says more.

    A key that failed on several servers, or before and after a restart, is one cluster. Servers of the release before report
    none of this. Copies are computed one by one.
    """
    if total != "requests":
        return 0
    batched = sum(int(row.get(f"{stream}_batched", 0)) for row in rows)
    keyed = sum(int(row.get(f"{stream}_keyed", 0)) for row in rows)
    sizes: dict[str, int] = {}
    for row in rows:
        for key, size in row.get(f"{stream}_keys", {}).items():
            keyed += 2 * sizes.get(key, 0) * int(size)
            sizes[key] = sizes.get(key, 0) + int(size)
    return max(batched, keyed)


def _observed(database: Database, operation: Operation, window: Mapping[str, Any]) -> Window:
    """A window with what servers counted and clients said of both versions in it."""
    epoch, generation = str(window["epoch"]), int(window["generation"])
    with database.read() as session:
        found = replicas.counts(session, operation.model, epoch, generation)
        verdicts = feedback.counts(session, operation.model, epoch, generation)

    def streams(version: str | None) -> dict[str, StreamCounts]:
        counted = live(found.get(version or "", []))
        if version in verdicts:
            counted["feedback"] = StreamCounts(*verdicts[version])
        return counted

    return Window(
        window["stage"],
        window["weight"],
        candidate=streams(operation.version),
        stable=streams(operation.stable),
        epoch=epoch,
        generation=generation,
    )


def canary_windows(database: Database, operation: Operation) -> list[Window]:
    return [
        _observed(database, operation, window)
        for window in operation.progress.get("windows", [])
        if window["stage"] not in ("baseline", "shadow")
    ]


def soak_window(database: Database, operation: Operation) -> Window:
    return replace(_observed(database, operation, operation.progress["soak"]), weight=1.0, stable={})


def shadow_window(database: Database, operation: Operation) -> Window:
    window = window_of(operation, "shadow")
    found = counts(database, operation, window)
    bad = {"error": "shadow_errors", "slow": "shadow_slow"}
    copies = summed(found.get(operation.version, []), "shadow_requests", bad)
    stable = live(found.get(operation.stable or "", []))
    return Window("shadow", 0.0, copies, stable, epoch=window["epoch"], generation=window["generation"])


AGREEMENTS = {"top": "shadow_disagreements", "tolerance": "shadow_differences", "exact": "shadow_inexact"}
"""The count of copies that do not agree, by the policy's kind of agreement."""


def agreement(database: Database, operation: Operation, kind: str) -> StreamCounts:
    """The compared copies, bad where the two answers do not agree in this way."""
    rows = counts(database, operation, window_of(operation, "shadow")).get(operation.version, [])
    name = AGREEMENTS[kind]
    told = [row for row in rows if name in row]  # a server of the release before does not tell all three
    compared = sum(int(row["shadow_requests"]) - int(row["shadow_errors"]) for row in told)
    return StreamCounts(compared, sum(int(row[name]) for row in told))


def frozen_counts(database: Database, operation: Operation, windows: list[Window]) -> dict[str, StreamCounts]:
    """The stable version's counts from the windows in which it still had traffic beside the candidate; where it never had
    (blue-green), those of its baseline."""
    none = StreamCounts()
    shared = [window for window in windows if window.weight < 1]
    if shared:
        names = dict.fromkeys([*judgement.STREAMS, *(stream for window in shared for stream in window.stable)])
        return {stream: sum((w.stable.get(stream, none) for w in shared), none) for stream in names}
    found = _observed(database, operation, window_of(operation, "baseline"))
    rows = baseline_rows(database, operation)
    threshold = operation.progress.get("slow_threshold_seconds") or float("inf")
    slow = sum(int(n) for row in rows for bound, n in row["latency"].items() if float(bound) > threshold)
    return {**found.stable, "slow": StreamCounts(found.stable["error"].requests, slow)}


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
