"""The demo's report as one HTML page that opens without network: the figures of a `Summary` put into `report.html.j2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelkeep.demo.answers import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE
from modelkeep.demo.charts import Mark, marks, series_of, timeline
from modelkeep.demo.report import Summary
from registry.policy import PromotionPolicy

TONES = {
    "promoted": "good",
    "recovered": "good",
    "production": "good",
    "stable": "good",
    "refused": "warn",
    "rejected": "warn",
    "withdrawn": "warn",
    "kill": "bad",
    "failed": "bad",
    "rollback": "note",
    "stage": "note",
}
"""Colour of a word by how it begins; what is not here stays grey."""


def render(
    summary: Summary,
    *,
    policy: PromotionPolicy,
    default: PromotionPolicy,
    why: Mapping[str, str],
    model: str,
    machine: str | None,
    next_command: str | None,
) -> str:
    """The page; `modelkeep.demo.report.render_html` says what goes in."""
    from jinja2 import Environment, StrictUndefined

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    environment.globals.update(tone=_tone, figures=figures, share=_share, ms=_ms)
    versions = {
        name: {"outcome": "", "about": "", "reason": "", "accuracy": None, "accuracy_live": None, "latency": {}} | facts
        for name, facts in summary.versions.items()
    }
    rows = _policy(policy, default, why)
    return environment.from_string(template).render(
        s={
            **{name: getattr(summary, name) for name in Summary.__slots__},
            "versions": versions,
            "steps": _steps(summary),
        }
        | {"cutover_failed": summary.cutover_failed},
        headline=_headline(summary),
        lead=_lead(summary),
        started=datetime.fromtimestamp(summary.traffic["started_at"], UTC).strftime("%-d %B %Y, %H:%M"),
        series=series_of(summary),
        timeline=timeline(summary),
        label=summary.label,
        model=model,
        parts=_parts(summary),
        cuts=_cuts(summary),
        warnings=_warnings(summary),
        policy=rows,
        differing=sum(row["differs"] for row in rows),
        evidence=f"{policy.evidence:g} times the number of streams that are judged",
        tolerance=f"{ABSOLUTE_TOLERANCE:g} + {RELATIVE_TOLERANCE:.1%}",
        machine=machine,
        next_command=next_command,
    )


def _headline(summary: Summary) -> str:
    if not summary.requests_total:
        return "No request was sent"
    if summary.requests_failed or summary.answers_wrong:
        found = []
        if summary.requests_failed:
            found.append(f"{summary.requests_failed:,} request{'s' if summary.requests_failed > 1 else ''} failed")
        if summary.answers_wrong:
            found.append(f"{summary.answers_wrong:,} answer{'s were' if summary.answers_wrong > 1 else ' was'} wrong")
        return f"{' and '.join(found)}: this is not as it should be"
    return "A model went from a file to all of the traffic, and no request was lost to a change"


def _lead(summary: Summary) -> str:
    words: dict[str, list[str]] = {}
    for name, facts in summary.versions.items():
        if facts.get("outcome"):
            words.setdefault(str(facts["outcome"]), []).append(summary.label(name))
    told = "; ".join(f"{', '.join(names)} {outcome}" for outcome, names in words.items())
    seconds = summary.traffic["seconds"]
    return f"{f'{told}. ' if told else ''}{seconds:.0f} seconds of live traffic, real images, one machine."


def _warnings(summary: Summary) -> list[str]:
    found = []
    traffic = summary.traffic
    if not traffic["client_closed_its_log"]:
        found.append("The client's log has no closing line: it was killed, and the last requests may be missing here.")
    if traffic.get("unlogged"):
        found.append(f"The client sent {traffic['unlogged']} more requests than its log tells of.")
    if traffic.get("max_lateness_seconds", 0.0) > 0.5:
        found.append(
            f"The client fell behind its schedule by up to {_ms(traffic['max_lateness_seconds'])}; "
            "that time is in the latencies."
        )
    return found


def _steps(summary: Summary) -> list[dict[str, Any]]:
    empty = dict.fromkeys(("p50_seconds", "p95_seconds", "p99_seconds", "max_seconds"))
    return [{**step, "latency": empty | step["latency"]} for step in summary.steps]


def _parts(summary: Summary) -> list[dict[str, Any]]:
    """The steps, each with its decisions; those before the first step come first, under a heading of their own."""
    steps = [e for e in summary.events if e.kind == "step"]
    everything = marks(summary)
    early = [m for m in everything if not steps or m.event.t < steps[0].t]
    parts: list[dict[str, Any]] = []
    if early:
        parts.append(
            {"number": None, "title": "Before the first part" if steps else "All of it", "detail": "", "marks": early}
        )
    for number, step in enumerate(steps, 1):
        end = steps[number].t if number < len(steps) else float("inf")
        inside: list[Mark] = [m for m in everything if step.t <= m.event.t < end]
        parts.append({"number": number, "title": step.title, "detail": step.detail, "marks": inside})
    return parts


def _cuts(summary: Summary) -> list[dict[str, Any]]:
    cuts = [c for c in summary.canaries if "cutover_failed" in c]
    most = max([max(c["cutover_failed"], c["requests_failed_in_canary"]) for c in cuts], default=0) or 1

    def width(count: int) -> float:
        return round(86 * count / most, 2)

    return [{**c, "bar": width(c["requests_failed_in_canary"]), "cut_bar": width(c["cutover_failed"])} for c in cuts]


def _policy(policy: PromotionPolicy, default: PromotionPolicy, why: Mapping[str, str]) -> list[dict[str, Any]]:
    used, usual = policy.model_dump(), default.model_dump()
    return [
        {
            "key": key,
            "used": _value(key, used[key]),
            "default": _value(key, usual[key]),
            "differs": used[key] != usual[key],
            "about": field.description or "",
            "why": why.get(key, ""),
        }
        for key, field in PromotionPolicy.model_fields.items()
    ]


def figures(values: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    """Name and value of each figure of an event, as a person reads them; what is nested comes with its outer name."""
    for key, value in values.items():
        name = f"{under} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping):
            yield from figures(value, name)
        elif value is not None:
            yield name.removesuffix(" seconds").replace("e value", "e-value"), _value(key, value)


def _value(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(key, v) for v in value)
    if not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("_seconds"):
        return _ms(value) if 0 < value < 1 else f"{value:,.4g} s"
    if any(word in key for word in ("accuracy", "share", "weight", "stages", "error_rate")) and 0 <= value <= 1:
        return f"{value:.4g}" if key == "accuracy_margin" else f"{value * 100:.4g} %"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e6):
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _tone(word: str) -> str:
    return next((tone for start, tone in TONES.items() if word.startswith(start)), "")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    milliseconds = seconds * 1000
    return (
        f"{milliseconds:.2f} ms"
        if milliseconds < 10
        else f"{milliseconds:,.0f} ms"
        if seconds < 10
        else f"{seconds:,.1f} s"
    )
