"""Who does it: the operating system's user on the command line, `prefect-ui` for what a Prefect worker started."""

from __future__ import annotations

import getpass
import os


def current() -> str:
    """The actor of this process. Prefect's server has no users: a run that a worker starts was asked for by a form or an API call."""
    if os.environ.get("PREFECT__FLOW_RUN_ID"):
        return "prefect-ui"
    try:
        return f"os:{getpass.getuser()}"
    except (KeyError, OSError):  # a container whose user id has no name
        return f"os:{os.getuid()}"
