"""The same requests through two versions, one after the other, in the process of the probe: for a candidate that no traffic can judge.

Only one of the two is in memory at a time. It only measures: what the counts mean is decided in tasks/judgement.py.
"""

from __future__ import annotations

import gc
import logging
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from registry.errors import ModelkeepError, UsageError
from serving.compute.golden import Arrays, Golden, chosen_metric, feed, read_golden
from serving.compute.runtimes import Runtime, first_line, load_runtime
from serving.text import trial
from serving.text.agreement import TOKENS, compare_texts
from serving.traffic.capture import TEXT_SUFFIX, parse_name
from serving.traffic.shadow import Comparison, compare
from serving.wire.v2 import Codec

if TYPE_CHECKING:
    from serving.probe import Job, ModelJob

log = logging.getLogger("serving.replay")

WARM_UP_CALLS = 10
SLICES = 5
"""The stable version's p95 is the median of those of so many parts, so that one stall of the machine does not move it."""
KEPT_BYTES = 512 << 20
"""Of the stable version's answers, at most. Where they take more, fewer requests are replayed."""
WAITING_BYTES = 16 << 20
"""Of the candidate's answers that wait to be compared: between its calls nothing runs that its times could show."""


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
    kept = _Kept(_most_bytes())
    before = _run(job.stable, requests, wanted, job, kept.take, until=started + 0.4 * job.seconds)
    if before.error is None:
        begin("replaying through the candidate")
        compared = _Compared(kept.answers)
        after = _run(job.candidate, requests, before.requests, job, compared.take, until=started + 0.9 * job.seconds)
        compared.finish()
        document["replay"] = _figures(before, after, compared, requests, job)
    else:
        document["replay"] = {"problem": f"the stable version does not load: {before.error}"}
    document["seconds"] = time.monotonic() - started
    return document


class Requests(Protocol):
    """What is replayed."""

    kind: str
    count: int
    texts: bool
    """Whether a model that generates text is asked for texts, and not only for runs of its graph."""

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        """What runs one of them; made beforehand, so that reading it from the disk is not in its time."""


class _Golden:
    """The inputs of golden cases, one case a request."""

    kind = "golden"
    texts = True

    def __init__(self, golden: Golden) -> None:
        self.golden, self.count = golden, golden.cases

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        def run() -> Arrays:
            return runtime.run(feed(runtime.signature, self.golden.inputs, slice(number, number + 1)), None)

        return run


class _Captured:
    """Requests as clients sent them (serving.traffic.capture), decoded as they were live: what the codec refuses is an error of the version."""

    kind = "captured"

    def __init__(self, folder: Path) -> None:
        found = [(parse_name(path.name), path) for path in sorted(folder.iterdir(), key=lambda path: path.name)]
        self._files = [(parsed[1], path) for parsed, path in found if parsed is not None]
        self.texts = any(path.suffix == TEXT_SUFFIX for _, path in self._files)
        self.count = len(self._files)
        if not self.count:
            raise UsageError(f"no captured requests are in {folder.name}")

    def call(self, runtime: Runtime, number: int) -> Callable[[], Arrays]:
        header_length, path = self._files[number]
        body = path.read_bytes()
        # Beside texts that were asked for there may be raw runs of the same graph.
        graph = runtime.graph if isinstance(runtime, trial.TextRuntime) else runtime

        def run() -> Arrays:
            request = Codec(graph.signature).decode(body, header_length)
            return graph.run(request.inputs, request.outputs)

        def text() -> Arrays:
            if not isinstance(runtime, trial.TextRuntime):
                raise UsageError("the request asks for a text, and this version generates none")
            return runtime.kept(body)

        if path.suffix == TEXT_SUFFIX:
            return text

        return run


def _golden(job: Job) -> _Golden:
    assert job.golden is not None
    golden = read_golden(job.golden)
    chosen_metric(golden, job.metric, job.golden.name)
    return _Golden(golden)


class _Kept:
    """The stable version's answers, for the candidate's to be compared with."""

    def __init__(self, most_bytes: int) -> None:
        self.answers: deque[Arrays | None] = deque()
        self._bytes_left = most_bytes

    def take(self, answer: Arrays | None) -> bool:
        """False where no more may come."""
        self.answers.append(answer)
        self._bytes_left -= _size(answer)
        return self._bytes_left > 0


class _Compared:
    """How often the candidate's answers, as they come, differ from the stable version's. Neither is kept longer than that takes."""

    def __init__(self, expected: deque[Arrays | None]) -> None:
        self._expected = expected
        self._waiting: list[Arrays | None] = []
        self._waiting_bytes = 0
        self.count = 0
        self.disagreements = {"top": 0, "tolerance": 0, "exact": 0}

    def take(self, answer: Arrays | None) -> bool:
        self._waiting.append(answer)
        self._waiting_bytes += _size(answer)
        if self._waiting_bytes >= WAITING_BYTES:
            self.finish()
        return True

    def finish(self) -> None:
        for new in self._waiting:
            old = self._expected.popleft()
            if old is None or new is None:
                continue  # counted as an error
            found = _compared(old, new)
            self.count += 1
            self.disagreements["top"] += found.disagrees
            self.disagreements["tolerance"] += found.differs
            self.disagreements["exact"] += found.inexact
        self._waiting, self._waiting_bytes = [], 0


def _compared(old: Arrays, new: Arrays) -> Comparison:
    if TOKENS in old and TOKENS in new:
        return compare_texts(old[TOKENS].tolist(), new[TOKENS].tolist())
    return compare(old, new)


class _Run:
    """Which requests one version answered, and how long each took."""

    def __init__(self) -> None:
        self.answered: list[bool] = []
        self.seconds: list[float] = []
        self.first_error: str | None = None
        self.error: str | None = None

    @property
    def requests(self) -> int:
        return len(self.answered)

    def answered_seconds(self, n: int) -> list[float]:
        """Of the first n requests, those that were answered."""
        return [s for s, answered in zip(self.seconds[:n], self.answered[:n], strict=True) if answered]


def _run(
    model: ModelJob,
    requests: Requests,
    wanted: int,
    job: Job,
    take: Callable[[Arrays | None], bool],
    *,
    until: float,
) -> _Run:
    """Run so many of the requests, until then (time.monotonic) at most, or until `take`, which gets every answer, wants no more."""
    found = _Run()
    try:
        # Golden cases of a text model are prompts and texts; captured requests may be texts or raw runs.
        load = trial.load if requests.texts else load_runtime
        runtime = load(model.path, model.format, signature=model.signature, threads=job.threads)
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
            found.answered.append(answer is not None)
            if problem is not None:
                found.first_error = found.first_error or f"request {number}: {problem}"
            if not take(answer) or time.monotonic() > until:
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


def _figures(before: _Run, after: _Run, compared: _Compared, requests: Requests, job: Job) -> dict[str, Any]:
    if after.error is not None:
        return {"problem": f"the candidate does not load: {after.error}"}
    n = after.requests
    p95 = _calm_p95(before.answered_seconds(before.requests))
    threshold = None if p95 is None else p95 * job.slow_factor
    return {
        "problem": None,
        "requests": n,
        "of": requests.count,
        "inputs": requests.kind,
        "stable_p95_seconds": p95,
        "slow_threshold_seconds": threshold,
        "candidate": _counts(after, n, threshold),
        "stable": _counts(before, n, threshold),
        "compared": compared.count,
        "disagreements": compared.disagreements,
    }


def _counts(run: _Run, n: int, threshold: float | None) -> dict[str, Any]:
    answered = run.answered_seconds(n)
    slow = None if threshold is None else sum(s > threshold for s in answered)
    p50, p95 = (float(q) for q in np.quantile(answered, [0.5, 0.95])) if answered else (None, None)
    return {
        "errors": n - len(answered),
        "slow": slow,
        "first_error": run.first_error,
        "p50_seconds": p50,
        "p95_seconds": p95,
    }


def _most_bytes() -> int:
    """What the stable version's answers may take: a small part of what this process may, so that the candidate has the same room."""
    limit = resource.getrlimit(resource.RLIMIT_DATA)[0]
    return KEPT_BYTES if limit == resource.RLIM_INFINITY else min(KEPT_BYTES, limit // 8)


def _size(answer: Arrays | None) -> int:
    """In bytes. An array of texts holds only pointers to them."""
    return sum(
        value.nbytes + (sum(map(sys.getsizeof, value.flat)) if value.dtype.kind == "O" else 0)
        for value in (answer or {}).values()
    )


def _calm_p95(seconds: list[float]) -> float | None:
    """None where there are too few to tell."""
    if len(seconds) < 20:
        return None
    parts = np.array_split(np.array(seconds), min(SLICES, len(seconds) // 20))
    return float(np.median([np.quantile(part, 0.95) for part in parts]))


def _text(error: BaseException) -> str:
    text = first_line(error)
    return text if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {text}"
