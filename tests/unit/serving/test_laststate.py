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


def test_of_a_model_that_does_not_load_it_has_what_loads_and_of_the_others_what_is_wanted() -> None:
    def wanted(model: str, version: str) -> Wanted:
        return Wanted(model, version, version * 64, "onnx", (), None, True)

    before = LastState(
        "e",
        7,
        (Route("a", 3, "1"), Route("b", 7, "1", "2", 0.5)),
        (wanted("a", "1"), wanted("b", "1"), wanted("b", "2")),
    )
    new = LastState(
        "e", 9, (Route("a", 8, "2"), Route("b", 9, "2", "3", 0.5), Route("c", 4, "1")),
        (wanted("a", "2"), wanted("b", "2"), wanted("b", "3"), wanted("c", "1")),
    )  # fmt: skip

    def routes(*errors: tuple[str, str], last: LastState | None = before) -> list[tuple[str | None, str | None]]:
        found = laststate.as_it_loads(new, errors, last)
        assert {route.generation for route in found.routes} == {8, 9, 4} and found.generation == 8
        named = {(route.model, name) for route in found.routes for name in (route.stable, route.candidate) if name}
        assert found.by_key().keys() == named
        return [(route.stable, route.candidate) for route in found.routes]

    assert laststate.as_it_loads(new, (), before) is new
    assert routes(("b", "3")) == [("2", None), ("2", None), ("1", None)]
    assert routes(("b", "2")) == [("2", None), ("1", None), ("1", None)], "the new candidate is not judged beside that"
    assert routes(("a", "2"), ("c", "1")) == [("1", None), ("2", "3"), ("1", None)], "c has none before it"
    assert routes(("a", "2"), last=None) == [("2", None), ("2", "3"), ("1", None)]


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
