"""An application's own paths: its request becomes tensors, the model's tensors its answer, and all else is as for V2."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.aliases import Alias, AliasOutput
from registry.sections import CacheSection
from registry.signature import DATATYPES, Signature, TensorSpec
from serving.caching.cache import ResponseCache
from serving.compute.engine import LoadedVersion
from serving.traffic.capture import Capture
from serving.traffic.routing import Route
from serving.wire.aliases import Translator, misfit, place, shown, softmax
from serving.wire.tensors import InputError, OutputError
from serving.wire.v2 import Codec
from tests.unit.serving.helpers import Arrays, PythonRuntime, Server, close, load, serve

Document = dict[str, Any]
SCORES = Signature((TensorSpec("x", "FP32", (-1, 3)),), (TensorSpec("y", "FP32", (-1, 3)),))


V2 = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}


def same(inputs: Arrays) -> dict[str, Any]:
    return {"y": inputs["x"]}


def alias(**more: Any) -> Alias:
    return Alias(**{"path": "/api/v2/predict-quality", "model": "m", **more})


def runtime(
    datatype: str = "FP32",
    shape: tuple[int, ...] = (-1, 3),
    function: Callable[[Arrays], dict[str, Any]] = same,
    *,
    out: tuple[str, tuple[int, ...]] | None = None,
) -> PythonRuntime:
    answered = TensorSpec("y", *(out or (datatype, shape)))
    return PythonRuntime(function, Signature((TensorSpec("x", datatype, shape),), (answered,)))


def asked(
    one: Alias, *sent: Any, model: PythonRuntime | None = None, headers: dict[str, str] | None = None, **options: Any
) -> list[Any]:
    """The answers (status, document) of a server with this alias to these documents or bodies."""

    async def scenario() -> list[Any]:
        version = load(model or runtime(), **options)
        server = serve(version, aliases=[one])
        answers = []
        for body in sent:
            raw = body if isinstance(body, bytes) else orjson.dumps(body)
            answer = await server.ask("POST", one.path, raw, headers)
            assert answer is not None
            answers.append((answer.status, answer.json()))
        close(version)
        return answers

    return asyncio.run(scenario())


def test_without_more_words_fields_are_inputs_and_all_outputs_are_answered() -> None:
    row, rows = asked(alias(), {"x": [1, 2, 3.5]}, {"x": [[1, 2, 3], [4, 5, 6]], "other": None})
    assert row == (200, {"y": [1, 2, 3.5]})
    assert rows == (200, {"y": [[1, 2, 3], [4, 5, 6]]})


def test_a_batch_of_one_is_answered_as_a_batch() -> None:
    assert asked(alias(), {"x": [[1, 2, 3]]}) == [(200, {"y": [[1, 2, 3]]})]
    one = alias(outputs=[{"output": "y", "form": "index"}])
    assert asked(one, {"x": [[1, 9, 3]]}, {"x": [1, 9, 3]}) == [(200, {"y": [1]}), (200, {"y": 1})]


@pytest.mark.parametrize(
    ("field", "document"),
    [
        ("items.0.price", {"items": [{"price": [1, 2, 3]}]}),
        ("items.*.price", {"items": [{"price": 1}, {"price": 2}, {"price": 3}]}),
        ("a.b.*", {"a": {"b": [1, 2, 3]}}),
        (".", [1, 2, 3]),
        (["a", "deep.b", "deep.c.0"], {"a": 1, "deep": {"b": 2, "c": [3]}}),
    ],
)
def test_a_value_is_found_by_its_path(field: Any, document: Any) -> None:
    assert asked(alias(inputs=[{"input": "x", "field": field}]), document) == [(200, {"y": [1, 2, 3]})]


def test_columns_become_rows() -> None:
    columns = alias(inputs=[{"input": "x", "field": ["rows.*.a", "rows.*.b", "rows.*.c"]}])
    rows = [{"a": 1, "b": 2, "c": 3}, {"a": 4, "b": 5, "c": 6}]
    assert asked(columns, {"rows": rows}) == [(200, {"y": [[1, 2, 3], [4, 5, 6]]})]


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (b"", "the body is empty"),
        (b"{", "not valid JSON"),
        ([1], "the request must be an object to have 'x'"),
        ({"y": 1, "z": 2}, "the request has no 'x'; it has 'y', 'z'"),
        ({"x": None}, "the request has no 'x'"),
        ({"x": [1, 2]}, "'x' has the shape [2], which does not fit [-1, 3]"),
        ({"x": [[1, 2, 3], [4, 5]]}, "rows of different lengths"),
        ({"x": [1, "a", 3]}, "the elements of FP32 must be numbers"),
        ({"x": {"a": 1}}, "does not fit"),
        ({"x": [1e300, 0, 0]}, "too large for FP32"),
        ({"x": [[[[1, 2, 3]]]]}, "which does not fit"),
    ],
)
def test_what_the_client_got_wrong_is_400_and_says_what(document: Any, said: str) -> None:
    [(status, answer)] = asked(alias(), document)
    assert status == 400 and said in answer["error"]


def test_a_path_that_leads_nowhere_says_where_it_ends() -> None:
    one = alias(inputs=[{"input": "x", "field": "items.*.price"}])
    answers = asked(one, {"items": [{"price": 1}, {}]}, {"items": 3}, {"items": {"price": 2}}, {})
    assert [status for status, _ in answers] == [400] * 4
    assert [answer["error"] for _, answer in answers] == [
        "the request has no 'items.1.price'",
        "'items' must be a list to have 'items.*.price', it is a number",
        "'items' must be a list to have 'items.*.price', it is an object",
        "the request has no 'items.*.price'",
    ]


def test_a_default_stands_in_for_a_missing_field_and_an_optional_input_stays_out() -> None:
    assert asked(alias(inputs=[{"input": "x", "default": [7, 8, 9]}]), {}) == [(200, {"y": [7, 8, 9]})]
    signature = Signature((*SCORES.inputs, TensorSpec("scale", "FP32", (1,), optional=True)), SCORES.outputs)
    model = PythonRuntime(lambda given: {"y": given["x"] * given.get("scale", 1)}, signature)
    assert asked(alias(), {"x": [1, 2, 3]}, {"x": [1, 2, 3], "scale": 2}, model=model) == [
        (200, {"y": [1, 2, 3]}),
        (200, {"y": [2, 4, 6]}),
    ]


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        *((name, [1, 0, 2]) for name in ("UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64")),
        *((name, [1.5, 0, -2]) for name in ("BF16", "FP16", "FP32", "FP64")),
        ("BOOL", [True, False, True]),
        ("BYTES", ["a", "", "é"]),
    ],
)
def test_every_datatype_comes_and_goes(datatype: str, value: list[Any]) -> None:
    assert asked(alias(), {"x": value}, model=runtime(datatype)) == [(200, {"y": value})]
    single = runtime(datatype, (-1,))
    assert asked(alias(), {"x": value[0]}, {"x": value[:1]}, {"x": []}, model=single) == [
        (200, {"y": value[0]}),
        (200, {"y": value[:1]}),
        (200, {"y": []}),
    ]


@pytest.mark.parametrize(
    ("sizes", "wanted", "batch", "expected"),
    [
        ((2, 3), (-1, 3), "auto", ((2, 3), False)),
        ((3,), (-1, 3), "auto", ((1, 3), True)),
        ((), (-1, 1), "auto", ((1, 1), True)),
        ((5,), (-1, 1), "auto", ((5, 1), False)),
        ((784,), (-1, 1, 28, 28), "auto", ((1, 1, 28, 28), True)),
        ((28, 28), (-1, 1, 28, 28), "auto", None),
        ((4,), (4,), "auto", ((4,), False)),
        ((4,), (-1,), "auto", ((4,), False)),
        ((), (-1,), "auto", ((1,), True)),
        ((), (), "auto", ((), False)),
        ((3,), (-1, -1), "auto", ((1, 3), True)),
        ((2, 3), (-1, 2, 3), "row", ((1, 2, 3), True)),
        ((2, 3), (-1, 3), "row", None),
        ((3,), (-1, 3), "rows", None),
        ((3,), (-1, 1), "rows", ((3, 1), False)),
        ((0, 3), (-1, 3), "auto", ((0, 3), False)),
        ((2,), (4, 2), "auto", None),
    ],
)
def test_a_value_gets_the_batch_that_the_model_wants(sizes: Any, wanted: Any, batch: str, expected: Any) -> None:
    assert place(sizes, wanted, batch) == expected


def test_an_output_is_shown_as_the_settings_say() -> None:
    scores = np.array([0.1, 2.5, 1.25], np.float32)
    labels = ("cat", "dog")

    def seen(**more: Any) -> Any:
        return orjson.loads(
            orjson.dumps(
                shown(AliasOutput(output="y", **more), scores, more.get("labels", labels), rows=False),
                option=orjson.OPT_SERIALIZE_NUMPY,
            )
        )

    assert seen() == [0.1, 2.5, 1.25]
    assert seen(decimals=0) == [0, 2, 1]
    assert seen(form="argmax") == {"index": 1, "label": "dog", "score": 2.5}
    assert seen(form="index") == 1 and seen(form="label") == "dog"
    assert seen(form="top", top=2) == [{"index": 1, "label": "dog", "score": 2.5}, {"index": 2, "score": 1.25}]
    assert seen(form="top", top=1000, labels=["a", "b", "c"])[2] == {"index": 0, "label": "a", "score": 0.1}
    assert seen(form="argmax", softmax=True, decimals=3) == {"index": 1, "label": "dog", "score": 0.726}
    assert sum(seen(softmax=True)) == pytest.approx(1)


def test_dimensions_of_one_are_left_out_but_for_a_batch() -> None:
    one = np.array([[[3.0]]], np.float32)

    def seen(array: Any, rows: bool, **more: Any) -> Any:
        return orjson.loads(
            orjson.dumps(
                shown(AliasOutput(output="y", **more), array, (), rows=rows), option=orjson.OPT_SERIALIZE_NUMPY
            )
        )

    assert seen(one, False) == 3.0 and seen(one, True) == [3.0] and seen(one, False, squeeze=False) == [[[3.0]]]
    assert seen(one, False, form="index") == 0 and seen(one, True, form="index") == [0]
    assert seen(np.empty((0, 3), np.float32), True, form="index") == []
    texts = np.array([[b"a"], [b"b"]], object)
    assert seen(texts, True) == ["a", "b"] and seen(texts[:1], False) == "a"


@pytest.mark.parametrize(
    ("array", "form", "said"),
    [
        (np.array([np.nan]), "values", "NaN or Infinity"),
        (np.array([1, np.inf]), "argmax", "NaN or Infinity"),
        (np.array([True]), "argmax", "no largest"),
        (np.array([b"a"], object), "index", "no largest"),
        (np.array([b"\xff"], object), "values", "not UTF-8"),
        (np.empty((2, 0)), "index", "no elements"),
        (np.empty((200, 1000)), "top", "too many"),
    ],
)
def test_what_json_cannot_carry_or_has_no_order_is_the_models_fault(array: Any, form: Any, said: str) -> None:
    array = np.nan_to_num(array) if said == "too many" else array
    with pytest.raises(OutputError, match=said):
        top = {"top": 1000} if form == "top" else {}
        shown(AliasOutput(output="y", form=form, **top), array, (), rows=True)


def test_softmax_of_large_numbers_stays_finite() -> None:
    assert softmax(np.array([1e30, 1e30], np.float32)).tolist() == [0.5, 0.5]
    assert softmax(np.float32(3) * np.ones(())).tolist() == 1
    assert softmax(np.empty((0, 2), np.float16)).shape == (0, 2)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"inputs": [{"input": "z"}]}, "no input 'z', its inputs are 'x'"),
        ({"inputs": [{"input": "x", "datatype": "INT8"}]}, "'x' is FP32 in the model, not INT8"),
        ({"inputs": [{"input": "x", "shape": [-1, 4]}]}, "does not fit input 'x'"),
        ({"inputs": [{"input": "x", "image": {"width": 3, "height": 1}}]}, "the image has the shape [-1, 3, 1, 3]"),
        ({"outputs": [{"output": "z"}]}, "no output 'z', its outputs are 'y'"),
        ({"outputs": [{"output": "y", "form": "label"}]}, "has no labels"),
    ],
)
def test_settings_that_do_not_fit_the_version_are_the_operators_and_say_so(more: Document, said: str) -> None:
    [(status, answer)] = asked(alias(**more), {"x": [1, 2, 3]})
    assert status == 500 and said in answer["error"] and "[[aliases]]" in answer["error"]
    problem = misfit(alias(**more), SCORES, {})
    assert problem is not None and said in problem


def test_inputs_that_nothing_fills_are_told() -> None:
    two = Signature((*SCORES.inputs, TensorSpec("w", "FP32", (-1,))), SCORES.outputs)
    assert misfit(alias(inputs=[{"input": "x"}]), two, {}) == "nothing says where the input 'w' comes from"
    assert misfit(alias(), two, {}) is None


def test_labels_come_from_the_version_or_the_settings() -> None:
    one = alias(outputs=[{"output": "y", "form": "label", "name": "kind"}])
    assert asked(one, {"x": [1, 9, 3]}, labels={"y": ("cat", "dog", "fox")}) == [(200, {"kind": "dog"})]
    own = alias(outputs=[{"output": "y", "form": "label", "labels": ["A", "B", "C"]}])
    assert asked(own, {"x": [1, 9, 3]}, labels={"y": ("cat", "dog", "fox")}) == [(200, {"y": "B"})]


def on(server: Server, path: str, document: Any, headers: dict[str, str] | None = None) -> Any:
    return server.post(path, document, headers)


def test_the_way_is_that_of_v2() -> None:
    """Route and candidate, ids, headers, limits, errors of the model, capture and counts."""

    def checked(inputs: Arrays) -> dict[str, Any]:
        if inputs["x"].max() > 100:
            raise ValueError("too much")
        return same(inputs)

    async def scenario() -> None:
        one = alias()
        stable = load(runtime(function=checked))
        candidate = load(runtime(function=lambda given: {"y": given["x"] * 2}), "2")
        draw = {"now": 0.9}
        server = serve(
            stable, candidate, route=Route("m", 3, "1", "2", 0.5), aliases=[one], random=lambda: draw["now"],
            max_body_bytes=1000,
        )  # fmt: skip
        offered: list[tuple[str, int | None, bytes]] = []

        class Kept(Capture):
            def __init__(self) -> None: ...
            def wants(self) -> bool:
                return True

            def offer(self, model: str, body: bytes, header_length: int | None) -> None:
                offered.append((model, header_length, body))

        server.serving.capture = Kept()
        path = one.path
        answer = await server.post(path, {"x": [1, 2, 3]}, {"X-Request-ID": "mine"})
        assert (answer.status, answer.json()) == (200, {"y": [1, 2, 3]})
        assert (answer.headers["x-model-version"], answer.headers["x-request-id"]) == ("1", "mine")
        assert float(answer.headers["x-model-seconds"]) >= 0 and float(answer.headers["x-queue-seconds"]) >= 0
        [(model, length, body)] = offered
        again = stable.codec.decode(body, length)
        assert model == "m" and again.inputs["x"].tolist() == [[1, 2, 3]]
        draw["now"] = 0.1
        answer = await server.post(path, {"x": [1, 2, 3]})
        assert (answer.json(), answer.headers["x-model-version"]) == ({"y": [2, 4, 6]}, "2")
        assert ".3.2." in answer.headers["x-request-id"] and len(offered) == 1
        draw["now"] = 0.9
        answer = await server.post(path, {"x": [101, 0, 0]})
        assert answer.status == 500 and "failed on this input" in answer.error
        assert stable.telemetry.total.errors == 1
        answer = await server.post(path, {"x": [0] * 1000})
        assert answer.status == 413
        wrong = await server.ask("GET", path)
        assert wrong is not None and (wrong.status, wrong.headers["allow"]) == (405, "POST")
        assert stable.telemetry.total.requests == 2 and server.serving.in_flight == 0 and not stable.references
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_model_that_is_not_there_is_404_and_may_come_later() -> None:
    async def scenario() -> None:
        one = alias(model="later")
        server = serve(aliases=[one])
        answer = await server.post(one.path, {"x": [1, 2, 3]})
        assert answer.status == 404 and "model 'later' is not known" in answer.error
        assert (await server.get("/")).json()["aliases"] == [
            {"path": one.path, "model": "later", "problem": "model 'later' is not known; this server has no models yet"}
        ]
        version = load(runtime(), model="later")
        server.serving.install({"later": Route("later", 1, "1")}, {("later", "1"): version}, "epoch", 2)
        assert (await server.post(one.path, {"x": [1, 2, 3]})).json() == {"y": [1, 2, 3]}
        assert (await server.get("/")).json()["aliases"] == [{"path": one.path, "model": "later"}]
        close(version)

    asyncio.run(scenario())


def test_nan_is_422_and_counts_as_the_versions_error() -> None:
    async def scenario() -> None:
        version = load(runtime(function=lambda given: {"y": given["x"] * np.float32(np.nan)}))
        server = serve(version, aliases=[alias()])
        answer = await server.post(alias().path, {"x": [1, 2, 3]})
        assert answer.status == 422 and version.telemetry.total.errors == 1
        close(version)

    asyncio.run(scenario())


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "a", "0"]), inner, max_size=3),
    max_leaves=12,
)
FIELDS: list[Any] = ["x", "x.0.a", "x.*", "x.*.a", "*", ".", ["x.a", "a"], ["x.*.a", "x.*.0"]]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    document=JSON | st.dictionaries(st.just("x"), JSON),
    field=st.sampled_from(FIELDS),
    datatype=st.sampled_from(list(DATATYPES)),
    shape=st.sampled_from([(-1, 3), (-1,), (), (3,), (-1, -1), (2, 0)]),
    batch=st.sampled_from(["auto", "row", "rows"]),
)
def test_whatever_json_comes_is_a_request_or_refused(
    document: Any, field: Any, datatype: str, shape: tuple[int, ...], batch: Any
) -> None:
    spec = TensorSpec("x", datatype, shape)
    codec = Codec(Signature((spec,), (TensorSpec("y", datatype, shape),)))
    translator = Translator(alias(inputs=[{"input": "x", "field": field, "batch": batch}]))
    try:
        body = orjson.dumps(document, option=orjson.OPT_NON_STR_KEYS)
    except orjson.JSONEncodeError:  # whole numbers beyond 64 bits
        body = json.dumps(document).encode()
    try:
        made = asyncio.run(translator.request(codec, body, {}, 30.0))
    except InputError as error:
        assert error.status == 400
        return
    array = codec.decode(made.body, made.header_length).inputs["x"]
    assert spec.accepts(array.shape)


def test_the_cache_answers_requests_in_other_words_and_says_so() -> None:
    async def scenario() -> None:
        runs = runtime()
        version = load(runs, deterministic=True)
        server = serve(version, aliases=[alias()])
        server.serving.cache = ResponseCache(CacheSection())
        server.serving.cache.follow([version])
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
        first = await server.post("/v2/models/m/infer", {"inputs": [tensor]})
        second = await server.post(alias().path, {"x": [1, 2, 3]})
        other = await server.post(alias().path, {"x": [1, 2, 4]})
        assert first.status == 200 and second.json() == {"y": [1, 2, 3]} and other.json() == {"y": [1, 2, 4]}
        assert second.headers["x-cache"] == "l1" and "x-cache" not in other.headers and len(runs.calls) == 2
        close(version)

    asyncio.run(scenario())


def test_a_body_may_be_packed_and_so_may_the_answer() -> None:
    async def scenario() -> None:
        version = load(runtime())
        server = serve(version, aliases=[alias()])
        rows = [[float(n % 7), 0.0, 1.0] for n in range(2000)]
        packed = gzip.compress(orjson.dumps({"x": rows}))
        answer = await server.ask("POST", alias().path, packed, {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"})
        assert answer is not None and answer.headers["content-encoding"] == "gzip"
        assert orjson.loads(gzip.decompress(answer.body)) == {"y": rows}
        close(version)

    asyncio.run(scenario())


def test_the_key_of_a_client_keeps_it_on_one_version() -> None:
    async def scenario() -> None:
        one, two = load(runtime()), load(runtime(), "2")
        server = serve(one, two, route=Route("m", 3, "1", "2", 0.5), aliases=[alias()])
        for name in ("anna", "bert", "carl", "dora"):
            seen = {
                (await server.post(path, document, {"X-Route-Key": name})).headers["x-model-version"]
                for path, document in ((alias().path, {"x": [1, 2, 3]}), ("/v2/models/m/infer", V2))
            }
            assert len(seen) == 1
        close(one, two)

    asyncio.run(scenario())


def test_a_long_answer_is_written_by_a_thread_and_is_the_same() -> None:
    rows = [[float(n), 0.0, 1.0] for n in range(5500)]
    assert asked(alias(), {"x": rows}) == [(200, {"y": rows})]


def test_it_is_in_the_api_page_and_its_schema() -> None:
    async def scenario() -> None:
        one = alias(summary="Says how good a thing is")
        picture = Alias(
            path="/look", model="m", inputs=[{"input": "x", "image": {"width": 1, "height": 1}, "field": "photo"}]
        )
        server = serve(aliases=[one, picture])
        schema = (await server.get("/openapi.json")).json()
        assert schema["paths"][one.path]["post"]["summary"] == "Says how good a thing is"
        body = schema["paths"]["/look"]["post"]["requestBody"]["content"]
        assert set(body) == {"multipart/form-data", "image/*"}
        assert body["multipart/form-data"]["schema"]["properties"]["photo"]["format"] == "binary"
        page = await server.ask("GET", "/docs")
        assert page is not None and b"Says how good a thing is" in page.body and b"/look" in page.body

    asyncio.run(scenario())


def test_the_mapping_goes_by_the_version_that_answers() -> None:
    async def scenario() -> None:
        first, second = load(runtime()), load(runtime("INT32"), "2")
        server = serve(first, aliases=[alias()])
        assert (await server.post(alias().path, {"x": [1, 2, 3.5]})).status == 200
        server.serving.install({"m": Route("m", 2, "2")}, {("m", "2"): second}, "epoch", 2)
        assert (await server.post(alias().path, {"x": [1, 2, 3.5]})).status == 400
        assert (await server.post(alias().path, {"x": [1, 2, 3]})).json() == {"y": [1, 2, 3]}
        close(first, second)

    asyncio.run(scenario())


def test_labels_are_of_the_version_in_classification_too() -> None:
    async def scenario() -> None:
        version: LoadedVersion = load(runtime(), labels={"y": ("cat", "", "fox: red")})
        server = serve(version)
        outputs = [{"name": "y", "parameters": {"classification": 3}}]
        inputs = [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]
        answer = await server.post("/v2/models/m/infer", {"inputs": inputs, "outputs": outputs})
        assert answer.json()["outputs"][0]["data"] == ["3.000000:2:fox: red", "2.000000:1", "1.000000:0:cat"]
        close(version)

    asyncio.run(scenario())
