"""NVIDIA's own V2 client from PyPI, unchanged, against a server process."""

from __future__ import annotations

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


def test_it_asks_about_health_models_and_statistics(http: Any) -> None:
    assert http.is_server_live() and http.is_server_ready()
    assert http.is_model_ready("affine") and http.is_model_ready("affine", "1")
    assert not http.is_model_ready("affine", "2")
    assert http.get_server_metadata()["name"] == "modelkeep"
    metadata = http.get_model_metadata("affine")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]
    assert http.get_model_config("affine")["max_batch_size"] == 8
    assert http.get_inference_statistics("affine")["model_stats"][0]["name"] == "affine"
    assert {model["name"] for model in http.get_model_repository_index()} == {"affine", "text"}


def test_it_raises_our_words(http: Any) -> None:
    from tritonclient.http import InferInput
    from tritonclient.utils import InferenceServerException

    tensor = InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match=r"'x' has the shape \[1, 3\], the model takes \[-1, 2\]"):
        http.infer("affine", [tensor])
    with pytest.raises(InferenceServerException, match="model 'other' is not known"):
        http.infer("other", [tensor])
    with pytest.raises(InferenceServerException, match="not available yet"):
        http.load_model("affine")
    bad = InferInput("x", [1, 2], "FP32")
    bad.set_data_from_numpy(np.full((1, 2), 1000, np.float32))
    with pytest.raises(InferenceServerException, match="model 'affine' version '1' failed on this input"):
        http.infer("affine", [bad])
    bad.set_data_from_numpy(np.ones((1, 2), np.float32))
    assert http.infer("affine", [bad]).as_numpy("y").tolist() == [[2, 2]]
