"""The paths of text generation: /v1/generate, and /v1/completions and /v1/models as the `openai` client knows them."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from registry.errors import ModelkeepError, NotFoundError
from registry.settings import Settings
from serving.compute.engine import LoadedVersion
from serving.state import Serving
from serving.statuses import status_of
from serving.text import asked
from serving.text.exchange import Desk, TextAnswer
from serving.text.styles import Completions, Plain, Style
from serving.text.version import TextVersion


def router(serving: Serving, settings: Settings) -> APIRouter:
    """The paths under /v1."""
    desk = Desk(serving, settings.text, wait_seconds=settings.server.request_timeout_seconds)
    paths = APIRouter(prefix="/v1")

    @paths.post("/generate", summary="Generate text: JSON, or server-sent events token by token")
    async def generate(request: Request) -> Response:
        return await _answered(request, desk, Plain(), asked.generate)

    @paths.post("/completions", summary="Generate text, as the openai client asks for it")
    async def completions(request: Request) -> Response:
        return await _answered(request, desk, Completions(), asked.completion)

    @paths.get("/models", summary="Models that generate text, as the openai client asks for them")
    async def models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_described(model, found) for model, found in sorted(_texts(serving).items())],
        }

    @paths.get("/models/{model}", summary="One of them")
    async def model(model: str) -> Response:
        found = _texts(serving).get(model)
        if found is None:
            error = NotFoundError(f"model '{model}' is not one that generates text here: see /v1/models")
            return _json(Completions().error(error), status_of(error))
        return _json(_described(model, found))

    return paths


async def _answered(request: Request, desk: Desk, style: Style, parse: Any) -> Response:
    try:
        body = await request.body()
        return TextAnswer(desk, parse(body), style)
    except ClientDisconnect:  # it went while it was sending: nobody reads this
        desk.serving.unrouted(499)
        return Response(status_code=400)
    except ModelkeepError as error:
        desk.serving.unrouted(status_of(error))
        return _json(style.error(error), status_of(error))


def _texts(serving: Serving) -> dict[str, TextVersion]:
    """The version that most requests get of each model that generates text."""
    by_model: dict[str, list[LoadedVersion]] = {}
    for (model, _), loaded in serving.loaded.items():
        by_model.setdefault(model, []).append(loaded)
    found = {}
    for model, versions in by_model.items():
        if (route := serving.routes.get(model)) is None:
            continue
        chosen = next((loaded for loaded in versions if loaded.version == route.stable), versions[0])
        if isinstance(chosen, TextVersion):
            found[model] = chosen
    return found


def _described(model: str, version: TextVersion) -> dict[str, Any]:
    return {
        "id": model,
        "object": "model",
        "created": int(version.loaded_at_unix_seconds),
        "owned_by": "modelkeep",
        "version": version.version,
        "context_length": version.text.context_length,
    }


def _json(document: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(document), status_code=status, media_type="application/json")
