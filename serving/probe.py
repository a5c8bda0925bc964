"""Loads a candidate, and its stable version beside it, in a process of its own, and measures both.

`python -P -m serving.probe`: one JSON job on standard input; on standard output a line for each phase begun, and the
result as the last line. It only measures: what the figures mean is decided in tasks/validation.py; tasks/probe.py sets the
limits that this process runs under.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError, UsageError
from registry.policy import METRICS
from registry.signature import Signature
from serving.compute.golden import Arrays, Golden, Tally, Yardstick, chosen_metric, feed, random_inputs, read_golden
from serving.compute.runtimes import Runtime, first_line, load_runtime, resident_bytes
from serving.compute.shapes import PromisedShapes
from serving.text import trial

log = logging.getLogger("serving.probe")

WARM_UP_CALLS = 10
LATENCY_PAIRS = 300
LATENCY_PAIRS_WANTED = 100
ROWS_IN_BATCH = 8
TOLERANCES = {"float16": 1e-2, "float32": 1e-4, "float64": 1e-8}
"""By how much a row may differ alone and in a batch, in parts of the output's largest absolute value."""


@dataclass(frozen=True, slots=True)
class ModelJob:
    path: Path
    format: str
    signature: Signature | None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ModelJob:
        signature = value.get("signature")
        return cls(
            Path(value["path"]), str(value["format"]), None if signature is None else Signature.from_dict(signature)
        )


@dataclass(frozen=True, slots=True)
class Job:
    candidate: ModelJob
    stable: ModelJob | None
    golden: Path | None
    threads: int
    seconds: float
    rtol: float
    atol: float
    seed: int
    metric: str = METRICS[0]
    tolerances: Mapping[str, float] = field(default_factory=dict)
    replay: int = 0
    """So many of the captured requests, or else golden inputs, through one version after the other (serving.replay), instead of a
    validation."""
    slow_factor: float = 1.25
    captured: Path | None = None
    """A folder of captured requests (serving.traffic.capture)."""

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Job:
        stable, golden, captured = value.get("stable"), value.get("golden"), value.get("captured")
        return cls(
            candidate=ModelJob.from_dict(value["candidate"]),
            stable=None if stable is None else ModelJob.from_dict(stable),
            golden=None if golden is None else Path(golden),
            threads=int(value.get("threads", 1)),
            seconds=float(value.get("seconds", 300.0)),
            rtol=float(value.get("rtol", 1e-3)),
            atol=float(value.get("atol", 1e-5)),
            seed=int(value.get("seed", 0)),
            metric=str(value.get("metric", METRICS[0])),
            tolerances={str(name): float(limit) for name, limit in value.get("tolerances", {}).items()},
            replay=int(value.get("replay", 0)),
            slow_factor=float(value.get("slow_factor", 1.25)),
            captured=None if captured is None else Path(captured),
        )


@dataclass(slots=True)
class Subject:
    """One model under measurement."""

    name: str
    runtime: Runtime
    figures: dict[str, Any]
    tally: Tally = field(default_factory=Tally)


def measure(job: Job, begin: Callable[[str], None]) -> dict[str, Any]:
    """Load, run and time the models of the job; `begin` is told each phase before it starts.

    Raises: nothing for what a model does wrong (that is a figure), UsageError for a golden file that cannot be used.
    """
    started = time.monotonic()
    golden = None
    if job.golden is not None:
        begin("reading the golden cases")
        golden = read_golden(job.golden)
        chosen_metric(golden, job.metric, job.golden.name)
    models = {"stable": job.stable, "candidate": job.candidate}
    begin("starting the runtimes")
    for format in {model.format for model in models.values() if model is not None}:
        _start(format, job.threads)
    subjects: list[Subject] = []
    figures: dict[str, dict[str, Any] | None] = {"stable": None, "candidate": None}
    # The stable version first: what the candidate costs is what it adds beside it, as it does in the server.
    for name, model in models.items():
        if model is not None:
            begin(f"loading the {name} version" if name == "stable" else "loading the candidate")
            figures[name], subject = _load(name, model, golden, job)
            if subject is not None:
                subjects.append(subject)
    if any(subject.name == "candidate" for subject in subjects):
        if golden is not None:
            begin("running the golden cases")
            _run_golden(subjects, golden, job, started + 0.5 * job.seconds)
        for subject in subjects:
            begin(f"comparing a batch with single rows ({subject.name})")
            independent, how = rows_independent(subject, golden, job)
            subject.figures.update(rows_independent=independent, rows_how=how)
        begin("timing")
        _time(subjects, golden, job, started)
    for subject in subjects:
        subject.runtime.close()
    return {
        "candidate": figures["candidate"],
        "stable": figures["stable"],
        "golden": None
        if golden is None
        else {
            "cases": golden.cases,
            "labels": golden.labels is not None,
            "outputs": sorted(golden.outputs),
            "metric": _yardstick(golden, job).metric,
        },
        "inputs": "golden" if golden is not None else f"random, seed {job.seed}",
        "seconds": time.monotonic() - started,
    }


def _start(format: str, threads: int) -> None:
    """Have a framework allocate what it does once in a process, so that neither model is charged with it."""
    try:
        if format == "onnx":
            from onnxruntime.datasets import get_example

            example = load_runtime(Path(get_example("sigmoid.onnx")), "onnx", signature=None, threads=threads)
            example.run(random_inputs(example.signature, 0, 1), None)
        elif format in ("torchscript", "pt2"):
            import torch

            torch.set_num_threads(threads)
            torch.nn.functional.linear(torch.zeros(8, 8), torch.zeros(8, 8))
    except (ModelkeepError, OSError, ImportError) as error:  # some MB more for the first model, nothing worse
        log.warning("%s: not warmed up: %s", format, error)


def _load(name: str, model: ModelJob, golden: Golden | None, job: Job) -> tuple[dict[str, Any], Subject | None]:
    figures: dict[str, Any] = {"loaded": False, "error": None, "golden": None, "latency": None}
    gc.collect()
    before = resident_bytes()
    started = time.perf_counter()
    try:
        runtime = trial.load(model.path, model.format, signature=model.signature, threads=job.threads)
    except Exception as error:  # whatever a loader throws at us is a figure: the model does not load
        log.warning("%s does not load", name, exc_info=True)
        figures["error"] = error_text(error)
        return figures, None
    figures["load_seconds"] = time.perf_counter() - started
    # The first call allocates what the model works in; where it fails, the phases that follow report it.
    with contextlib.suppress(Exception):
        runtime.run(_one_call(runtime.signature, golden, job, 0), None)
    figures.update(
        loaded=True,
        signature=runtime.signature.as_dict(),
        memory_bytes=max(resident_bytes() - before, runtime.memory_bytes),
    )
    return figures, Subject(name, runtime, figures)


def _one_call(signature: Signature, golden: Golden | None, job: Job, row: int) -> Arrays:
    if golden is None:
        return random_inputs(signature, job.seed + row, 1)
    return feed(signature, golden.inputs, slice(row, row + 1))


def _run_golden(subjects: list[Subject], golden: Golden, job: Job, until: float) -> None:
    """Case by case, every model on the same cases, as many as there is time for (one at least)."""
    yardstick = _yardstick(golden, job)
    for subject in subjects:
        subject.tally = Tally.of(golden, yardstick)
    for row in range(golden.cases):
        for subject in subjects:
            _run_case(subject, golden, yardstick, row)
        if time.monotonic() > until:
            break
    for subject in subjects:
        subject.figures["golden"] = subject.tally.as_dict()


def _yardstick(golden: Golden, job: Job) -> Yardstick:
    name = job.golden.name if job.golden is not None else ""
    return Yardstick(chosen_metric(golden, job.metric, name), job.tolerances, job.rtol, job.atol)


def _run_case(subject: Subject, golden: Golden, yardstick: Yardstick, row: int) -> None:
    tally, signature = subject.tally, subject.runtime.signature
    tally.cases += 1
    answer, problem = None, None
    try:
        answer = subject.runtime.run(feed(signature, golden.inputs, slice(row, row + 1)), None)
        PromisedShapes(signature).check(answer)
    except Exception as error:  # a model may fail in any way it likes: that is what is counted
        problem = error_text(error)
    problem = tally.add(row, answer, signature, golden, yardstick) or problem
    if problem is not None or answer is None:
        tally.failures += 1
        tally.first_failure = tally.first_failure or f"case {row}: {problem}"
        return
    tally.passed_rows.append(row)
    wild = [n for n, a in answer.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
    if wild:
        tally.non_finite += 1
        tally.first_non_finite = tally.first_non_finite or f"case {row}: output '{wild[0]}'"


def rows_independent(subject: Subject, golden: Golden | None, job: Job) -> tuple[bool | None, str]:
    """Whether a batch of n rows equals n single rows, and how that was found; None where it could not be found."""
    signature = subject.runtime.signature
    for kind, specs in (("input", signature.required), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape or spec.shape[0] != -1:
                return False, f"the first dimension of {kind} '{spec.name}', {list(spec.shape)}, does not vary"
    if golden is not None:
        rows = subject.tally.passed_rows
        # Spread over the file: neighbours may be alike.
        chosen = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, ROWS_IN_BATCH).astype(int))] if rows else []
        needed = {spec.name for spec in signature.required}  # a request with an optional input is never batched
        inputs = {name: a[chosen] for name, a in golden.inputs.items() if name in needed}
        source = "golden rows"
    else:
        inputs = random_inputs(signature, job.seed, ROWS_IN_BATCH)
        chosen = list(range(ROWS_IN_BATCH))
        source = f"random rows (seed {job.seed})"
    n = len(chosen)
    if n < 2:
        return None, f"{n} {source} that succeed alone: two at least are needed"
    try:
        singles = [subject.runtime.run(feed(signature, inputs, slice(i, i + 1)), None) for i in range(n)]
    except Exception as error:
        return None, f"{source} fail alone: {error_text(error)}"
    try:
        batch = subject.runtime.run(feed(signature, inputs, slice(0, n)), None)
    except Exception as error:
        return False, f"a batch of {n} {source} fails: {error_text(error)}"
    for name, together in batch.items():
        alone = np.concatenate([single[name] for single in singles])
        if alone.shape != together.shape:
            return False, f"output '{name}': a batch of {n} gives {list(together.shape)}, singles {list(alone.shape)}"
        difference = _difference(alone, together)
        if difference is not None:
            return False, f"output '{name}': a batch of {n} {source} and {n} singles differ {difference}"
    return True, f"a batch of {n} {source} equals {n} singles"


def _difference(alone: NDArray[Any], together: NDArray[Any]) -> str | None:
    if alone.dtype.kind != "f":
        return None if np.array_equal(alone, together) else "in their values"
    if not np.array_equal(np.isfinite(alone), np.isfinite(together)):
        return "in where they are finite"
    finite = np.isfinite(alone)
    if not finite.any():
        return None
    a, b = alone[finite].astype(np.float64), together[finite].astype(np.float64)
    scale = max(float(np.abs(a).max()), 1e-30)
    worst = float(np.abs(a - b).max()) / scale
    tolerance = TOLERANCES.get(alone.dtype.name, 1e-4)
    return None if worst <= tolerance else f"by {worst:.2g} of the largest value ({tolerance:g} is allowed)"


def _time(subjects: list[Subject], golden: Golden | None, job: Job, started: float) -> None:
    """One interleaved run at batch 1: each round times every model once, in alternating order, on the same input."""
    rows = [0]
    if golden is not None:
        rows = sorted(set.intersection(*(set(s.tally.passed_rows) for s in subjects)))
        if not rows:
            log.warning("no golden case succeeds on every model: nothing to time with")
            return
    try:
        calls = {s.name: [_one_call(s.runtime.signature, golden, job, r) for r in rows[:64]] for s in subjects}
    except UsageError as error:
        log.warning("nothing to time with: %s", error)
        return
    try:
        times = _interleave(subjects, calls, job, started)
    except Exception as error:  # a model that fails now and then; the golden cases or the canary will tell
        log.warning("cannot be timed: %s", error_text(error))
        return
    for s in subjects:
        p50, p95 = np.quantile(times[s.name], [0.5, 0.95])
        s.figures["latency"] = {"p50_seconds": float(p50), "p95_seconds": float(p95), "samples": len(times[s.name])}


def _interleave(
    subjects: list[Subject], calls: Mapping[str, list[Arrays]], job: Job, started: float
) -> dict[str, list[float]]:
    soon = time.monotonic() + 0.1 * job.seconds
    for i in range(WARM_UP_CALLS):
        for s in subjects:
            s.runtime.run(calls[s.name][i % len(calls[s.name])], None)
        if time.monotonic() > soon:
            break
    times: dict[str, list[float]] = {s.name: [] for s in subjects}
    # The pairs that are wanted may take a good part of what is left; the others only a moment.
    now = time.monotonic()
    enough, latest = now + min(5.0, 0.1 * job.seconds), now + max(0.5 * (started + job.seconds - now), 1.0)
    gc.collect()
    gc.disable()
    try:
        for i in range(LATENCY_PAIRS):
            for s in subjects if i % 2 else reversed(subjects):
                call = calls[s.name][i % len(calls[s.name])]
                begun = time.perf_counter()
                s.runtime.run(call, None)
                times[s.name].append(time.perf_counter() - begun)
            now = time.monotonic()
            if now > latest or (now > enough and i + 1 >= LATENCY_PAIRS_WANTED):
                break
    finally:
        gc.enable()
    return times


def error_text(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {text}"


def _work(job: Job) -> Callable[[Job, Callable[[str], None]], dict[str, Any]]:
    if not job.replay:
        return measure
    from serving import replay

    return replay.measure


def main() -> int:
    """Exit 0 with a result, 2 for a job or a golden file that cannot be used (the last line names it)."""
    faulthandler.enable()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s %(levelname)s %(message)s")
    # What a library prints must not end up between the lines of the result.
    report: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(line: Mapping[str, Any]) -> None:
        report.write(json.dumps(line, allow_nan=False) + "\n")
        report.flush()

    os.nice(5)  # the server on this machine comes first
    try:
        job = Job.from_dict(json.loads(sys.stdin.read()))
    except (ValueError, KeyError, TypeError) as error:
        say({"error": f"the job is not valid: {type(error).__name__}: {error}"})
        return 2
    # Should whoever started us be killed, nobody else ends a model that never returns.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, job.seconds + 5)
    try:
        result = _work(job)(job, lambda phase: say({"phase": phase}))
    except UsageError as error:
        say({"error": str(error)})
        return 2
    say(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
