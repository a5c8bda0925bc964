"""The way of a request to a version that is here: past the gate, where its model has none for the moment."""

from __future__ import annotations

from serving.compute.engine import LoadedVersion
from serving.state import Serving
from serving.traffic.gate import Receive
from serving.traffic.routing import Route


async def admitted(
    serving: Serving,
    model: str,
    version: str | None,
    key: bytes | None,
    timeout_seconds: float,
    receive: Receive | None = None,
) -> tuple[LoadedVersion, Route | None, int | None]:
    """What Serving.admit gives; where the model has no version for the moment, as soon as it has one. A model that sleeps is woken.

    `timeout_seconds` is what the whole request has left. `receive` is the client's, whose body has been read: if he goes, waiting ends.
    Who asks very often may call Serving.admit itself where the model is not in `serving.traffic.gate.closed`. Raises NotFoundError,
    UnavailableError, BusyError (too many wait already), ClientGoneError.
    """
    if model in serving.gate.closed:
        await serving.gate.wait(model, timeout_seconds, receive)
    return serving.admit(model, version, key)
