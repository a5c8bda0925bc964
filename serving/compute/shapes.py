"""Whether what a model answered has the shapes that its signature promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from registry.signature import Signature


class PromisedShapes:
    """The shapes of a signature's outputs, laid out so that a look costs little: it is taken after every run of a model."""

    def __init__(self, signature: Signature) -> None:
        self._fixed = {
            spec.name: (len(spec.shape), tuple((axis, size) for axis, size in enumerate(spec.shape) if size >= 0))
            for spec in signature.outputs
        }
        self._named = {spec.name: list(spec.shape) for spec in signature.outputs}

    def check(self, answer: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError for an output with another number of dimensions, or another size where it is fixed. -1 is any size."""
        for name, array in answer.items():
            promised = self._fixed.get(name)
            if promised is None:
                continue
            shape = array.shape
            right = len(shape) == promised[0]
            if right:
                for axis, size in promised[1]:
                    if shape[axis] != size:
                        right = False
                        break
            if not right:
                raise ValueError(
                    f"it answered '{name}' in the shape {list(shape)}, its signature says {self._named[name]}"
                )
