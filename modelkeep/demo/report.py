"""From the client's log and the story's events to the figures: `summary.json`, and `report.html` that shows them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkeep.demo.answers import AnswerCheck, DirectRuns, Request, check, read_log
from registry.policy import PromotionPolicy

LOST_WITHIN_SECONDS = 2.0
"""A socket that a kill broke is seen broken at once; this allows for a client that is busy, and for no later reset."""

KINDS = ("step", "register", "refused", "stage", "promoted", "withdrawn", "rollback", "kill", "recovered")

ANSWERED, FAILED, FAILED_IN_CANARY, LOST_TO_KILL = "answered", "failed", "failed in canary", "lost to a kill"


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the story did or saw, at `t` monotonic seconds. A "step" opens a part that lasts until the next one."""

    t: float
    kind: str
    version: str | None
    title: str
    detail: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Event | Mapping[str, Any]) -> Event:
        """Raises ValueError for a kind that the report does not know."""
        event = (
            value
            if isinstance(value, Event)
            else cls(
                float(value["t"]),
                str(value["kind"]),
                value.get("version"),
                str(value["title"]),
                str(value.get("detail") or ""),
                dict(value.get("figures") or {}),
            )
        )
        if event.kind not in KINDS:
            raise ValueError(f"event {event.title!r} is of kind {event.kind!r}; the kinds are {', '.join(KINDS)}")
        return event


@dataclass(frozen=True, slots=True)
class CanaryWindow:
    """While `version` was a candidate with a weight: from `start` to `end`, monotonic seconds."""

    version: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Kill:
    """A SIGKILL to a serving process: `start` just before it was sent, `end` when the process was seen dead."""

    start: float
    end: float

    @classmethod
    def of(cls, value: Kill | float | tuple[float, float]) -> Kill:
        if isinstance(value, Kill):
            return value
        return cls(*value) if isinstance(value, tuple) else cls(value, value)


@dataclass(frozen=True, slots=True)
class Point:
    """One request, as the charts need it. `at` and `latency` in seconds, `at` since the first request was due."""

    at: float
    latency: float
    version: str | None
    outcome: str


@dataclass(slots=True)
class Summary:
    """What `demo/summary.json` holds, and beside it (`points`, `events`) what only the page shows."""

    requests_total: int
    requests_failed: int
    requests_failed_in_canary: int
    requests_lost_to_kills: int
    answers_wrong: int
    versions: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    canaries: list[dict[str, Any]]
    traffic: dict[str, Any]
    answers: dict[str, Any]
    failures: dict[str, int]
    origin: float
    points: list[Point]
    events: list[Event]
    kills: list[Kill]

    @property
    def cutover_failed(self) -> int:
        """Requests that would have failed if each withdrawn candidate had taken all of the traffic in its canary's time."""
        return sum(canary.get("cutover_failed", 0) for canary in self.canaries)

    def label(self, version: str | None) -> str:
        """What people call the version: its `name` in the story, else as the server names it."""
        return "" if version is None else str(self.versions.get(version, {}).get("name") or version)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, JSON-able; seconds count from the first request."""
        return {
            "requests_total": self.requests_total,
            "requests_failed": self.requests_failed,
            "requests_failed_in_canary": self.requests_failed_in_canary,
            "requests_lost_to_kills": self.requests_lost_to_kills,
            "answers_wrong": self.answers_wrong,
            "cutover_failed": self.cutover_failed,
            "versions": self.versions,
            "steps": self.steps,
            "canaries": self.canaries,
            "traffic": self.traffic,
            "answers": self.answers,
            "failures": self.failures,
        }


def outcome(request: Request, windows: Iterable[CanaryWindow], kills: Iterable[Kill]) -> str:
    """The one class of a request.

    "failed in canary": an HTTP 5xx that names the version which a window of that version was weighing at the time.
    "lost to a kill": under way at the SIGKILL, and its connection broke (reset or end) then. Anything else that brought
    no answer has failed.
    """
    if request.error is None:
        return ANSWERED
    if request.status is not None and 500 <= request.status <= 599:
        for window in windows:
            if request.version == window.version and request.sent <= window.end and request.finished >= window.start:
                return FAILED_IN_CANARY
    if request.error in ("reset", "eof") and request.status is None:
        for kill in kills:
            if request.sent <= kill.end and kill.start <= request.finished <= kill.end + LOST_WITHIN_SECONDS:
                return LOST_TO_KILL
    return FAILED


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the largest, exact over the values (no interpolation); nothing where there are none."""
    if not seconds:
        return {}
    values = np.sort(np.asarray(seconds, dtype=np.float64))

    def at(q: float) -> float:
        return round(float(values[max(0, int(np.ceil(q * len(values))) - 1)]), 6)

    return {"p50_seconds": at(0.50), "p95_seconds": at(0.95), "p99_seconds": at(0.99), "max_seconds": at(1.0)}


def summarise(
    log_path: Path,
    *,
    events: Iterable[Event | Mapping[str, Any]],
    kills: Iterable[Kill | float | tuple[float, float]] = (),
    canary_windows: Iterable[CanaryWindow | tuple[str, float, float]] = (),
    direct: DirectRuns,
    labels: NDArray[np.int64],
    versions: Mapping[str, Mapping[str, Any]],
) -> Summary:
    """Counts everything once, from the log of the client.

    `versions` holds, in the order to show, what the story knows of each version: `outcome`, and any of `accuracy` (golden
    cases), `about`, `reason`; what the traffic saw is added to each. `labels` are those of the traffic images. For each
    canary window in which its candidate failed, the same requests' images are run through that version directly, to count
    what a cut-over in that moment would have failed.
    """
    log = read_log(log_path)
    requests = sorted(log.requests, key=lambda r: r.scheduled)
    windows = [w if isinstance(w, CanaryWindow) else CanaryWindow(*w) for w in canary_windows]
    killed = sorted((Kill.of(k) for k in kills), key=lambda k: k.start)
    told = sorted((Event.of(e) for e in events), key=lambda e: e.t)
    origin = requests[0].scheduled if requests else float(log.start["monotonic"])
    outcomes = [outcome(r, windows, killed) for r in requests]
    checked = check(requests, direct)
    failures: dict[str, int] = {}
    for request, result in zip(requests, outcomes, strict=True):
        if result == FAILED:
            failures[request.error or "unknown"] = failures.get(request.error or "unknown", 0) + 1
    return Summary(
        requests_total=len(requests),
        requests_failed=outcomes.count(FAILED),
        requests_failed_in_canary=outcomes.count(FAILED_IN_CANARY),
        requests_lost_to_kills=outcomes.count(LOST_TO_KILL),
        answers_wrong=checked.wrong,
        versions=_versions(versions, requests, outcomes, labels),
        steps=_steps(told, requests, outcomes, origin),
        canaries=[_canary(window, requests, outcomes, direct, origin) for window in windows],
        traffic=_traffic(log.start, log.end, requests),
        answers=_answers(checked),
        failures=failures,
        origin=origin,
        points=[
            Point(r.scheduled - origin, r.latency_seconds, r.version, o)
            for r, o in zip(requests, outcomes, strict=True)
        ],
        events=told,
        kills=killed,
    )


def _versions(
    known: Mapping[str, Mapping[str, Any]], requests: list[Request], outcomes: list[str], labels: NDArray[np.int64]
) -> dict[str, dict[str, Any]]:
    seen = {r.version for r in requests if r.version is not None}
    result: dict[str, dict[str, Any]] = {name: dict(facts) for name, facts in known.items()}
    for name in sorted(seen - set(result), key=natural):
        result[name] = {"outcome": "not part of the story"}
    for name, facts in result.items():
        mine = [(r, o) for r, o in zip(requests, outcomes, strict=True) if r.version == name]
        answered = [r for r, _ in mine if r.answer is not None]
        facts["requests"] = len(mine)
        facts["answered"] = len(answered)
        facts["failed"] = sum(o != ANSWERED for _, o in mine)
        if answered:
            right = sum(int(r.answer.argmax()) == int(labels[r.image]) for r in answered if r.answer is not None)
            facts["accuracy_live"] = round(right / len(answered), 4)
            facts["latency"] = quantiles([r.latency_seconds for r in answered])
    return result


def _steps(events: list[Event], requests: list[Request], outcomes: list[str], origin: float) -> list[dict[str, Any]]:
    """One entry for each "step" event, with what was decided in it and what the traffic saw."""
    opened = [e for e in events if e.kind == "step"]
    last = max([r.finished for r in requests] + [e.t for e in events], default=origin)
    ends = [*(e.t for e in opened[1:]), last][: len(opened)]
    steps = []
    for number, (step, end) in enumerate(zip(opened, ends, strict=True)):
        final = number == len(opened) - 1
        mine = [
            (r, o)
            for r, o in zip(requests, outcomes, strict=True)
            if step.t <= r.scheduled and (final or r.scheduled < end)
        ]
        inside = [e for e in events if e.kind != "step" and step.t <= e.t and (final or e.t < end)]
        steps.append(
            {
                "title": step.title,
                "version": step.version,
                "detail": step.detail,
                "start_seconds": round(step.t - origin, 3),
                "end_seconds": round(end - origin, 3),
                "requests": len(mine),
                **{
                    f"requests_{o.replace(' a ', '_').replace(' ', '_')}": sum(x == o for _, x in mine)
                    for o in (FAILED, FAILED_IN_CANARY, LOST_TO_KILL)
                },
                "latency": quantiles([r.latency_seconds for r, o in mine if o == ANSWERED]),
                "decisions": [
                    {
                        "kind": e.kind,
                        "at_seconds": round(e.t - origin, 3),
                        "version": e.version,
                        "title": e.title,
                        "detail": e.detail,
                        "figures": dict(e.figures),
                    }
                    for e in inside
                ],
            }
        )
    return steps


def _canary(
    window: CanaryWindow, requests: list[Request], outcomes: list[str], direct: DirectRuns, origin: float
) -> dict[str, Any]:
    inside = [(r, o) for r, o in zip(requests, outcomes, strict=True) if window.start <= r.sent <= window.end]
    mine = [o for r, o in inside if r.version == window.version]
    # Those that were under way when the window closed count for the window, as they do in `outcome`.
    failed = sum(
        o == FAILED_IN_CANARY and r.version == window.version and r.sent <= window.end and r.finished >= window.start
        for r, o in zip(requests, outcomes, strict=True)
    )
    result: dict[str, Any] = {
        "version": window.version,
        "start_seconds": round(window.start - origin, 3),
        "end_seconds": round(window.end - origin, 3),
        "requests": len(inside),
        "requests_by_candidate": len(mine),
        "requests_failed_in_canary": failed,
    }
    if failed and direct.knows(window.version):
        result["cutover_failed"] = sum(direct.error(window.version, r.image) is not None for r, _ in inside)
    return result


def _traffic(start: Mapping[str, Any], end: Mapping[str, Any] | None, requests: list[Request]) -> dict[str, Any]:
    seconds = requests[-1].scheduled - requests[0].scheduled if len(requests) > 1 else 0.0
    result: dict[str, Any] = {
        "rate_asked": start["rate"],
        "seconds": round(seconds, 3),
        "started_at": start["wall"],
        "binary_requests": sum(r.binary for r in requests),
        "latency": quantiles([r.latency_seconds for r in requests if r.error is None]),
        "client_closed_its_log": end is not None,
    }
    if seconds:
        result["rate_reached"] = round(len(requests) / seconds, 1)
    if end is not None:
        result["max_lateness_seconds"] = end["max_lateness_seconds"]
        result["client_cpu_seconds"] = end["cpu_seconds"]
        result["unlogged"] = end["sent"] - len(requests)
    return result


def _answers(checked: AnswerCheck) -> dict[str, Any]:
    return checked.as_dict()


def natural(name: str) -> tuple[Any, ...]:
    """Sorts v2 before v10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a temporary file beside `path`, forced to disk, renamed over it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_summary(summary: Summary, path: Path) -> Path:
    """`summary.json`; raises ValueError where a figure is not a JSON number (NaN), rather than writing it."""
    write_text(path, json.dumps(summary.as_dict(), indent=2, allow_nan=False, default=_plain) + "\n")
    return path


def render_html(
    summary: Summary,
    *,
    policy: PromotionPolicy,
    default: PromotionPolicy | None = None,
    why: Mapping[str, str] | None = None,
    model: str = "digits",
    machine: str | None = None,
    next_command: str | None = None,
) -> str:
    """One self-contained page. `policy` is the one used, `default` what it is compared with, `why` the reason for each
    difference by setting; `machine` a sentence on where it ran; `next_command` is shown at the end."""
    from modelkeep.demo.page import render  # the page is made of this module's types

    return render(
        summary,
        policy=policy,
        default=default or PromotionPolicy(),
        why=why or {},
        model=model,
        machine=machine,
        next_command=next_command,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} in the figures of the demo: {value!r}")
