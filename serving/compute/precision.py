"""Half precision where a model stands it: decided at load, by its golden cases through both, never by hope."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from registry.errors import ModelkeepError
from serving.compute.golden import Golden, feed, read_golden

log = logging.getLogger("modelkeep.precision")

CASES = 64
TOLERANCE = 1e-2
"""By how much an answer may differ, in parts of the output's largest absolute value."""


def agrees(full: Any, half: Any, golden: Golden) -> str | None:
    """Why the two do not agree on the golden cases, as many as CASES; None where they do."""
    if half.signature != full.signature:
        return "its inputs and outputs have other types in half precision"
    rows = np.unique(np.linspace(0, golden.cases - 1, min(CASES, golden.cases)).astype(int))
    for row in rows:
        inputs = feed(full.signature, golden.inputs, slice(int(row), int(row) + 1))
        want, got = full.run(inputs, None), half.run(inputs, None)
        for spec in full.signature.outputs:
            one, two = np.asarray(want[spec.name]), np.asarray(got[spec.name])
            problem = _apart(one, two)
            if problem is not None:
                return f"case {row}: output '{spec.name}' {problem}"
        first = full.signature.outputs[0].name
        if want[first].dtype.kind == "f" and want[first].ndim and want[first].shape[-1] > 1:
            tops = np.argmax(want[first], axis=-1), np.argmax(got[first], axis=-1)
            if not np.array_equal(*tops):
                return f"case {row}: another top class"
    return None


def choose(load: Callable[[bool], Any], golden: Path | None, name: str) -> tuple[Any, str]:
    """The runtime in half precision where its answers to the golden cases agree, else the one in full; and why.

    `load(half)` loads the model. Raises what loading it in full raises.
    """
    full = load(False)
    if golden is None:
        return full, "fp32: no golden cases to compare half precision with"
    half = None
    try:
        cases = read_golden(golden)
        needed = (spec.name for spec in full.signature.inputs if not spec.optional)
        if unfed := ", ".join(name for name in needed if name not in cases.inputs):
            return full, f"fp32: its golden cases are not the graph's inputs ({unfed}), as those of texts are"
        half = load(True)
        apart = agrees(full, half, cases) if half.precision == "fp16" else "it does not compute on the device"
    except Exception as error:  # a model that cannot be halved fails in ways of its own: full precision serves
        text = str(error) if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {error}"
        apart = f"half precision fails: {text.splitlines()[0] if text else type(error).__name__}"
    if apart is None and half is not None:
        full.close()
        return half, f"fp16: agrees on {min(CASES, cases.cases)} golden cases"
    if half is not None:
        half.close()
    log.warning("%s computes in full precision: %s", name, apart)
    return full, f"fp32: {apart}"


def _apart(one: NDArray[Any], two: NDArray[Any]) -> str | None:
    if one.shape != two.shape:
        return f"has the shape {list(two.shape)} in half precision, {list(one.shape)} in full"
    if one.dtype.kind != "f":
        return None if np.array_equal(one, two) else "has other values in half precision"
    if not np.array_equal(np.isfinite(one), np.isfinite(two)):
        return "is finite elsewhere in half precision"
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return "has other infinities in half precision"
    a, b = one[finite].astype(np.float64), two[finite].astype(np.float64)
    if not a.size:
        return None
    scale = max(float(np.abs(a).max()), 1e-30)
    worst = float(np.abs(a - b).max()) / scale
    return None if worst <= TOLERANCE else f"differs by {worst:.2g} of its largest value ({TOLERANCE:g} is allowed)"
