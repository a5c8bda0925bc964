"""Run by the Python of an environment that has kserve: asks the server at argv[1] as its client does, and prints what it got as JSON."""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def tensor(name, shape, datatype, array, binary):
    made = InferInput(name=name, shape=shape, datatype=datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


async def main(url):
    said = {}
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=60)) as client:
        said["live"] = await client.is_server_live(url)
        said["ready"] = await client.is_server_ready(url)
        said["model"] = [await client.is_model_ready(url, "affine"), await client.is_model_ready(url, "other")]
        x = np.array([[1, 2], [3, 4.5]], np.float32)
        for binary in (False, True):
            for wanted in (False, True):
                request = InferRequest(
                    model_name="affine",
                    request_id="r-7",
                    infer_inputs=[tensor("x", [2, 2], "FP32", x, binary)],
                    request_outputs=[RequestedOutput("y", {"binary_data": wanted})],
                )
                headers = {}
                answer = await client.infer(url, request, model_name="affine", response_headers=headers)
                key = f"{'binary' if binary else 'json'} to {'binary' if wanted else 'json'}"
                said[key] = [
                    answer.id,
                    [output.name for output in answer.outputs],
                    answer.outputs[0].as_numpy().tolist(),
                    headers.get("x-model-version"),
                ]
        halves = np.array([1, 0.5], np.float16)
        request = InferRequest("halves", [tensor("x", [2], "FP16", halves, True)])
        said["FP16"] = (await client.infer(url, request, model_name="halves")).outputs[0].as_numpy().tolist()
        texts = np.array([b"ab", "é".encode()], dtype=object)
        for binary in (False, True):
            request = InferRequest("text", [tensor("x", [2], "BYTES", texts, binary)])
            answer = (await client.infer(url, request, model_name="text")).outputs[0].as_numpy()
            said[f"BYTES {binary}"] = [one.decode() if isinstance(one, bytes) else one for one in answer.tolist()]
        document = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        said["dict"] = (await client.infer(url, document, model_name="affine")).outputs[0].as_numpy().tolist()
        try:
            await client.infer(url, {"inputs": []}, model_name="affine")
        except Exception as error:
            said["error"] = [type(error).__name__, str(error)]
    print(json.dumps(said))


asyncio.run(main(sys.argv[1]))
