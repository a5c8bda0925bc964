"""Does a server answer by a version? Asked with a real inference that names none, so that the server's own route decides."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from registry import versions
from registry.database import Database
from registry.errors import ModelkeepError
from registry.signature import FROM_NUMPY
from registry.store import ArtifactStore
from tasks.servers import NOBODY, Access

_AGAIN_SECONDS = 0.02
_REQUEST_SECONDS = 5.0

Tensors = list[dict[str, Any]]
"""The inputs of a V2 request, as JSON."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a server answered. `seconds` are from the moment asked about to its first answer by the target; None: never in time."""

    seconds: float | None
    why: str = ""
    """Why not; or, where it did, what was odd about the answer."""

    @property
    def follows(self) -> bool:
        return self.seconds is not None


def golden_row(database: Database, artifacts: ArtifactStore, model: str, version: str) -> Tensors | None:
    """The first golden case of a version; None where it has none, or where the file is not at hand."""
    import numpy as np

    with database.read() as session:
        row = versions.get(session, model, version)
    if row.golden_digest is None:
        return None
    try:
        with np.load(artifacts.path(row.golden_digest), allow_pickle=False) as cases:
            arrays = {name.removeprefix("input."): cases[name][:1] for name in cases.files if name.startswith("input.")}
    except (ModelkeepError, OSError, ValueError):
        return None  # zeros will do: it is the route that is asked about
    return [
        {"name": name, "datatype": FROM_NUMPY[array.dtype.name], "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, array in arrays.items()
        if array.dtype.name in FROM_NUMPY
    ]  # fmt: skip


def zeros(metadata: Mapping[str, Any]) -> Tensors:
    """Inputs of nothing but zeros for a model's V2 metadata; a free dimension is 1."""
    tensors = []
    for spec in metadata["inputs"]:
        if spec.get("optional"):
            continue
        shape = [max(1, int(n)) if int(n) != 0 else 0 for n in spec["shape"]]
        value: Any = "" if spec["datatype"] == "BYTES" else False if spec["datatype"] == "BOOL" else 0
        tensors.append(
            {"name": spec["name"], "datatype": spec["datatype"], "shape": shape, "data": [value] * math.prod(shape)}
        )
    return tensors


def first_answer(
    address: str,
    model: str,
    target: str,
    *,
    tensors: Tensors | None,
    access: Access = NOBODY,
    since: float,
    deadline: float,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """Ask a server until it answers by `target`, or until the deadline (both on `monotonic`)."""
    with httpx.Client(base_url=address, timeout=_REQUEST_SECONDS, **access.reaching(address)) as client:
        while True:
            try:
                why = _elsewhere(client, model, target)
                if not why:
                    named, trouble = _ask(client, model, target, tensors)
                    if named == target:
                        return Answer(round(monotonic() - since, 3), trouble)
                    why = f"still answers by version {named}" if named else trouble
            except httpx.HTTPError as error:
                why = f"does not answer: {type(error).__name__} {error}".strip()
            if monotonic() >= deadline:
                return Answer(None, why)
            sleep(_AGAIN_SECONDS)


def first_answers(addresses: Mapping[str, str], model: str, target: str, **how: Any) -> dict[str, Answer]:
    """The same of several servers at a time: {name: answer}."""
    if not addresses:
        return {}
    with ThreadPoolExecutor(len(addresses), thread_name_prefix="answer") as pool:
        asked = {name: pool.submit(first_answer, address, model, target, **how) for name, address in addresses.items()}
        return {name: future.result() for name, future in asked.items()}


def _elsewhere(client: httpx.Client, model: str, target: str) -> str:
    """Why an answer by the target would prove nothing: beside a candidate it may have come by chance. Empty where it would."""
    told = client.get("/api/v2/model-info")
    if told.status_code != 200:
        return f"does not say what it serves ({told.status_code}): {_error(told)}"
    info = told.json()
    route = info["models"].get(model)
    if route is None:
        return f"serves no {model}"
    if route["stable"] == target and route["candidate"] is None:
        return ""
    error = info["errors"].get(f"{model}/{target}")
    return f"still serves {route['stable']}" + (
        f": {error}" if error else f" and {route['candidate']}" if route["candidate"] else ""
    )


def _ask(client: httpx.Client, model: str, target: str, tensors: Tensors | None) -> tuple[str | None, str]:
    """(version that answered, what was wrong with the answer). An error of the model names its version in a header."""
    if _generates(client, model):
        return _named(_generated(client, model))
    if tensors is None:
        metadata = client.get(f"/v2/models/{model}/versions/{target}")
        if metadata.status_code != 200:
            return None, f"has not loaded version {target}: {_error(metadata)}"
        tensors = zeros(metadata.json())
    answer = client.post(f"/v2/models/{model}/infer", json={"inputs": tensors})
    if answer.status_code == 400 and _generates(client, model):  # it slept, so that nobody knew what it is
        answer = _generated(client, model)
    return _named(answer)


def _generates(client: httpx.Client, model: str) -> bool:
    """Whether it generates text: tensors of zeros would only make it fail."""
    described = client.get(f"/v1/models/{model}")
    return described.status_code == 200 and described.json().get("object") == "model"


def _generated(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/generate", json={"model": model, "prompt": "Test prompt", "max_tokens": 1})


def _named(answer: httpx.Response) -> tuple[str | None, str]:
    document = answer.json() if answer.status_code == 200 else {}
    named = document.get("model_version") or answer.headers.get("x-model-version")
    # Refused before it was a version's turn, or by the version itself: only the second is routed.
    text = "" if answer.status_code == 200 else f"answered with an error ({answer.status_code}): {_error(answer)}"
    return (None if named is None else str(named)), text


def _error(answer: httpx.Response) -> str:
    try:
        document = answer.json()
    except ValueError:
        document = None
    return str(document["error"])[:300] if isinstance(document, dict) and "error" in document else answer.text[:300]
