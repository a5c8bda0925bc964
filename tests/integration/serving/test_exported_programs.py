"""torch.export programs behind the runtime protocol: models of many kinds compute as torch does, and a bad file runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]

# In a process of its own: whatever a framework does at its import stays away from the other tests.
SAVE_AND_COMPARE = """
import json, logging, sys, warnings
warnings.simplefilter("ignore"); logging.disable()
from pathlib import Path
import numpy as np, torch
from torch import nn
from registry.formats import inspect
from serving.compute.runtimes import load_runtime

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    def forward(self, x): return self.inner(x)
class Recurrent(nn.Module):
    def __init__(self):
        super().__init__(); self.inner = nn.LSTM(4, 5, batch_first=True)
    def forward(self, x): return self.inner(x)[0]
class NoGrad(nn.Module):
    def __init__(self):
        super().__init__(); self.inner = nn.Linear(4, 2)
    def forward(self, x):
        with torch.no_grad(): y = self.inner(x)
        return {"y": y, "x": x * 2}
class Words(nn.Module):
    def __init__(self):
        super().__init__(); self.inner = nn.EmbeddingBag(9, 3, mode="sum")
    def forward(self, tokens, *, scale): return self.inner(tokens) * scale
class Mixed(nn.Module):
    def forward(self, x):
        n = x.shape[0] * 2
        y = torch.einsum("ij,kj->ik", x, x).sum(1)
        return torch.cat([y, y]).reshape(n // 2, 2), x > 0, torch.where(x > 0, x, torch.zeros_like(x)).amax(1)
class Branch(nn.Module):
    def forward(self, x): return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
f = lambda *shape: torch.randn(*shape)
cases = {
    "conv": (conv, (f(3, 1, 8, 8),), {}, True), "attention": (Attention(), (f(3, 5, 8),), {}, True),
    "recurrent": (Recurrent(), (f(3, 6, 4),), {}, True), "no_grad": (NoGrad(), (f(3, 4),), {}, True),
    "words": (Words(), (torch.randint(0, 9, (3, 4)),), {"scale": f(3, 1)}, True), "mixed": (Mixed(), (f(3, 4),), {}, True),
    "branch": (Branch(), (f(3, 4),), {}, False),
}
batch, said = torch.export.Dim("batch", min=1), {}
for name, (module, given, named, varies) in cases.items():
    module.eval()
    path = Path(sys.argv[1]) / f"{name}.pt2"
    shapes = {"kwargs": None}
    dynamic = None
    if varies:
        dynamic = tuple({0: batch} for _ in given) if not named else {"tokens": {0: batch}, "scale": {0: batch}}
    torch.export.save(torch.export.export(module, given, named, dynamic_shapes=dynamic), path)
    signature = inspect(path, max_bytes=1 << 30).signature
    runtime = load_runtime(path, "pt2", signature=None, threads=1)
    assert runtime.signature == signature
    for rows in ((1, 3, 5) if varies else (3,)):
        shapes = [(t.dtype.is_floating_point, (rows, *t.shape[1:])) for t in (*given, *named.values())]
        tensors = [torch.randn(shape) if floats else torch.randint(0, 9, shape) for floats, shape in shapes]
        inputs = {spec.name: t.numpy() for spec, t in zip(signature.inputs, tensors, strict=True)}
        got = runtime.run(inputs, None)
        with torch.inference_mode():
            want = module(*tensors[:len(given)], **dict(zip(named, tensors[len(given):])))
        if isinstance(want, dict): want = [want[key] for key in got]
        elif not isinstance(want, tuple): want = [want]
        for a, b in zip(got.values(), want, strict=True):
            assert np.allclose(a, b.numpy(), atol=1e-5), name
    assert runtime.memory_bytes >= path.stat().st_size
    runtime.close()
    said[name] = signature.as_dict()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("programs")
    done = subprocess.run(
        [sys.executable, "-c", SAVE_AND_COMPARE, str(folder)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_programs_of_many_kinds_answer_as_their_modules_do_at_any_batch(programs: tuple[Path, dict[str, Any]]) -> None:
    _, said = programs
    assert set(said) == {"conv", "attention", "recurrent", "no_grad", "words", "mixed", "branch"}
    assert said["words"]["inputs"] == [
        {"name": "tokens", "datatype": "INT64", "shape": [-1, 4]},
        {"name": "scale", "datatype": "FP32", "shape": [-1, 1]},
    ]
    assert [one["datatype"] for one in said["mixed"]["outputs"]] == ["FP32", "BOOL", "FP32"]


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


LOAD = """
import logging, sys, warnings
warnings.simplefilter("ignore"); logging.disable()
from pathlib import Path
from registry.errors import RefusedError
from serving.compute.runtimes import load_runtime
try:
    load_runtime(Path(sys.argv[1]), "pt2", signature=None)
except RefusedError as error:
    print("refused:", error)
"""


def with_member(source: Path, target: Path, member: str, content: bytes) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.partition("/")[2] == member else old.read(name))
    return target


def test_a_file_that_was_changed_after_its_registration_is_refused_at_load_and_runs_nothing(
    programs: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = programs
    mark, path = tmp_path / "ran", tmp_path / "m.pt2"
    with_member(folder / "conv.pt2", path, "data/sample_inputs/model.pt", pickle.dumps(Payload(mark), protocol=2))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "refused:" in done.stdout
    assert "sample_inputs" in done.stdout
    assert not mark.exists()
    # The attack is real: torch's own loader runs it.
    own = f"import torch; torch.export.load({str(path)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", own], capture_output=True, timeout=120, check=False)
    assert mark.exists()
