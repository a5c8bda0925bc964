"""NVIDIA's own V2 client from PyPI, unchanged, against a server process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

# It leaves its sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def http(server: str) -> Iterator[Any]:
    import tritonclient.http

    client = tritonclient.http.InferenceServerClient(server, connection_timeout=60, network_timeout=60)
    yield client
    client.close()


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_it_infers_in_json_and_in_binary(http: Any, binary_in: bool, binary_out: bool) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    x = np.array([[1, 2], [3, 4.5]], np.float32)
    tensor = InferInput("x", [2, 2], "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary_in)
    result = http.infer(
        "affine", [tensor], outputs=[InferRequestedOutput("y", binary_data=binary_out)], request_id="r-7"
    )
    np.testing.assert_array_equal(result.as_numpy("y"), x * 2)
    answer = result.get_response()
    assert (answer["model_version"], answer["id"]) == ("1", "r-7")
    assert [output["name"] for output in answer["outputs"]] == ["y"]


def test_it_infers_without_naming_outputs_and_with_a_version(http: Any) -> None:
    from tritonclient.http import InferInput

    tensor = InferInput("x", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
    result = http.infer("affine", [tensor], model_version="1")
    assert result.as_numpy("y").tolist() == [[2, 2]] and result.as_numpy("z").tolist() == [[1, 1]]


@pytest.mark.parametrize("binary", [True, False])
def test_it_sends_and_gets_text(http: Any, binary: bool) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    tensor = InferInput("x", [2], "BYTES")
    tensor.set_data_from_numpy(np.array(["ab", "é"], dtype=object), binary_data=binary)
    result = http.infer("text", [tensor], outputs=[InferRequestedOutput("y", binary_data=binary)])
    got = [v.decode() if isinstance(v, bytes) else v for v in result.as_numpy("y")]
    assert got == ["ab", "é"]


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_it_may_compress_its_requests(http: Any, algorithm: str) -> None:
    from tritonclient.http import InferInput

    tensor = InferInput("x", [500, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((500, 2), np.float32))
    result = http.infer("affine", [tensor], request_compression_algorithm=algorithm)
    assert result.as_numpy("y").sum() == 2000


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("binary", [True, False])
def test_it_may_ask_for_compressed_answers(http: Any, algorithm: str, binary: bool) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    x = np.arange(6000, dtype=np.float32).reshape(3000, 2) % 7
    tensor = InferInput("x", [3000, 2], "FP32")
    tensor.set_data_from_numpy(x)
    result = http.infer(
        "affine",
        [tensor],
        outputs=[InferRequestedOutput("y", binary_data=binary)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_array_equal(result.as_numpy("y"), x * 2)


@pytest.mark.parametrize("binary", [True, False])
def test_it_asks_for_the_largest_numbers(http: Any, binary: bool) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput

    tensor = InferInput("x", [2, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[1, 2], [4, 3]], np.float32))
    outputs = [InferRequestedOutput("y", binary_data=binary, class_count=1), InferRequestedOutput("z")]
    result = http.infer("affine", [tensor], outputs=outputs)
    got = [[v.decode() if isinstance(v, bytes) else v for v in row] for row in result.as_numpy("y")]
    assert got == [["4.000000:1"], ["8.000000:0"]]
    assert result.as_numpy("z").tolist() == [[1, 2], [4, 3]]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("model", "datatype"), [("flags", "BOOL"), ("halves", "FP16"), ("brains", "BF16")])
def test_it_sends_and_gets_booleans_and_numbers_of_two_bytes(
    http: Any, model: str, datatype: str, binary: bool
) -> None:
    import ml_dtypes
    from tritonclient.http import InferInput, InferRequestedOutput
    from tritonclient.utils import InferenceServerException

    dtype = {"BOOL": np.bool_, "FP16": np.float16, "BF16": ml_dtypes.bfloat16}[datatype]
    x = np.array([1, 0, 1, 0.5]).astype(dtype)
    tensor = InferInput("x", [4], datatype)
    outputs = [InferRequestedOutput("y", binary_data=binary)]
    tensor.set_data_from_numpy(x, binary_data=binary or datatype == "BF16")
    if datatype == "BF16" and not binary:
        with pytest.raises(InferenceServerException, match="BF16, which JSON cannot carry"):
            http.infer(model, [tensor], outputs=outputs)
        return
    answer = http.infer(model, [tensor], outputs=outputs).as_numpy("y")
    assert answer.astype(np.float32).tolist() == x.astype(np.float32).tolist()
    empty = InferInput("x", [0], datatype)
    empty.set_data_from_numpy(x[:0])
    assert http.infer(model, [empty], outputs=outputs).as_numpy("y").shape == (0,)


def test_it_sends_a_tensor_without_words(http: Any, server: str) -> None:
    import requests

    raw = np.array([[1, 2]], np.float32).tobytes()
    answer = requests.post(
        f"http://{server}/v2/models/affine/infer",
        data=raw,
        headers={"Inference-Header-Content-Length": "0", "Content-Type": "application/octet-stream"},
        timeout=60,
    )
    length = int(answer.headers["Inference-Header-Content-Length"])
    assert answer.status_code == 200
    assert np.frombuffer(answer.content[length:], np.float32).tolist() == [2, 4, 1, 2]


def test_it_gives_a_deadline_a_priority_and_a_sequence(http: Any) -> None:
    from tritonclient.http import InferInput

    tensor = InferInput("x", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 2), np.float32))
    result = http.infer(
        "affine", [tensor], timeout=60_000_000, priority=1, sequence_id=5, sequence_start=True, parameters={"my": "own"}
    )
    assert result.as_numpy("y").tolist() == [[2, 2]]


def test_its_asyncio_twin_infers_compressed_and_in_parallel(server: str) -> None:
    from tritonclient.http import InferInput, InferRequestedOutput
    from tritonclient.http.aio import InferenceServerClient

    async def scenario() -> None:
        async with InferenceServerClient(server) as client:
            assert await client.is_server_ready() and await client.is_model_ready("affine", "1")
            assert {model["state"] for model in await client.get_model_repository_index()} == {"READY"}
            tensor = InferInput("x", [4000, 2], "FP32")
            tensor.set_data_from_numpy(np.ones((4000, 2), np.float32))
            results = await asyncio.gather(
                *(
                    client.infer(
                        "affine",
                        [tensor],
                        outputs=[InferRequestedOutput("y", binary_data=binary)],
                        request_compression_algorithm=sent,
                        response_compression_algorithm=got,
                    )
                    for binary in (True, False)
                    for sent in (None, "gzip", "deflate")
                    for got in (None, "gzip", "deflate")
                )
            )
            assert [result.as_numpy("y").sum() for result in results] == [16000] * 18

    asyncio.run(scenario())


def test_its_asyncio_twin_asks_about_health_models_and_statistics_and_raises_our_words(server: str) -> None:
    from tritonclient.http import InferInput
    from tritonclient.http.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    async def scenario() -> None:
        async with InferenceServerClient(server) as client:
            assert await client.is_server_live() and await client.is_model_ready("affine")
            assert not await client.is_model_ready("affine", "2")
            assert (await client.get_server_metadata())["name"] == "modelkeep"
            assert (await client.get_model_metadata("affine"))["versions"] == ["1"]
            assert (await client.get_model_config("affine"))["max_batch_size"] == 8
            assert (await client.get_inference_statistics("affine"))["model_stats"][0]["version"] == "1"
            tensor = InferInput("x", [2], "BYTES")
            tensor.set_data_from_numpy(np.array(["ab", "é"], dtype=object))
            assert [v.decode() for v in (await client.infer("text", [tensor])).as_numpy("y")] == ["ab", "é"]
            wrong = InferInput("x", [1, 3], "FP32")
            wrong.set_data_from_numpy(np.ones((1, 3), np.float32))
            with pytest.raises(InferenceServerException, match=r"'x' has the shape \[1, 3\]"):
                await client.infer("affine", [wrong])

    asyncio.run(scenario())


def test_what_is_not_supported_says_so(http: Any) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    for call in (
        http.get_system_shared_memory_status,
        http.get_cuda_shared_memory_status,
        http.get_trace_settings,
        http.get_log_settings,
    ):
        with pytest.raises(InferenceServerException, match="not supported") as caught:
            call()
        assert caught.value.status() == "501"
    tensor = InferInput("x", [1, 2], "FP32")
    tensor.set_shared_memory("region", 8)
    with pytest.raises(
        InferenceServerException, match="input 'x' names a shared memory region, which is not supported"
    ):
        http.infer("affine", [tensor])


def test_it_asks_about_health_models_and_statistics(http: Any) -> None:
    assert http.is_server_live() and http.is_server_ready()
    assert http.is_model_ready("affine") and http.is_model_ready("affine", "1")
    assert not http.is_model_ready("affine", "2")
    assert http.get_server_metadata()["name"] == "modelkeep"
    metadata = http.get_model_metadata("affine")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert http.get_model_config("affine")["max_batch_size"] == 8
    assert http.get_inference_statistics("affine")["model_stats"][0]["name"] == "affine"
    assert {model["name"] for model in http.get_model_repository_index()} == {
        "affine",
        "text",
        "halves",
        "brains",
        "flags",
    }


def test_it_raises_our_words(http: Any) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    tensor = InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match=r"'x' has the shape \[1, 3\], the model takes \[-1, 2\]"):
        http.infer("affine", [tensor])
    with pytest.raises(InferenceServerException, match="model 'other' is not known"):
        http.infer("other", [tensor])
    with pytest.raises(InferenceServerException, match="load by the V2 protocol is not supported"):
        http.load_model("affine")
    bad = InferInput("x", [1, 2], "FP32")
    bad.set_data_from_numpy(np.full((1, 2), 1000, np.float32))
    with pytest.raises(InferenceServerException, match="model 'affine' version '1' failed on this input"):
        http.infer("affine", [bad])
    bad.set_data_from_numpy(np.ones((1, 2), np.float32))
    assert http.infer("affine", [bad]).as_numpy("y").tolist() == [[2, 2]]
