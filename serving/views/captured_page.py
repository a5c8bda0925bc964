"""`/api/v2/captured`: what this server keeps of the requests that it answered, for replays."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse

from registry.errors import StorageError
from serving.access.auth import who_of
from serving.traffic.capture import REMOVE_SECONDS, Capture
from serving.views.operations import RegistryThreads

log = logging.getLogger("modelkeep.capture")

_CHUNK_BYTES = 1 << 16


def router(capture: Capture) -> APIRouter:
    """Reading the requests themselves, and removing them, needs the role operate: they are what clients sent."""
    found = APIRouter(prefix="/api/v2/captured")
    # Longer than a removal waits: who removes is to read what that says.
    threads = RegistryThreads(answer_seconds=REMOVE_SECONDS + 5)

    @found.get("", summary="Requests kept for replays, by model: how many, and from when")
    async def captured() -> dict[str, Any]:
        return {
            "share": capture.share,
            "counts": dict(capture.counts),
            "models": {
                model: {"requests": held.requests, "bytes": held.bytes, "oldest": held.oldest, "newest": held.newest}
                for model, held in capture.held().items()
            },
        }

    @found.get("/{model}", summary="The newest of them as a zip of V2 request bodies", response_class=StreamingResponse)
    async def captured_requests(
        model: str, newest: Annotated[int, Query(ge=1, le=1_000_000)] = 1000
    ) -> StreamingResponse:
        file = await threads.run(lambda: _packed(capture, model, newest))
        return StreamingResponse(_chunks(file), media_type="application/zip")

    @found.delete("/{model}", summary="Remove what is kept of a model")
    async def captured_remove(request: Request, model: str) -> dict[str, Any]:
        removed = await threads.run(lambda: capture.remove(model))
        log.info("%s removed %d captured requests of %s", who_of(request).actor, removed, model)
        return {"removed": removed}

    return found


def _packed(capture: Capture, model: str, newest: int) -> IO[bytes]:
    """A temporary file without a name, ready to be read. Raises NotFoundError, StorageError."""
    try:
        file = tempfile.TemporaryFile(prefix="modelkeep-captured-")  # noqa: SIM115 (closed by who reads it)
        try:
            capture.pack(model, newest, file)
            file.seek(0)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise StorageError(f"the captured requests of {model} cannot be packed: {error}") from error
    return file


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
