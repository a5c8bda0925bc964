"""The drills as one HTML page that opens without network: the last one in full, RPO and RTO of all of them as a picture."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.errors import StorageError
from tasks.backup import drill_server
from tasks.backup.damage import WAYS
from tasks.backup.progress import duration, size

WIDTH, LEFT, RIGHT = 1000.0, 70.0, 16.0
PANEL, GAP, TOP = 110.0, 44.0, 22.0
_TONES = {drill_server.SAME: "good", drill_server.DIFFERS: "bad", drill_server.ALONE: "note"}


def render(drills: Sequence[Mapping[str, Any]]) -> str:
    """The page. `drills` as `drill.history` gives them, oldest first; none is a page too."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("drill.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    last = drills[-1] if drills else None
    return environment.from_string(template).render(
        last=last,
        drills=drills,
        headline=headline(last),
        missing=0 if last is None else sum(1 for one in last["components"] if one["failed"]),
        ways=WAYS,
        tones=_TONES,
        duration=_duration,
        size=size,
        chart=chart(drills),
    )


def write(path: Path, drills: Sequence[Mapping[str, Any]]) -> None:
    """Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text(render(drills), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def headline(last: Mapping[str, Any] | None) -> str:
    if last is None:
        return "Nothing is known of how a recovery would go"
    if last["state"] == "passed":
        return "Everything came back, and the damage was found out"
    count = len(last["failed"])
    return f"The drill failed: {count} thing{'' if count == 1 else 's'} would go wrong"


def chart(drills: Sequence[Mapping[str, Any]]) -> str:
    """RTO above, RPO below, over time; each panel has its own scale from zero."""
    if not drills:
        return ""
    times = [dt.datetime.fromisoformat(one["began_at"]).timestamp() for one in drills]
    first, last = times[0], times[-1]
    height = TOP + 2 * PANEL + 2 * GAP
    parts = [
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="RTO and RPO of {len(drills)} drills">'
    ]
    places = [
        (LEFT + WIDTH - RIGHT) / 2 if last == first else LEFT + (at - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        for at in times
    ]
    for number, (key, title) in enumerate((("rto_seconds", "RTO"), ("rpo_seconds", "RPO"))):
        top = TOP + number * (PANEL + GAP)
        values = [float(one[key]) for one in drills]
        most = _above(max(values))
        parts.append(f'<text class="panel" x="{LEFT}" y="{top - 8:.0f}">{title}</text>')
        for share in (0.0, 0.5, 1.0):
            y = top + PANEL * (1 - share)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(
                f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_duration(most * share)}</text>'
            )
        points = [(x, top + PANEL * (1 - value / most)) for x, value in zip(places, values, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline class="line {key[:3]}" points="{line}"/>')
        for (x, y), one, value in zip(points, drills, values, strict=True):
            kind = "dot failed" if one["state"] == "failed" else "dot"
            parts.append(
                f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{one["began_at"][:16]}: {_duration(value)}, '
                f"{one['state']}</title></circle>"
            )
    bottom = TOP + 2 * PANEL + GAP + 22
    ends = (
        {places[0]: (times[0], "start"), places[-1]: (times[-1], "end")}
        if last > first
        else {places[0]: (times[0], "middle")}
    )
    for x, (at, anchor) in ends.items():
        day = f"{dt.datetime.fromtimestamp(at, dt.UTC):%Y-%m-%d}"
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom:.0f}" text-anchor="{anchor}">{day}</text>')
    return "".join([*parts, "</svg>"])


def _above(value: float) -> float:
    """The top of a scale: not below, never zero, and with a half that is a time too."""
    for unit, factors in ((1.0, (1, 2, 4, 10, 20, 30)), (60.0, (1, 2, 4, 10, 20, 30)), (3600.0, (1, 2, 4, 8, 12, 24))):
        for factor in factors:
            if unit * factor >= value:
                return unit * factor
    days = math.ceil(value / 86400)
    return 86400.0 * (days + days % 2)


def _duration(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if 0 < seconds < 10:
        return f"{seconds:.1f} s"
    return duration(seconds)
