"""What the comparison of serving found: the marks of the design, and all of it in Markdown and JSON. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any

from benchmarks._turns import (
    Mark,
    Turn,
    as_json,
    at_least,
    at_most,
    marks_table,
    rates_table,
    ratios,
    spread,
    table,
    unmeasured,
)

SMALL, HEAVY, KEPT = "small", "heavy", "kept"
"""The models: two small convolutions; about 2 ms a row alone; the small one again, whose answers may be kept."""
SMALL_28, KEPT_28 = "small-28", "kept-28"
"""As those without the number, but for images of 28x28 numbers (16 kB of JSON), not 8x8."""
LARGER = "28x28"
"""How their cases are named."""
OURS, TRITON, BATCHER = "modelkeep", "Triton", "Triton, batcher"
TRITONS = (TRITON, BATCHER)
"""Triton twice: as it is out of the box, and with its dynamic batcher and a Python model that computes a batch at once."""
ALONE = "ONNX Runtime alone, batches of 16"
KINDS = ("json", "binary")
SHOWN = {"json": "JSON", "binary": "binary"}
_SHOWN_MODELS = {SMALL_28: f"{SMALL}, {LARGER}"}
ELSEWHERE = (
    ("dashboard sample on screen", "< 100 ms", "not part of serving inference: with the dashboard"),
    ("tracing", "< 5 % at 1 % sampling", "there is no tracing yet"),
    ("cache hit rate, Zipf(1.1)", "<= 3 points below Belady", "make bench: benchmarks/cache_hit_rate.py, below"),
    ("SQL backup", "within 10 %", "not part of serving: with the backups"),
    ("registry", "the same at 10 and at 10,000 versions", "make bench: benchmarks/registry_scale.py"),
)
"""Marks of the design that need no GPU and are measured by others."""


@dataclass
class Found:
    """What came out, as it grows. `cases` are by name, then by server."""

    cases: dict[str, dict[str, list[Turn]]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def case(model: str, kind: str, connections: int) -> str:
    return f"{_SHOWN_MODELS.get(model, model)}, {SHOWN[kind]}, {connections}"


def judge(found: Found) -> list[Mark]:
    """Every mark of the design that needs no GPU."""
    marks: list[Mark] = []
    cases = found.cases
    sizes = ((SMALL, ""), (SMALL_28, f"{LARGER}, "))
    for (model, size), (kind, limit) in product(sizes, (("binary", 1.4), ("json", 2.0))):
        for connections, triton in product((16, 64), TRITONS):
            turns, name = cases[case(model, kind, connections)], f"{size}{SHOWN[kind]}, {connections}"
            _against(marks, turns, triton, name, "requests_per_second", limit)
    for (model, size), kind in product(sizes, KINDS):
        for connections, triton in product((16, 64), TRITONS):
            turns, name = cases[case(model, kind, connections)], f"{size}{SHOWN[kind]}, {connections}"
            _against(marks, turns, triton, name, "p99_seconds", 1.0)
    for kind in KINDS:
        for triton in TRITONS:
            _against(marks, cases[case(SMALL, kind, 1)], triton, f"{SHOWN[kind]}, one connection", "p50_seconds", 1.0)
    for kind in KINDS:
        turns = cases[case(HEAVY, kind, 16)]
        name = f"heavy model, {SHOWN[kind]}, 16: rate against ONNX Runtime's own at batch 16"
        marks.append(at_least(name, 0.8, ratios(turns[OURS], turns[ALONE], "requests_per_second")))
    for size, connections in product(("", f"{LARGER}, "), (16, 64)):
        name = f"cache hit, {size}JSON, {connections}"
        _against(marks, cases[name], BATCHER, name, "requests_per_second", 1.0)
    failed = float(sum(turn.failed for turns in cases.values() for some in turns.values() for turn in some))
    marks.append(at_most("requests that failed in all of these turns", 0.0, spread([failed])))
    marks += _of_swaps(found.others["swaps"], found.others["swaps_one_version"])
    first = spread(found.others["start"]["first_answer_seconds"])
    marks.append(at_most("start to the first 200 of a model", 2.0, first, " s"))
    for name, figures in found.others["health_under_load"].items():
        if name.startswith(OURS):
            shown = f"p99 of {name.removeprefix(OURS + ' ')} model under full load"
            marks.append(at_most(shown, 50.0, spread([1e3 * figures["p99_seconds"]]), " ms"))
    marks.extend(unmeasured(name, limit, why) for name, limit, why in ELSEWHERE)
    return marks


def _against(
    marks: list[Mark], turns: Mapping[str, Sequence[Turn]], triton: str, case: str, what: str, limit: float
) -> None:
    rate = what == "requests_per_second"
    name = f"{case}: {'rate' if rate else what.partition('_')[0]} against {triton}"
    if not turns.get(triton):
        marks.append(unmeasured(name, f"{'>=' if rate else '<='} {limit:g}", "it could not be started here"))
        return
    found = ratios(turns[OURS], turns[triton], what)
    marks.append(at_least(name, limit, found) if rate else at_most(name, limit, found))


def _of_swaps(room: Mapping[str, Any], no_room: Mapping[str, Any]) -> list[Mark]:
    over = 1e3 * (room["slowest_seconds"] - room["usual_slowest_seconds"])
    lost = {name: float(one["failed"] + one["wrong"]) for name, one in (("room", room), ("no room", no_room))}
    return [
        at_most(f"{room['swaps']} swaps under load: failed or wrong of {room['requests']:,}", 0.0, spread([lost["room"]])),
        at_most("swap under load: slowest beyond the usual slowest", 100.0, spread([over]), " ms"),
        at_most("swap, from its record to the first answer", 3.0, spread([room["swap_seconds"]]), " s"),
        at_most(
            f"{no_room['swaps']} swaps with memory for one version: failed or wrong of {no_room['requests']:,} "
            f"({no_room['held_back']} waited, at most {no_room['held_back_longest_seconds']} s)",
            0.0, spread([lost["no room"]]),
        ),
    ]  # fmt: skip


def markdown(found: Found, marks: Sequence[Mark], about: dict[str, Any]) -> str:
    named = list(found.versions)
    memory = [(name, f"{size / (1 << 20):.0f}") for name, size in found.others["memory_at_rest_bytes"].items()]
    health_rows = [
        (name, f"{1e3 * row['p50_seconds']:.1f}", f"{1e3 * row['p99_seconds']:.1f}")
        for name, row in found.others["health_under_load"].items()
    ]
    failed = sum(turn.failed for turns in found.cases.values() for name in turns for turn in turns[name])
    starts_text = json.dumps(found.others["start"])
    peers = ", ".join(found.versions[name] for name in named if name not in (OURS, *TRITONS))
    missing = "".join(f" Without {name}: {why}." for name, why in found.absent.items())
    parts = [
        f"{about['date']}, commit {about['commit']}, {about['machine']}, load before {about['load_before']}; {about['seconds']} s. Triton as PyPI has it: "
        f"{found.versions.get(TRITON, 'absent')}, its Python backend with ONNX Runtime (its own ONNX backend is not in the wheel), without and with its "
        f"dynamic batcher. Others: {peers}.{missing} Requests a second (p99 in ms; µs of CPU a request, all processes of a server), medians of "
        f"{about['rounds']} rounds in turns ({about['peer_rounds']} of the others); {failed} requests failed.",
        rates_table(found.cases, [*named, ALONE]),
        marks_table(marks),
        table(("check, while 64 connections infer", "p50 ms", "p99 ms"), health_rows),
        table(("memory at rest, three models (the others two)", "MB"), memory),
        f"Start: {starts_text}",
        features_table(found.others["features"]),
        growth_table(found.others["growth"]),
    ]
    return "\n\n".join(parts) + "\n"


def features_table(features: dict[str, dict[str, list[Turn]]]) -> str:
    """What a request costs more with a feature, in microseconds of CPU: with it less without it, in the same round."""
    rows = []
    for name, found in features.items():
        cells = []
        for where, turns in found.items():
            if where.endswith("with"):
                cells.append(_microseconds(turns, found[where.removesuffix("with") + "without"]))
        rows.append((name, *cells))
    kinds = [where.partition(",")[0] for where in next(iter(features.values()), {}) if where.endswith("with")]
    return table(("a request costs more with", *(f"{kind}, 16: µs of CPU" for kind in kinds)), rows)


def _microseconds(with_it: list[Turn], without: list[Turn]) -> str:
    found = spread([1e6 * (_cost(a) - _cost(b)) for a, b in zip(with_it, without, strict=True)])
    return f"{found.median:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def _cost(turn: Turn) -> float:
    """Seconds of the server's core for one request: as measured, else by its rate, which is right where the core was full."""
    return turn.cpu_seconds if turn.cpu_seconds is not None else 1 / turn.requests_per_second


def growth_table(growth: dict[str, dict[str, list[Turn]]]) -> str:
    rows = []
    for name, found in growth.items():
        cells = []
        for turns in found.values():
            each = spread([1e6 * _cost(turn) for turn in turns])
            cells.append(f"{each.median:.1f} ({each.low:.1f} to {each.high:.1f})")
        rows.append((name, *cells))
    return table(("models", "JSON, 16: µs of CPU a request", "binary, 16"), rows)


def document(found: Found, marks: Sequence[Mark], about: dict[str, Any]) -> dict[str, Any]:
    others = dict(found.others)
    others["features"] = as_json(
        {f"{name}: {where}": {OURS: turns} for name, by in others["features"].items() for where, turns in by.items()}
    )
    others["growth"] = as_json(others["growth"])
    return {
        "benchmark": "serving_compare",
        **about,
        "versions": found.versions,
        "absent": found.absent,
        "marks": [asdict(mark) for mark in marks],
        "cases": as_json(found.cases),
        **others,
    }
