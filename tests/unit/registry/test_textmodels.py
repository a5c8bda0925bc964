"""Text models at registration: what is recognised, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from registry import formats, textmodels
from registry.errors import RefusedError, UsageError

GIB = 1 << 30
WORDS = 50
TEXT = "[text]\ncontext_length = 64\neos_ids = [0]\n"


def tokenizer(path: Path, words: int = WORDS, **tokens: int) -> None:
    vocabulary = {f"w{number}": number for number in range(words)}
    for token, number in tokens.items():
        vocabulary = {word: n for word, n in vocabulary.items() if n != number} | {token: number}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.Fuse()
    made.enable_truncation(4)
    made.save(str(path))


def graph(path: Path, *, cache: bool = True, logits: Any = ("b", "s", WORDS), **change: Any) -> None:
    """A graph of the right face. `change` gives an input or output another shape, or None to leave it out."""
    floats, numbers = TensorProto.FLOAT, TensorProto.INT64
    inputs: dict[str, tuple[int, Any]] = {"input_ids": (numbers, ("b", "s")), "attention_mask": (numbers, ("b", "t"))}
    outputs: dict[str, tuple[int, Any]] = {"logits": (floats, logits)}
    if cache:
        inputs["past_key_values.0.key"] = (floats, ("b", 2, "p", 4))
        outputs["present.0.key"] = (floats, ("b", 2, "t", 4))
    for name, shape in change.items():
        name = name.replace("__", ".")
        side = outputs if name in outputs or name.startswith("present") else inputs
        if shape is None:
            del side[name]
        else:
            side[name] = (side.get(name, (numbers, ()))[0], shape)
    nodes = [
        helper.make_node("Constant", [], ["ones"], value=helper.make_tensor("v", floats, [WORDS], [0.5] * WORDS)),
        helper.make_node("Cast", ["input_ids"], ["numbers"], to=floats),
        helper.make_node("Identity", ["past_key_values.0.key" if cache else "numbers"], ["same"]),
    ]
    for name in outputs:
        nodes.append(helper.make_node("Identity", ["ones"], [name]))
    made = helper.make_graph(
        nodes,
        "text",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in outputs.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def folder(tmp_path: Path, toml: str | None = TEXT, **options: Any) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    graph(made / "model.onnx", **options)
    tokenizer(made / "tokenizer.json")
    if toml is not None:
        (made / "model.toml").write_text(toml)
    return made


def found(path: Path) -> textmodels.TextModel | None:
    return textmodels.beside(path / "model.onnx", formats.inspect(path, max_bytes=GIB).signature)


def test_a_folder_with_a_table_text_is_a_text_model_and_its_files_belong_together(tmp_path: Path) -> None:
    path = folder(tmp_path)
    looked = formats.inspect(path, max_bytes=GIB)
    assert sorted(looked.names) == ["model.onnx", "model.toml", "tokenizer.json"]
    assert looked.metadata["text"]["context_length"] == 64 and looked.metadata["text"]["end_ids"] == [0]
    text = found(path)
    assert text is not None and text.cache[0].heads == 2 and text.cache_bytes_per_token == 32
    assert text.attention_mask == "attention_mask" and text.position_ids is None and not text.padded


def test_without_a_table_the_files_beside_a_graph_with_a_cache_say_what_is_needed(tmp_path: Path) -> None:
    path = folder(tmp_path, toml=None)
    (path / "config.json").write_text(json.dumps({"max_position_embeddings": 77, "eos_token_id": 3}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5]}))
    text = found(path)
    assert text is not None and (text.context_length, text.end_ids) == (77, (4, 5))


def test_an_end_token_that_the_tokenizer_does_not_know_is_refused_for_it_would_never_come(tmp_path: Path) -> None:
    path = folder(
        tmp_path, toml=f"[text]\ncontext_length = 64\neos_ids = [{WORDS + 5}]\n", logits=("b", "s", WORDS + 14)
    )
    with pytest.raises(RefusedError, match=f"end token {WORDS + 5} is not among the {WORDS} of the tokenizer"):
        formats.inspect(path, max_bytes=GIB)


def test_the_tokenizer_knows_its_end_by_its_usual_names(tmp_path: Path) -> None:
    path = folder(tmp_path, toml="[text]\ncontext_length = 64\n")
    tokenizer(path / "tokenizer.json", **{"<|endoftext|>": 7})
    text = found(path)
    assert text is not None and text.end_ids == (7,)


def test_a_graph_without_a_cache_is_a_text_model_only_where_that_is_said(tmp_path: Path) -> None:
    path = folder(tmp_path, toml=None, cache=False)
    assert found(path) is None and "text" not in formats.inspect(path, max_bytes=GIB).metadata
    (path / "model.toml").write_text(TEXT)
    text = found(path)
    assert text is not None and text.cache == ()


def test_other_models_with_other_files_beside_them_are_no_text_models(tmp_path: Path) -> None:
    path = folder(tmp_path, toml=None)
    (path / "tokenizer.json").unlink()
    (path / "notes.txt").write_text("notes")
    assert found(path) is None


def test_a_graph_in_a_folder_below_finds_its_tokenizer(tmp_path: Path) -> None:
    path = folder(tmp_path, toml='file = "onnx/model.onnx"\n' + TEXT)
    (path / "onnx").mkdir()
    (path / "model.onnx").rename(path / "onnx" / "model.onnx")
    looked = formats.inspect(path, max_bytes=GIB)
    assert looked.names[0] == "onnx/model.onnx"
    text = textmodels.beside(path / "onnx" / "model.onnx", looked.signature)
    assert text is not None and text.tokenizer == path / "tokenizer.json"


def test_truncation_that_training_left_in_a_tokenizer_is_taken_off(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert len(textmodels.read_tokenizer(path / "tokenizer.json").encode("w2 " * 9).ids) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"logits": ("b", "s", WORDS - 1)}, "do not belong together"),
        ({"logits": ("b", WORDS)}, "output 'logits' is FP32 [-1, 50]"),
        ({"input_ids": ("b", 8)}, "the number of tokens must"),
        ({"attention_mask": ("b", 8)}, "its number of tokens must vary"),
        ({"token_type_ids": ("b", "s")}, "needs the input 'token_type_ids'"),
        ({"present__0__key": None}, "does not come out as 'present.0.key'"),
        ({"past_key_values__0__key": ("b", "h", "p", 4)}, "must be numbers in the graph"),
        ({"past_key_values__0__key": ("b", 2, 4)}, "[sequences, heads, tokens, size]"),
        ({"past_key_values__0__key": ("b", 2, 16, 4)}, "with the number of tokens free"),
    ],
)
def test_a_graph_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(RefusedError) as refusal:
        formats.inspect(folder(tmp_path, **options), max_bytes=GIB)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[text]\neos_ids = [0]\n", "how long a text may be"),
        ("[text]\ncontext_length = 64\n", "which token ends a text"),
        ("[text]\ncontext_length = 64\neos_ids = [50]\n", "end token 50"),
        (TEXT + 'logits = "scores"\n', "no output 'scores'"),
        (TEXT + 'input_ids = "tokens"\n', "no input 'tokens'"),
        (TEXT + 'tokenizer = "other.json"\n', "other.json"),
    ],
)
def test_what_model_toml_says_wrongly_is_refused_with_the_reason(tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(RefusedError) as refusal:
        formats.inspect(folder(tmp_path, toml=toml), max_bytes=GIB)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "toml", ["[text]\ncontext_length = 1\n", "[text]\nlength = 5\n", '[text]\ntokenizer = "../x.json"\n']
)
def test_a_table_text_that_is_wrong_is_named(tmp_path: Path, toml: str) -> None:
    with pytest.raises(UsageError, match=r"text\."):
        formats.inspect(folder(tmp_path, toml=toml), max_bytes=GIB)


@pytest.mark.parametrize("content", ["{}", "not json", '{"model": {"type": "BPE"}}', "[" * 2000])
def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    path = folder(tmp_path)
    (path / "tokenizer.json").write_text(content)
    with pytest.raises(RefusedError, match="not a tokenizer that can be read"):
        formats.inspect(path, max_bytes=GIB)


def test_the_file_of_a_text_model_alone_is_refused_with_the_folder_to_give(tmp_path: Path) -> None:
    path = folder(tmp_path)
    with pytest.raises(RefusedError, match="give the folder"):
        formats.inspect(path / "model.onnx", max_bytes=GIB)


def test_a_broken_configuration_beside_a_model_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "config.json").write_text("{")
    with pytest.raises(RefusedError, match=r"config\.json cannot be read"):
        formats.inspect(path, max_bytes=GIB)
