"""No modules of the server import each other in a circle, late imports in functions included: each can be read after those that it names.

What only type checkers see does not count here: docs/ARCHITECTURE.md names the circles that are left there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.unit.test_import_rules import ROOT, is_type_checking

WITHOUT_CIRCLES = ("blocks", "deployments", "flows", "serving")


def modules(folder: Path, room: str) -> dict[str, Path]:
    """The modules of a room by their dotted names."""
    found = {}
    for path in sorted((folder / room).rglob("*.py")):
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """What running the code below a node, all of its functions too, would import of these modules."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            yield from imported(ast.Module(body=child.orelse, type_ignores=[]), known)
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                yield from (name for name in (inner if inner in known else child.module,) if name in known)
        yield from imported(child, known)


def circle(folder: Path, room: str) -> list[str]:
    """The modules of one circle, in its order; none where there is none."""
    known = modules(folder, room)
    graph = {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), known)) - {name} for name, path in known.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("room", WITHOUT_CIRCLES)
def test_no_modules_of_a_room_import_each_other_in_a_circle(room: str) -> None:
    assert circle(ROOT, room) == []


def test_a_circle_through_a_function_is_found_and_one_of_types_is_none(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (room / "__init__.py").write_text("")
    (room / "a.py").write_text("from room import b\n")
    (room / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from room.a import A\nelse:\n    import json\n"
    )
    assert circle(tmp_path, "room") == []
    (room / "b.py").write_text("def late():\n    from room.c import d\n")
    (room / "c.py").write_text("import room.a\n")
    assert set(circle(tmp_path, "room")) == {"room.a", "room.b", "room.c"}
