"""What is not inference, by FastAPI: health, metrics, what is served, the operations of serving.views.operations, and /docs."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from registry.errors import ModelkeepError
from serving.access.auth import role_of
from serving.compute.engine import LoadedVersion
from serving.state import Serving
from serving.statuses import status_of
from serving.text import health as text_health
from serving.views.backup_metrics import BackupMetrics
from serving.views.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from serving.views.metrics import Metrics, software_version
from serving.wire.aliases import Aliases


class _Pages(FastAPI):
    """Its schema has the aliases too, which it does not answer itself."""

    def __init__(self, aliases: Aliases, **options: Any) -> None:
        super().__init__(**options)
        self._own_paths = aliases

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            super().openapi()["paths"].update(self._own_paths.openapi())
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_pages(
    serving: Serving,
    *,
    nudge: Callable[[], Awaitable[dict[str, Any]]],
    info: Callable[[], dict[str, Any]],
    routers: Sequence[APIRouter] = (),
    aliases: Aliases | None = None,
    backups: BackupMetrics | None = None,
) -> FastAPI:
    """What is not inference. The page of /docs is our own: FastAPI's loads its scripts from the network."""
    metrics = Metrics(serving, backups)
    own_paths = Aliases() if aliases is None else aliases
    app = _Pages(
        own_paths,
        title="modelkeep",
        version=software_version(),
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
            ModelkeepError: _own_error,
            Exception: _unexpected_error,
        },
    )

    @app.get("/", summary="What this is")
    async def root(request: Request) -> dict[str, Any]:
        public = {"name": "modelkeep", "version": app.version, "documentation": "/docs"}
        if role_of(request) is None:
            return public
        served = {"environment": serving.environment, "replica": serving.replica_id, "models": sorted(serving.routes)}
        return {**public, **served, "aliases": own_paths.as_list(serving)}

    @app.get("/health", summary="Live and ready")
    async def health() -> JSONResponse:
        body = {
            "live": serving.live,
            "ready": serving.ready,
            "in_flight": serving.in_flight,
            "boot_id": serving.boot_id,
        }
        if serving.live and serving.ready:
            return JSONResponse(body)
        return JSONResponse({**body, "error": "not ready; try again later"}, 503, headers={"Retry-After": "1"})

    @app.get("/metrics", summary="Prometheus metrics")
    async def metrics_page() -> Response:
        return Response(metrics.render(), media_type=METRICS_CONTENT_TYPE)

    @app.get("/api/v2/model-info", summary="What this server serves, and how far it follows the registry")
    async def model_info() -> dict[str, Any]:
        return info()

    @app.get("/api/v2/model-health", summary="Loaded versions: health, requests, errors, queues")
    async def model_health(generate: bool = False) -> dict[str, Any]:
        return {
            "models": [
                {
                    **_health(loaded),
                    **serving.health.get(key, {"status": "unknown"}),
                    **await text_health.generation(loaded, now=generate),
                }
                for key, loaded in sorted(serving.loaded.items())
            ]
            + _hanging(serving),
            "dormant": dict(sorted(serving.sleeping.items())),
            "unloaded": dict(sorted(serving.unloaded.items())),
        }

    @app.post("/api/v2/update-models", summary="Follow the registry now; answers when that is done")
    async def update_models() -> dict[str, Any]:
        return await nudge()

    for router in routers:
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_docs_page(app))

    return app


def _hanging(serving: Serving) -> list[dict[str, Any]]:
    """Versions that are not here because they hang while they load."""
    found = {} if serving.loader is None else serving.loader.hanging()
    return [
        {"model": model, "version": version, "status": "unhealthy", "reasons": [why], "loaded": False}
        for (model, version), why in sorted(found.items())
        if (model, version) not in serving.loaded
    ]


def _health(loaded: LoadedVersion) -> dict[str, Any]:
    total = loaded.telemetry.total
    return {
        "model": loaded.model,
        "version": loaded.version,
        "requests": total.requests,
        "errors": total.errors,
        "in_flight": loaded.references,
        "queue_length": loaded.queue_length,
        "memory_bytes": loaded.runtime.memory_bytes,
        "last_inference_unix_seconds": loaded.telemetry.last_inference_unix_seconds,
    }


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = f"{request.url.path}: {error.detail}" if error.status_code in (404, 405) else str(error.detail)
    return JSONResponse({"error": text}, status_code=error.status_code, headers=dict(error.headers or {}))


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    texts = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
    return JSONResponse({"error": "; ".join(texts)}, status_code=422)


async def _own_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ModelkeepError)
    status = status_of(error)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse({"error": str(error)}, status_code=status, headers=headers)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": "internal error of the server; see its log"}, status_code=500)


_V2_PATHS = (
    ("GET", "/v2", "The server"),
    ("GET", "/v2/health/live", "200 where it lives"),
    ("GET", "/v2/health/ready", "200 where it takes traffic"),
    ("GET", "/v2/models/{model}[/versions/{version}]", "Inputs and outputs"),
    ("GET", "/v2/models/{model}[/versions/{version}]/ready", "200 where it is loaded"),
    ("GET", "/v2/models/{model}[/versions/{version}]/config", "Configuration"),
    ("GET", "/v2/models/{model}[/versions/{version}]/stats", "Counts and times"),
    ("POST", "/v2/models/{model}[/versions/{version}]/infer", "Inference; without a version the route decides"),
    ("POST", "/v2/repository/index", "What is loaded"),
    ("POST", "/v2/repository/models/{model}/load", "Serve an unloaded model again, or load one that sleeps now"),
    ("POST", "/v2/repository/models/{model}/unload", "Stop serving a model on this server alone"),
)


def _docs_page(app: FastAPI) -> str:
    own = [
        (method.upper(), path, operation.get("summary", ""))
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    ]
    rows = "".join(
        f"<tr><td>{method}</td><td><code>{html.escape(path)}</code></td><td>{html.escape(text)}</td></tr>"
        for method, path, text in (*_V2_PATHS, *own)
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>modelkeep: API</title>"
        "<style>body{font:16px system-ui;margin:3rem auto;max-width:60rem;padding:0 1rem}"
        "td{padding:.3rem .8rem .3rem 0;border-bottom:1px solid #ddd}code{font-size:.95em}</style>"
        "<h1>modelkeep</h1><p>Inference follows the "
        '<a href="https://github.com/kserve/open-inference-protocol">Open Inference Protocol V2</a> over REST, '
        'with binary tensors. Errors are <code>{"error": "…"}</code>. Schema of the rest: '
        '<a href="/openapi.json">openapi.json</a>.</p>'
        f"<table>{rows}</table></html>"
    )
