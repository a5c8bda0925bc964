"""Which HTTP status an error is answered with, and the errors that only HTTP knows."""

from __future__ import annotations

from typing import Any

from registry.errors import (
    ConflictError,
    LockedError,
    ModelkeepError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)


class QueueFullError(ModelkeepError):
    """The version has as many requests waiting as its queue holds. Answered 429."""


_STATUSES: tuple[tuple[type[ModelkeepError], int], ...] = (
    (UsageError, 400),
    (NotFoundError, 404),
    (LockedError, 409),
    (ConflictError, 409),
    (RefusedError, 422),
    (QueueFullError, 429),
    (UnavailableError, 503),
)


class BusyError(ModelkeepError):
    """The server has as many requests in flight as it may. Answered 429."""

    status = 429


class DeadlineError(ModelkeepError):
    """A request ran out of time. Answered 504."""

    status = 504


class OutOfMemoryError(ModelkeepError):
    """The device, or the memory that models may have, ran out while computing. A runtime raises it; the engine splits and tries again.

    What does not fit alone either is answered 507: a client that tries again at once would only meet it again.
    `requested_bytes` is what could not be had, where the allocator said so.
    """

    status = 507

    def __init__(self, message: str, requested_bytes: int | None = None) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes


class NotYetError(ModelkeepError):
    """A part of the protocol that this server does not have. Answered 501."""

    status = 501


class MethodError(UsageError):
    """A path that is asked with the wrong method. Answered 405."""

    status = 405

    def __init__(self, path: str, method: str, allowed: str) -> None:
        super().__init__(f"{path} takes {allowed}, not {method}")
        self.allowed = allowed


class ClientGoneError(ModelkeepError):
    """The client closed its connection. Nobody is there to be answered; counted as 499."""


def status_of(error: ModelkeepError) -> int:
    """The HTTP status that an error is answered with."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    return next((code for kind, code in _STATUSES if isinstance(error, kind)), 500)


_KINDS = {
    404: "not_found", 405: "input", 429: "busy", 499: "client_gone", 503: "unavailable", 504: "deadline", 507: "memory",
}  # fmt: skip


def kind_of(error: ModelkeepError) -> str:
    """What went wrong, in a word for /metrics: the model (`model`, `output`, `memory`), the client (`input`, `not_found`, `client_gone`),
    time and room (`deadline`, `busy`, `unavailable`), or this server (`internal`).
    """
    if isinstance(error, ClientGoneError):
        return "client_gone"
    kind = getattr(error, "kind", None)
    if isinstance(kind, str):
        return kind
    status = status_of(error)
    return _KINDS.get(status, "input" if 400 <= status < 500 else "internal")


OPENAI_PATHS = ("/v1/completions", "/v1/models")
"""What the `openai` client asks: it shows of an error what stands in error.message."""


def error_body(path: str, status: int, text: str) -> dict[str, Any]:
    """The body of an error: `{"error": text}`, or as the `openai` client reads it where that one asks."""
    if not path.startswith(OPENAI_PATHS):
        return {"error": text}
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": None, "code": status}}
