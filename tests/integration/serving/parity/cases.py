"""The requests of the parity test, made from a seed: what a client may send, in every mix, and what it should not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tests.integration.serving.parity.exchange import LENGTH, Array, Case, Tensor, infer, path
from tests.integration.serving.parity.models import AFFINE, FIXED, GRID, IDENTITIES, MAX_BATCH, OPTIONAL, PAIR

WORDS = ("", "a", "word", "grün", "日本", "two words", 'a "quoted" one', "line\nline", "0")

MIXED = ("BOOL", "BYTES", "FP32", "FP64", "INT8", "INT64", "UINT16", "UINT64")


def random_array(random: np.random.Generator, datatype: str, shape: tuple[int, ...]) -> Array:
    if datatype == "BYTES":
        array = np.empty(shape, object)
        array.reshape(-1)[:] = [WORDS[n].encode() for n in random.integers(0, len(WORDS), array.size)]
        return array
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(bool)
    if datatype == "BF16":  # as bits, of numbers that are finite
        return random.integers(0, 0x7F00, shape).astype(np.uint16)
    if datatype.startswith("FP"):
        return (random.standard_normal(shape) * 100).astype(f"float{datatype[2:]}")
    limits = np.iinfo(datatype.lower())
    return random.integers(limits.min, limits.max, shape, datatype.lower(), endpoint=True)


def every_case(seed: int) -> list[Case]:
    random = np.random.default_rng(seed)
    good = (
        of_types,
        of_outputs,
        of_mixes,
        of_parameters,
        of_raw_tensors,
        of_shapes,
        of_classes,
        of_transport,
        of_answers_packed,
        of_documents,
    )
    bad = (of_malformed_tensors, of_malformed_bodies, of_wrong_paths)
    return [case for make in good for case in make(random)] + [
        replace(case, kind=f"malformed: {case.kind}") for make in bad for case in make(random)
    ]


def of_types(random: np.random.Generator) -> Iterator[Case]:
    for datatype, model in IDENTITIES.items():
        for binary_in in (False, True):
            for binary_out in (False, True):
                how = f"{'binary' if binary_in else 'JSON'} to {'binary' if binary_out else 'JSON'}"
                for size in (1, int(random.integers(2, 50))):
                    x = Tensor("x", datatype, random_array(random, datatype, (size,)), binary_in)
                    wanted = [{"name": "y", "parameters": {"binary_data": binary_out}}]
                    yield infer(f"{datatype}, {how}", model.name, [x], outputs=wanted)
        if "INT" in datatype:
            limits = np.iinfo(datatype.lower())
            x = Tensor("x", datatype, np.array([limits.min, limits.max], datatype.lower()))
            yield infer("the least and the greatest whole number, JSON", model.name, [x])
    for value in ("nan", "inf", "-inf"):
        x = Tensor("x", "FP32", np.array([1, float(value)], np.float32), binary=True)
        yield infer("NaN and infinity, binary", "same-fp32", [x], parameters={"binary_data_output": True})
        yield infer("NaN and infinity as JSON", "same-fp32", [x])
    bad = Tensor("x", "BYTES", np.array([b"\xff\xfe"], object), binary=True)
    yield infer("bytes that are no text, binary", "same-bytes", [bad], parameters={"binary_data_output": True})
    for data in ([1, 2], [1.0, 2.5], [1e2, -1e-3]):
        yield infer("whole numbers and exponents as FP32", "same-fp32", [Tensor("x", "FP32", np.zeros(2), data=data)])


def _x(random: np.random.Generator, rows: int = 2, **more: Any) -> Tensor:
    return Tensor("x", "FP32", random_array(random, "FP32", (rows, 4)), **more)


def of_outputs(random: np.random.Generator) -> Iterator[Case]:
    yes, no = {"binary_data": True}, {"binary_data": False}
    wanted: list[Any] = [
        [{"name": "y"}], [{"name": "z"}], [{"name": "z"}, {"name": "y"}], [{"name": "y", "parameters": yes}, {"name": "z"}],
        [{"name": "z", "parameters": no}, {"name": "y", "parameters": yes}], [{"name": "y", "parameters": {}}],
    ]  # fmt: skip
    for outputs in wanted:
        for binary in (False, True):
            # A list in another order than the model's is a kind of its own.
            kind = "outputs in another order" if outputs[0]["name"] == "z" and len(outputs) > 1 else "outputs asked for"
            yield infer(kind, "affine", [_x(random, binary=binary)], outputs=outputs)
    for default in (True, False):
        for outputs in (None, [{"name": "y", "parameters": no}], [{"name": "y"}]):
            more: dict[str, Any] = {} if outputs is None else {"outputs": outputs}
            kind = "binary_data_output"
            if default and outputs is not None and "parameters" not in outputs[0]:
                kind = "binary_data_output and an output that says nothing"
            yield infer(kind, "affine", [_x(random)], parameters={"binary_data_output": default}, **more)
    yield infer("an empty list of outputs", "affine", [_x(random)], outputs=[])
    yield infer("an output that is not there", "affine", [_x(random)], outputs=[{"name": "w"}])
    yield infer("an output asked for twice", "affine", [_x(random)], outputs=[{"name": "y"}, {"name": "y"}])
    yield infer("an output without a name", "affine", [_x(random)], outputs=[{}])
    yield infer("outputs are no list", "affine", [_x(random)], outputs={"name": "y"})
    yield infer("an output is no object", "affine", [_x(random)], outputs=["y"])
    yield infer(
        "binary_data is no boolean", "affine", [_x(random)], outputs=[{"name": "y", "parameters": {"binary_data": 1}}]
    )


def of_mixes(random: np.random.Generator) -> Iterator[Case]:
    """Everything that is right, put together at random."""
    for _ in range(80):
        model = (AFFINE, FIXED, GRID, PAIR, OPTIONAL, *(IDENTITIES[one] for one in MIXED))[
            int(random.integers(5 + len(MIXED)))
        ]
        free = int(random.integers(1, MAX_BATCH + 1))
        tensors = [
            Tensor(
                name, datatype, random_array(random, datatype, tuple(free if n < 0 else n for n in shape)), flip(random)
            )
            for name, datatype, shape in model.inputs
            if name not in model.optional or flip(random)
        ]
        random.shuffle(tensors)
        more: dict[str, Any] = {}
        if flip(random):
            more["id"] = WORDS[int(random.integers(1, len(WORDS)))]
        if flip(random):
            named = [name for name, _, _ in model.outputs if flip(random)]
            more["outputs"] = [{"name": name, "parameters": {"binary_data": flip(random)}} for name in named]
        if flip(random):
            more["parameters"] = {"binary_data_output": flip(random), "note": "x"}
        yield infer(
            "any mix", model.name, tensors, version="1" if flip(random) else None,
            packed=(None, None, "gzip", "deflate")[int(random.integers(4))], chunk=int(random.integers(0, 90)) * flip(random), **more,
        )  # fmt: skip


def flip(random: np.random.Generator) -> bool:
    return bool(random.integers(2))


def of_parameters(random: np.random.Generator) -> Iterator[Case]:
    for id in ("1", "a b", "日本", "x" * 200):
        yield infer("id", "affine", [_x(random)], id=id)
    yield infer("an empty id", "affine", [_x(random)], id="")
    wrong: tuple[Any, ...] = (7, None, True, ["a"])
    for value in wrong:
        yield infer(f"id is {json.dumps(value)}", "affine", [_x(random)], id=value)
    for parameters in ({}, {"note": "x"}, {"count": 3, "on": True}, {"share": 0.5}, {"priority": 0}, {"timeout": 0}):
        yield infer("parameters", "affine", [_x(random)], parameters=parameters)
    yield infer("a long timeout", "affine", [_x(random)], parameters={"timeout": 30_000_000})
    yield infer("a sequence id for a model without sequences", "affine", [_x(random)], parameters={"sequence_id": 5})
    yield infer("a parameter that is null", "affine", [_x(random)], parameters={"note": None})
    yield infer("a parameter that is an object", "affine", [_x(random)], parameters={"note": {}})
    yield infer("parameters are no object", "affine", [_x(random)], parameters=[1])
    yield infer("a timeout that is no number", "affine", [_x(random)], parameters={"timeout": "soon"})
    yield infer("binary_data_output is no boolean", "affine", [_x(random)], parameters={"binary_data_output": "yes"})
    yield infer("unknown members", "affine", [_x(random, said={"more": 1})], colour="red")
    yield infer("an input's own parameters", "affine", [_x(random, said={"parameters": {"note": 1}})])
    yield infer("a named version", "affine", [_x(random)], version="1")
    for region in ("shared_memory_region",):
        said = {"parameters": {region: "none", "shared_memory_byte_size": 32}, "data": ...}
        yield infer("an input in shared memory that is not there", "affine", [_x(random, said=said)])
        wanted = [{"name": "y", "parameters": {region: "none", "shared_memory_byte_size": 32}}]
        yield infer("an output in shared memory that is not there", "affine", [_x(random)], outputs=wanted)


def of_raw_tensors(random: np.random.Generator) -> Iterator[Case]:
    def raw(kind: str, model: str, body: bytes, **more: Any) -> Case:
        return Case(kind, "POST", path(model, "infer"), ((LENGTH, "0"),), body, **more)

    for count in (1, 5, 30):
        body = random_array(random, "FP32", (count,)).tobytes()
        yield raw("a raw tensor", "same-fp32", body)
        yield raw("a raw tensor in chunks", "same-fp32", body, chunk=3)
    yield raw("a raw tensor, one row of a model with batches", "affine", random_array(random, "FP32", (1, 4)).tobytes())
    yield raw("a raw tensor, rows of a model with batches", "affine", random_array(random, "FP32", (3, 4)).tobytes())
    yield raw("a raw tensor of a fixed shape", "fixed", random_array(random, "FP32", (2, 3)).tobytes())
    yield raw("a raw text", "same-bytes", b"no length before")
    yield raw("a raw tensor of the wrong size", "same-fp32", b"12345")
    yield raw("a raw tensor of the wrong size, fixed shape", "fixed", b"1234")
    yield raw("a raw tensor where two dimensions are free", "grid", bytes(16))
    yield raw("a raw tensor for two inputs", "pair", bytes(8))
    yield raw("a raw tensor where the other input is optional", "optional", bytes(8))
    yield raw("an empty raw tensor", "same-fp32", b"")


def of_shapes(random: np.random.Generator) -> Iterator[Case]:
    for _ in range(8):
        shape = tuple(int(n) for n in random.integers(1, 7, 2))
        array = random_array(random, "INT32", shape)
        yield infer("two free dimensions", "grid", [Tensor("x", "INT32", array, bool(random.integers(2)))])
        yield infer("nested data", "grid", [Tensor("x", "INT32", array, data=array.tolist())])
    for datatype, shape in (("INT32", (0, 3)), ("INT32", (3, 0)), ("INT32", (0, 0)), ("FP32", (0,)), ("BYTES", (0,))):
        model = "grid" if datatype == "INT32" else f"same-{datatype.lower()}"
        for binary in (False, True):
            x = Tensor("x", datatype, random_array(random, datatype, shape), binary)
            how = "binary" if binary else "JSON"
            yield infer(f"no elements, {how}", model, [x], parameters={"binary_data_output": binary})
    yield infer("no rows for a model with batches", "affine", [_x(random, 0)])
    for rows in (1, 3, MAX_BATCH):
        yield infer("rows up to the batch", "affine", [_x(random, rows, binary=bool(random.integers(2)))])
    for rows in (MAX_BATCH + 1, 5 * MAX_BATCH):
        yield infer("more rows than a batch has", "affine", [_x(random, rows, binary=bool(random.integers(2)))])
    for binary in (False, True):
        yield infer("a fixed shape", "fixed", [Tensor("x", "FP32", random_array(random, "FP32", (2, 3)), binary)])
        a, b = (Tensor(name, "FP32", random_array(random, "FP32", (5,)), binary) for name in "ab")
        yield infer("two inputs", "pair", [a, b])
        yield infer("two inputs in another order", "pair", [b, a])
        yield infer("two inputs, one in JSON, one binary", "pair", [a, Tensor("b", "FP32", b.array, not binary)])
        x = Tensor("x", "FP32", random_array(random, "FP32", (4,)), binary)
        yield infer("an optional input left out", "optional", [x])
        yield infer(
            "an optional input sent", "optional", [x, Tensor("scale", "FP32", np.array([2], np.float32), binary)]
        )
    yield infer("only the optional input", "optional", [Tensor("scale", "FP32", np.array([2], np.float32))])
    yield infer("inputs that do not fit one another", "pair", [a, Tensor("b", "FP32", np.zeros(3, np.float32))])


def of_classes(random: np.random.Generator) -> Iterator[Case]:
    def classes(
        kind: str, count: Any, rows: int = 2, model: str = "affine", tensor: Tensor | None = None, **more: Any
    ) -> Case:
        wanted = [{"name": "y", "parameters": {"classification": count, **more}}]
        return infer(f"classification: {kind}", model, [tensor or _x(random, rows)], outputs=wanted)

    for count in (1, 2, 4):
        for rows in (1, 3):
            yield classes("some classes", count, rows)
            yield classes("some classes, binary", count, rows, binary_data=True)
    for rows, count in ((1, 5), (3, 2)):
        x = Tensor("x", "FP32", random_array(random, "FP32", (rows, 5)), binary=True)
        yield classes("with labels", count, model="labelled", tensor=x)
        yield classes("with labels, binary", count, model="labelled", tensor=x, binary_data=True)
    yield classes("more classes than there are", 9)
    yield classes("0", 0)
    yield classes("a negative number", -1)
    yield classes("a text", "two")
    yield classes("true", True)
    for datatype in ("INT32", "FP64", "UINT8"):
        x = Tensor("x", datatype, random_array(random, datatype, (6,)))
        yield classes(f"of {datatype}", 3, model=f"same-{datatype.lower()}", tensor=x)
    for datatype in ("BYTES", "BOOL", "FP16"):
        x = Tensor("x", datatype, random_array(random, datatype, (6,)), binary=True)
        yield classes(f"of {datatype}", 3, model=f"same-{datatype.lower()}", tensor=x)
    equal = Tensor("x", "INT32", np.array([5, 7, 5, 7], np.int32))
    yield classes("of equal scores", 4, model="same-int32", tensor=equal)
    matrix = Tensor("x", "INT32", np.array([[1, 2, 3], [6, 5, 4]], np.int32))
    yield classes("of a matrix without batches", 2, model="grid", tensor=matrix)
    nothing = Tensor("x", "FP32", np.zeros(0, np.float32))
    yield classes("of no elements", 2, model="same-fp32", tensor=nothing)


def of_transport(random: np.random.Generator) -> Iterator[Case]:
    for packed in ("gzip", "deflate"):
        for binary in (False, True):
            yield infer(f"body in {packed}", "affine", [_x(random, 8, binary=binary)], packed=packed)
            yield infer(
                f"body in {packed} and in chunks", "affine", [_x(random, 8, binary=binary)], packed=packed, chunk=11
            )
        document = infer("", "affine", [_x(random)])
        cut = infer("", "affine", [_x(random)], packed=packed).body[:-6]
        say = (("Content-Encoding", packed),)
        yield Case(f"body says {packed} and is not", "POST", document.path, say, document.body)
        yield Case(f"{packed} cut off", "POST", document.path, say, cut)
    yield Case(
        "deflate without zlib's head", "POST", document.path, (("Content-Encoding", "deflate"),), _bare(document.body)
    )
    yield Case(
        "gzip in capitals",
        "POST",
        document.path,
        (("Content-Encoding", "GZIP"),),
        gzip.compress(document.body, mtime=0),
    )
    yield infer("a content encoding that nobody knows", "affine", [_x(random)], headers=[("Content-Encoding", "zip")])
    yield infer("content encoding identity", "affine", [_x(random)], headers=[("Content-Encoding", "identity")])
    for chunk in (1, 7, 1000):
        for binary in (False, True):
            yield infer("in chunks", "affine", [_x(random, 5, binary=binary)], chunk=chunk)
    for kind in ("application/octet-stream", "text/plain", "application/json; charset=utf-8"):
        yield infer("any Content-Type", "affine", [_x(random)], headers=[("Content-Type", kind)])


def _bare(data: bytes) -> bytes:
    squeeze = zlib.compressobj(wbits=-15)
    return squeeze.compress(data) + squeeze.flush()


def of_answers_packed(random: np.random.Generator) -> Iterator[Case]:
    for accept in (
        "gzip",
        "deflate",
        "identity",
        "br",
        "*",
        "gzip, deflate",
        "deflate, gzip",
        "gzip;q=0",
        "deflate;q=0.5, gzip;q=0.9",
    ):
        ask, named = [("Accept-Encoding", accept)], f"Accept-Encoding: {accept.replace('*', 'any')}"
        for rows in (1, 8):
            yield infer(f"{named}; a short answer", "affine", [_x(random, rows)], headers=ask)
        for binary in (False, True):
            x = Tensor("x", "INT32", np.zeros((100, 100), np.int32), binary=True)
            yield infer(f"{named}; a long answer", "grid", [x], headers=ask, parameters={"binary_data_output": binary})


def of_documents(random: np.random.Generator) -> Iterator[Case]:
    for method in ("GET", "HEAD"):
        for name in (
            "/v2/health/live",
            "/v2/health/ready",
            path("affine", "ready"),
            path("affine", "ready", version="1"),
        ):
            yield Case(f"{method} of health", method, name)
    yield Case("the server", "GET", "/v2")
    yield Case("the server, with a slash", "GET", "/v2/")
    yield Case("HEAD of the server", "HEAD", "/v2")
    for model in (AFFINE, FIXED, GRID, PAIR, *IDENTITIES.values()):
        yield Case("a model", "GET", path(model.name))
        yield Case("a model's version", "GET", path(model.name, version="1"))
    yield Case("a model with an optional input", "GET", path(OPTIONAL.name))
    for model in (AFFINE, FIXED, GRID, OPTIONAL):
        yield Case(f"configuration of {model.name}", "GET", path(model.name, "config"))
    yield Case("configuration of a version", "GET", path("fixed", "config", version="1"))
    yield Case("HEAD of a model", "HEAD", path("affine"))
    yield Case("statistics of a model", "GET", path("fixed", "stats"))
    yield Case("statistics of a version", "GET", path("fixed", "stats", version="1"))
    yield Case("statistics of all models", "GET", "/v2/models/stats")
    for body in (b"", b"{}", b'{"ready": true}'):
        yield Case("the repository's index", "POST", "/v2/repository/index", (), body)
    yield Case("the index of what is not ready", "POST", "/v2/repository/index", (), b'{"ready": false}')
    yield Case("the index, bad JSON", "POST", "/v2/repository/index", (), b"{")
    yield Case("load of an unknown model", "POST", "/v2/repository/models/none/load")
    yield Case("unload of an unknown model", "POST", "/v2/repository/models/none/unload")
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        yield Case(f"{kind}: status", "GET", f"/v2/{kind}/status")
        yield Case(
            f"{kind}: register",
            "POST",
            f"/v2/{kind}/region/r/register",
            (),
            b'{"key": "/none", "offset": 0, "byte_size": 8}',
        )
        yield Case(f"{kind}: unregister", "POST", f"/v2/{kind}/region/r/unregister")
    for name in ("trace/setting", "logging"):
        yield Case(f"Triton's own: {name}", "GET", f"/v2/{name}")


def of_malformed_tensors(random: np.random.Generator) -> Iterator[Case]:
    def bad(kind: str, model: str = "affine", tensor: Tensor | None = None, **said: Any) -> Case:
        tensor = tensor or _x(random)
        return infer(
            kind, model, [Tensor(tensor.name, tensor.datatype, tensor.array, tensor.binary, said, tensor.data)]
        )

    for binary in (False, True):
        how = "binary" if binary else "JSON"
        yield bad(f"a wrong shape, {how}", tensor=Tensor("x", "FP32", np.zeros((2, 3), np.float32), binary))
        yield bad(f"a wrong shape, fixed, {how}", "fixed", Tensor("x", "FP32", np.zeros((3, 2), np.float32), binary))
        yield bad(f"a wrong rank, {how}", tensor=Tensor("x", "FP32", np.zeros(4, np.float32), binary))
        yield bad(f"a shape with more elements than data, {how}", tensor=_x(random, binary=binary), shape=[3, 4])
        yield bad(f"a shape with fewer elements than data, {how}", tensor=_x(random, binary=binary), shape=[1, 4])
        yield bad(f"another datatype, {how}", tensor=_x(random, binary=binary), datatype="INT32")
        yield bad(f"another name, {how}", tensor=Tensor("w", "FP32", np.zeros((1, 4), np.float32), binary))
        yield infer(f"a missing input, {how}", "pair", [Tensor("a", "FP32", np.zeros(2, np.float32), binary)])
        x = _x(random, binary=binary)
        yield infer(f"an input sent twice, {how}", "affine", [x, x])
        yield infer(f"one input too many, {how}", "affine", [x, Tensor("w", "FP32", np.zeros(2, np.float32), binary)])
    for shape in ([-1, 4], [2.0, 4], ["2", 4], 8, None, [[2, 4]], [2**40, 4], [2**62, 4], [2**70, 4], []):
        yield bad(f"shape is {json.dumps(shape)}", shape=shape)
    for datatype in ("FLOAT", "fp32", None, 7, ""):
        yield bad(f"datatype is {json.dumps(datatype)}", datatype=datatype)
    for member in ("name", "datatype", "shape", "data"):
        said: dict[str, Any] = {member: ...}
        yield bad(f"an input without '{member}'", **said)
    wrong: tuple[Any, ...] = (
        "12", 7, {}, None, [None] * 8, ["1"] * 8, [[1, 2, 3, 4], [1, 2, 3]], [True] * 8, [{}] * 8, [1e300] * 8,
    )  # fmt: skip
    for data in wrong:
        yield bad(f"data is {json.dumps(data)[:30]}", data=data)
    yield bad("data is nested in another shape", data=[[1, 2], [3, 4], [5, 6], [7, 8]])
    elements: tuple[tuple[str, list[Any]], ...] = (
        ("INT32", [1.5]), ("INT32", [2**31]), ("INT32", [2**80]), ("INT32", ["1"]), ("INT32", [True]), ("INT32", [1.0]),
        ("INT8", [128]), ("UINT8", [-1]), ("UINT64", [-1]), ("INT64", [2**63]), ("BOOL", [2]), ("BOOL", [1]),
        ("BOOL", ["true"]), ("BOOL", [1.0]), ("FP64", ["1"]), ("BYTES", [1]), ("BYTES", [None]), ("BYTES", [["a"]]),
        ("FP16", [1.0]), ("FP32", [1e39]),
    )  # fmt: skip
    for of_type, values in elements:
        x = Tensor("x", of_type, np.zeros(1, bool), data=values)
        yield bad(f"{of_type} of {json.dumps(values)}", f"same-{of_type.lower()}", x)
    for packed in (b"\x02", b"\x02\0\0\0a", b"\xff\xff\xff\xffa", b"\0\0\0\0\0\0\0\0", b"\x01\0\0\0ab", b""):
        x = Tensor("x", "BYTES", np.zeros(1, object), binary=True, data=packed)
        yield bad(f"BYTES as {packed.hex() or 'nothing'}", "same-bytes", x)
    x = Tensor("x", "BOOL", np.zeros(2, bool), binary=True, data=b"\x02\xff")
    yield bad("BOOL in binary is neither 0 nor 1", "same-bool", x)


def of_malformed_bodies(random: np.random.Generator) -> Iterator[Case]:
    good = infer("", "affine", [_x(random, binary=True)])
    head = int(dict(good.headers)[LENGTH])

    def length(kind: str, value: str, body: bytes = good.body) -> Case:
        return Case(kind, "POST", good.path, ((LENGTH, value),), body)

    yield length("header length beyond the body", str(len(good.body) + 10))
    yield length("header length one too short", str(head - 1))
    yield length("header length one too long", str(head + 1))
    yield length("header length negative", "-1")
    yield length("header length is a word", "many")
    yield length("header length is empty", "")
    yield length("header length beyond 64 bits", "9" * 30)
    yield length("header length with a plus", f"+{head}")
    yield length("header length with a fraction", f"{head}.5")
    yield Case("header length missing", "POST", good.path, (), good.body)
    yield length("binary data cut off", str(head), good.body[:-3])
    yield length("binary data with extra bytes", str(head), good.body + b"\0" * 4)
    for size in (-1, "32", 1.5, None, 2**70, 0):
        said = {"parameters": {"binary_data_size": size}}
        yield infer(f"binary_data_size is {json.dumps(size)}", "affine", [_x(random, binary=True, said=said)])
    yield infer("both data and binary_data_size", "affine", [_x(random, binary=True, said={"data": [1] * 8})])
    plain = infer("", "affine", [_x(random)])
    for text in (
        b"", b"{", b"null", b"[]", b"7", b'"x"', b"{}", b'{"inputs": []}', b'{"inputs": {}}', b'{"inputs": [7]}', b'{"inputs": null}',
        b"\xff\xfe", b"\xef\xbb\xbf" + plain.body, plain.body + b" ", plain.body + b"x", plain.body[:-2], b"[" * 500, b'{"a":' * 500,
        plain.body.replace(b"[2, 4]", b"[2, 4],"), b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', b"\0",
    ):  # fmt: skip
        yield Case(
            f"body is {text[:16]!r} … {text[-8:]!r}" if len(text) > 24 else f"body is {text!r}",
            "POST",
            plain.path,
            (),
            text,
        )
    invalid = plain.body.replace(b'"x"', b'"\xff"')
    yield Case("a name that is not UTF-8", "POST", plain.path, (), invalid)
    yield Case("members twice", "POST", plain.path, (), plain.body.replace(b"{", b'{"id": "1", "id": "2", ', 1))
    # Bytes of a good request changed at random: whatever they are now, both must think the same of them.
    for at in random.integers(0, len(plain.body), 24):
        changed = bytearray(plain.body)
        changed[int(at)] = b'"'[0]
        yield Case(f"a quotation mark at byte {int(at)}", "POST", plain.path, (), bytes(changed))


def of_wrong_paths(random: np.random.Generator) -> Iterator[Case]:
    body = infer("", "affine", [_x(random)]).body
    for name, at in (("model", path("none", "infer")), ("version", path("affine", "infer", version="7"))):
        yield Case(f"unknown {name}", "POST", at, (), body)
    for version in ("x", "0", "-1", "01", "99999999999999999999"):
        yield Case(f"version {version}", "POST", path("affine", "infer", version=version), (), body)
    for rest in ("", "ready", "config", "stats"):
        what = rest or "metadata"
        yield Case(f"{what} of an unknown model", "GET", path("none", *filter(None, [rest])))
        yield Case(f"{what} of an unknown version", "GET", path("affine", *filter(None, [rest]), version="7"))
    for method in ("GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"):
        yield Case(f"{method} instead of POST", method, path("affine", "infer"))
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        for at in ("/v2", "/v2/health/ready", path("affine"), path("affine", "ready"), path("affine", "stats")):
            yield Case(f"{method} instead of GET: {at}", method, at)
    for at in (
        "/v2/models",
        "/v2/none",
        "/v2/models/affine/none",
        "/v2/models/affine/versions",
        "/v2/health",
        "/v3",
        "/v2/models//infer",
    ):
        yield Case(f"no such path: {at}", "GET", at)
    yield Case("a slash behind the path", "POST", path("affine", "infer") + "/", (), body)
    yield Case("a path in per cent", "POST", "/v2/models/%61ffine/infer", (), body)
    yield Case("a query behind the path", "POST", path("affine", "infer") + "?a=b", (), body)
    yield Case("GET of the index", "GET", "/v2/repository/index")
    yield Case("GET of a load", "GET", "/v2/repository/models/affine/load")
