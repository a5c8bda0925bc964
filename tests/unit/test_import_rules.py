"""The import rules of docs/ARCHITECTURE.md: imports go down only, and what is heavy is imported where it is used."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("blocks", "deployments", "flows", "modelkeep", "registry", "serving", "tasks")

# Which other rooms a room may import. The command line (modelkeep) puts everything together, so nothing may import it.
MAY_IMPORT: dict[str, set[str]] = {
    "registry": set(),
    "serving": {"registry"},
    "tasks": {"registry"},
    "blocks": {"registry"},
    "flows": {"tasks", "blocks", "registry"},
    "deployments": {"flows", "blocks", "registry"},
    "modelkeep": {"blocks", "deployments", "flows", "registry", "serving", "tasks"},
}
WITHOUT_PREFECT = ("registry", "serving", "tasks")

# Too slow or too large for the top of a module that the command line or the server loads.
HEAVY = {
    "alembic",
    "boto3",
    "botocore",
    "chromadb",
    "great_expectations",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "prefect",
    "scipy",
    "sklearn",
    "torch",
}
# The rooms that exist to be loaded by Prefect, and what is loaded only when the schema has to change.
MAY_LOAD_AT_TOP: dict[str, set[str]] = {
    "flows": {"prefect"},
    "blocks": {"prefect"},
    "deployments": {"prefect"},
    "registry/ddl.py": {"alembic"},
    "registry/migrate.py": {"alembic"},
    "registry/migrations": {"alembic"},
}


@dataclass(frozen=True)
class Import:
    """One imported module, where, and whether importing the file alone is enough to load it."""

    path: str
    line: int
    module: str
    at_top: bool

    @property
    def root(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_in(node: ast.AST, path: str, *, at_top: bool = True) -> Iterator[Import]:
    """All imports below a node, `import_module("…")` too; what only type checkers see is not at the top."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(path, child.lineno, alias.name, at_top)
        elif isinstance(child, ast.ImportFrom):
            if child.level:
                package = path.removesuffix(".py").split("/")[: -child.level]
                module = ".".join([*package, child.module] if child.module else package)
            else:
                module = child.module or ""
            yield Import(path, child.lineno, module, at_top)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_in(child, path, at_top=False)
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            yield from imports_in(ast.Module(body=child.body, type_ignores=[]), path, at_top=False)
            yield from imports_in(ast.Module(body=child.orelse, type_ignores=[]), path, at_top=at_top)
        else:
            if isinstance(child, ast.Call) and child.args and isinstance(child.args[0], ast.Constant):
                called = child.func.attr if isinstance(child.func, ast.Attribute) else getattr(child.func, "id", "")
                name = child.args[0].value
                if called in {"import_module", "__import__"} and isinstance(name, str):
                    yield Import(path, child.lineno, name, at_top)
            yield from imports_in(child, path, at_top=at_top)


def imports_of_room(room: str) -> list[Import]:
    found: list[Import] = []
    for file in sorted((ROOT / room).rglob("*.py")):
        path = file.relative_to(ROOT).as_posix()
        found.extend(imports_in(ast.parse(file.read_text(encoding="utf-8"), filename=path), path))
    return found


def broken_rules(room: str, imports: list[Import]) -> list[str]:
    """What the imports of one room break, in words."""
    broken = []
    for one in imports:
        if one.root in ROOMS and one.root != room and one.root not in MAY_IMPORT[room]:
            broken.append(f"{one}, but {room} may import {', '.join(sorted(MAY_IMPORT[room])) or 'no other room'}")
        if one.root in {"tests", "benchmarks", "scripts"}:
            broken.append(f"{one}, which is not shipped")
        if one.root == "prefect" and room in WITHOUT_PREFECT:
            broken.append(f"{one}, but {room} must work without Prefect")
        places = [place for place in MAY_LOAD_AT_TOP if one.path == place or one.path.startswith(f"{place}/")]
        allowed = {name for place in places for name in MAY_LOAD_AT_TOP[place]}
        if one.at_top and one.root in HEAVY - allowed:
            broken.append(f"{one} at its top, but {one.root} must be imported where it is used")
    return broken


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it_and_nothing_heavy_at_the_top(room: str) -> None:
    assert broken_rules(room, imports_of_room(room)) == []


def test_the_rules_name_every_room_of_the_repository() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "scripts"}
    assert packages == set(ROOMS) == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("room", "source", "rule"),
    [
        ("registry", "from serving.api import create_app", "may import no other room"),
        ("serving", "import tasks.judgement", "may import registry"),
        ("tasks", "def run():\n    from serving import probe", "may import registry"),
        ("flows", "from serving import api", "may import blocks, registry, tasks"),
        ("flows", "import modelkeep.cli", "may import blocks, registry, tasks"),
        ("blocks", "from tasks import validation", "may import registry"),
        ("tasks", "def run():\n    import prefect", "must work without Prefect"),
        ("serving", "def run():\n    importlib.import_module('prefect')", "must work without Prefect"),
        ("serving", "try:\n    import torch\nexcept ImportError:\n    torch = None", "imported where it is used"),
        ("modelkeep", "class Demo:\n    import sklearn.datasets", "imported where it is used"),
        ("registry", "import tests.support", "not shipped"),
    ],
)
def test_a_broken_rule_is_found(room: str, source: str, rule: str) -> None:
    broken = broken_rules(room, list(imports_in(ast.parse(source), f"{room}/example.py")))
    assert len(broken) == 1
    assert rule in broken[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("serving/example.py", "def run():\n    import torch"),
        ("serving/example.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("serving/example.py", "from . import routing\nfrom registry.errors import RefusedError"),
        ("flows/example.py", "from prefect import flow\nimport tasks.judgement"),
        ("registry/migrations/env.py", "from alembic import context"),
    ],
)
def test_what_the_rules_allow_is_not_found(path: str, source: str) -> None:
    assert broken_rules(path.partition("/")[0], list(imports_in(ast.parse(source), path))) == []


SERVING = (
    ("process", "statuses"),
    ("device", "traffic", "wire"),
    ("figures",),
    ("compute",),
    ("caching",),
    ("access",),
    ("http",),
    ("state", "supervisor"),
    ("admission",),
    ("text",),
    ("loaded", "replay"),
    ("follow", "probe"),
    ("views",),
    ("api",),
    ("entry",),
    ("child",),
)
"""The rooms of serving/, the lowest first, and the modules beside them: each imports only what stands before it. Types are free."""


def upward_imports(path: str, source: str) -> list[str]:
    """What a file of serving/ imports of serving/ from its own line of SERVING, or one after it; not what only type checkers see."""
    heights = {name: height for height, names in enumerate(SERVING) for name in names}

    def of(module: str) -> str:
        return module.split(".")[1] if module.count(".") else ""

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and is_type_checking(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").partition(".")[0] == "serving":
                yield from [f"{child.module}.{alias.name}" for alias in child.names]
            elif isinstance(child, ast.Import):
                yield from [alias.name for alias in child.names if alias.name.startswith("serving.")]
            else:
                yield from walk(child)

    here = of(path.removesuffix(".py").replace("/", "."))
    return [
        f"{path} imports {module}"
        for module in walk(ast.parse(source))
        if of(module) != here and heights[of(module)] >= heights[here]
    ]


def test_the_rooms_of_serving_import_only_what_lies_below_them() -> None:
    files = sorted((ROOT / "serving").rglob("*.py"))
    names = {file.relative_to(ROOT / "serving").parts[0].removesuffix(".py") for file in files} - {"__init__"}
    assert names == {name for row in SERVING for name in row}
    found = [
        one
        for file in files
        if file != ROOT / "serving" / "__init__.py"
        for one in upward_imports(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from serving.follow import reconcile", True),
        ("def run():\n    from serving.state import Serving", True),
        ("import serving.api", True),
        ("from serving import child", True),
        ("if TYPE_CHECKING:\n    from serving.state import Serving", False),
        ("from serving.device.loads import taken\nfrom serving.compute.engine import LoadedVersion", False),
    ],
)
def test_an_import_upwards_in_serving_is_found(source: str, found: bool) -> None:
    assert bool(upward_imports("serving/compute/example.py", source)) is found


SERVER = """
import importlib, importlib.util, json, sys
from pathlib import Path

for name in ("serving.api", "serving.follow.reconcile", "serving.child"):
    if importlib.util.find_spec(name) is not None:
        importlib.import_module(name)
importlib.import_module("registry.settings").load_settings()
runtime = importlib.import_module("serving.compute.runtimes").load_runtime(Path(sys.argv[1]), "onnx", signature=None)
import numpy
outputs = runtime.run({"x": numpy.ones((2, 3), dtype=numpy.float32)}, None)
runtime.close()
print(json.dumps({"y": outputs["y"].tolist(), "loaded": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def small_onnx_model(path: Path) -> Path:
    """y = x + x, with a free batch dimension."""
    from onnx import TensorProto, helper, save

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return path


def run_alone(code: str, *arguments: str, home: Path) -> str:
    """Runs code in a fresh interpreter without the working directory in its path; answers the last line it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MODELKEEP_")}
    environment |= {"PYTHONPATH": str(ROOT), "MODELKEEP_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=home,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_server_with_an_onnx_model_imports_neither_prefect_nor_torch(tmp_path: Path) -> None:
    model = small_onnx_model(tmp_path / "double.onnx")
    result = json.loads(run_alone(SERVER, str(model), home=tmp_path))
    assert result["y"] == [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    assert {"onnxruntime", "serving", "registry"} <= set(result["loaded"])
    assert set(result["loaded"]).isdisjoint(HEAVY - {"onnxruntime"})


def test_the_command_line_starts_without_anything_heavy(tmp_path: Path) -> None:
    code = "import json, sys, modelkeep.cli; print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    loaded = set(json.loads(run_alone(code, home=tmp_path)))
    assert "modelkeep" in loaded
    assert loaded.isdisjoint(HEAVY)
