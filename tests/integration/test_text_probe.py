"""A text model in the probe: golden continuations, independence of texts, timing, and a replay of the golden prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from torch import Tensor, nn

from benchmarks import _text_model
from registry import formats, intake
from serving.text import trial
from serving.text.asked import generate, keep
from serving.text.sequences import Wanted
from serving.text.words import Words
from serving.traffic.capture import name_of
from tasks.probe import ProbeJob, ProbeModel, ProbeResult, run_probe

PROMPTS = [
    "The data set contains",
    "Test prompt",
    "a",
    "Number of instances: 150. Each",
    "What is it?",
    "mean value of",
]
MOST = 12


def model(seed: int = 0) -> ProbeModel:
    return ProbeModel(_text_model.kept(seed) / "model" / "model.onnx", "onnx")


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, and how model 0 goes on, by a plain loop in torch."""
    folder = _text_model.kept(0)
    words, decoder = Words.read(folder / "model" / "tokenizer.json"), _text_model.in_torch(folder)
    texts = [words.decode(decoder.greedy(words.encode(prompt), MOST, 0)) for prompt in PROMPTS]
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    prompts, counts = np.array(PROMPTS), np.full(len(PROMPTS), MOST)
    np.savez(path, **{"input.prompt": prompts, "input.max_tokens": counts, "output.text": np.array(texts)})
    assert intake.look_into_golden(path)["cases"] == len(PROMPTS)
    return path


def probe(candidate: ProbeModel, **how: object) -> ProbeResult:
    return run_probe(ProbeJob(candidate, **how), timeout_seconds=120, memory_mb=4000)  # type: ignore[arg-type]


def test_golden_continuations_are_checked_and_texts_are_found_to_be_independent(golden: Path) -> None:
    result = probe(model(0), stable=model(1), golden=golden)
    assert result.outcome == "done", result
    good, other = result.candidate, result.stable
    assert good is not None and good.golden is not None and other is not None and other.golden is not None
    assert good.golden.outputs == [1] * len(PROMPTS) and good.golden.accuracy == 1.0
    assert other.golden.accuracy is not None and other.golden.accuracy < 1.0, "another model says other things"
    assert good.rows_independent is True and good.latency is not None and good.latency.samples > 0
    assert good.signature is not None and [spec.name for spec in good.signature.inputs] == ["prompt", "max_tokens"]


def test_a_replay_of_golden_prompts_compares_texts(golden: Path) -> None:
    result = probe(model(0), stable=model(1), golden=golden, replay=len(PROMPTS))
    assert result.outcome == "done" and result.replay is not None, result
    assert result.replay["compared"] == len(PROMPTS) and result.replay["disagreements"]["exact"] > 0


def test_a_replay_of_captured_texts_asks_both_versions_with_the_same_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "captured"
    folder.mkdir()
    for number in range(20):
        body = {"model": "writer", "prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 9, "temperature": 1.5}
        asked = generate(orjson.dumps({**body, "seed": number}))
        wanted = Wanted((), asked.max_tokens, asked.sampling, asked.stops)
        (folder / name_of(number, None, text=True)).write_bytes(keep(asked, wanted))
    same = probe(model(0), stable=model(0), replay=20, captured=folder)
    assert same.outcome == "done" and same.replay is not None, same
    assert same.replay["compared"] == 20 and same.replay["disagreements"] == {"top": 0, "tolerance": 0, "exact": 0}


def test_a_text_model_that_cannot_generate_does_not_load(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(_text_model.kept(0) / "model", folder)
    toml = folder / "model.toml"
    toml.write_text(toml.read_text().replace("[text]", '[text]\npast = "nothing."'))
    result = probe(ProbeModel(folder / "model.onnx", "onnx"))
    assert result.candidate is not None and not result.candidate.loaded
    assert "past_key_values.0.key" in (result.candidate.error or "")


@pytest.mark.parametrize("cached", [True, False])
def test_torchscript_generates_the_same_with_a_cache_and_without(tmp_path: Path, cached: bool) -> None:
    """A graph without a cache is computed over the whole texts, of different lengths at the same time."""
    decoder, kept = _text_model.in_torch(_text_model.kept(0)), _text_model.kept(0) / "model"
    layers = [f"{layer}.{kind}" for layer in range(decoder.layers) for kind in ("key", "value")]
    size = decoder.width // _text_model.HEADS
    tensors = {
        "inputs": [(name, "INT64", [-1, -1]) for name in ("input_ids", "attention_mask", "position_ids")],
        "outputs": [("logits", "FP32", [-1, -1, _text_model.WORDS])],
    }
    if cached:
        for side, prefix in (("inputs", "past_key_values"), ("outputs", "present")):
            tensors[side] += [(f"{prefix}.{name}", "FP32", [-1, _text_model.HEADS, -1, size]) for name in layers]
    module = decoder if cached else _Whole(decoder)
    past = [torch.zeros(2, _text_model.HEADS, 3 if cached else 0, size) for _ in layers]
    example = (
        torch.zeros(2, 4, dtype=torch.long),
        torch.ones(2, 7 if cached else 4, dtype=torch.long),
        torch.arange(4).expand(2, 4),
    )
    folder = tmp_path / "model"
    folder.mkdir()
    with torch.no_grad():
        traced = torch.jit.trace(module, (*example, *(past if cached else [])), check_trace=False)
    traced.save(str(folder / "model.pt"))
    shutil.copy(kept / "tokenizer.json", folder)
    lines = ["[text]", f"context_length = {_text_model.CONTEXT}", "eos_ids = [0]"]
    for side, specs in tensors.items():
        for name, datatype, shape in specs:
            lines += [f"[[{side}]]", f'name = "{name}"', f'datatype = "{datatype}"', f"shape = {shape}"]
    (folder / "model.toml").write_text("\n".join(lines))
    found = formats.inspect(folder, max_bytes=1 << 30)
    assert found.format == "torchscript" and found.metadata["text"]["cache_tensors"] == (len(layers) if cached else 0)
    runtime = trial.load(folder / "model.pt", "torchscript", signature=found.toml.signature)
    assert isinstance(runtime, trial.TextRuntime)
    answer = runtime.run({"prompt": np.array(PROMPTS), "max_tokens": np.full(len(PROMPTS), MOST)}, None)
    words = Words.read(kept / "tokenizer.json")
    expected = [words.decode(decoder.greedy(words.encode(prompt), MOST, 0)).encode() for prompt in PROMPTS]
    assert answer["text"].tolist() == expected


class _Whole(nn.Module):
    """The decoder without its cache: logits alone come out."""

    def __init__(self, decoder: _text_model.Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        found: Tensor = self.decoder(ids, mask, positions, *self.decoder.empty(ids.shape[0]))[0]
        return found
