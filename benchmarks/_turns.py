"""Turns of load against servers side by side: one turn of wrk, what its figures are, medians, ratios, tables. Starts no server."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Turn:
    """What a server did for a few seconds. `failed` are connections that broke, time-outs, and statuses from 400 on."""

    requests_per_second: float
    p50_seconds: float
    p99_seconds: float
    slowest_seconds: float
    failed: int = 0
    cpu_seconds: float | None = None
    """Of the server's processes, for one request."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests of one case go. `fresh` is where in the body a number lies that differs from request to request
    (offset, length); None: all requests are equal.
    """

    address: str
    path: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    fresh: tuple[int, int] | None = None
    binary: bool = False


def lua(target: Target, body: Path, first: int) -> str:
    """The script that makes wrk send this target's requests; fresh ones begin with the number `first`."""
    headers = "\n".join(f"wrk.headers[{_quoted(name)}] = {_quoted(value)}" for name, value in target.headers.items())
    fresh = ""
    if target.fresh is not None:
        offset, length = target.fresh
        # Three low bytes of a float32 below 0.25, or seven digits behind "0."
        number = (
            "string.char(n % 256, math.floor(n / 256) % 256, math.floor(n / 65536) % 128, 62)"
            if target.binary
            else f'string.format("%0{length}d", n % 1e{length})'
        )
        fresh = f"""
local before, after, n = body:sub(1, {offset}), body:sub({offset + length + 1}), {first}
request = function()
    n = n + 1
    return wrk.format(nil, nil, nil, before .. {number} .. after)
end
"""
    return f"""
local file = io.open({_quoted(str(body))}, "rb")
local body = file:read("*a")
file:close()
wrk.method, wrk.body = "POST", body
{headers}
{fresh}
done = function(summary, latency, requests)
    local e = summary.errors
    local bad = e.status + e.connect + e.read + e.write + e.timeout
    io.write(string.format("RESULT %d %d %d %d %d %d\\n", summary.requests, summary.duration,
        latency:percentile(50), latency:percentile(99), latency.max, bad))
end
"""


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def read_result(output: str) -> tuple[Turn, int]:
    """What wrk printed, by the script above, and of how many requests. Raises ValueError where there is no result."""
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise ValueError(f"wrk printed no result: {output[-300:]!r}")
    requests, micros, p50, p99, slowest, bad = (int(word) for word in line.split()[1:])
    return Turn(requests / (micros / 1e6), p50 / 1e6, p99 / 1e6, slowest / 1e6, bad), requests


class Driver:
    """wrk on one core. Every turn's fresh numbers are others than those of all turns before."""

    def __init__(self, folder: Path, core: int | None) -> None:
        self._folder = folder
        self._core = core
        self._first = 0

    def turn(
        self, target: Target, connections: int, seconds: float, computed: Callable[[], float] | None = None
    ) -> Turn:
        """wrk counts whole seconds only. `computed` says how many seconds the server has computed so far."""
        body, script = self._folder / "body", self._folder / "post.lua"
        body.write_bytes(target.body)
        script.write_text(lua(target, body, self._first))
        self._first += 400_000
        command = [
            "wrk",
            "-t1",
            f"-c{connections}",
            f"-d{max(1, round(seconds))}s",
            "--timeout",
            "20s",
            "-s",
            str(script),
        ]
        before = computed() if computed else 0.0
        with pinned(self._core):
            done = subprocess.run(
                [*command, f"http://{target.address}{target.path}"],
                capture_output=True, text=True, timeout=seconds + 90, check=True,
            )  # fmt: skip
        found, requests = read_result(done.stdout)
        if computed is None or not requests:
            return found
        return replace(found, cpu_seconds=(computed() - before) / requests)


def two_cores() -> tuple[int, int] | tuple[None, None]:
    """One for the servers, another for the load; none to stay on where there is but one."""
    cores = sorted(os.sched_getaffinity(0))
    return (cores[0], cores[-1]) if len(cores) > 1 else (None, None)


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes that are started in here stay on this core; None: anywhere."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def in_turns(
    names: Sequence[str], rounds: int, one: Callable[[str], Turn], *, fewer: Mapping[str, int] | None = None
) -> dict[str, list[Turn]]:
    """Round after round, each name once a round, another one first in every round. `fewer` has the names that only take part
    in so many rounds.
    """
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in [*names[start:], *names[:start]]:
            if number < (fewer or {}).get(name, rounds):
                found[name].append(one(name))
    return found


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError where there are none."""
    if not values:
        raise ValueError("there is nothing to take the median of")
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[Turn], theirs: Sequence[Turn], what: str) -> Spread:
    """Ours divided by theirs of the same round, for one figure of a turn. Raises ValueError where no round has both."""
    return spread([getattr(a, what) / getattr(b, what) for a, b in zip(ours, theirs, strict=False)])


@dataclass(frozen=True, slots=True)
class Mark:
    """A mark of the design, and what was found. `found` None: it was not measured, and `why` says why."""

    name: str
    limit: str
    found: float | None
    met: bool | None
    text: str = ""
    why: str = ""


def at_least(name: str, limit: float, found: Spread) -> Mark:
    shown = f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"
    return Mark(name, f">= {limit:g}", round(found.median, 3), found.median >= limit, shown)


def at_most(name: str, limit: float, found: Spread, unit: str = "") -> Mark:
    shown = f"{found.median:.2f}{unit} ({found.low:.2f} to {found.high:.2f})"
    return Mark(name, f"<= {limit:g}{unit}", round(found.median, 4), found.median <= limit, shown)


def unmeasured(name: str, limit: str, why: str) -> Mark:
    return Mark(name, limit, None, None, "", why)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Raises ValueError where a row has not as many cells as the head."""
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"a row of {len(row)} cells under a head of {len(head)}: {list(row)}")
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def marks_table(marks: Sequence[Mark]) -> str:
    words = {True: "met", False: "NOT met", None: "not measured"}
    return table(
        ("mark", "limit", "found: median (lowest to highest round)", ""),
        [(mark.name, mark.limit, mark.text or mark.why, words[mark.met]) for mark in marks],
    )


def rates_table(cases: Mapping[str, Mapping[str, Sequence[Turn]]], servers: Sequence[str]) -> str:
    """Requests a second (p99 in milliseconds; microseconds of CPU a request) by case and server; a server that has no such
    case has a dash.
    """
    rows = []
    for case, found in cases.items():
        cells = []
        for server in servers:
            turns = found.get(server)
            if not turns:
                cells.append("–")
                continue
            rate = spread([turn.requests_per_second for turn in turns]).median
            p99 = spread([turn.p99_seconds for turn in turns]).median
            used = [turn.cpu_seconds for turn in turns if turn.cpu_seconds is not None]
            cpu = f"; {1e6 * spread(used).median:.0f}" if used else ""
            cells.append(f"{rate:,.0f} ({1e3 * p99:.1f}{cpu})")
        rows.append((case, *cells))
    return table(("", *servers), rows)


def as_json(cases: Mapping[str, Mapping[str, Sequence[Turn]]]) -> dict[str, Any]:
    return {
        case: {server: [_rounded(turn) for turn in turns] for server, turns in found.items()}
        for case, found in cases.items()
    }


def _rounded(turn: Turn) -> dict[str, float]:
    return {
        name: round(value, 7 if "seconds" in name else 1) for name, value in asdict(turn).items() if value is not None
    }
