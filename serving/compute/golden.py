"""Golden cases: the file, its rows as a model takes them, and how an answer to one is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import UsageError
from registry.policy import METRICS
from registry.signature import DATATYPES, Signature, TensorSpec
from serving.device.loads import first_line

Arrays = dict[str, NDArray[Any]]

FREE_DIMENSION = 8
"""What stands for a varying dimension, other than the first, in random inputs."""


@dataclass(frozen=True, slots=True)
class Golden:
    """The golden cases: n rows of every input, and what is known about the right answers.

    `metric` is the one that the file names; `target` what the first output should be, where no output is named.
    """

    inputs: Arrays
    labels: NDArray[Any] | None
    outputs: Arrays
    target: NDArray[Any] | None = None
    metric: str | None = None

    @property
    def cases(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True, slots=True)
class Yardstick:
    """How answers are held to the golden ones. `tolerances` are absolute, by output; the others get rtol and atol.

    `metric` is one of registry.policy.METRICS.
    """

    metric: str
    tolerances: Mapping[str, float]
    rtol: float
    atol: float


@dataclass(slots=True)
class Deviation:
    """How far one output was from the golden one: the largest absolute difference, and the cases beyond the tolerance."""

    tolerance: float
    cases: int = 0
    beyond: int = 0
    worst: float | None = None
    worst_case: int | None = None
    problem: str | None = None

    def add(self, row: int, distance: float | None) -> None:
        """`distance` is None where the answer has no such output, or one of another size or kind."""
        self.cases += 1
        if distance is None or not np.isfinite(distance):
            self.beyond += 1
            self.problem = self.problem or f"case {row}: there is no answer to compare, or none that is finite"
            return
        self.beyond += int(distance > self.tolerance)
        if self.worst is None or distance > self.worst:
            self.worst, self.worst_case = distance, row

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Tally:
    """What the golden cases showed of one model; a list has one entry a case, 1 right, 0 wrong or failed.

    `scores` are of the metric, None for a case that has none.
    """

    cases: int = 0
    labels: list[int] | None = None
    outputs: list[int] | None = None
    scores: list[float | None] | None = None
    deviations: dict[str, Deviation] = field(default_factory=dict)
    failures: int = 0
    first_failure: str | None = None
    non_finite: int = 0
    first_non_finite: str | None = None
    passed_rows: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, golden: Golden, yardstick: Yardstick) -> Tally:
        return cls(
            labels=None if golden.labels is None else [],
            outputs=[] if golden.outputs else None,
            scores=None if yardstick.metric == "accuracy" else [],
            deviations={
                name: Deviation(limit) for name, limit in yardstick.tolerances.items() if name in golden.outputs
            },
        )

    def as_dict(self) -> dict[str, Any]:
        judged = [verdicts for verdicts in (self.labels, self.outputs) if verdicts is not None]
        return {
            "cases": self.cases,
            "correct": [min(verdicts) for verdicts in zip(*judged, strict=True)] if judged else None,
            "labels": self.labels,
            "outputs": self.outputs,
            "scores": self.scores,
            "deviations": {name: found.as_dict() for name, found in self.deviations.items()},
            "failures": self.failures,
            "first_failure": self.first_failure,
            "non_finite": self.non_finite,
            "first_non_finite": self.first_non_finite,
        }

    def add(
        self, row: int, answer: Arrays | None, signature: Signature, golden: Golden, yardstick: Yardstick
    ) -> str | None:
        """Score the answer to a case, None where the model failed on it. Returns what could not be scored."""
        problem, label, outputs, score = None, False, False, None
        if answer is not None:
            try:
                if golden.labels is not None:
                    label = _top(answer, signature) == int(golden.labels[row])
                outputs = all(_matches(answer, name, want[row], yardstick) for name, want in golden.outputs.items())
                score = _score(answer, row, signature, golden, yardstick)
            except Exception as error:  # an answer of a shape that nobody thought of is the model's failure
                problem = f"{type(error).__name__}: {first_line(error)}"
        if self.labels is not None:
            self.labels.append(int(label))
        if self.outputs is not None:
            self.outputs.append(int(outputs))
        if self.scores is not None:
            self.scores.append(score)
        for name, deviation in self.deviations.items():
            deviation.add(row, None if answer is None else _distance(answer, name, golden.outputs[name][row]))
        return problem


def read_golden(path: Path) -> Golden:
    """Read a golden file. Raises UsageError that names what is wrong with it; nothing in it is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"golden cases {path.name}: not a .npz of plain arrays: {first_line(error)}") from error
    metric = arrays.pop("metric", None)
    inputs = {name.removeprefix("input."): a for name, a in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): a for name, a in arrays.items() if name.startswith("output.")}
    labels, target = arrays.get("label"), arrays.get("target")
    if not inputs:
        raise UsageError(f"golden cases {path.name}: no array 'input.<name>' among {sorted(arrays)}")
    rows = {name: a.shape[0] if a.ndim else 0 for name, a in arrays.items()}
    first = rows[f"input.{next(iter(inputs))}"]
    if first == 0 or any(rows[name] != first for name in (f"input.{n}" for n in inputs)):
        raise UsageError(f"golden cases {path.name}: every input needs the same number of rows, above 0: {rows}")
    if any(rows[f"output.{name}"] != first for name in outputs) or (labels is not None and labels.shape != (first,)):
        raise UsageError(f"golden cases {path.name}: 'label' and 'output.<name>' need one entry a case: {rows}")
    if labels is not None and labels.dtype.kind not in "iub":
        raise UsageError(f"golden cases {path.name}: 'label' must be integers, not {labels.dtype}")
    if target is not None and (rows["target"] != first or target.dtype.kind not in "iubf"):
        raise UsageError(f"golden cases {path.name}: 'target' needs one number, or row of numbers, a case: {rows}")
    if metric is not None and (metric.size != 1 or metric.dtype.kind not in "US"):
        raise UsageError(
            f"golden cases {path.name}: 'metric' must be one text (one of {', '.join(METRICS)}), not {metric.dtype} "
            f"of shape {list(metric.shape)}"
        )
    return Golden(inputs, labels, outputs, target, _texts(metric)[0] if metric is not None else None)


def chosen_metric(golden: Golden, asked: str, name: str) -> str:
    """The metric to measure: what is asked for, where that is not the usual one, else what the file names.

    Raises UsageError for a metric that nobody knows, with those known, or that the file has nothing for.
    """
    metric = asked if asked != METRICS[0] else golden.metric or METRICS[0]
    if metric not in METRICS:
        raise UsageError(
            f"golden cases {name}: the metric {metric!r} is not known; known are {', '.join(METRICS)} "
            "(array 'metric' of the file, or the policy's metric)"
        )
    if metric == "exact_match" and not golden.outputs:
        raise UsageError(f"golden cases {name}: the metric exact_match needs 'output.<name>', and there is none")
    if metric == "mean_absolute_error" and not golden.outputs and golden.target is None:
        raise UsageError(
            f"golden cases {name}: the metric mean_absolute_error needs 'target' or 'output.<name>', and there is neither"
        )
    return metric


def random_inputs(signature: Signature, seed: int, rows: int) -> Arrays:
    """Seeded inputs that fit the signature: `rows` rows where the first dimension varies, else what it says."""
    random = np.random.default_rng(seed)

    def make(spec: TensorSpec) -> NDArray[Any]:
        shape = [n if n >= 0 else FREE_DIMENSION for n in spec.shape]
        if spec.shape and spec.shape[0] == -1:
            shape[0] = rows
        dtype = DATATYPES[spec.datatype]
        if spec.datatype == "BYTES":
            return np.full(shape, b"text", dtype=object)
        if spec.datatype.startswith(("FP", "BF")):
            return np.asarray(random.standard_normal(shape)).astype(dtype)
        # Integers are as often indices as amounts: 0 and 1 are in range for nearly every model; bytes are pixels.
        return random.integers(0, 256 if spec.datatype == "UINT8" else 2, shape).astype(dtype)

    return {spec.name: make(spec) for spec in signature.required}


def feed(signature: Signature, inputs: Arrays, rows: slice) -> Arrays:
    """The inputs of these rows in the model's datatypes and shapes. Raises UsageError where they do not fit."""
    fed: Arrays = {}
    for spec in signature.inputs:
        if spec.optional and spec.name not in inputs:
            continue
        if spec.name not in inputs:
            raise UsageError(f"input '{spec.name}' is not among the given ones, {sorted(inputs)}")
        value = inputs[spec.name][rows]
        if not spec.accepts(value.shape) and len(value) == 1 and spec.accepts(value.shape[1:]):
            value = value[0]  # a model without a batch dimension
        if not spec.accepts(value.shape):
            raise UsageError(f"input '{spec.name}' is of shape {list(value.shape)}, the model takes {list(spec.shape)}")
        if spec.datatype == "BYTES":
            fed[spec.name] = np.array(
                [v.encode() if isinstance(v, str) else bytes(v) for v in value.ravel().tolist()] + [b""], dtype=object
            )[:-1].reshape(value.shape)
            continue
        try:
            fed[spec.name] = value.astype(DATATYPES[spec.datatype], casting="same_kind", copy=False)
        except TypeError as error:
            raise UsageError(f"input '{spec.name}' is {value.dtype}, the model takes {spec.datatype}") from error
    return fed


def _top(answer: Arrays, signature: Signature) -> int:
    first = np.asarray(answer[signature.outputs[0].name])
    return int(np.argmax(first.reshape(-1, first.shape[-1])[0]))


def _score(answer: Arrays, row: int, signature: Signature, golden: Golden, yardstick: Yardstick) -> float | None:
    """The metric of one case; None where it is not to be had, as with an answer that is not finite."""
    if yardstick.metric == "exact_match":
        return float(all(_equal(answer, name, want[row]) for name, want in golden.outputs.items()))
    if yardstick.metric != "mean_absolute_error":
        return None
    wanted = (
        {signature.outputs[0].name: golden.target[row]}
        if golden.target is not None
        else {name: want[row] for name, want in golden.outputs.items()}
    )
    apart = [_differences(answer, name, np.asarray(want)) for name, want in wanted.items()]
    if any(part is None for part in apart):
        return None
    mean = float(np.mean(np.concatenate([part for part in apart if part is not None])))
    return mean if np.isfinite(mean) else None


def _differences(answer: Arrays, name: str, want: NDArray[Any]) -> NDArray[Any] | None:
    """Absolute differences, flat; None where the two cannot be compared."""
    got = answer.get(name)
    if got is None or got.size != want.size or want.size == 0:
        return None
    if got.dtype.kind not in "iubf" or want.dtype.kind not in "iubf":
        return None
    one, two = got.astype(np.float64).ravel(), want.astype(np.float64).ravel()
    same = (one == two) | (np.isnan(one) & np.isnan(two))  # infinity minus infinity is no number
    with np.errstate(invalid="ignore"):
        return np.where(same, 0.0, np.abs(one - two))


def _distance(answer: Arrays, name: str, want: NDArray[Any]) -> float | None:
    apart = _differences(answer, name, np.asarray(want))
    return None if apart is None else float(apart.max())


def _equal(answer: Arrays, name: str, want: NDArray[Any]) -> bool:
    if name not in answer or answer[name].size != want.size:
        return False
    got = answer[name].reshape(want.shape)
    if got.dtype.kind in "OSU" or want.dtype.kind in "OSU":
        return _texts(got) == _texts(want)
    return bool(np.array_equal(got, want))


def _matches(answer: Arrays, name: str, want: NDArray[Any], yardstick: Yardstick) -> bool:
    if name not in answer or answer[name].size != want.size:
        return False
    got = answer[name].reshape(want.shape)
    if got.dtype.kind in "OSU" or want.dtype.kind in "OSU":
        return _texts(got) == _texts(want)
    if name in yardstick.tolerances:
        distance = _distance(answer, name, want)
        return distance is not None and distance <= yardstick.tolerances[name]
    return bool(np.allclose(got, want, rtol=yardstick.rtol, atol=yardstick.atol, equal_nan=True))


def _texts(array: NDArray[Any]) -> list[str]:
    return [v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in array.ravel().tolist()]
