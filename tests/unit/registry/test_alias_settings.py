"""`[[aliases]]` of modelkeep.toml: what is taken, and that each wrong value is named with what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from registry.aliases import Alias
from registry.errors import SettingsError
from registry.settings import Settings, build_settings

HEAD = '[[aliases]]\npath = "/api/v2/analyze-image"\nmodel = "digits"\n'
WHOLE = (
    HEAD
    + """
summary = "Which digit it is"

[[aliases.inputs]]
input = "pixels"
field = "photo"
image = { width = 8, height = 8, channels = 1, layout = "NHWC", resize = "fit", scale = 0.0625, mean = [0.5], std = [0.5] }

[[aliases.inputs]]
input = "age"
field = ["person.age", "items.*.price"]
datatype = "FP32"
shape = [-1, 2]
batch = "row"
default = [1, 2.5]

[[aliases.outputs]]
output = "scores"
name = "digit"
form = "top"
top = 3
softmax = true
decimals = 4
labels = ["zero", "one"]

[[aliases]]
path = "/other"
model = "m"
"""
)


def built(text: str) -> Settings:
    return build_settings(Path("/x/modelkeep.toml"), text, environ={"MODELKEEP_PROFILE": "cpu"}, cwd=Path("/x"))


def test_everything_that_can_be_said_is_taken_and_shown() -> None:
    settings = built(WHOLE)
    first, second = settings.aliases
    assert first.inputs[0].image is not None and first.inputs[0].image.shape == (-1, 8, 8, 1)
    assert first.inputs[1].default == [1, 2.5] and first.outputs[0].called == "digit"
    assert (second.path, second.inputs, second.outputs) == ("/other", [], [])
    rows = {row["key"]: row["value"] for row in json.loads(json.dumps(settings.describe()))}
    assert rows["aliases./api/v2/analyze-image.inputs"][0]["image"]["width"] == 8


def test_the_environment_may_say_it_as_json() -> None:
    text = json.dumps([{"path": "/a", "model": "m", "inputs": [{"input": "x", "field": "a.b"}]}])
    environ = {"MODELKEEP_PROFILE": "cpu", "MODELKEEP_ALIASES": text}
    [one] = build_settings(None, None, environ=environ, cwd=Path("/x")).aliases
    assert one.inputs[0].field == "a.b"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"/api/v2/analyze-image"', '"/v2/models"', "/v2 is the server's own: take another path"),
        ('"/api/v2/analyze-image"', '"/api/v2/feedback/x"', "/api/v2/feedback is the server's own"),
        ('"/api/v2/analyze-image"', '"/v1/generate"', "/v1 is the server's own"),
        ('"/api/v2/analyze-image"', '"analyze"', "must be a path that begins with '/'"),
        ('"/api/v2/analyze-image"', '"/a b"', "must be a path"),
        ('"/api/v2/analyze-image"', '"/a/"', "does not end with it"),
        ('"/api/v2/analyze-image"', '"/a/../b"', "'.' or '..'"),
        ('"/api/v2/analyze-image"', '"/"', "must be a path"),
        ('"/other"', '"/api/v2/analyze-image"', "the path '/api/v2/analyze-image' twice"),
        ('"digits"', '"../x"', "'../x' is not a model name"),
        ("width = 8", "width = 0", "greater than or equal to 1"),
        ("width = 8", "with = 8", "did you mean"),
        ("channels = 1", "channels = 2", "Input should be 1, 3 or 4"),
        ("channels = 1", "channels = 3", "mean has 1 numbers, channels is 3"),
        ('layout = "NHWC"', 'layout = "NWHC"', "Input should be 'NCHW'"),
        ("std = [0.5]", "std = [0.0]", "std has a 0"),
        ('resize = "fit"', 'resize = "best"', "'stretch', 'fit', 'crop' or 'exact'"),
        ('field = "photo"', 'field = ["photo", "other"]', "one part of the form, not several"),
        ('field = "photo"', 'field = "photo"\nshape = [1]', "shape has no meaning for an image"),
        ('field = "photo"', 'field = "photo"\nbatch = "row"', "batch has no meaning for an image"),
        ('field = "photo"', 'field = "photo"\ndatatype = "BYTES"', "does not become BYTES"),
        ('"items.*.price"]', '"items..price"]', "'items..price' is not a path"),
        ('["person.age", "items.*.price"]', "[]", "is an empty list"),
        ('datatype = "FP32"', 'datatype = "float"', "'float' is not one of BOOL"),
        ("shape = [-1, 2]", "shape = [-2, 2]", "or -1 for any"),
        ('input = "age"', 'input = "pixels"', "inputs: the tensor 'pixels' is there twice"),
        ("top = 3", "top = 0", "greater than or equal to 1"),
        ('form = "top"', 'form = "argmax"', "top has no use with form = 'argmax'"),
        ('form = "top"\ntop = 3', 'form = "values"', "labels have no use with form = 'values'"),
        ("decimals = 4", "decimals = -1", "greater than or equal to 0"),
        ("decimals = 4", "decimal = 4", "did you mean"),
        ("softmax = true", 'softmax = "perhaps"', "valid boolean"),
    ],
)
def test_a_wrong_value_is_an_error_at_the_start_that_says_what_to_do(old: str, new: str, said: str) -> None:
    assert WHOLE.count(old) == 1
    with pytest.raises(SettingsError, match="aliases") as caught:
        built(WHOLE.replace(old, new))
    assert said in str(caught.value) and "/x/modelkeep.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("image = { width = 1, height = 1, channels = 3, layout = 'NHW' }", "layout NHW has no C"),
        ("image = { width = 8192, height = 8192, channels = 3 }", "is more than"),
        ("image = { width = 1, height = 1 }\ndefault = 3", "default has no meaning for an image"),
    ],
)
def test_a_picture_that_no_tensor_holds_is_refused(more: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        built(HEAD + f'[[aliases.inputs]]\ninput = "x"\n{more}\n')


def test_two_pictures_need_names() -> None:
    image = "image = { width = 1, height = 1 }\n"
    both = "".join(f'[[aliases.inputs]]\ninput = "{name}"\n{image}' for name in "ab")
    with pytest.raises(SettingsError, match="are both the first file: give each a field"):
        built(HEAD + both)
    named = "".join(f'[[aliases.inputs]]\ninput = "{name}"\nfield = "{name}"\n{image}' for name in "ab")
    assert len(built(HEAD + named).aliases[0].inputs) == 2


def test_no_endpoint_of_the_server_can_be_taken() -> None:
    """docs/API.md has them all: another test holds it against the server."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "API.md").read_text(encoding="utf-8")
    paths = {path for path in re.findall(r"^\| (?:GET|POST|DELETE) \| `([^`\[]+)", page, flags=re.MULTILINE)} - {"/"}
    assert len(paths) > 20
    for path in paths:
        with pytest.raises(ValidationError, match="is the server's own"):
            Alias(path=re.sub(r"[{}]", "", path), model="m")
