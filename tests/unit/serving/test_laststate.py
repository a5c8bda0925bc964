"""The last good state on disk: what is written is read, and what is damaged is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from serving.loaded import laststate
from serving.loaded.laststate import LastState, Wanted
from serving.traffic.routing import Route

FILE = {"name": "v1.onnx", "digest": "a" * 64, "size_bytes": 3}
STATE = LastState(
    "epoch",
    7,
    (Route("digits", 7, "1", "2", 0.25, True, 0.5, True), Route("other", 3, None)),
    (Wanted("digits", "1", "a" * 64, "onnx", (FILE,), None, True, quality={"accuracy": 0.5}),),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last-state.json"
    laststate.write(path, STATE)
    assert laststate.read(path) == STATE
    laststate.write(path, LastState("other", 1, (), ()))
    assert laststate.read(path) == LastState("other", 1, (), ())
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_no_file_is_no_state(tmp_path: Path) -> None:
    assert laststate.read(tmp_path / "last-state.json") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"format": 2}',
        b'{"format": 1}',
        b'{"format": 1, "epoch": "x", "generation": "many", "routes": [], "versions": []}',
        b'{"format": 1, "epoch": "x", "generation": 1, "routes": [{"weight": 1}], "versions": []}',
        b'{"format": 1, "epoch": "x", "generation": 1, "routes": {"digits": 1}, "versions": []}',
        b'{"format": 1, "epoch": "x", "generation": 1, "routes": [], "versions": [1]}',
    ],
)
def test_a_damaged_file_raises_valueerror_whatever_the_damage(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "last-state.json"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        laststate.read(path)


@pytest.mark.parametrize("field", ["model", "generation", "stable", "candidate", "weight", "shadow", "watch"])
def test_a_route_with_a_value_of_another_kind_is_damage(tmp_path: Path, field: str) -> None:
    path = tmp_path / "last-state.json"
    laststate.write(path, STATE)
    document = json.loads(path.read_text())
    document["routes"][0] = {**asdict(STATE.routes[0]), field: ["?"]}
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="damaged"):
        laststate.read(path)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "last-state.json"
    laststate.write(path, STATE)
    unwritable = LastState("epoch", 8, (), (Wanted("m", "1", "d", "onnx", (), {"x": object()}, True),))
    with pytest.raises(TypeError):
        laststate.write(path, unwritable)
    assert laststate.read(path) == STATE
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
