"""Answers in the cache: their keys, their bytes, and what they count for."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from serving.caching.cache_values import Answer, KeyMaker, computing, kept, pack, unpack
from tests.unit.serving.caching import KEY
from tests.unit.serving.helpers import Arrays, close, load


def make(model: str = "m", version: str = "1", digest: str = "d" * 64, platform: str = "onnx", *more: str) -> KeyMaker:
    return KeyMaker(model, version, digest, platform, *more)


def test_a_key_depends_on_everything_that_the_answer_depends_on() -> None:
    x = np.array([[1, 2]], dtype="<f4")
    inputs: list[tuple[KeyMaker, Arrays, tuple[str, ...] | None]] = [
        (make(), {"x": x}, None),
        (make("n"), {"x": x}, None),
        (make(version="2"), {"x": x}, None),
        (make(digest="e" * 64), {"x": x}, None),
        (make(platform="torch"), {"x": x}, None),
        (make("m", "1", "d" * 64, "onnx", "cuda:0"), {"x": x}, None),
        (make("m", "1", "d" * 64, "onnx", "cuda:0", "fp16"), {"x": x}, None),
        (make("md"), {"x": x}, None),
        (make(), {"y": x}, None),
        (make(), {"x": x + 1}, None),
        (make(), {"x": -0.0 * x}, None),
        (make(), {"x": 0.0 * x}, None),
        (make(), {"x": x.reshape(2, 1)}, None),
        (make(), {"x": x.reshape(2)}, None),
        (make(), {"x": x.view("<i4")}, None),
        (make(), {"x": x.astype("<f8")}, None),
        (make(), {"x": x, "y": x}, None),
        (make(), {"x": x}, ()),
        (make(), {"x": x}, ("x",)),
        (make(), {"x": x}, ("x", "y")),
        (make(), {"x": x}, ("xy",)),
        (make(), {"x": np.array([b"ab", b"c"], dtype=object)}, None),
        (make(), {"x": np.array([b"a", b"bc"], dtype=object)}, None),
        (make(), {"x": np.array([b"abc"], dtype=object)}, None),
        (make(), {"x": np.zeros((0, 2), "<f4")}, None),
        (make(), {"x": np.zeros((2, 0), "<f4")}, None),
    ]
    keys = [maker(arrays, outputs) for maker, arrays, outputs in inputs]
    assert len(set(keys)) == len(keys) and {len(key) for key in keys} == {16}


def test_versions_that_compute_otherwise_have_other_keys() -> None:
    """Two servers on one Redis, one of them in half precision: neither may take the other's answers for its own."""
    x = np.array([[1, 2]], dtype="<f4")
    versions = [load() for _ in range(4)]
    for version, device, precision in zip(
        versions, ("cpu", "cuda:0", "cuda:1", "cuda:0"), ("fp32", "fp32", "fp32", "fp16"), strict=True
    ):
        version.runtime.device, version.runtime.precision = device, precision
    keys = [KeyMaker("m", "1", "d" * 64, *computing(version.runtime))({"x": x}, None) for version in versions]
    close(*versions)
    assert keys[1] == keys[2] and len(set(keys)) == 3


def test_a_key_does_not_depend_on_how_the_request_was_written() -> None:
    x, y = np.arange(6, dtype="<f4").reshape(2, 3), np.ones(2, "<i8")
    assert make()({"x": x, "y": y}, None) == make()({"y": y.copy(), "x": np.asfortranarray(x)}, None)
    wide = np.arange(12, dtype="<f4").reshape(2, 6)
    assert make()({"x": wide[:, :3]}, None) == make()({"x": wide[:, :3].copy()}, None)


ARRAYS = npst.arrays(
    dtype=st.sampled_from(["<f4", "<f8", "<i8", "|u1", "|b1", "<f2"]), shape=npst.array_shapes(min_dims=0, min_side=0)
)
TEXTS = st.lists(st.binary(max_size=9), max_size=4) | st.lists(st.text(max_size=5), max_size=4)


@given(st.dictionaries(st.text(max_size=5), ARRAYS, max_size=3), TEXTS, st.floats(0, 100))
def test_an_answer_comes_back_from_its_bytes_as_it_was(arrays: dict[str, Any], texts: Any, seconds: float) -> None:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    value = pack(KEY, Answer({**arrays, "texts": array}, seconds))
    assert value is not None
    found = unpack(KEY, value)
    assert (
        found is not None
        and found.model_seconds == seconds
        and list(found.arrays) == [*arrays, "texts"][-len(found.arrays) :]
    )
    assert found.arrays["texts"].tolist() == texts
    for name, array in arrays.items():
        if name != "texts":
            assert found.arrays[name].dtype == array.dtype and found.arrays[name].shape == array.shape
            assert found.arrays[name].tobytes() == array.tobytes()


VALUE = pack(KEY, Answer({"y": np.arange(6, dtype="<f4").reshape(2, 3), "t": np.array([b"ab"], dtype=object)}, 0.5))
assert VALUE is not None


@given(st.integers(0, len(VALUE) - 1), st.integers(1, 255))
def test_a_value_with_a_byte_changed_is_a_miss(at: int, change: int) -> None:
    assert VALUE is not None
    damaged = bytearray(VALUE)
    damaged[at] ^= change
    assert unpack(KEY, bytes(damaged)) is None


@given(st.integers(0, len(VALUE) - 1) | st.just(-1), st.binary(max_size=64))
def test_a_value_that_is_cut_off_longer_or_something_else_is_a_miss(length: int, other: bytes) -> None:
    assert VALUE is not None
    assert unpack(KEY, VALUE[:length]) is None
    assert unpack(KEY, VALUE + b"x" + other) is None
    assert unpack(KEY, other) is None
    assert unpack(b"q" * 16, VALUE) is None, "another key's answer"


def test_what_has_the_right_checksum_and_no_sense_is_a_miss() -> None:
    from serving.caching.cache_values import FORMAT, _checksum

    for header in (
        {},
        [],
        {"arrays": [["y", "<f4", [2, 3], 23]], "seconds": 1},
        {"arrays": [["y", "|O", [1], 24]], "seconds": 1},
        {"arrays": [["y", "<f4", [7], 24]], "seconds": 1},
        {"arrays": [["y", "bytes", [1], 24]], "seconds": 1},
        {"arrays": [["y", "<f4", [2, 3], 24]], "seconds": "long"},
        {"arrays": [["y", "<f4", [2, 3], 24]]},
    ):
        text = orjson.dumps(header)
        body = KEY + len(text).to_bytes(4, "little") + text + b"\xff" * 24
        assert unpack(KEY, bytes((FORMAT,)) + _checksum(body) + body) is None, header


def test_what_cannot_be_written_is_not() -> None:
    assert pack(KEY, Answer({"y": np.array(["a"])}, 0)) is None
    assert pack(KEY, Answer({"y": np.array(["a", b"b"], dtype=object)}, 0)) is None


@pytest.mark.parametrize("text", ["a" * 1_000, "\u00e9" * 1_000, "\u6c34" * 1_000, "\U0001f40d" * 1_000, b"a" * 1_000])
def test_a_text_counts_with_the_bytes_that_it_takes(text: Any) -> None:
    array = np.empty(1, dtype=object)
    array[0] = text
    empty = np.empty(1, dtype=object)
    empty[0] = b""
    more = kept({"y": array})[1] - kept({"y": empty})[1]
    wide = 1 if isinstance(text, bytes) or text[0] < "\u0100" else 2 if text[0] < "\U00010000" else 4
    assert wide * 1_000 <= more <= wide * 1_000 + 100
