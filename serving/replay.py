"""The same requests through two versions, one after the other, in the process of the probe: for a candidate that no traffic can judge.

Only one of the two is in memory at a time. It only measures: what the counts mean is decided in tasks/judgement.py.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from registry.errors import ModelkeepError, UsageError
from serving.capture import parse_name
from serving.golden import Arrays, Golden, chosen_metric, feed, read_golden
from serving.runtimes import Runtime, first_line, load_runtime
from serving.shadow import compare
from serving.v2 import Codec

if TYPE_CHECKING:
    from serving.probe import Job, ModelJob

log = logging.getLogger("serving.replay")

WARM_UP_CALLS = 10
SLICES = 5
"""The stable version's p95 is the median of those of so many parts, so that one stall of the machine does not move it."""


def measure(job: Job, begin: Callable[[str], None]) -> dict[str, Any]:
    """Run the captured requests, or else the golden inputs, `job.replay` of them at most, through both versions.

    A request that there is no time for in the candidate counts for neither. Raises UsageError without either, or without a stable version.
    """
    started = time.monotonic()
    if job.stable is None or (job.golden is None and job.captured is None):
        raise UsageError("a replay needs captured requests or golden inputs, and a stable version to compare with")
    begin("reading the requests")
    requests: Requests = _Captured(job.captured) if job.captured is not None else _golden(job)
    document: dict[str, Any] = {
        "candidate": None,
        "stable": None,
        "golden": {"cases": requests.count} if requests.kind == "golden" else None,
        "inputs": requests.kind,
    }
    begin("replaying through the stable version")
    wanted = min(job.replay, requests.count)
    before = _run(job.stable, requests, wanted, job, until=started + 0.4 * job.seconds)
    if before.error is None:
        begin("replaying through the candidate")
        after = _run(job.candidate, requests, before.requests, job, until=started + 0.9 * job.seconds)
        document["replay"] = _compared(before, after, requests, job)
    else:
        document["replay"] = {"problem": f"the stable version does not load: {before.error}"}
    document["seconds"] = time.monotonic() - started
    return document


class Requests(Protocol):
    """What is replayed."""

    kind: str
    count: int

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        """What runs one of them; made beforehand, so that reading it from the disk is not in its time."""


class _Golden:
    """The inputs of golden cases, one case a request."""

    kind = "golden"

    def __init__(self, golden: Golden) -> None:
        self.golden, self.count = golden, golden.cases

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        def run() -> Arrays:
            return runtime.run(feed(runtime.signature, self.golden.inputs, slice(number, number + 1)), None)

        return run


class _Captured:
    """Requests as clients sent them (serving.capture), decoded as they were live: what the codec refuses is an error of the version."""

    kind = "captured"

    def __init__(self, folder: Path) -> None:
        found = [(parse_name(path.name), path) for path in sorted(folder.iterdir(), key=lambda path: path.name)]
        self._files = [(parsed[1], path) for parsed, path in found if parsed is not None]
        self.count = len(self._files)
        if not self.count:
            raise UsageError(f"no captured requests are in {folder.name}")

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        header_length, path = self._files[number]
        body = path.read_bytes()

        def run() -> Arrays:
            request = Codec(runtime.signature).decode(body, header_length)
            return runtime.run(request.inputs, request.outputs)

        return run


def _golden(job: Job) -> _Golden:
    assert job.golden is not None
    golden = read_golden(job.golden)
    chosen_metric(golden, job.metric, job.golden.name)
    return _Golden(golden)


class _Run:
    """What one version answered, and how long each answer took."""

    def __init__(self) -> None:
        self.answers: list[Arrays | None] = []
        self.seconds: list[float] = []
        self.first_error: str | None = None
        self.error: str | None = None

    @property
    def requests(self) -> int:
        return len(self.answers)


def _run(model: ModelJob, requests: Requests, wanted: int, job: Job, *, until: float) -> _Run:
    found = _Run()
    try:
        runtime = load_runtime(model.path, model.format, signature=model.signature, threads=job.threads)
    except Exception as error:  # whatever a loader throws at us is a figure: the model does not load
        log.warning("does not load", exc_info=True)
        found.error = _text(error)
        return found
    try:
        for number in range(min(WARM_UP_CALLS, wanted)):
            _answer(requests.call(runtime, number))
        for number in range(wanted):
            call = requests.call(runtime, number)
            begun = time.perf_counter()
            answer, problem = _answer(call)
            found.seconds.append(time.perf_counter() - begun)
            found.answers.append(answer)
            if problem is not None:
                found.first_error = found.first_error or f"request {number}: {problem}"
            if time.monotonic() > until:
                break
    finally:
        runtime.close()
        del runtime
        gc.collect()
    return found


def _answer(call: Callable[[], Arrays]) -> tuple[Arrays | None, str | None]:
    try:
        return call(), None
    except Exception as error:  # a model may fail in any way it likes: that is what is counted
        return None, _text(error)


def _compared(before: _Run, after: _Run, requests: Requests, job: Job) -> dict[str, Any]:
    if after.error is not None:
        return {"problem": f"the candidate does not load: {after.error}"}
    n = after.requests
    p95 = _calm_p95([s for s, answer in zip(before.seconds, before.answers, strict=True) if answer is not None])
    threshold = None if p95 is None else p95 * job.slow_factor
    agreements = {"top": 0, "tolerance": 0, "exact": 0}
    compared = 0
    for old, new in zip(before.answers[:n], after.answers, strict=True):
        if old is None or new is None:
            continue  # counted as an error
        compared += 1
        found = compare(old, new)
        agreements["top"] += found.disagrees
        agreements["tolerance"] += found.differs
        agreements["exact"] += found.inexact
    return {
        "problem": None,
        "requests": n,
        "of": requests.count,
        "inputs": requests.kind,
        "stable_p95_seconds": p95,
        "slow_threshold_seconds": threshold,
        "candidate": _counts(after, n, threshold),
        "stable": _counts(before, n, threshold),
        "compared": compared,
        "disagreements": agreements,
    }


def _counts(run: _Run, n: int, threshold: float | None) -> dict[str, Any]:
    answered = [s for s, answer in zip(run.seconds[:n], run.answers[:n], strict=True) if answer is not None]
    slow = None if threshold is None else sum(s > threshold for s in answered)
    p50, p95 = (float(q) for q in np.quantile(answered, [0.5, 0.95])) if answered else (None, None)
    return {
        "errors": n - len(answered),
        "slow": slow,
        "first_error": run.first_error,
        "p50_seconds": p50,
        "p95_seconds": p95,
    }


def _calm_p95(seconds: list[float]) -> float | None:
    """None where there are too few to tell."""
    if len(seconds) < 20:
        return None
    parts = np.array_split(np.array(seconds), min(SLICES, len(seconds) // 20))
    return float(np.median([np.quantile(part, 0.95) for part in parts]))


def _text(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {text}"
