"""What goes into a model and what comes out: names, datatypes and shapes, in the words of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DATATYPES: dict[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "BF16": "float32",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",
}
"""Protocol datatype -> name of the numpy dtype that holds it. numpy has no BF16; float32 holds every number of it."""

FROM_NUMPY: dict[str, str] = {numpy: name for name, numpy in DATATYPES.items() if name != "BF16"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor. `shape` holds -1 for a dimension that may vary; an input that is `optional` has a default in the model."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False

    def as_dict(self) -> dict[str, Any]:
        said = {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}
        return {**said, "optional": True} if self.optional else said

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TensorSpec:
        shape = tuple(int(n) for n in value["shape"])
        return cls(str(value["name"]), str(value["datatype"]), shape, bool(value.get("optional", False)))

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """True where `shape` has the same rank and every fixed dimension agrees."""
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):  # noqa: SIM110 - a generator for every request would be felt
            if want != got and want != -1:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Signature:
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def required(self) -> tuple[TensorSpec, ...]:
        """The inputs that every request must bring."""
        return tuple(spec for spec in self.inputs if not spec.optional)

    def as_dict(self) -> dict[str, Any]:
        return {"inputs": [t.as_dict() for t in self.inputs], "outputs": [t.as_dict() for t in self.outputs]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Signature:
        return cls(
            tuple(TensorSpec.from_dict(t) for t in value["inputs"]),
            tuple(TensorSpec.from_dict(t) for t in value["outputs"]),
        )
