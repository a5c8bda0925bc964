"""The codec of the V2 protocol: what it reads, what it refuses and in which words, what it writes."""

from __future__ import annotations

import json
import re
import tracemalloc
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.signature import DATATYPES, Signature, TensorSpec
from serving.wire import tensors
from serving.wire.tensors import DTYPES, InputError, OutputError, to_bf16
from serving.wire.v2 import Codec, InferRequest

TWO = Codec(
    Signature(
        (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT64", (-1,))),
        (TensorSpec("p", "FP32", (-1, 2)), TensorSpec("q", "BYTES", (-1,))),
    )
)
BINARY = {"parameters": {"binary_data_output": True}}
A = {"name": "a", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}
B = {"name": "b", "shape": [2], "datatype": "INT64", "data": [7, -8]}
NUMBERS = [name for name in DATATYPES if name not in ("BYTES", "BOOL", "BF16")]


def of(datatype: str, shape: tuple[int, ...] = (-1,)) -> Codec:
    return Codec(Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", datatype, shape),)))


def decode(codec: Codec, document: Any, tail: bytes = b"") -> InferRequest:
    head = json.dumps(document).encode()
    return codec.decode(head + tail, len(head) if tail else None)


def one(datatype: str, data: Any, shape: list[int]) -> Any:
    document = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}
    return decode(of(datatype, (-1,) * len(shape)), document).inputs["x"]


def refused(codec: Codec, document: Any, tail: bytes = b"") -> str:
    with pytest.raises(InputError) as caught:
        decode(codec, document, tail)
    return str(caught.value)


@pytest.mark.parametrize("datatype", NUMBERS)
def test_every_number_type_travels_in_json_and_in_binary(datatype: str) -> None:
    codec = of(datatype)
    want = np.array([0, 1, 100], dtype=DATATYPES[datatype])
    got = one(datatype, want.tolist(), [3])
    assert got.dtype == want.dtype and got.tolist() == want.tolist()
    tensor = {"name": "x", "shape": [3], "datatype": datatype, "parameters": {"binary_data_size": want.nbytes}}
    request = decode(codec, {"inputs": [tensor], "parameters": {"binary_data_output": True}}, want.tobytes())
    np.testing.assert_array_equal(request.inputs["x"], want)
    body, length = codec.encode("m", "1", request, {"y": want}, {})
    assert length is not None and body[length:] == want.tobytes()
    output = orjson.loads(body[:length])["outputs"][0]
    assert output == {
        "name": "y",
        "datatype": datatype,
        "shape": [3],
        "parameters": {"binary_data_size": want.nbytes},
    }


def test_bool_travels_in_json_and_in_binary() -> None:
    assert one("BOOL", [True, False], [2]).tolist() == [True, False]
    tensor = {"name": "x", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}}
    assert decode(of("BOOL"), {"inputs": [tensor]}, b"\x02\x00").inputs["x"].tolist() == [True, False]


def test_bytes_travel_as_json_strings_and_with_their_lengths() -> None:
    assert one("BYTES", ["ab", "é"], [2]).tolist() == [b"ab", "é".encode()]
    packed = b"\x02\x00\x00\x00ab" + b"\x00\x00\x00\x00" + b"\x01\x00\x00\x00\xff"
    tensor = {"name": "x", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(packed)}}
    document = {"inputs": [tensor], "outputs": [{"name": "y", "parameters": {"binary_data": True}}]}
    request = decode(of("BYTES"), document, packed)
    assert request.inputs["x"].tolist() == [b"ab", b"", b"\xff"]
    body, length = of("BYTES").encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert body[length:] == packed


def test_text_that_a_model_answers_travels_both_ways() -> None:
    request = decode(of("BYTES"), {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]})
    body, _ = of("BYTES").encode("m", "1", request, {"y": np.array(["é"], dtype=object)}, {})
    assert orjson.loads(body)["outputs"][0] == {"name": "y", "datatype": "BYTES", "shape": [1], "data": ["é"]}


def test_nested_and_flat_data_mean_the_same() -> None:
    assert one("FP32", [[1, 2], [3, 4]], [2, 2]).tolist() == one("FP32", [1, 2, 3, 4], [2, 2]).tolist()


def test_an_empty_batch_is_a_batch() -> None:
    assert one("FP32", [], [0, 2]).shape == (0, 2)


def test_whole_numbers_keep_every_digit() -> None:
    assert one("UINT64", [1, 2**64 - 1], [2]).tolist() == [1, 2**64 - 1]
    assert one("INT64", [-(2**63), 2**63 - 1], [2]).tolist() == [-(2**63), 2**63 - 1]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False)
        | st.integers(-(2**63), 2**64 - 1)
        | st.sampled_from([True, None, "1", [1.5], {}, 1e39, -0.0, 70000.0]),
        max_size=5,
    ),
    st.sampled_from([*NUMBERS, "BOOL"]),
)
def test_a_flat_list_of_fractions_becomes_what_numpy_makes_of_it(rest: list[Any], datatype: str) -> None:
    def read() -> tuple[str, bytes] | str:
        try:
            found = tensors.from_json("x", datatype, (len(rest) + 1,), [2.0, *rest])
        except InputError as error:
            return str(error)
        return found.dtype.str, found.tobytes()

    with pytest.MonkeyPatch.context() as patch:
        quick = read()
        patch.setattr(tensors, "_flat_floats", lambda data: None)
        assert quick == read()


@pytest.mark.parametrize("data", [[1.5, 10**400], [10**400, 1], [[1.5], [10**400]]])
def test_a_number_beyond_all_fractions_is_refused(data: list[Any]) -> None:
    """No JSON has it, but the default of an alias in the settings may."""
    with pytest.raises(InputError):
        tensors.from_json("x", "FP32", (2,), data)


def test_the_id_is_echoed_and_names_are_answered() -> None:
    request = decode(TWO, {"id": "r-1", "inputs": [A, B], "outputs": [{"name": "p"}]})
    assert request.outputs == ("p",)
    body, length = TWO.encode("m", "7", request, {"p": np.zeros((1, 2), np.float32)}, {"queue_seconds": 0.5})
    assert length is None
    assert orjson.loads(body) == {
        "model_name": "m",
        "model_version": "7",
        "parameters": {"queue_seconds": 0.5},
        "id": "r-1",
        "outputs": [{"name": "p", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 0.0]}],
    }


def test_an_output_may_be_json_where_the_request_wants_binary() -> None:
    document = {
        "inputs": [A, B],
        "parameters": {"binary_data_output": True},
        "outputs": [{"name": "p", "parameters": {"binary_data": False}}, {"name": "q"}],
    }
    request = decode(TWO, document)
    outputs = {"p": np.ones((1, 2), np.float32), "q": np.array([b"z"], dtype=object)}
    body, length = TWO.encode("m", "1", request, outputs, {})
    assert length is not None and body[length:] == b"\x01\x00\x00\x00z"
    assert orjson.loads(body[:length])["outputs"][0]["data"] == [1.0, 1.0]


def test_binary_tensors_follow_each_other_in_the_order_of_the_inputs() -> None:
    b = {"name": "b", "shape": [2], "datatype": "INT64", "parameters": {"binary_data_size": 16}}
    a = {"name": "a", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    tail = np.array([7, 8]).tobytes() + np.array([1, 2], np.float32).tobytes()
    inputs = decode(TWO, {"inputs": [b, a]}, tail).inputs
    assert inputs["a"].tolist() == [[1, 2]] and inputs["b"].tolist() == [7, 8]
    assert inputs["a"].flags.aligned and inputs["b"].flags.aligned


def test_a_raw_tensor_gets_its_shape_from_its_size() -> None:
    request = of("FP32", (-1, 2)).decode(np.arange(6, dtype=np.float32).tobytes(), 0)
    assert request.inputs["x"].shape == (3, 2) and request.binary_default


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([A], "must be a JSON object, it is a list"),
        ({}, "no 'inputs'"),
        ({"inputs": {}}, "no 'inputs'"),
        ({"inputs": ["a"]}, "every input must be a JSON object, one is a string"),
        ({"inputs": [{}]}, "no 'name'"),
        ({"inputs": [A, {**B, "name": "c"}]}, "no input 'c'; its inputs are 'a', 'b'"),
        ({"inputs": [A, A, B]}, "input 'a' was sent twice"),
        ({"inputs": [A]}, "input 'b' is missing"),
        ({"inputs": [{**A, "datatype": "FP64"}, B]}, "'a' has the datatype 'FP64', the model takes FP32"),
        ({"inputs": [{"name": "a", "shape": [1, 2], "data": [1, 2]}, B]}, "has no 'datatype'"),
        ({"inputs": [{**A, "shape": [2]}, B]}, "'a' has the shape [2], the model takes [-1, 2]"),
        ({"inputs": [{**A, "shape": [1, 3]}, B]}, "'a' has the shape [1, 3]"),
        ({"inputs": [{**A, "shape": [-1, 2]}, B]}, "-1 in 'shape' is not a dimension"),
        ({"inputs": [{**A, "shape": [True, 2]}, B]}, "True in 'shape' is not a dimension"),
        ({"inputs": [{**A, "shape": [10**30, 2]}, B]}, "in 'shape' is not a dimension"),
        ({"inputs": [{**A, "shape": "1,2"}, B]}, "no 'shape'"),
        ({"inputs": [{**A, "data": [1]}, B]}, "'a' has 1 elements, its shape [1, 2] needs 2"),
        ({"inputs": [{**A, "data": [[1], [2]]}, B]}, "nested as [2, 1], but its shape is [1, 2]"),
        ({"inputs": [{**A, "data": [[1], [2, 3]]}, B]}, "rows of different lengths"),
        ({"inputs": [{**A, "data": 1}, B]}, "'data' must be a list, it is a number"),
        ({"inputs": [{**A, "data": ["1", "2"]}, B]}, "elements of FP32 must be numbers"),
        ({"inputs": [{**A, "data": [None, 2]}, B]}, "elements of FP32 must be numbers"),
        ({"inputs": [{**A, "data": [True, False]}, B]}, "elements of FP32 must be numbers"),
        ({"inputs": [{**A, "data": [{}, 2]}, B]}, "elements of FP32 must be numbers"),
        ({"inputs": [{**A, "data": [1e300, 2]}, B]}, "too large for FP32"),
        ({"inputs": [A, {**B, "data": [1.5, 2]}]}, "elements of INT64 must be whole numbers"),
        ({"inputs": [A, {**B, "data": [2**63, 2]}]}, "does not fit INT64"),
        ({"inputs": [{"name": "a", "shape": [1, 2], "datatype": "FP32"}, B]}, "neither 'data' nor"),
        ({"inputs": [{**A, "parameters": {"binary_data_size": 8}}, B]}, "both 'data' and"),
        ({"inputs": [{**A, "parameters": []}, B]}, "'parameters' of input 'a' must be a JSON object"),
        ({"inputs": [A, B], "id": 5}, "'id' must be a string"),
        ({"inputs": [A, B], "parameters": 5}, "'parameters' of the request"),
        ({"inputs": [A, B], "parameters": {"binary_data_output": "yes"}}, "must be true or false, it is 'yes'"),
        ({"inputs": [A, B], "outputs": "p"}, "'outputs' must be a list"),
        ({"inputs": [A, B], "outputs": [{"name": "r"}]}, "no output 'r'; its outputs are 'p', 'q'"),
        ({"inputs": [A, B], "outputs": [{"name": "p"}, {"name": "p"}]}, "asked for twice"),
        (
            {"inputs": [A, B], "outputs": [{"name": "q", "parameters": {"classification": 2}}]},
            "'q' is BYTES, which has no",
        ),
        (
            {"inputs": [A, B], "outputs": [{"name": "p", "parameters": {"classification": -1}}]},
            "a whole number, it is -1",
        ),
        ({"inputs": [A, B], "outputs": [{"name": "p", "parameters": {"classification": "2"}}]}, "number, it is '2'"),
        ({"inputs": [A, B], "outputs": [{"name": "p", "parameters": {"shared_memory_region": "r"}}]}, "not supported"),
        ({"inputs": [{**A, "data": None}, B]}, "'data' must be a list, it is null"),
        (
            {"inputs": [A, B], "parameters": {"timeout": -1}},
            "'timeout' of the request must be a whole number, it is -1",
        ),
        ({"inputs": [A, B], "parameters": {"timeout": 1.5}}, "must be a whole number, it is 1.5"),
        ({"inputs": [A, B], "parameters": {"note": None}}, "must be a string, a number or true or false, it is None"),
        ({"inputs": [A, B], "parameters": {"note": {}, "timeout": 1}}, "'note' of the request must be a string"),
        ({"inputs": [A, B], "parameters": {"priority": True}}, "'priority' of the request must be a whole number"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(document: Any, words: str) -> None:
    assert words in refused(TWO, document)


@pytest.mark.parametrize(
    ("size", "tail", "words"),
    [
        (8, b"1234", "says 8 bytes of binary data, but only 4 are left"),
        (4, b"1234", "has 4 bytes, its shape [1, 2] of FP32 needs 8"),
        (8, b"123456789", "1 bytes of the body belong to no tensor"),
        (-1, b"1234", "must be a number of bytes, it is -1"),
        ("8", b"12345678", "must be a number of bytes, it is '8'"),
    ],
)
def test_wrong_binary_data_is_told_what_is_wrong(size: Any, tail: bytes, words: str) -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": size}}
    assert words in refused(of("FP32", (-1, 2)), {"inputs": [tensor]}, tail)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (b"\x05\x00\x00\x00ab", "element 0 of BYTES ends beyond"),
        (b"\x01\x00\x00\x00a\x01", "element 1 of BYTES ends beyond"),
        (b"\x01\x00\x00\x00a", "has 1 elements, its shape [2] needs 2"),
    ],
)
def test_truncated_bytes_are_told_which_element(packed: bytes, words: str) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "parameters": {"binary_data_size": len(packed)}}
    assert words in refused(of("BYTES"), {"inputs": [tensor]}, packed)


def test_bytes_in_json_are_strings_only() -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": ["a", 1]}
    assert "elements of BYTES must be strings" in refused(of("BYTES"), {"inputs": [tensor]})


@pytest.mark.parametrize(
    ("body", "length", "words"),
    [
        (b"", None, "the body is empty"),
        (b"{", None, "not valid JSON"),
        (b'{"inputs": [NaN]}', None, "JSON has no NaN or Infinity"),
        (b"\xff", None, "not valid JSON"),
        (b"[" * 5000, None, "nested too deeply"),
        (b"{}", 3, "is 3, but the body has 2 bytes"),
        (b"{}xx", 3, "not valid JSON"),
    ],
)
def test_a_broken_body_is_told_what_is_broken(body: bytes, length: int | None, words: str) -> None:
    with pytest.raises(InputError, match=r".") as caught:
        TWO.decode(body, length)
    assert words in str(caught.value)


@pytest.mark.parametrize(("size", "words"), [(9, "needs a multiple of 8 bytes, the body has 9"), (0, "")])
def test_a_raw_tensor_of_the_wrong_size_is_refused(size: int, words: str) -> None:
    codec = of("FP32", (-1, 2))
    if not words:
        assert codec.decode(b"", 0).inputs["x"].shape == (0, 2)
        return
    with pytest.raises(InputError, match=words):
        codec.decode(bytes(size), 0)


def test_a_raw_tensor_needs_one_input_and_one_free_dimension() -> None:
    with pytest.raises(InputError, match="a model of one input"):
        TWO.decode(b"", 0)
    with pytest.raises(InputError, match="does not follow from its size"):
        of("FP32", (-1, -1)).decode(b"1234", 0)
    with pytest.raises(InputError, match="BYTES must be one element"):
        of("BYTES", (-1, 2)).decode(b"1234", 0)


def test_raw_bytes_are_one_element() -> None:
    array = of("BYTES", (-1, 1)).decode("é\0".encode(), 0).inputs["x"]
    assert array.shape == (1, 1) and array[0, 0] == "é\0".encode()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_json_cannot_carry_is_an_error_that_names_it_and_binary(value: float) -> None:
    request = InferRequest("null", {}, None, False, {})
    output = {"y": np.array([1, value], np.float32)}
    with pytest.raises(OutputError, match=r"output 'y' of model 'm' version '3' has NaN or Infinity.*binary") as caught:
        of("FP32").encode("m", "3", request, output, {})
    assert caught.value.status == 422
    request.binary_default = True
    body, length = of("FP32").encode("m", "3", request, output, {})
    assert np.frombuffer(body[length:], np.float32)[0] == 1


def test_the_word_null_in_an_id_is_no_error() -> None:
    body, _ = of("FP32").encode("m", "3", InferRequest("null", {}, None, False, {}), {"y": np.ones(1, np.float32)}, {})
    assert orjson.loads(body)["id"] == "null"


def test_outputs_in_any_memory_order_are_written_row_by_row() -> None:
    request = InferRequest(None, {}, None, False, {})
    array = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    body, _ = of("FP32").encode("m", "1", request, {"y": array}, {})
    assert orjson.loads(body)["outputs"][0]["data"] == [0, 1, 2, 3, 4, 5]
    request.binary_default = True
    body, length = of("FP32").encode("m", "1", request, {"y": array}, {})
    assert np.frombuffer(body[length:], np.float32).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("datatype", DATATYPES)
@pytest.mark.parametrize("shape", [[0], [0, 3], [3, 0]])
def test_tensors_without_elements_travel_both_ways(datatype: str, shape: list[int]) -> None:
    codec = of(datatype, (-1,) * len(shape))
    tensor = {"name": "x", "datatype": datatype, "shape": shape}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 0}}], **BINARY}).encode()
    request = codec.decode(head, len(head))
    assert list(request.inputs["x"].shape) == shape and request.inputs["x"].dtype == DATATYPES[datatype]
    body, length = codec.encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert length == len(body)
    assert orjson.loads(body)["outputs"] == [
        {"name": "y", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": 0}}
    ]
    if datatype != "BF16":
        request = decode(codec, {"inputs": [{**tensor, "data": []}]})
        assert list(request.inputs["x"].shape) == shape
        body, _ = codec.encode("m", "1", request, {"y": request.inputs["x"]}, {})
        assert orjson.loads(body)["outputs"][0]["data"] == []


@settings(max_examples=200, deadline=None)
@given(data=st.data(), datatype=st.sampled_from([name for name in DATATYPES if name != "BYTES"]))
def test_whatever_bits_come_go_out_again_in_binary(data: st.DataObject, datatype: str) -> None:
    width = DTYPES[datatype].itemsize
    shape = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    size = int(np.prod(shape)) * width
    sent = data.draw(st.binary(min_size=size, max_size=size))
    if datatype == "BOOL":
        sent = bytes(byte & 1 for byte in sent)
    if datatype == "BF16":  # whatever is not a number becomes the quiet one of its kind
        halves = np.frombuffer(sent, "<u2")
        sent = np.where((halves & 0x7FFF) > 0x7F80, halves | 0x40, halves).astype("<u2").tobytes()
    codec = of(datatype, (-1,) * len(shape))
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor], **BINARY}).encode()
    request = codec.decode(head + sent, len(head))
    body, length = codec.encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert length is not None and body[length:] == sent
    assert orjson.loads(body[:length])["outputs"][0]["shape"] == shape


@settings(max_examples=100, deadline=None)
@given(elements=st.lists(st.binary(max_size=20), max_size=6))
def test_whatever_bytes_come_go_out_again_in_binary(elements: list[bytes]) -> None:
    sent = b"".join(len(element).to_bytes(4, "little") + element for element in elements)
    tensor = {"name": "x", "datatype": "BYTES", "shape": [len(elements)], "parameters": {"binary_data_size": len(sent)}}
    head = json.dumps({"inputs": [tensor], **BINARY}).encode()
    request = of("BYTES").decode(head + sent, len(head))
    assert request.inputs["x"].tolist() == elements
    body, length = of("BYTES").encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert body[length:] == sent


def test_bf16_is_float32_inside_and_travels_in_binary_only() -> None:
    codec = of("BF16")
    sent = np.array([0x3F80, 0xC000, 0x7F80, 0x7FC0, 0x0001], "<u2").tobytes()
    tensor = {"name": "x", "datatype": "BF16", "shape": [5], "parameters": {"binary_data_size": 10}}
    x = decode(codec, {"inputs": [tensor], **BINARY}, sent).inputs["x"]
    assert x.dtype == np.float32 and x[:3].tolist() == [1, -2, np.inf] and np.isnan(x[3])
    # NaN stays NaN; a tie goes to the even neighbour; what is larger than all becomes infinite.
    odd = np.array([0x7F800001, 0x3F808000, 0x3F818000, 0x7F7FFFFF], np.uint32).view(np.float32)
    assert to_bf16(odd).view("<u2").tolist() == [0x7FC0, 0x3F80, 0x3F82, 0x7F80]
    assert "is BF16, which JSON cannot carry: send it" in refused(
        codec, {"inputs": [{**tensor, "parameters": {}, "data": [1]}]}
    )
    assert "'y' is BF16, which JSON cannot carry; ask for it in binary" in refused(codec, {"inputs": [tensor]}, sent)
    named = {"name": "y", "parameters": {"binary_data": False}}
    assert "'y' is BF16" in refused(codec, {"inputs": [tensor], **BINARY, "outputs": [named]}, sent)
    raw = codec.decode(sent, 0)
    body, length = codec.encode("m", "1", raw, {"y": raw.inputs["x"]}, {})
    assert body[length:] == sent
    largest = {"name": "y", "parameters": {"classification": 1}}
    request = decode(codec, {"inputs": [tensor], "outputs": [largest]}, sent)
    body, _ = codec.encode("m", "1", request, {"y": np.array([1, 2.5], np.float32)}, {})
    assert orjson.loads(body)["outputs"][0]["data"] == ["2.500000:1"]


def test_a_scalar_of_bf16_stays_a_scalar() -> None:
    for bits, half in ((0x3F818000, 0x3F82), (0xFFFFFFFF, 0xFFFF)):
        packed = to_bf16(np.array(bits, np.uint32).view(np.float32))
        assert packed.shape == () and packed.view("<u2").item() == half
    codec = of("BF16", ())
    tensor = {"name": "x", "datatype": "BF16", "shape": [], "parameters": {"binary_data_size": 2}}
    request = decode(codec, {"inputs": [tensor], **BINARY}, b"\x80\x3f")
    body, length = codec.encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert orjson.loads(body[:length])["outputs"][0]["shape"] == [] and body[length:] == b"\x80\x3f"


@pytest.mark.parametrize(
    ("datatype", "elements"), [("FP32", "numbers"), ("BOOL", "true or false"), ("INT64", "whole numbers")]
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_long_text_among_numbers_costs_no_memory(datatype: str, elements: str, nested: bool) -> None:
    data: list[Any] = ["1"] * 3000 + ["x" * 3000]
    tensor = {"name": "x", "shape": [1, 3001], "datatype": datatype, "data": [data] if nested else data}
    codec = of(datatype, (-1, -1))
    tracemalloc.start()
    try:
        words = refused(codec, {"inputs": [tensor]})
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words == f"input 'x': the elements of {datatype} must be {elements}"
    assert most < 2_000_000, "numpy would take 36 MB"


def test_a_shape_of_very_many_dimensions_is_refused_before_anything_is_done_with_them() -> None:
    """The product of 900,000 dimensions takes minutes, in which nothing else runs; as gzip they are 58 kB."""

    shape: list[Any] = [0] + [2**31] * 900_000
    shape[1] = "which would be refused first if they were looked at one by one"
    tensor = {"name": "x", "shape": shape, "datatype": "FP32", "data": []}
    words = refused(of("FP32", (-1, 4)), {"inputs": [tensor]})
    assert words == "input 'x' has the shape [… 900001 dimensions], the model takes [-1, 4] (-1: any)"


@pytest.mark.parametrize("depth", [32, 33, 64, 100])
@pytest.mark.parametrize(("datatype", "element"), [("BYTES", "a"), ("INT32", 1.5), ("INT32", None), ("FP32", 1.5)])
def test_data_that_is_nested_deeper_than_arrays_are_is_the_clients_mistake(
    depth: int, datatype: str, element: Any
) -> None:
    for _ in range(depth):
        element = [element]
    tensor = {"name": "x", "shape": [1], "datatype": datatype, "data": element}
    assert refused(of(datatype), {"inputs": [tensor]}).startswith("input 'x'")


def test_elements_that_are_too_many_are_not_all_read_first() -> None:
    tail = bytes(10_000_000)
    tensor = {"name": "x", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": len(tail)}}
    codec, head = of("BYTES"), json.dumps({"inputs": [tensor]}).encode()
    body = head + tail
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=re.escape("more elements than the 1 that its shape [1] needs")):
            codec.decode(body, len(head))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000, "two and a half million empty texts are 20 MB"


def test_a_shape_that_no_array_has_is_refused_even_without_elements() -> None:
    shape = [0, 2**31, 2**31, 2**31]
    codec = of("FP32", (-1, -1, -1, -1))
    tensor = {"name": "x", "shape": shape, "datatype": "FP32"}
    for nothing in ({"data": []}, {"parameters": {"binary_data_size": 0}}):
        assert "has the shape [0, 2147483648, 2147483648, 2147483648], which is too large" in refused(
            codec, {"inputs": [{**tensor, **nothing}]}
        )
    for datatype in DATATYPES:
        largest = {"name": "x", "shape": [0, 2**16, 2**10], "datatype": datatype, "parameters": {"binary_data_size": 0}}
        assert decode(of(datatype, (-1, -1, -1)), {"inputs": [largest], **BINARY}).inputs["x"].shape == (
            0,
            2**16,
            2**10,
        )
        more = {**largest, "shape": [0, 2**16, 2**10 + 1]}
        assert "too large even without elements" in refused(of(datatype, (-1, -1, -1)), {"inputs": [more], **BINARY})


def test_the_largest_numbers_come_as_texts_for_each_row_in_json_and_in_binary() -> None:
    codec = of("FP32", (-1, 3))
    x = {"name": "x", "datatype": "FP32", "shape": [2, 3], "data": [0.1, 0.7, 0.2, 3, 1, 3]}
    y = np.array([[0.1, 0.7, 0.2], [3, 1, 3]], np.float32)
    for binary in (False, True):
        wanted = {"name": "y", "parameters": {"classification": 2, "binary_data": binary}}
        request = decode(codec, {"inputs": [x], "outputs": [wanted]})
        body, length = codec.encode("m", "1", request, {"y": y}, {})
        texts = ["0.700000:1", "0.200000:2", "3.000000:0", "3.000000:2"]
        output = orjson.loads(body[:length])["outputs"][0]
        assert (output["datatype"], output["shape"]) == ("BYTES", [2, 2])
        if binary:
            assert body[length:] == b"".join(len(t).to_bytes(4, "little") + t.encode() for t in texts)
        else:
            assert output["data"] == texts
    nought = decode(codec, {"inputs": [x], "outputs": [{"name": "y", "parameters": {"classification": 0}}]})
    assert nought.classes is None


def test_a_timeout_is_in_microseconds_and_parameters_that_change_nothing_are_taken() -> None:
    assert decode(TWO, {"inputs": [A, B], "parameters": {"timeout": 1500}}).timeout_seconds == 0.0015
    sequence = {"sequence_id": 7, "sequence_start": True, "sequence_end": False, "priority": 3, "my": "own"}
    request = decode(TWO, {"inputs": [A, B], "parameters": {**sequence, "binary_data_output": True}})
    assert request.timeout_seconds == 0 and request.binary_default


def test_a_tensor_in_shared_memory_is_refused_by_name() -> None:
    tensor = {"name": "a", "shape": [1, 2], "datatype": "FP32", "parameters": {"shared_memory_region": "r"}}
    assert refused(TWO, {"inputs": [tensor, B]}) == (
        "input 'a' names a shared memory region, which is not supported; send tensors in the body"
    )


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)

wanted = st.dictionaries(st.sampled_from(["binary_data", "classification", "shared_memory_region"]), json_values)


@settings(max_examples=150, deadline=None)
@given(data=json_values, shape=json_values, parameters=json_values, datatype=st.sampled_from(list(DATATYPES)))
def test_whatever_json_comes_is_decoded_or_refused(data: Any, shape: Any, parameters: Any, datatype: str) -> None:
    tensor = {"name": "x", "datatype": datatype, "data": data, "shape": shape, "parameters": parameters}
    body = json.dumps({"inputs": [tensor]}).encode()
    for codec in (of(datatype), of(datatype, (2, -1))):
        try:
            array = codec.decode(body, None).inputs["x"]
        except InputError:
            continue
        assert array.shape == tuple(shape)


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=200), length=st.none() | st.integers(0, 300))
def test_whatever_bytes_come_are_decoded_or_refused(body: bytes, length: int | None) -> None:
    for codec in (TWO, of("FP32"), of("BYTES")):
        try:
            codec.decode(body, length)
        except InputError:
            continue
        assert length == 0


def test_an_optional_input_may_be_left_out_and_a_needed_one_may_not() -> None:
    x, factor = TensorSpec("x", "FP32", (-1,)), TensorSpec("factor", "FP32", (1,), optional=True)
    codec = Codec(Signature((x, factor), (TensorSpec("y", "FP32", (-1,)),)))
    both = [
        {"name": "x", "datatype": "FP32", "shape": [1], "data": [1]},
        {"name": "factor", "datatype": "FP32", "shape": [1], "data": [2]},
    ]
    assert list(decode(codec, {"inputs": both[:1]}).inputs) == ["x"]
    assert list(decode(codec, {"inputs": both}).inputs) == ["x", "factor"]
    assert "input 'x' is missing" in refused(codec, {"inputs": both[1:]})
    assert list(codec.decode(np.array([1, 2], "<f4").tobytes(), 0).inputs) == ["x"]


@settings(max_examples=300, deadline=None)
@given(
    outputs=json_values | st.lists(st.fixed_dictionaries({"name": st.sampled_from(["y", "z"]), "parameters": wanted})),
    parameters=json_values
    | st.dictionaries(st.sampled_from(["timeout", "priority", "binary_data_output"]), json_values),
    datatype=st.sampled_from(list(DATATYPES)),
)
def test_whatever_is_asked_for_is_answered_or_refused(outputs: Any, parameters: Any, datatype: str) -> None:
    codec = of(datatype, (-1, 2))
    size = 18 if datatype == "BYTES" else 4 * DTYPES[datatype].itemsize
    tensor = {"name": "x", "datatype": datatype, "shape": [2, 2], "parameters": {"binary_data_size": size}}
    sent = b"\1\0\0\0a\0\0\0\0\1\0\0\0b\0\0\0\0" if datatype == "BYTES" else bytes(size)
    head = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()
    try:
        request = codec.decode(head + sent, len(head))
    except InputError:
        return
    assert request.timeout_seconds >= 0
    body, length = codec.encode("m", "1", request, {"y": request.inputs["x"]}, {})
    assert orjson.loads(body[:length])["outputs"][0]["shape"][0] == 2
