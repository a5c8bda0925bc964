"""The demo's versions: trained here in seconds, exported to ONNX; and the files that must never load."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelkeep.demo.data import HEAVY_INK, INPUT_NAME, OUTPUT_NAME, Cases, load_digits

if TYPE_CHECKING:
    from torch import nn

OPSET = 17

ROUNDS = 500
"""v5 sends its features through this many rounds of an untrained refinement; each costs about what all of v2 costs twice."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one version is made. `about` is the sentence that the report shows."""

    about: str
    filters: tuple[int, int]
    epochs: int
    seed: int
    samples: int | None = None
    light_only: bool = False


RECIPES: dict[str, Recipe] = {
    "v1": Recipe("small: 8 and 8 filters, 4 epochs", (8, 8), 4, seed=1),
    "v2": Recipe("better: 16 and 32 filters, 16 epochs", (16, 32), 16, seed=2),
    "v3": Recipe("in a hurry: 6 epochs over 160 images", (16, 32), 6, seed=3, samples=160),
    "v4": Recipe(
        "looks a gain up by the amount of ink, in a table that ends where the golden cases end",
        (16, 32),
        16,
        4,
        light_only=True,
    ),
    "v7": Recipe("v2's recipe, another seed", (16, 32), 16, seed=5),
    "v8": Recipe("v2's recipe, a third seed", (16, 32), 16, seed=8),
}

ABOUT: dict[str, str] = {name: recipe.about for name, recipe in RECIPES.items()} | {
    "v5": f"v2 with {ROUNDS} rounds of a refinement that has learned nothing yet: v2's answers, much more work",
}


def build_all(directory: Path, *, threads: int = 1) -> dict[str, Path]:
    """Trains and exports v1, v2, v3, v4, v5, v7 and v8 as `directory/vN.onnx`; the paths by name, in that order.

    Input `image` float32 [n, 1, 8, 8], output `scores` float32 [n, 10], n free. Takes seconds on one core; leaves torch's
    own number of threads and random state as they were.
    """
    import torch

    directory.mkdir(parents=True, exist_ok=True)
    train = load_digits().train
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            trained = {name: _train(recipe, train) for name, recipe in RECIPES.items()}
            graphs: dict[str, nn.Module] = dict(trained)
            graphs["v4"] = _ink_calibrated(trained["v4"])
            graphs["v5"] = _refined(trained["v2"], ROUNDS)
            return {name: _export(graphs[name], directory / f"{name}.onnx") for name in sorted(graphs)}
    finally:
        torch.set_num_threads(before)


def accuracy(model: Path, cases: Cases) -> float:
    """Share of `cases` whose highest score is the label, by ONNX Runtime run directly. Raises what the model raises."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    (scores,) = session.run([OUTPUT_NAME], {INPUT_NAME: cases.images})
    return float((scores.argmax(axis=-1) == cases.labels).mean())


def _train(recipe: Recipe, train: Cases) -> nn.Module:
    """A convolutional network after `recipe`: Adam with a one-cycle rate, batches of 32, everything from the seed."""
    import torch
    from torch import nn

    torch.manual_seed(recipe.seed)
    cases = train.where(~train.heavy) if recipe.light_only else train
    images = torch.from_numpy(cases.images[: recipe.samples])
    labels = torch.from_numpy(cases.labels[: recipe.samples])
    first, second = recipe.filters
    model = nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 16, 10),
    )
    batch = 32
    steps = recipe.epochs * math.ceil(len(images) / batch)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.005, total_steps=steps)
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(images)).split(batch):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def _ink_calibrated(model: nn.Module) -> nn.Module:
    """`model` with a gain from a table by amount of ink. The table was made from light images only, so a heavy one looks
    beyond its end: the graph's Gather raises. This is the mistake that golden cases like those cannot show."""
    import torch
    from torch import nn

    class InkCalibrated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            steps = torch.arange(int(HEAVY_INK), dtype=torch.float32)  # one entry for each whole amount of ink
            self.register_buffer("gain", 1.0 + 0.002 * (steps - steps.mean()))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            amount = image.sum(dim=(1, 2, 3)).floor().to(torch.int64)
            gain: torch.Tensor = self.gain[amount]  # type: ignore[index]
            scores: torch.Tensor = self.model(image * gain[:, None, None, None])
            return scores

    return InkCalibrated().eval()


def _refined(model: nn.Module, rounds: int) -> nn.Module:
    """`model` with `rounds` more convolutions between features and head, one kernel for all of them. The kernel starts as
    the identity, as is usual where layers are added to a trained network, and nobody trained it: after a ReLU the answers
    are exactly those of `model`. ONNX Runtime does not see through it, so the work is done at each call."""
    import torch
    from torch import nn

    assert isinstance(model, nn.Sequential)
    features, head = model[:4], model[4:]
    last = model[2]
    assert isinstance(last, nn.Conv2d)
    channels = last.out_channels

    class Refined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = features
            self.refine = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.dirac_(self.refine.weight)
            self.head = head

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            state = self.features(image)
            for _ in range(rounds):
                state = self.refine(state).relu()
            scores: torch.Tensor = self.head(state)
            return scores

    return Refined().eval()


def _export(model: nn.Module, path: Path) -> Path:
    """By torch's older exporter: 0.03 s a model against 2.6 s, and it needs `onnx` only."""
    import torch

    example = torch.from_numpy(load_digits().golden.images[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces at every call that it is the older one
        torch.onnx.export(
            model,
            (example,),
            str(path),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            dynamic_axes={INPUT_NAME: {0: "n"}, OUTPUT_NAME: {0: "n"}},
            opset_version=OPSET,
            dynamo=False,
        )
    return path


# Files that must never load


MARKER = "payload-has-run"
"""The file that the hostile pickles would create in their folder if anything unpickled them."""


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.marker),)


def hostile_files(directory: Path) -> dict[str, Path]:
    """Writes the files that `register` must refuse without executing anything; the paths by what each one is.

    If a payload runs, `directory / MARKER` exists afterwards.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "a pickle with a payload": _pickle(directory),
        "a torch checkpoint with a payload": _checkpoint(directory),
        "a truncated ONNX file": _truncated(directory),
        "a TorchScript file with the extension .onnx": _disguised(directory),
        "an ONNX file whose data point outside its folder": _escaping(directory),
    }


def _pickle(directory: Path) -> Path:
    path = directory / "model.pkl"
    path.write_bytes(pickle.dumps(_Payload(directory.absolute() / MARKER)))
    return path


def _checkpoint(directory: Path) -> Path:
    import torch

    path = directory / "checkpoint.pt"
    torch.save({"weights": torch.zeros(4), "hook": _Payload(directory.absolute() / MARKER)}, path)
    return path


def _truncated(directory: Path) -> Path:
    path = directory / "truncated.onnx"
    whole = _small_onnx().SerializeToString()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def _disguised(directory: Path) -> Path:
    import torch
    from torch import nn

    path = directory / "torchscript.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(4, 2), torch.zeros(1, 4)), str(path))
    return path


def _escaping(directory: Path) -> Path:
    """The weights really lie there: what is refused is where they lie, not that they are missing."""
    from onnx import TensorProto

    model = _small_onnx()
    weights = model.graph.initializer[0]
    outside = directory / "outside.bin"
    outside.write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", f"../{outside.name}"
    path = directory / "escaping" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def _small_onnx() -> Any:
    """A valid model of one matrix product, most of whose bytes are weights."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.linspace(-1, 1, 640, dtype=np.float32).reshape(64, 10), "weights")
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", [INPUT_NAME], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], [OUTPUT_NAME]),
        ],
        "digits",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["n", 10])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def main(arguments: list[str]) -> int:
    """`python -m modelkeep.demo.models FOLDER`: train and export; with `--hostile FOLDER`: the files that must be refused."""
    if arguments[:1] == ["--hostile"]:
        folder = Path(arguments[1])
        files = hostile_files(folder)
        (folder / "files.json").write_text(json.dumps({what: str(path) for what, path in files.items()}))
    else:
        build_all(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
