"""The largest numbers of an output, as Triton writes them."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.signature import Signature, TensorSpec
from serving.wire.classification import MOST_TEXTS, classify, largest
from serving.wire.tensors import InputError
from tests.unit.serving.helpers import ROWS, PythonRuntime, close, load, request, serve

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_whole_numbers_of_every_size_keep_their_order(dtype: str) -> None:
    limits = np.iinfo(dtype)
    row = np.array([limits.min, limits.max, 0, limits.max], dtype)
    texts = classify(row, 4, batched=False).tolist()
    expected = [f"{limits.max}:1", f"{limits.max}:3"]
    expected += [f"{limits.min}:0", "0:2"] if limits.min == 0 else ["0:2", f"{limits.min}:0"]
    assert [text.decode() for text in texts] == expected


def test_a_tensor_without_rows_is_one_row() -> None:
    assert classify(np.array([[1.5, 9]], np.float64), 1, batched=False).tolist() == [b"9.000000:1"]
    assert classify(np.array([[1.5, 9]], np.float64), 1, batched=True).tolist() == [[b"9.000000:1"]]
    assert classify(np.array(3, np.int8), 5, batched=True).tolist() == [b"3:0"]
    assert classify(np.array([3, 4], np.int8), 5, batched=True).tolist() == [b"4:1", b"3:0"]


def test_more_than_there_are_is_all() -> None:
    assert classify(np.array([[1, 2]], np.float16), 10**12, batched=True).shape == (1, 2)


@pytest.mark.parametrize(("rows", "count"), [(100, 1001), (MOST_TEXTS + 1, 1), (1, MOST_TEXTS + 1)])
def test_more_texts_than_the_limit_are_refused_with_the_limit(rows: int, count: int) -> None:
    table = np.zeros((rows, count), np.float32)
    with pytest.raises(InputError, match=rf"asks for {rows * count} texts .*, the limit is 100000") as caught:
        classify(table, count, batched=True)
    assert caught.value.status == 400
    assert len(classify(table[:100], 100, batched=True)) == min(rows, 100)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_nothing_has_no_largest(shape: tuple[int, ...]) -> None:
    assert classify(np.empty(shape, np.float32), 2, batched=False).shape == (0,)
    rows = shape[:1] if len(shape) > 1 else ()
    assert classify(np.empty(shape, np.float32), 2, batched=True).shape == (*rows, min(2, shape[-1]))


def test_what_is_no_number_comes_last_and_infinity_first() -> None:
    row = np.array([np.nan, 1, np.inf, np.nan, -1], np.float32)
    assert classify(row, 3, batched=False).tolist() == [b"inf:2", b"1.000000:1", b"-1.000000:4"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=60), count=st.integers(0, 60))
def test_the_largest_are_those_of_a_stable_sort(values: list[int], count: int) -> None:
    expected = sorted(range(len(values)), key=lambda index: -values[index])[:count]
    assert largest(np.array(values, np.float32), min(count, len(values))).tolist() == expected


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=9),
    count=st.integers(0, 5),
    dtype=st.sampled_from(["float32", "int8", "uint16"]),
)
def test_many_rows_are_ranked_as_each_alone(rows: list[list[int]], count: int, dtype: str) -> None:
    table = np.abs(np.array(rows)).astype(dtype)
    together = classify(table, count, batched=True)
    assert together.tolist() == [classify(row, count, batched=False).tolist() for row in table]


def test_rows_with_nan_are_ranked_as_each_alone() -> None:
    table = np.array([[np.nan, 1, np.inf], [np.nan, np.nan, -1]], np.float32)
    texts = classify(table, 2, batched=True).tolist()
    assert texts == [[b"inf:2", b"1.000000:1"], [b"-1.000000:2", b"nan:0"]]


def test_labels_stand_behind_the_index() -> None:
    table = np.array([[1, 3, 2], [3, 1, 2]], np.int8)
    labels = ["cat", "", "ein Löwe: groß"]
    assert [text.decode() for text in classify(table, 3, batched=True, labels=labels).ravel()] == [
        *("3:1", "2:2:ein Löwe: groß", "1:0:cat"),
        *("3:0:cat", "2:2:ein Löwe: groß", "1:1"),
    ]
    assert classify(table, 1, batched=True, labels=["cat"]).tolist() == [[b"3:1"], [b"3:0:cat"]]
    assert classify(table[:, :0], 1, batched=True, labels=labels).shape == (2, 0)


def test_a_long_ranking_is_none_of_the_event_loops_work() -> None:
    table = np.arange(90_000, dtype=np.float32).reshape(-1, 1)
    signature = Signature(ROWS.inputs, (TensorSpec("y", "FP32", (-1, 1)),))
    version = load(PythonRuntime(lambda given: {"y": table}, signature), rows_independent=False)
    threads: list[int] = []
    encode = version.codec.encode

    def noted(*what: Any) -> Any:
        threads.append(threading.get_ident())
        return encode(*what)

    async def scenario() -> list[Any]:
        version.codec.encode = noted  # type: ignore[method-assign]
        server = serve(version)
        answers = []
        for parameters in ({"classification": 1}, {}):
            outputs = [{"name": "y", "parameters": parameters}]
            answers.append((await server.post("/v2/models/m/infer", {**request(1, 2), "outputs": outputs})).json())
        close(version)
        return answers

    ranked, plain = asyncio.run(scenario())
    assert ranked["outputs"][0]["shape"] == [90_000, 1] and ranked["outputs"][0]["data"][7] == "7.000000:0"
    assert plain["outputs"][0]["datatype"] == "FP32"
    assert [one == threading.get_ident() for one in threads] == [False, True]
