"""Which HTTP status an error is answered with, and the errors that only HTTP knows."""

from __future__ import annotations

from registry.errors import (
    ConflictError,
    LockedError,
    ModelkeepError,
    NotFoundError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from serving.engine import QueueFullError

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
