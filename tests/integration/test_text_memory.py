"""Texts over ONNX Runtime's own arena, with a limit: it really runs out, and every text ends as it does alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import _text_model

ROOT = Path(__file__).resolve().parents[2]

# A process has one such arena, for good.
SCRIPT = """
import json, sys
from pathlib import Path
from registry.errors import ModelkeepError
from registry.textmodels import beside
from serving.device.devices import Place
from serving.compute.runtimes import load_runtime
from serving.text.batching import Batcher
from serving.text.caches import unlimited
from serving.text.sampling import Sampling
from serving.text.sequences import TextSequence, Wanted
from serving.text.words import Words

path = Path(sys.argv[1])
shortages = []

def generated(place, prompts, together):
    runtime = load_runtime(path, "onnx", signature=None, place=place)
    model = beside(path, runtime.signature)
    words = Words.read(model.tokenizer)

    def ran_out(error):
        shortages.append(str(error)[:80])  # the error itself would hold what was computed
        runtime.trim()

    batches = Batcher(
        runtime.run, model, runtime.signature, max_running=together, max_rows=together, share=unlimited(model),
        failure=lambda error: error if isinstance(error, ModelkeepError) else ModelkeepError(str(error)), ran_out=ran_out,
    )
    texts = [TextSequence(Wanted(prompt, 200, Sampling(temperature=0.0), (), True), words, model.end_ids) for prompt in prompts]
    batches.waiting.extend(texts)
    errors = []
    while batches.busy:
        errors += [str(piece.error) for _, piece in batches.step() if piece.error is not None]
    return [text.ids for text in texts], errors, batches.cut

words = Words.read(beside(path, load_runtime(path, "onnx", signature=None).signature).tokenizer)
said = ["The data set contains", "Test prompt", "Number of instances: 150. Each of the attributes", "a"]
prompts = [tuple(words.encode(prompt)) for prompt in said * 4]
limited, errors, cut = generated(Place(memory_bytes=int(sys.argv[2]), limited=True), prompts, 16)
ran_out = len(shortages)
alone, _, _ = generated(Place(), prompts[:4], 1)
right = sum(ids == alone[number % 4] for number, ids in enumerate(limited))
print(json.dumps({"right": right, "errors": errors, "cut": cut, "ran_out": ran_out}))
"""


def test_sixteen_texts_in_an_arena_that_runs_out_all_end_with_the_text_that_they_have_alone() -> None:
    """Their caches take 3.2 MB at the end, and each step asks for larger pieces than the one before."""
    model = _text_model.kept(0) / "model" / "model.onnx"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), str(12 << 20)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ran_out"] > 0, "the arena was large enough"
    assert (found["right"], found["errors"], found["cut"]) == (16, [], 0)
