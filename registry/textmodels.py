"""Text models: a decoder-only graph with a tokenizer beside it. What its tensors are is found here; nothing is run.

Read at registration, when a server loads a version, and by the probe: all three find the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import RefusedError
from registry.modeltoml import MODEL_TOML, ModelToml, TextToml, read_beside
from registry.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 64 << 20
_CONFIGS = ("generation_config.json", "config.json")
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
"""What tokenizers call the token that ends a text, where nothing else says which it is."""
_INTEGERS = ("INT64", "INT32")
_MASKS = (*_INTEGERS, "BOOL", "FP32", "FP16")
_FLOATS = ("FP32", "FP16", "BF16")


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One tensor of the key/value cache: [sequences, heads, tokens, size], as it goes in and as it comes out one step longer."""

    past: str
    present: str
    datatype: str
    heads: int
    size: int

    @property
    def bytes_per_token(self) -> int:
        return self.heads * self.size * (2 if self.datatype == "FP16" else 4)


@dataclass(frozen=True, slots=True)
class TextModel:
    """What generating text with a graph needs to know. Names are those of its tensors; None: it has no such input."""

    tokenizer: Path
    context_length: int
    """Tokens of prompt and answer together, at most."""
    end_ids: tuple[int, ...]
    vocabulary: int
    """Tokens with an id below this have text; what the graph may say beyond is never chosen."""
    input_ids: str
    attention_mask: str | None
    position_ids: str | None
    logits: str
    cache: tuple[CacheTensor, ...]
    one_by_one: bool
    """The graph takes one sequence at a time."""

    @property
    def padded(self) -> bool:
        """Whether sequences of different lengths can share a batch of the cache: a mask hides the padding, positions are told."""
        return self.attention_mask is not None and self.position_ids is not None

    @property
    def cache_bytes_per_token(self) -> int:
        return sum(tensor.bytes_per_token for tensor in self.cache)

    def as_dict(self) -> dict[str, Any]:
        """For the record of a version. JSON-able."""
        return {
            "context_length": self.context_length,
            "end_ids": list(self.end_ids),
            "vocabulary": self.vocabulary,
            "cache_tensors": len(self.cache),
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "attention_mask": self.attention_mask is not None,
            "position_ids": self.position_ids is not None,
        }


def beside(main: Path, signature: Signature | None) -> TextModel | None:
    """The text model that a loaded file is a part of: its tokenizer lies in its folder, or above where model.toml names the file."""
    for folder in (main.parent, *main.parents[1:3]):
        if not (folder / TOKENIZER).is_file() and not (folder / MODEL_TOML).is_file():
            continue
        toml = read_beside(folder)
        if folder == main.parent or (toml.file is not None and folder / toml.file == main):
            return find(folder, toml, signature)
    return None


def find(folder: Path, toml: ModelToml, signature: Signature | None) -> TextModel | None:
    """What `folder` holds for generating text with a graph of this signature; None where it is no text model.

    It is one where model.toml has a table [text], or where a tokenizer lies beside a graph with token ids, logits and a key/value
    cache. Raises RefusedError that names what is missing or does not fit.
    """
    told = toml.text
    tokenizer = folder / (told.tokenizer if told is not None else TOKENIZER)
    if told is None:
        if not tokenizer.is_file() or signature is None or not _generates(signature):
            return None
        told = TextToml()
    if signature is None:
        raise RefusedError(f"{folder}: a text model needs a signature: give [[inputs]] and [[outputs]] in {MODEL_TOML}")
    if not tokenizer.is_file():
        raise RefusedError(f"{folder}: a text model needs its tokenizer, {tokenizer.name}: put it beside the graph")
    inputs, outputs = {spec.name: spec for spec in signature.inputs}, {spec.name: spec for spec in signature.outputs}
    ids = _tensor(folder, inputs, told.input_ids, "input", _INTEGERS, 2, "input_ids")
    logits = _tensor(folder, outputs, told.logits, "output", _FLOATS, 3, "logits")
    if ids.shape[1] != -1 or ids.shape[0] not in (-1, 1):
        raise RefusedError(
            f"{folder}: input '{ids.name}' is {list(ids.shape)}: a text model takes [sequences, tokens], and the number of tokens must "
            "vary; export it with dynamic axes"
        )
    mask = _optional(folder, inputs, told.attention_mask, _MASKS, "attention_mask")
    positions = _optional(folder, inputs, told.position_ids, _INTEGERS, "position_ids")
    cache = _cache(folder, told, signature)
    known = {ids.name, mask, positions, *(tensor.past for tensor in cache)}
    if strange := [spec.name for spec in signature.required if spec.name not in known]:
        raise RefusedError(
            f"{folder}: the graph needs the input '{strange[0]}', which generating text does not know; known are input_ids, "
            f"attention_mask, position_ids and {told.past}* (their names: table [text] of {MODEL_TOML})"
        )
    vocabulary, words = _vocabulary(tokenizer)
    width = logits.shape[2]
    if width != -1 and vocabulary > width:
        raise RefusedError(
            f"{folder}: the tokenizer has ids up to {vocabulary - 1}, the logits of the graph end at {width - 1}: they do not belong together"
        )
    config = _configuration(folder)
    ends = _ends(folder, told, config, words)
    if wrong := [token for token in ends if not 0 <= token < vocabulary]:  # what is beyond is never chosen
        raise RefusedError(
            f"{folder}: the end token {wrong[0]} is not among the {vocabulary} of the tokenizer: say which it is, [text] eos_ids = […] "
            f"in {MODEL_TOML}"
        )
    return TextModel(
        tokenizer=tokenizer,
        context_length=_context_length(folder, told, config),
        end_ids=ends,
        vocabulary=vocabulary,
        input_ids=ids.name,
        attention_mask=mask,
        position_ids=positions,
        logits=logits.name,
        cache=cache,
        one_by_one=ids.shape[0] == 1,
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer, without the truncation and padding that training may have left in it. Raises RefusedError."""
    from tokenizers import Tokenizer

    if path.stat().st_size > MAX_JSON_BYTES:
        raise RefusedError(f"{path.name} has more than {MAX_JSON_BYTES} bytes: it is no tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except BaseException as error:  # a panic of its Rust is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
            raise
        raise RefusedError(
            f"{path.name} is not a tokenizer that can be read ({' '.join(str(error).split())[:200]}): save it again with "
            "tokenizer.save(…), or save_pretrained of a fast tokenizer"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _generates(signature: Signature) -> bool:
    """Whether a graph is one of a decoder, by its usual names. Without a cache it could as well be an encoder: [text] says then."""
    told = TextToml()
    names = {spec.name for spec in signature.inputs}
    logits = next((spec for spec in signature.outputs if spec.name == told.logits), None)
    cached = any(name.startswith(told.past) for name in names)
    return told.input_ids in names and logits is not None and len(logits.shape) == 3 and cached


def _tensor(
    folder: Path, tensors: Mapping[str, TensorSpec], name: str, side: str, types: tuple[str, ...], rank: int, key: str
) -> TensorSpec:
    spec = tensors.get(name)
    if spec is None:
        listed = ", ".join(f"'{other}'" for other in tensors) or "none"
        raise RefusedError(
            f"{folder}: the graph has no {side} '{name}' (it has {listed}): say which it is, [text] {key} = … in {MODEL_TOML}"
        )
    if spec.datatype not in types or len(spec.shape) != rank:
        raise RefusedError(
            f"{folder}: {side} '{name}' is {spec.datatype} {list(spec.shape)}; a text model has {' or '.join(types)} of {rank} dimensions there"
        )
    return spec


def _optional(
    folder: Path, inputs: Mapping[str, TensorSpec], name: str, types: tuple[str, ...], key: str
) -> str | None:
    if name not in inputs or inputs[name].optional:
        return None
    spec = _tensor(folder, inputs, name, "input", types, 2, key)
    if spec.shape[1] != -1:
        raise RefusedError(f"{folder}: input '{name}' is {list(spec.shape)}: its number of tokens must vary")
    return name


def _cache(folder: Path, told: TextToml, signature: Signature) -> tuple[CacheTensor, ...]:
    """The pairs of cache tensors, each [sequences, heads, tokens, size] with heads and size given by the graph."""
    presents = {
        spec.name.removeprefix(told.present): spec for spec in signature.outputs if spec.name.startswith(told.present)
    }
    tensors = []
    for spec in signature.inputs:
        if not spec.name.startswith(told.past):
            continue
        out = presents.get(spec.name.removeprefix(told.past))
        if out is None:
            raise RefusedError(
                f"{folder}: the cache goes in as '{spec.name}' and does not come out as '{told.present}{spec.name.removeprefix(told.past)}': "
                f"export it with use_cache, or name the outputs ([text] present = … in {MODEL_TOML})"
            )
        for side in (spec, out):
            shape = side.shape
            if side.datatype not in _FLOATS or len(shape) != 4 or shape[2] != -1 or shape[0] not in (-1, 1):
                raise RefusedError(
                    f"{folder}: cache tensor '{side.name}' is {side.datatype} {list(shape)}; it must be floats "
                    "[sequences, heads, tokens, size], with the number of tokens free"
                )
        if spec.shape[1] < 1 or spec.shape[3] < 1:
            raise RefusedError(
                f"{folder}: cache tensor '{spec.name}' is {list(spec.shape)}: heads and size (dimensions 1 and 3) must be numbers in the "
                "graph, for the first step begins with an empty cache of that shape"
            )
        if out.datatype != spec.datatype:
            raise RefusedError(
                f"{folder}: cache tensor '{spec.name}' is {spec.datatype} going in and {out.datatype} coming out"
            )
        tensors.append(CacheTensor(spec.name, out.name, spec.datatype, spec.shape[1], spec.shape[3]))
    return tuple(tensors)


def _vocabulary(path: Path) -> tuple[int, Mapping[str, int]]:
    """(the highest id + 1, ids by token)."""
    words = read_tokenizer(path).get_vocab(with_added_tokens=True)
    if not words:
        raise RefusedError(f"{path.name} has no tokens")
    return max(words.values()) + 1, words


def _configuration(folder: Path) -> dict[str, Any]:
    """What the usual JSON files beside a model say of it, the more special one first. Raises RefusedError for one that is broken."""
    found: dict[str, Any] = {}
    for name in _CONFIGS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.stat().st_size > MAX_JSON_BYTES:
                raise ValueError(f"it has more than {MAX_JSON_BYTES} bytes")
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise RefusedError(f"{path} cannot be read: {error}") from error
        if isinstance(document, dict):
            found = {**document, **found}
    return found


def _ends(folder: Path, told: TextToml, config: dict[str, Any], words: Mapping[str, int]) -> tuple[int, ...]:
    if told.eos_ids is not None:
        return tuple(told.eos_ids)
    said = config.get("eos_token_id")
    said = said if isinstance(said, list) else [said]
    ends = tuple(token for token in said if type(token) is int)
    if not ends:
        ends = tuple(words[word] for word in _ENDS if word in words)[:1]
    if not ends:
        raise RefusedError(
            f"{folder}: nothing says which token ends a text: give [text] eos_ids = […] in {MODEL_TOML} ([] where there is none)"
        )
    return ends


def _context_length(folder: Path, told: TextToml, config: dict[str, Any]) -> int:
    if told.context_length is not None:
        return told.context_length
    for key in _LENGTHS:
        if type(config.get(key)) is int and config[key] > 1:
            return int(config[key])
    raise RefusedError(f"{folder}: nothing says how long a text may be: give [text] context_length = … in {MODEL_TOML}")
