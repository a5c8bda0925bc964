"""What a person says about a model: model.toml beside it, and the options of `register`, which go before it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import UsageError
from registry.signature import DATATYPES, Signature, TensorSpec

MODEL_TOML = "model.toml"
MAX_BYTES = 1 << 20
KINDS = ("classifier", "predictor", "extractor", "router")


class _Toml(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TensorToml(_Toml):
    name: str
    datatype: str
    shape: list[int]


class TextToml(_Toml):
    """The table [text]: a model that generates text. What it leaves out is looked for in the graph and the files beside it."""

    context_length: int | None = Field(None, ge=2)
    """Tokens of prompt and answer together, at most."""
    eos_ids: list[int] | None = None
    """The tokens that end a text."""
    tokenizer: str = Field("tokenizer.json", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    input_ids: str = "input_ids"
    attention_mask: str = "attention_mask"
    position_ids: str = "position_ids"
    logits: str = "logits"
    past: str = Field("past_key_values.", min_length=1)
    """What the names of the cache's inputs begin with."""
    present: str = Field("present.", min_length=1)
    """What the names of the cache's outputs begin with."""


class ModelToml(_Toml):
    """What a person says about a model in the model.toml beside it."""

    file: str | None = None
    """In a folder of several files: the one to load."""
    kind: str | None = None
    description: str | None = None
    author: str | None = None
    architecture: str | None = None
    training_dataset: str | None = None
    training_metrics: dict[str, float | int | str] = {}
    tags: list[str] | dict[str, str] = []
    dependencies: list[str] = []
    deterministic: bool = False
    """The same inputs always give the same outputs, so that servers may keep answers and give them again."""
    max_batch: int | None = Field(None, ge=1)
    """The most rows that servers compute together, where that is fewer than `performance.batch_size`."""
    metadata: dict[str, str | int | float | bool] = {}
    labels: dict[str, list[str] | str] = {}
    """By output, the names of its classes: a list, or a text file beside the model; see registry.labels."""
    inputs: list[TensorToml] = []
    outputs: list[TensorToml] = []
    text: TextToml | None = None

    @property
    def signature(self) -> Signature | None:
        """The signature, where inputs and outputs are given: a TorchScript file has none of its own."""
        if not self.inputs or not self.outputs:
            return None
        inputs, outputs = (
            [TensorSpec(t.name, t.datatype, tuple(t.shape)) for t in side] for side in (self.inputs, self.outputs)
        )
        return Signature(tuple(inputs), tuple(outputs))

    @property
    def facts(self) -> dict[str, Any]:
        """What was said of the model itself: not its signature, not which file it is, and nothing that was left out."""
        return self.model_dump(exclude={"file", "kind", "inputs", "outputs", "text"}, exclude_defaults=True)


def parse_model_toml(path: Path) -> ModelToml:
    """Read a model.toml. Raises UsageError that names the file, the key and what is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} has more than {MAX_BYTES} bytes: it is meant for a few lines")
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    try:
        told = ModelToml.model_validate(values)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc']))}: {_why(p['type'], p['msg'])}" for p in error.errors())
        raise UsageError(f"{path}: " + "; ".join(problems)) from None
    for side, tensors in (("inputs", told.inputs), ("outputs", told.outputs)):
        _check_tensors(path, side, tensors)
    if bool(told.inputs) != bool(told.outputs):
        raise UsageError(f"{path}: give both [[inputs]] and [[outputs]], or neither")
    if told.kind is not None:
        check_kind(told.kind, f"{path}: kind")
    return told


def read_beside(folder: Path) -> ModelToml:
    """The model.toml of a folder, or an empty one. Raises UsageError."""
    path = folder / MODEL_TOML
    return parse_model_toml(path) if path.is_file() else ModelToml()


def check_kind(kind: str, what: str = "kind") -> str:
    """The kind itself. Raises UsageError that names those there are."""
    if kind not in KINDS:
        raise UsageError(f"{what}: {kind!r} is not one of {', '.join(KINDS)}")
    return kind


def given(options: dict[str, str | None], pairs: dict[str, str]) -> dict[str, Any]:
    """Facts from options: the fields of model.toml, `training_metrics.NAME`, and whatever else under "metadata".

    Raises UsageError for a field that is no text.
    """
    facts: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    for key, value in pairs.items():
        field, _, name = key.partition(".")
        if field == "training_metrics" and name:
            facts.setdefault("training_metrics", {})[name] = _number(value)
        elif key in ("description", "author", "architecture", "training_dataset"):
            facts[key] = value
        elif key == "dependencies":
            facts[key] = [item.strip() for item in value.split(",") if item.strip()]
        elif key == "deterministic":
            if value not in ("true", "false"):
                raise UsageError(f"--metadata {key}={value}: it is true or false")
            facts[key] = value == "true"
        elif key == "max_batch":
            if not value.isdecimal() or int(value) < 1:
                raise UsageError(f"--metadata {key}={value}: it is a number of rows, 1 at least")
            facts[key] = int(value)
        elif key in ModelToml.model_fields:
            raise UsageError(f"--metadata {key}={value}: {key} has an option of its own, or belongs into {MODEL_TOML}")
        else:
            facts.setdefault("metadata", {})[key] = value
    return facts


def merged(first: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Facts with others laid over them; the maps among them are merged, not replaced."""
    result = {**first, **over}
    for name in ("training_metrics", "metadata"):
        if isinstance(first.get(name), dict) and isinstance(over.get(name), dict):
            result[name] = {**first[name], **over[name]}
    return result


def written(signature: Signature) -> str:
    """A model.toml that says what goes in and out, the same text for the same signature."""
    lines = []
    for side, tensors in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        for spec in tensors:
            lines += [f"[[{side}]]", f"name = {json.dumps(spec.name)}", f'datatype = "{spec.datatype}"']
            lines += [f"shape = {list(spec.shape)}", ""]
    return "\n".join(lines)


def _number(text: str) -> float | int | str:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def _why(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "not a key of model.toml, which has " + ", ".join(ModelToml.model_fields)
    return message


def _check_tensors(path: Path, side: str, tensors: list[TensorToml]) -> None:
    for tensor in tensors:
        if not tensor.name or [t.name for t in tensors].count(tensor.name) > 1:
            raise UsageError(f"{path}: {side}: the name {tensor.name!r} is empty or there twice")
        if tensor.datatype not in DATATYPES:
            raise UsageError(f"{path}: {side}.{tensor.name}: {tensor.datatype!r} is not one of {', '.join(DATATYPES)}")
        if any(size < -1 for size in tensor.shape):
            raise UsageError(f"{path}: {side}.{tensor.name}: shape {tensor.shape}: sizes are 0 or more, or -1 for any")
