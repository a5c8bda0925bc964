"""What each version answers when ONNX Runtime runs it directly, and whether the traffic got just that."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkeep.demo.data import INPUT_NAME, OUTPUT_NAME

ABSOLUTE_TOLERANCE = 1e-4
RELATIVE_TOLERANCE = 1e-3
"""For scores (logits) of a few units: a batch of sixteen may add up in another order than a batch of one, no more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the client's log. Times in monotonic seconds; `error` is None where an answer came."""

    index: int
    image: int
    binary: bool
    scheduled: float
    sent: float
    finished: float
    status: int | None
    error: str | None
    version: str | None
    answer: NDArray[np.float32] | None
    message: str | None

    @property
    def latency_seconds(self) -> float:
        """From the moment that it was due, so that waiting in the client counts too."""
        return self.finished - self.scheduled


@dataclass(frozen=True, slots=True)
class TrafficLog:
    """A client's log as read back: `start` and `end` are its opening and closing lines, `end` None if it never closed."""

    requests: list[Request]
    start: dict[str, Any]
    end: dict[str, Any] | None


def read_log(path: Path) -> TrafficLog:
    """Reads the log of one client. A last line cut short (the client was killed) is left out; anything else that is not a
    line of the log raises ValueError with its number."""
    requests: list[Request] = []
    start: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    text = path.read_text(encoding="utf-8")
    lines = text.split("\n")
    cut = lines.pop()  # empty after a complete last line
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            kind = record.get("kind", "request")
            if kind == "start" and start is None:
                start = record
            elif kind == "end":
                end = record
            elif kind == "request":
                requests.append(_request(record))
            else:
                raise ValueError(f"a second line of kind {kind!r}: one log a client")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if start is None:
        raise ValueError(f"{path}: no opening line; is it the log of a client? {cut[:80]}")
    return TrafficLog(requests, start, end)


def _request(record: Mapping[str, Any]) -> Request:
    answer = record.get("answer")
    return Request(
        index=record["index"],
        image=record["image"],
        binary=record["binary"],
        scheduled=record["scheduled"],
        sent=record["sent"],
        finished=record["finished"],
        status=record["status"],
        error=record["error"],
        version=record["version"],
        answer=None if answer is None else np.frombuffer(base64.b64decode(answer), dtype="<f4"),
        message=record.get("message"),
    )


class DirectRuns:
    """The versions, run directly: each image once, alone, when it is first asked for; then remembered."""

    def __init__(self, models: Mapping[str, Path], images: NDArray[np.float32]) -> None:
        """`models`: the files by version, named as the server names it; `images`: those that the traffic sends."""
        self._models = dict(models)
        self._images = images
        self._sessions: dict[str, Any] = {}
        self._known: dict[tuple[str, int], NDArray[np.float32] | str] = {}

    def knows(self, version: str | None) -> bool:
        return version in self._models

    def scores(self, version: str, image: int) -> NDArray[np.float32] | None:
        """The ten scores, or None where the model itself raises on this image."""
        result = self._run(version, image)
        return None if isinstance(result, str) else result

    def error(self, version: str, image: int) -> str | None:
        """What the model raises on this image, None where it answers."""
        result = self._run(version, image)
        return result if isinstance(result, str) else None

    def _run(self, version: str, image: int) -> NDArray[np.float32] | str:
        key = (version, image)
        if key not in self._known:
            from onnxruntime.capi import onnxruntime_pybind11_state as errors

            session = self._session(version)
            try:
                (scores,) = session.run([OUTPUT_NAME], {INPUT_NAME: self._images[image : image + 1]})
            except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
                self._known[key] = str(error)
            else:
                self._known[key] = scores[0]
        return self._known[key]

    def _session(self, version: str) -> Any:
        if version not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.inter_op_num_threads = 1
            options.log_severity_level = 4  # a graph that raises is an answer here, nothing to print
            self._sessions[version] = onnxruntime.InferenceSession(
                str(self._models[version]), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[version]


@dataclass(slots=True)
class AnswerCheck:
    """`checked` answers compared, `wrong` of them not those of the version that they name; `examples` says why, for some."""

    checked: int = 0
    wrong: int = 0
    by_version: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"checked": self.checked, "wrong": self.wrong, "by_version": self.by_version, "examples": self.examples}


def check(requests: Iterable[Request], direct: DirectRuns) -> AnswerCheck:
    """Compares every answer that came with what the version it names gives when run directly: the same highest score, and
    each score within the tolerances. An answer that names no known version is wrong, and so is one where the model raises."""
    result = AnswerCheck()
    for request in requests:
        if request.answer is None:
            continue
        result.checked += 1
        name = request.version or "none"
        result.by_version[name] = result.by_version.get(name, 0) + 1
        fault = _fault(request, direct)
        if fault is not None:
            result.wrong += 1
            if len(result.examples) < 10:
                result.examples.append(f"request {request.index}, image {request.image}, version {name}: {fault}")
    return result


def _fault(request: Request, direct: DirectRuns) -> str | None:
    if request.version is None or not direct.knows(request.version):
        return "no such version"
    expected = direct.scores(request.version, request.image)
    if expected is None:
        return "the model raises on this image when run directly"
    assert request.answer is not None
    if request.answer.shape != expected.shape:
        return f"{request.answer.shape} scores, expected {expected.shape}"
    if int(request.answer.argmax()) != int(expected.argmax()):
        return f"digit {request.answer.argmax()}, expected {expected.argmax()}"
    if not np.allclose(request.answer, expected, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE):
        return f"scores differ by up to {float(np.abs(request.answer - expected).max()):.3g}"
    return None
