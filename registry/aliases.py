"""Paths of an application's own that are answered by a model: what `[[aliases]]` of the settings says of each.

How a request becomes tensors and tensors become an answer is serving.wire.aliases'.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from registry.errors import UsageError
from registry.names import check_model_name
from registry.sections import OWN_PATHS, Entry
from registry.signature import DATATYPES

Layout = Literal["NCHW", "NHWC", "CHW", "HWC", "NHW", "HW"]
Form = Literal["values", "argmax", "index", "label", "top"]
_MOST_TENSOR_ELEMENTS = 1 << 26


class AliasImage(Entry):
    """An uploaded picture as a tensor: (value * scale - mean) / std, by channel."""

    KEY: ClassVar[str | None] = None

    width: int = Field(ge=1, le=8192, description="Columns of the tensor.")
    height: int = Field(ge=1, le=8192, description="Its rows.")
    channels: Literal[1, 3, 4] = Field(3, description="1: grey, 3: red, green, blue, 4: those and opacity.")
    layout: Layout = Field("NCHW", description="The tensor's dimensions, in order; N is the batch.")
    resize: Literal["stretch", "fit", "crop", "exact"] = Field(
        "stretch", description="fit: with borders, crop: the middle, exact: refuse what has another size."
    )
    scale: float = Field(1.0, description="What the values, 0 to 255, are multiplied by.")
    mean: list[float] = Field(default=[], description="What is taken off then, one number for each channel.")
    std: list[float] = Field(default=[], description="What is divided by then, one number for each channel.")
    background: int = Field(255, ge=0, le=255, description="Grey of borders, and of what shines through.")
    max_pixels: int = Field(25_000_000, ge=1, le=200_000_000, description="Most pixels of the pictures of a request.")

    @model_validator(mode="after")
    def _fits(self) -> AliasImage:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values and len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} numbers, channels is {self.channels}: give one for each")
        if 0 in self.std:
            raise ValueError("std has a 0, by which nothing can be divided: leave std out, or give 1")
        if "C" not in self.layout and self.channels != 1:
            raise ValueError(f"layout {self.layout} has no C, channels is {self.channels}: take NCHW, or channels = 1")
        if self.width * self.height * self.channels > _MOST_TENSOR_ELEMENTS:
            raise ValueError(
                f"{self.width} x {self.height} x {self.channels} is more than {_MOST_TENSOR_ELEMENTS} numbers"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor; -1 where the batch is."""
        sizes = {"N": -1, "C": self.channels, "H": self.height, "W": self.width}
        return tuple(sizes[letter] for letter in self.layout)


class AliasInput(Entry):
    """Where an input tensor of the model comes from."""

    KEY: ClassVar[str | None] = None

    input: str = Field(min_length=1, description="The tensor's name in the model.")
    field: str | list[str] | None = Field(
        default=None,
        description="Path of its value in the JSON, as items.0.price, items.*.price or . for all of it; several make a "
        "row. Of an image: the part of the form. Absent: the tensor's name; of an image the first file.",
    )
    image: AliasImage | None = Field(default=None, description="It is a picture: a raw body, or a part of a form.")
    datatype: str | None = Field(default=None, description="What the model must take; absent: whatever it takes.")
    shape: list[int] | None = Field(default=None, description="The tensor's shape, -1: any; absent: the model's.")
    batch: Literal["auto", "row", "rows"] = Field(
        "auto", description="row: the value is one row, rows: it has the batch dimension, auto: whichever fits."
    )
    default: Any = Field(default=None, description="The value where the field is missing; absent: that is an error.")

    @field_validator("field")
    @classmethod
    def _paths(cls, value: str | list[str] | None) -> str | list[str] | None:
        paths = [] if value is None else [value] if isinstance(value, str) else value
        if isinstance(value, list) and not value:
            raise ValueError("is an empty list: name a field, or leave it out")
        for path in paths:
            if path != "." and (not path or "" in path.split(".")):
                raise ValueError(
                    f"{path!r} is not a path: names and numbers with dots between them, as in items.0.price"
                )
        return value

    @field_validator("datatype")
    @classmethod
    def _datatype(cls, value: str | None) -> str | None:
        if value is not None and value not in DATATYPES:
            raise ValueError(f"{value!r} is not one of {', '.join(DATATYPES)}")
        return value

    @field_validator("shape")
    @classmethod
    def _shape(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and any(n < -1 for n in value):
            raise ValueError("sizes are 0 or more, or -1 for any")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> AliasInput:
        if self.image is not None:
            for name in ("shape", "default"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no meaning for an image: leave it out")
            if self.batch != "auto":
                raise ValueError("batch has no meaning for an image: its layout says whether there is a batch")
            if isinstance(self.field, list):
                raise ValueError("field of an image is one part of the form, not several")
            if self.datatype in ("BOOL", "BYTES"):
                raise ValueError(f"a picture does not become {self.datatype}: take a datatype of numbers")
        return self


class AliasOutput(Entry):
    """How an output tensor of the model gets into the answer."""

    KEY: ClassVar[str | None] = None

    output: str = Field(min_length=1, description="The tensor's name in the model.")
    name: str | None = Field(default=None, min_length=1, description="Its name in the answer; absent: the tensor's.")
    form: Form = Field(
        "values", description="values, or of the largest: argmax (index, label, score), index, label; top: several."
    )
    top: int = Field(5, ge=1, le=1000, description="How many form = top gives.")
    softmax: bool = Field(False, description="Turn the last dimension into shares of 1 first.")
    decimals: int | None = Field(default=None, ge=0, le=15, description="Round to so many.")
    squeeze: bool = Field(True, description="Leave out dimensions of 1: one number comes without lists.")
    labels: list[str] = Field(default=[], description="Names of the classes; none: those of the version.")

    @model_validator(mode="after")
    def _has_use(self) -> AliasOutput:
        if self.labels and self.form in ("values", "index"):
            raise ValueError(f"labels have no use with form = {self.form!r}: take argmax, label or top")
        if "top" in self.model_fields_set and self.form != "top":
            raise ValueError(f"top has no use with form = {self.form!r}: set form = 'top'")
        return self

    @property
    def called(self) -> str:
        """Its name in the answer."""
        return self.output if self.name is None else self.name


class Alias(Entry):
    """An application's own path that is answered by a model. It need not be known yet: until it is, the answer is 404."""

    KEY: ClassVar[str | None] = "path"

    path: str = Field(description="Where POST is answered, as in /api/v2/analyze-image.")
    model: str = Field(description="The model that answers.")
    summary: str = Field("", max_length=200, description="What it does, for /docs.")
    inputs: list[AliasInput] = Field(default=[], description="None: every input is the JSON field of its name.")
    outputs: list[AliasOutput] = Field(default=[], description="None: all of the model's, under their names.")

    @field_validator("path")
    @classmethod
    def _path(cls, value: str) -> str:
        if not re.fullmatch(r"/[A-Za-z0-9._~/-]+", value) or "//" in value or value.endswith("/"):
            raise ValueError(
                "must be a path that begins with '/' and does not end with it, as in /api/v2/analyze-image"
            )
        if {".", ".."}.intersection(value.split("/")):
            raise ValueError("has a '.' or '..' as a part, which clients take away: leave it out")
        if taken := next((path for path in OWN_PATHS if value == path or value.startswith(path + "/")), None):
            raise ValueError(f"{taken} is the server's own: take another path")
        return value

    @field_validator("model")
    @classmethod
    def _model(cls, value: str) -> str:
        try:
            check_model_name(value)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return value

    @model_validator(mode="after")
    def _once(self) -> Alias:
        for what, names in (
            ("inputs: the tensor", [one.input for one in self.inputs]),
            ("outputs: the name", [one.called for one in self.outputs]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{what} {name!r} is there twice: leave one out")
        raw = [one.input for one in self.inputs if one.image is not None and one.field is None]
        if len(raw) > 1:
            raise ValueError(f"the images of {raw[0]!r} and {raw[1]!r} are both the first file: give each a field")
        return self
