"""torch.export archives: what torch writes is read, whatever else is in one is refused. Nothing that is inspected may run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from registry import exportgraph
from registry.errors import RefusedError
from registry.exported import check, rewritten
from registry.formats import inspect
from registry.signature import TensorSpec

GIB = 1 << 30
GRAPH = "models/model.json"
EXAMPLE = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Payload:
    """Unpickled, it leaves a folder behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What torch.export.save writes: a dict of outputs from any batch, keyword arguments, and what is refused with a reason."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)
            self.register_buffer("scale", torch.tensor([2.0]))

        def forward(self, x: Any) -> Any:
            scores = self.linear(x) * self.scale + torch.arange(3.0)
            return {"scores": scores, "label": scores.argmax(-1)}

    class Keywords(torch.nn.Module):
        def forward(self, a: Any, *, b: Any) -> Any:
            return a + b, a.sum()

    class Nested(torch.nn.Module):
        def forward(self, pair: Any) -> Any:
            return pair[0] + pair[1]

    class Constant(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x + 1, 3

    folder = tmp_path_factory.mktemp("programs")
    batch = torch.export.Dim("batch", min=1)
    made = {
        "net": (Net().eval(), (torch.zeros(2, 4),), {}, {"x": {0: batch}}),
        "keywords": (Keywords(), (torch.zeros(2, 3),), {"b": torch.ones(3)}, None),
        "nested": (Nested(), ((torch.zeros(2), torch.zeros(2)),), {}, None),
        "constant": (Constant(), (torch.zeros(2),), {}, None),
        "training": (torch.nn.BatchNorm1d(4).train(), (torch.zeros(3, 4),), {}, None),
    }
    paths = {}
    for name, (module, given, named, shapes) in made.items():
        paths[name] = folder / f"{name}.pt2"
        torch.export.save(torch.export.export(module, given, named, dynamic_shapes=shapes), paths[name])
    return paths


def refusal(path: Path) -> str:
    with pytest.raises(RefusedError) as error:
        inspect(path, max_bytes=GIB)
    assert str(path) in str(error.value)
    return str(error.value)


def changed(source: Path, target: Path, change: Callable[[str, bytes], bytes | None], **added: bytes) -> Path:
    """A copy of an archive with members changed, left out or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            content = change(name.partition("/")[2], old.read(name))
            if content is not None:
                new.writestr(name, content)
        for name, content in added.items():
            new.writestr(f"{root}/{name}", content)
    return target


def edited(source: Path, target: Path, member: str, edit: Callable[[Any], None]) -> Path:
    """A copy of an archive with one of its JSON documents changed."""

    def change(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        document = json.loads(content)
        edit(document)
        return json.dumps(document).encode()

    return changed(source, target, change)


def test_a_program_is_described_by_its_graph(programs: dict[str, Path]) -> None:
    found = inspect(programs["net"], max_bytes=GIB)
    assert found.format == "pt2"
    assert found.signature is not None
    assert found.signature.inputs == (TensorSpec("x", "FP32", (-1, 4)),)
    assert found.signature.outputs == (TensorSpec("scores", "FP32", (-1, 3)), TensorSpec("label", "INT64", (-1,)))
    assert found.metadata["parameters"] == 15
    assert found.metadata["producer"].startswith("torch 2.13")
    assert found.metadata["nodes"] > 2
    assert "aten" in found.metadata["opset"]


def test_keyword_arguments_and_a_tuple_of_answers_have_names(programs: dict[str, Path]) -> None:
    program = check(programs["keywords"], max_bytes=GIB)
    assert [spec.name for spec in program.signature.inputs] == ["a", "b"]
    assert program.positional == 1
    assert program.signature.outputs == (TensorSpec("output_0", "FP32", (2, 3)), TensorSpec("output_1", "FP32", ()))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nested", "wrap the model so that it takes plain tensors"),
        ("constant", "no tensor (as_int)"),
        ("training", "call .eval()"),
    ],
)
def test_a_program_that_cannot_be_served_says_why(name: str, said: str, programs: dict[str, Path]) -> None:
    assert said in refusal(programs[name])


def test_looking_at_a_program_needs_no_torch(programs: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path; from registry.formats import inspect; "
        f"inspect(Path({str(programs['net'])!r}), max_bytes=1 << 30); "
        "print([name for name in ('torch', 'onnx', 'numpy', 'sympy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_part_of_the_graph_that_torch_knows_is_known_or_refused_here() -> None:
    """A torch that writes something new makes this fail, and then somebody looks at what it is."""
    from torch._export.serde import schema

    seen: set[Any] = set()

    def parts(kind: Any) -> None:
        if is_dataclass(kind) and kind not in seen:
            seen.add(kind)
            for hint in get_type_hints(kind, vars(schema)).values():
                parts(hint)
        for inner in get_args(kind):
            parts(inner)

    parts(schema.ExportedProgram)
    names = {field.name for kind in seen for field in fields(kind)}
    assert names - exportgraph.KNOWN_KEYS == set()
    assert len(names) > 80


# Attacks. Each would run code if the file were given to torch.export.load as it is.


def saved(value: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


MEMBERS = [
    *("archive_format", "archive_version", "byteorder", ".data/version", ".data/serialization_id"),
    *("data/weights/weight_0", WEIGHTS, CONSTANTS, EXAMPLE, GRAPH),
]


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "in torch.save"])
def test_a_pickle_in_any_member_is_refused_or_never_reaches_torch(
    member: str, wrapped: bool, programs: dict[str, Path], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    payload = saved(Payload(mark)) if wrapped else pickle.dumps(Payload(mark), protocol=2)
    path = changed(programs["net"], tmp_path / "m.pt2", lambda name, old: payload if name == member else old)
    if member.startswith((".data/", "data/weights/weight_")):
        # Numbers of the archive's own that nothing reads, and bytes of a weight, which are numbers whatever they are.
        clean = tmp_path / "clean.pt2"
        try:
            rewritten(path, clean, max_bytes=GIB)
        except RefusedError:
            pass
        else:
            with zipfile.ZipFile(clean) as archive:
                assert archive.read(f"model/{EXAMPLE}") == b""
                assert archive.read("model/.data/version") == b"6\n"
                assert "model/.data/serialization_id" not in archive.namelist()
    else:
        refusal(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("data/constants/custom_obj_0", "data/constants/opaque_obj_0", "data/aotinductor/model/x.so", "data/x.pkl"),
        *("models/other.json", "data/weights/model.pt", "data/constants/model.pt", "data/sample_inputs/other.pt"),
        *("data/weights/weight_99", "data/executorch/x", "code/x.py"),
    ],
)
def test_a_member_that_torch_export_never_writes_is_refused(
    name: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    mark = tmp_path / "ran"
    payload = pickle.dumps(Payload(mark), protocol=2)
    assert name in refusal(changed(programs["net"], tmp_path / "m.pt2", lambda _, old: old, **{name: payload}))
    assert not mark.exists()


def test_a_weight_that_is_a_pickle_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    def pickled(document: Any) -> None:
        next(iter(document["config"].values()))["use_pickle"] = True

    assert "is a pickle" in refusal(edited(programs["net"], tmp_path / "m.pt2", WEIGHTS, pickled))


def test_an_expression_of_a_size_that_would_be_evaluated_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    def evil(document: Any) -> None:
        sizes = document["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0]["as_expr"]["expr_str"] = f"__import__('os').mkdir({str(mark)!r})"

    path = edited(programs["net"], tmp_path / "m.pt2", GRAPH, evil)
    assert "no arithmetic on sizes" in refusal(path)
    assert not mark.exists()
    # The attack is real: torch itself would have run it.
    load = f"import torch, logging; logging.disable(); torch.export.load({str(path)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", load], capture_output=True, timeout=120, check=False)
    assert mark.exists()


def test_a_name_that_would_become_source_code_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    evil = 'x; __import__("os").system("true")'

    def rename(document: Any) -> None:
        text = json.dumps(document).replace('"name": "x"', f'"name": {json.dumps(evil)}')
        document.clear()
        document.update(json.loads(text))

    assert "name is" in refusal(edited(programs["net"], tmp_path / "m.pt2", GRAPH, rename))


@pytest.mark.parametrize(
    "target",
    [
        *("torch.hub.load", "torch.serialization.os.system", "torch.load", "torch.ops.load_library", "#ext:x"),
        *("torch.ops.aten.from_file.default", "torch.ops.aten.__class__.x", "_operator.attrgetter", "math.__loader__"),
        *("torch.ops.mine.op.default", "torch.ops.higher_order.flex_attention", "torch.ops.aten.add", "os.system"),
    ],
)
def test_an_operator_that_no_model_needs_is_refused(target: str, programs: dict[str, Path], tmp_path: Path) -> None:
    def retarget(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    assert target in refusal(edited(programs["net"], tmp_path / "m.pt2", GRAPH, retarget))


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0').__class__",
        "Pow(Integer(9), Pow(Integer(9), Integer(9)))",
        "Pow(Integer(2), Integer(1000000))",
        "Symbol('a b')",
        "Symbol('s0', commutative=print())",
        "lambda: 1",
        "[x for x in ()]",
        "Add(*range(9))",
        "Function('x')",
        "eval('1')",
        "Integer(" * 150 + "1" + ")" * 150,
        "1" * 5000,
        "Symbol('s0'",
    ],
)
def test_an_expression_is_arithmetic_on_symbols_or_refused(text: str) -> None:
    with pytest.raises(exportgraph.Foreign):
        exportgraph.check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Symbol('s0', integer=True), Integer(-1))",
        "Mul(Integer(2), Symbol('s0', positive=True, integer=True))",
        "FloorDiv(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Pow(Symbol('s0', positive=True, integer=True), Integer(2))",
        "Max(Integer(1), Symbol('u0', integer=True))",
    ],
)
def test_expressions_that_torch_writes_pass(text: str) -> None:
    exportgraph.check_expression(text)


def graph_part(*path: Any, value: Any) -> Callable[[Any], None]:
    def edit(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return edit


DEFAULTDICT = '[1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]'


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (graph_part("graph_module", "graph", "custom_obj_values", value={"x": {"name": "x", "class_fqn": "a.B"}}), "custom_obj_values"),
        (graph_part("graph_module", "treespec_namedtuple_fields", value={"os.x": {"field_names": ["a"]}}), "treespec_namedtuple_fields"),
        (graph_part("graph_module", "module_call_graph", 0, "signature", "in_spec", value=DEFAULTDICT), "defaultdict"),
        (graph_part("graph_module", "module_call_graph", 0, "signature", "in_spec", value="[2, {}]"), "not known here"),
        (graph_part("graph_module", "surprise", value=1), "surprise"),
        (graph_part("graph_module", value=[]), "not built as"),
        (graph_part("schema_version", value={"major": 1 << 70, "minor": 0}), "no size or number"),
        (graph_part("graph_module", "graph", "tensor_values", "x", "device", "type", value="cuda"), "move model and example to the CPU"),
        (graph_part("graph_module", "graph", "tensor_values", "x", "sizes", value=[{"as_int": -5}]), "has the size"),
        (graph_part("graph_module", "graph", "tensor_values", "x", "dtype", value=10), "cannot be served"),
    ],
)  # fmt: skip
def test_a_graph_that_torch_export_does_not_write_is_refused(
    edit: Callable[[Any], None], said: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    assert said in refusal(edited(programs["net"], tmp_path / "m.pt2", GRAPH, edit))


def test_python_source_that_checks_inputs_is_not_carried_over(programs: dict[str, Path], tmp_path: Path) -> None:
    """guards_code is executed by torch; so is nothing of it here."""
    path = edited(
        programs["net"], tmp_path / "m.pt2", GRAPH, graph_part("guards_code", value=["__import__('os').abort()"])
    )
    rewritten(path, tmp_path / "clean.pt2", max_bytes=GIB)
    with zipfile.ZipFile(tmp_path / "clean.pt2") as archive:
        document = json.loads(archive.read(f"model/{GRAPH}"))
    assert document["guards_code"] == []
    assert all(node["metadata"] == {} for node in document["graph_module"]["graph"]["nodes"])


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sizes", [{"as_int": 1 << 40}, {"as_int": 4}], "truncated or was exported without weights"),
        ("storage_offset", {"as_int": 1 << 30}, "truncated"),
        ("strides", [{"as_int": -4}, {"as_int": 1}], "has the size"),
        ("sizes", [{"as_int": True}], "has the size"),
        ("layout", 1, "cannot be served"),
    ],
)
def test_a_weight_that_claims_more_than_there_is_is_refused(
    key: str, value: Any, said: str, programs: dict[str, Path], tmp_path: Path
) -> None:
    def claim(document: Any) -> None:
        document["config"]["linear.weight"]["tensor_meta"][key] = value

    assert said in refusal(edited(programs["net"], tmp_path / "m.pt2", WEIGHTS, claim))


def test_a_weight_outside_its_folder_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    def wander(document: Any) -> None:
        document["config"]["linear.weight"]["path_name"] = "../../archive_format"

    assert "is not there" in refusal(edited(programs["net"], tmp_path / "m.pt2", WEIGHTS, wander))


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.7, 0.99, 0.999])
def test_a_truncated_program_is_refused(keep: float, programs: dict[str, Path], tmp_path: Path) -> None:
    whole = programs["net"].read_bytes()
    path = tmp_path / "m.pt2"
    path.write_bytes(whole[: int(len(whole) * keep)])
    said = refusal(path)  # cut at the right place, the end of the archive inside (the example) looks like its own
    assert "damaged or truncated" in said or "two readers" in said


def test_a_flipped_byte_is_refused_or_harmless_but_never_an_accident(programs: dict[str, Path], tmp_path: Path) -> None:
    whole, path = programs["net"].read_bytes(), tmp_path / "m.pt2"
    for position in range(0, len(whole), 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            inspect(path, max_bytes=GIB)
        except RefusedError as error:
            assert str(path) in str(error), position


def test_deep_nesting_is_refused_and_no_crash(programs: dict[str, Path], tmp_path: Path) -> None:
    deep = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
    refusal(changed(programs["net"], tmp_path / "m.pt2", lambda name, old: deep if name == GRAPH else old))


def test_a_zip_bomb_is_refused_before_it_unpacks(programs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    with zipfile.ZipFile(programs["net"]) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) if not name.endswith("weight_0") else bytes(64 << 20))
    assert "zip bomb" in refusal(path)


# Archives that two readers would read differently


def test_members_that_differ_in_case_only_are_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    path = changed(programs["net"], tmp_path / "m.pt2", lambda _, old: old, **{"models/MODEL.json": b"{}"})
    assert "same name" in refusal(path)


@pytest.mark.parametrize("place", ["before", "after", "comment"])
def test_bytes_around_the_archive_are_refused(place: str, programs: dict[str, Path], tmp_path: Path) -> None:
    whole, path = programs["net"].read_bytes(), tmp_path / "m.pt2"
    if place == "before":  # Python's reader shifts every offset by it, torch's does not
        path.write_bytes(b"PK\x03\x04" + bytes(60) + whole)
    elif place == "after":
        path.write_bytes(whole + b"PK" + bytes(20))
    else:
        path.write_bytes(whole)
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"hello"
    said = refusal(path)
    assert "two readers may see two models" in said or "damaged" in said


def test_a_torch_export_archive_under_another_extension_is_refused(programs: dict[str, Path], tmp_path: Path) -> None:
    for suffix in (".pt", ".onnx", ".zip"):
        path = tmp_path / f"m{suffix}"
        path.write_bytes(programs["net"].read_bytes())
        assert "name it .pt2" in refusal(path)
