"""Who does it: a key, the operating system's user on the command line, `prefect-ui` for what a Prefect worker started."""

from __future__ import annotations

import getpass
import os
from dataclasses import dataclass
from typing import Literal

Via = Literal["command", "api", "form"]


@dataclass(frozen=True, slots=True)
class Who:
    """The author of an act. `key_id` is that of the key that authenticated it; `claimed` a name typed into a form."""

    actor: str
    key_id: str | None = None
    via: Via = "command"
    claimed: str | None = None


def current() -> str:
    """The actor of this process. Prefect's server has no users: a run that a worker starts was asked for by a form or an API call."""
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        return "prefect-ui"
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container whose user id has no name
        return f"os:{os.getuid()}"
