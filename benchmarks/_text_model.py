"""A small language model for tests and benchmarks: trained in seconds on text inside a pinned wheel, exported with its key/value cache.

`build(folder)` writes what is registered into folder/model and the weights beside it; `Decoder` is the same model in torch, to compare with.
"""

from __future__ import annotations

import fcntl
import hashlib
import warnings
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONTEXT, WORDS, WIDTH, HEADS, LAYERS = 256, 512, 64, 4, 2
STEPS, BATCH, SPAN = 200, 12, 48
END = "<|end|>"
KEPT = Path(__file__).resolve().parents[1] / ".test-results" / "models"


def corpus() -> str:
    """The descriptions of scikit-learn's data sets: some 60,000 characters of English."""
    files = distribution("scikit-learn").files or []
    found = sorted((file for file in files if file.match("sklearn/datasets/descr/*.rst")), key=str)
    return "\n\n".join(Path(str(file.locate())).read_text(encoding="utf-8") for file in found)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, hidden: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`hidden` [texts, 1, new, all] is added to the scores; key and value are the cache, [texts, heads, before, size]."""
        texts, new, width = x.shape[0], x.shape[1], self.out.in_features
        parts = self.mixed(self.before(x)).reshape(texts, new, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        query, k, v = parts[0], parts[1], parts[2]
        key, value = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)
        scores = query @ key.transpose(2, 3) / (width // HEADS) ** 0.5 + hidden
        mixed = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).reshape(texts, new, width)
        x = x + self.out(mixed)
        return x + self.down(nn.functional.gelu(self.up(self.after(x)))), key, value


class Decoder(nn.Module):
    """Token ids in, logits and a longer cache out. Positions are learned, so a wrong one shows."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.width, self.layers = width, layers
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.last = nn.LayerNorm(width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        new, total = input_ids.shape[1], attention_mask.shape[1]
        rows = torch.arange(new).reshape(-1, 1) + (total - new)
        later = torch.arange(total).reshape(1, -1) > rows
        hidden = later[None, None] | (attention_mask[:, None, None, :] == 0)
        hidden = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, -1e9)
        x = self.words(input_ids) + self.places(position_ids)
        present: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            x, key, value = block(x, hidden, past[2 * number], past[2 * number + 1])
            present += [key, value]
        return self.last(x) @ self.words.weight.T, *present

    def greedy(self, ids: list[int], most: int, end: int) -> list[int]:
        """The continuation, by the plainest loop there is: the whole text again for each token, no cache, no batch."""
        ids, begin = list(ids), len(ids)
        with torch.inference_mode():
            while len(ids) - begin < most:
                token = int(self.logits(torch.tensor([ids]))[0, -1].argmax())
                if token == end:
                    break
                ids.append(token)
        return ids[begin:]

    def logits(self, ids: Tensor) -> Tensor:
        """Of whole texts, [texts, tokens, words]."""
        texts, length = ids.shape
        positions = torch.arange(length).expand(texts, length)
        found: Tensor = self(ids, torch.ones_like(ids), positions, *self.empty(texts))[0]
        return found

    def empty(self, texts: int) -> list[Tensor]:
        """The cache before the first token."""
        return [torch.zeros(texts, HEADS, 0, self.width // HEADS) for _ in range(2 * self.layers)]


def build(folder: Path, *, seed: int = 0, steps: int = STEPS, width: int = WIDTH, layers: int = LAYERS) -> Path:
    """Train and export into `folder`. Another seed gives another model with the same tokenizer; no steps give one of noise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model_folder = folder / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    text = corpus()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(model_folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    data = torch.tensor(tokenizer.encode(text).ids)
    model = trained(data, end, seed=seed, steps=steps, width=width, layers=layers)
    torch.save(model.state_dict(), folder / "weights.pt")
    _export(model, model_folder / "model.onnx")
    (model_folder / "model.toml").write_text(
        'file = "model.onnx"\ndescription = "A small model for tests."\n\n'
        f"[text]\ncontext_length = {CONTEXT}\neos_ids = [{end}]\n"
    )
    return model_folder


def trained(data: Tensor, end: int, *, seed: int, steps: int, width: int, layers: int) -> Decoder:
    """A model that has seen pieces of `data`, each of which ends with `end` now and then."""
    # A state of its own: who trains in a test shall not change the random numbers of others. One thread: more of them wait for each
    # other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Decoder(width, layers)
        optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            begins = torch.randint(0, len(data) - SPAN - 1, (BATCH,))
            pieces = torch.stack([data[at : at + SPAN + 1] for at in begins.tolist()])
            pieces[:2, -1] = end
            logits = model.logits(pieces[:, :-1])
            loss = nn.functional.cross_entropy(logits.reshape(-1, WORDS), pieces[:, 1:].reshape(-1))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    torch.set_num_threads(threads)
    return model.eval()


def _export(model: Decoder, path: Path) -> None:
    pairs = [f"{layer}.{kind}" for layer in range(model.layers) for kind in ("key", "value")]
    past, present = [f"past_key_values.{pair}" for pair in pairs], [f"present.{pair}" for pair in pairs]
    texts, before, new = 2, 3, 4
    example = (
        torch.zeros(texts, new, dtype=torch.long),
        torch.ones(texts, before + new, dtype=torch.long),
        torch.arange(before, before + new).expand(texts, new),
        *(torch.zeros(texts, HEADS, before, model.width // HEADS) for _ in pairs),
    )
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "texts", 1: "new"},
        "attention_mask": {0: "texts", 1: "all"},
        "position_ids": {0: "texts", 1: "new"},
        "logits": {0: "texts", 1: "new"},
        **{name: {0: "texts", 2: "before"} for name in past},
        **{name: {0: "texts", 2: "all"} for name in present},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model, example, str(path), input_names=["input_ids", "attention_mask", "position_ids", *past],
            output_names=["logits", *present], dynamic_axes=axes, dynamo=False, opset_version=17,
        )  # fmt: skip


def kept(seed: int = 0) -> Path:
    """The folder of `build`, made once and kept between runs as long as this file says the same. Only seed 0 has learned much."""
    key = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    folder = KEPT / f"text-{seed}-{key}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once make one
        if not (folder / "ready").exists():
            build(folder, seed=seed, steps=STEPS if seed == 0 else 10)
            (folder / "ready").write_text("")
    return folder


def in_torch(folder: Path, width: int = WIDTH, layers: int = LAYERS) -> Decoder:
    """The model of a folder that `kept` or `build` made."""
    model = Decoder(width, layers)
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    return model.eval()
