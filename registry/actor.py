"""Who does it: a key, the operating system's user on the command line, `prefect-ui` for what a Prefect worker started."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from typing import Literal

from registry.errors import RefusedError

Via = Literal["command", "api", "form"]


@dataclass(frozen=True, slots=True)
class Who:
    """The author of an act. `key_id` is that of the key that authenticated it; `claimed` a name typed into a form."""

    actor: str
    key_id: str | None = None
    via: Via = "command"
    claimed: str | None = None


_acting: Who | None = None
_refusal = ""


def act_as(who: Who | None, *, refusal: str = "") -> None:
    """From now on this process acts for somebody: a command that was given a key. `refusal` says why he may change nothing."""
    global _acting, _refusal
    _acting, _refusal = who, refusal


def current() -> str:
    """The actor of a change by this process. Prefect's server has no users: a run that a worker starts was asked for by a form or
    an API call. Raises RefusedError where who this process acts for may change nothing."""
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        return "prefect-ui"
    if _refusal:
        raise RefusedError(_refusal)
    return user() if _acting is None else _acting.actor


def user() -> str:
    """The operating system's user."""
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container whose user id has no name
        return f"os:{os.getuid()}"
