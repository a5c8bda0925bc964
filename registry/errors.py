"""The one error hierarchy. A message says what was wrong, with which value, and what to do."""

from __future__ import annotations


class ModelkeepError(Exception):
    """Base of every error that is meant for a person. `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(ModelkeepError):
    """The call itself is wrong: an unknown option, name or key."""

    exit_code = 2


class SettingsError(UsageError):
    """A setting is unknown, malformed, or breaks the limits of the hardware profile."""


class RefusedError(ModelkeepError):
    """The request is understood and refused by a rule (a file that is not safe, a failed gate)."""


class NotFoundError(ModelkeepError):
    """A model, version, promotion or artifact that does not exist."""


class ConflictError(ModelkeepError):
    """The thing exists already with other content, or has changed since it was read."""


class IllegalMoveError(ConflictError):
    """A state change that the state machine does not have. The message names the legal ones."""


class LockedError(ModelkeepError):
    """Another run holds the lease on the subject."""

    exit_code = 4


class FencedError(ModelkeepError):
    """The fencing token of this operation is dead: someone else took the lease, or it expired."""

    exit_code = 4


class ArtifactError(ModelkeepError):
    """An artifact is missing, or its bytes do not have the digest that they are stored under."""


class StorageError(ModelkeepError):
    """A disk is full or read-only, or a store cannot be reached. Nothing was left half written."""


class UnavailableError(ModelkeepError):
    """A server or database that does not answer."""


class AuditError(ModelkeepError):
    """The audit chain does not verify."""
