"""A model that answers another shape than its signature promises: its own fault, found after the run."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from registry.signature import Signature, TensorSpec
from serving.compute.shapes import PromisedShapes
from serving.traffic.routing import Route
from tests.unit.serving.helpers import Arrays, PythonRuntime, close, load, serve

SIGNATURE = Signature(
    (TensorSpec("x", "FP32", (-1, 2)),), (TensorSpec("y", "FP32", (-1, 2)), TensorSpec("z", "FP32", ()))
)


@pytest.mark.parametrize("shape", [(0, 2), (1, 2), (9, 2)])
def test_what_was_promised_passes(shape: tuple[int, ...]) -> None:
    PromisedShapes(SIGNATURE).check({"y": np.zeros(shape), "z": np.zeros(())})


@pytest.mark.parametrize("shape", [(), (2,), (1, 3), (2, 1), (1, 2, 1)])
def test_another_number_of_dimensions_or_another_size_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"answered 'y' in the shape .* its signature says \[-1, 2\]"):
        PromisedShapes(SIGNATURE).check({"y": np.zeros(shape)})


def test_what_the_signature_does_not_name_is_somebody_elses_concern() -> None:
    PromisedShapes(SIGNATURE).check({"other": np.zeros((3, 3))})


def test_a_version_that_answers_another_shape_fails_that_request_and_is_counted() -> None:
    def wide(inputs: Arrays) -> dict[str, np.ndarray]:
        return {"y": inputs["x"] if inputs["x"].max() < 100 else np.zeros((1, 3), np.float32)}

    async def scenario() -> None:
        version = load(PythonRuntime(wide))
        server = serve(version, route=Route("m", 1, "1", watch=True))
        answer = await server.infer(1000, 2)
        assert answer.status == 500 and "answered 'y' in the shape [1, 3], its signature says [-1, 2]" in answer.error
        assert (await server.infer(1, 2)).status == 200
        assert version.watch[1].errors == 1
        close(version)

    asyncio.run(scenario())
