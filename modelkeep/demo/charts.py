"""The picture of the demo's report: one SVG of shares, failures and latency over one time axis. No script, no network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from modelkeep.demo.report import FAILED, FAILED_IN_CANARY, LOST_TO_KILL, Event, Point, Summary, natural, quantiles

WIDTH, LEFT, RIGHT = 1120.0, 64.0, 16.0
BAND, LANE, GAP = 30.0, 19.0, 46.0
SHARE_HEIGHT, FAILURE_HEIGHT, LATENCY_HEIGHT, AXIS_HEIGHT = 190.0, 84.0, 130.0, 40.0

LATENCY_TITLE = (
    "Latency of the answers by second, from the moment each was due (p95 and p50, milliseconds, logarithmic)"
)

SERIES = 8
"""Colours of versions; a ninth version would share the first one's."""

FAILURE_CLASSES = {FAILED: "failed", FAILED_IN_CANARY: "canary", LOST_TO_KILL: "killed"}
MARKED = ("refused", "stage", "promoted", "withdrawn", "rollback", "kill", "recovered")


@dataclass(frozen=True, slots=True)
class Mark:
    """A decision as the chart and the table name it: by its number."""

    number: int
    at: float
    event: Event


def marks(summary: Summary) -> list[Mark]:
    """Every event but the steps, numbered in the order of time."""
    told = [e for e in summary.events if e.kind != "step"]
    return [Mark(n, e.t - summary.origin, e) for n, e in enumerate(told, 1)]


def series_of(summary: Summary) -> dict[str, int]:
    """Colour number, 1 … SERIES, of each version that traffic has seen."""
    seen = sorted({p.version for p in summary.points if p.version is not None}, key=natural)
    return {version: n % SERIES + 1 for n, version in enumerate(seen)}


@dataclass(frozen=True, slots=True)
class _Axis:
    first: float
    last: float

    def x(self, at: float) -> float:
        at = min(max(at, self.first), self.last)
        return LEFT + (at - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)


def timeline(summary: Summary) -> str:
    """The SVG; a sentence in place of it where there was no request. Colours come from the page's CSS variables."""
    if not summary.points:
        return '<p class="empty">No request was sent, so there is nothing to draw.</p>'
    last = max(max(p.at for p in summary.points), *[e.t - summary.origin for e in summary.events], 1.0)
    axis = _Axis(0.0, last)  # what was decided before the first request is in the table only
    bucket = _nice(last / 180, (0.25, 0.5, 1, 2, 5, 10, 30, 60))
    buckets = list(_buckets(summary.points, bucket))
    drawn = [m for m in marks(summary) if m.event.kind in MARKED and m.at >= 0]
    lanes = _lanes(drawn, axis)
    marks_top = BAND + 8
    share_top = marks_top + LANE * max(lanes.values(), default=-1) + LANE + 28
    failure_top = share_top + SHARE_HEIGHT + GAP
    latency_top = failure_top + FAILURE_HEIGHT + GAP
    bottom = latency_top + LATENCY_HEIGHT
    height = bottom + AXIS_HEIGHT
    parts = [
        f'<svg class="timeline" viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        'aria-label="Share of the traffic by version, failures and latency over time">',
        _steps_band(summary, axis, bottom),
        _share_panel(summary, buckets, bucket, axis, share_top),
        _failure_panel(summary, buckets, bucket, axis, failure_top),
        _latency_panel(summary.points, axis, latency_top),
        _time_axis(axis, bottom),
        *(_mark(m, axis, marks_top + LANE * lanes[m.number] + 7, bottom) for m in drawn),
        _title("Who answered: share of the requests by version", share_top),
        _title(f"Requests that failed, by {bucket:g} s", failure_top),
        _title(LATENCY_TITLE, latency_top),
        "</svg>",
    ]
    return "\n".join(parts)


def _buckets(points: Sequence[Point], width: float) -> Iterator[tuple[float, list[Point]]]:
    found: dict[int, list[Point]] = {}
    for point in points:
        found.setdefault(int(point.at // width), []).append(point)
    for number in sorted(found):
        yield number * width, found[number]


def _lanes(drawn: list[Mark], axis: _Axis) -> dict[int, int]:
    """Lane of each mark's number: the first in which it does not touch the one before."""
    ends: list[float] = []
    lanes: dict[int, int] = {}
    for mark in drawn:
        x = axis.x(mark.at)
        lane = next((n for n, end in enumerate(ends) if x - end >= 19), len(ends))
        if lane == len(ends):
            ends.append(x)
        ends[lane] = x
        lanes[mark.number] = lane
    return lanes


def _steps_band(summary: Summary, axis: _Axis, bottom: float) -> str:
    parts = []
    for number, step in enumerate(summary.steps, 1):
        if step["end_seconds"] <= 0:
            continue
        x, end = axis.x(step["start_seconds"]), axis.x(step["end_seconds"])
        width = max(end - x, 0.5)
        shade = "even" if number % 2 == 0 else "odd"
        tip = f"{number}. {step['title']}: {step['requests']:,} requests in {step['end_seconds'] - step['start_seconds']:.1f} s"
        parts.append(
            f'<rect class="band {shade}" x="{x:.1f}" y="{BAND:g}" width="{width:.1f}" height="{bottom - BAND:.1f}"/>'
        )
        label = f"{number}  {step['title']}"
        room = int((width - 10) / 6.1)
        if room < len(label):
            label = label[: room - 1].rstrip() + "…" if room >= 9 else str(number)
        parts.append(
            f'<g><title>{escape(tip)}</title><rect class="head" x="{x + 1:.1f}" y="4" width="{max(width - 2, 0.5):.1f}" height="{BAND - 8:g}" rx="4"/>'
            + (f'<text class="step" x="{x + 6:.1f}" y="{BAND / 2 + 4:g}">{escape(label)}</text>' if width > 14 else "")
            + "</g>"
        )
    return "\n".join(parts)


def _title(text: str, top: float) -> str:
    return f'<text class="panel" x="{LEFT:g}" y="{top - 10:.1f}">{escape(text)}</text>'


def _grid(y: float, label: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">{escape(label)}</text>'
    )


def _share_panel(
    summary: Summary, buckets: list[tuple[float, list[Point]]], width: float, axis: _Axis, top: float
) -> str:
    series = series_of(summary)
    parts = [_grid(top + SHARE_HEIGHT * (1 - s), f"{s:.0%}") for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shares = []
    for at, points in buckets:
        named = [p.version for p in points if p.version is not None]
        if named:
            shares.append((at, {v: named.count(v) / len(named) for v in series}, len(named)))
    floor = {at: 0.0 for at, _, _ in shares}
    for version, colour in series.items():
        runs: list[list[tuple[float, float, float]]] = []
        for at, share, _ in shares:
            low, high = floor[at], floor[at] + share[version]
            floor[at] = high
            if high > low:
                if not runs or not math.isclose(runs[-1][-1][0] + width, at):
                    runs.append([])
                runs[-1].append((at, low, high))
        for run in runs:
            upper = [(x, high) for at, _, high in run for x in (axis.x(at), axis.x(at + width))]
            lower = [(x, low) for at, low, _ in reversed(run) for x in (axis.x(at + width), axis.x(at))]
            path = "L".join(f"{x:.1f} {top + SHARE_HEIGHT * (1 - s):.1f}" for x, s in upper + lower)
            parts.append(f'<path class="area s{colour}" d="M{path}Z"/>')
    for at, share, count in shares:
        x = axis.x(at)
        said = ", ".join(f"{summary.label(v)} {s:.1%}" for v, s in share.items() if s)
        parts.append(
            f'<rect class="hit" x="{x:.1f}" y="{top:.1f}" width="{max(axis.x(at + width) - x, 0.5):.2f}" height="{SHARE_HEIGHT:g}">'
            f"<title>{escape(f'{at:.1f} s: {count} requests; {said}')}</title></rect>"
        )
    return "\n".join(parts)


def _failure_panel(
    summary: Summary, buckets: list[tuple[float, list[Point]]], width: float, axis: _Axis, top: float
) -> str:
    parts = []
    counts = [(at, {c: sum(p.outcome == c for p in points) for c in FAILURE_CLASSES}) for at, points in buckets]
    peak = max((sum(c.values()) for _, c in counts), default=0)
    ceiling = _nice(max(peak, 4) / 4, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000)) * 4
    parts += [_grid(top + FAILURE_HEIGHT * (1 - s), f"{ceiling * s:g}") for s in (0.0, 0.5, 1.0)]
    for at, of in counts:
        if not any(of.values()):
            continue
        x, end = axis.x(at), axis.x(at + width)
        said = ", ".join(f"{n} {c}" for c, n in of.items() if n)
        parts.append(f"<g><title>{escape(f'{at:.1f} s: {said}')}</title>")
        y = top + FAILURE_HEIGHT
        for name, css in FAILURE_CLASSES.items():
            if of[name]:
                tall = of[name] / ceiling * FAILURE_HEIGHT
                y -= tall
                parts.append(
                    f'<rect class="bar {css}" x="{x:.1f}" y="{y:.1f}" width="{max(end - x - 1, 2.5):.1f}" height="{max(tall - 1, 1):.1f}"/>'
                )
        parts.append("</g>")
    if not peak:
        parts.append(
            f'<text class="none" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{top + FAILURE_HEIGHT / 2 + 4:.1f}" text-anchor="middle">no request failed</text>'
        )
    for kill in summary.kills:
        x, y = axis.x(kill.start - summary.origin), top + FAILURE_HEIGHT
        parts.append(
            f'<path class="killmark" d="M{x:.1f} {y + 2:.1f}l-5 9h10z"><title>SIGKILL at {kill.start - summary.origin:.1f} s</title></path>'
        )
    return "\n".join(parts)


def _latency_panel(points: Sequence[Point], axis: _Axis, top: float) -> str:
    parts: list[str] = []
    answered = [p for p in points if p.outcome == "answered"]
    found = [(at, quantiles([p.latency for p in group])) for at, group in _buckets(answered, 1.0)]
    if not found:
        return "\n".join([*parts, f'<text class="none" x="{LEFT:g}" y="{top + 30:.1f}">no request was answered</text>'])
    low = math.floor(math.log10(max(min(q["p50_seconds"] for _, q in found), 1e-5)) * 2) / 2
    high = math.ceil(math.log10(max(q["p95_seconds"] for _, q in found) * 1.001) * 2) / 2
    high = max(high, low + 1)

    def y(seconds: float) -> float:
        share = (math.log10(max(seconds, 10**low)) - low) / (high - low)
        return top + LATENCY_HEIGHT * (1 - share)

    for decade in range(math.floor(low), math.ceil(high) + 1):
        for step in (1, 3):
            value = step * 10.0**decade
            if low - 1e-9 <= math.log10(value) <= high + 1e-9:
                parts.append(_grid(y(value), f"{value * 1000:g}"))
    for name in ("p50_seconds", "p95_seconds"):
        path, before = [], None
        for at, q in found:
            path.append(
                f"{'L' if before is not None and at - before < 1.5 else 'M'}{axis.x(at + 0.5):.1f} {y(q[name]):.1f}"
            )
            before = at
        parts.append(f'<path class="line {name[:3]}" d="{"".join(path)}"/>')
    for at, q in found:
        x = axis.x(at)
        tip = f"{at:.0f} s: p50 {q['p50_seconds'] * 1000:.2f} ms, p95 {q['p95_seconds'] * 1000:.2f} ms, slowest {q['max_seconds'] * 1000:.1f} ms"
        parts.append(
            f'<rect class="hit" x="{x:.1f}" y="{top:.1f}" width="{max(axis.x(at + 1) - x, 0.5):.2f}" height="{LATENCY_HEIGHT:g}">'
            f"<title>{escape(tip)}</title></rect>"
        )
    return "\n".join(parts)


def _time_axis(axis: _Axis, bottom: float) -> str:
    step = _nice((axis.last - axis.first) / 12, (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600))
    parts = []
    for number in range(math.ceil(axis.first / step), math.floor(axis.last / step) + 1):
        x = axis.x(number * step)
        parts.append(
            f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 5:.1f}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 19:.1f}" text-anchor="middle">{number * step:g}</text>'
        )
    parts.append(
        f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
        f'<text class="tick" x="{WIDTH - RIGHT:g}" y="{bottom + 35:.1f}" text-anchor="end">seconds since the first request</text>'
    )
    return "\n".join(parts)


def _mark(mark: Mark, axis: _Axis, y: float, bottom: float) -> str:
    x = axis.x(mark.at)
    event = mark.event
    tip = f"{mark.number}. {mark.at:.1f} s, {event.kind}: {event.title}"
    return (
        f'<g class="mark {event.kind}"><title>{escape(tip)}</title>'
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{bottom:.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5"/>'
        f'<text x="{x:.1f}" y="{y + 3.5:.1f}" text-anchor="middle">{mark.number}</text></g>'
    )


def _nice(least: float, steps: Sequence[float]) -> float:
    return float(next((s for s in steps if s >= least), math.ceil(least / steps[-1]) * steps[-1]))
