"""Which process wrote an intent or a flag, and whether it is certainly dead: told only of one that we could see if it lived."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def identity() -> dict[str, Any]:
    """A name and a number alone are used again: by the next process, by another container, by a machine of the same name."""
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "boot_id": boot_id(),
        "pid_space": pid_space(),
    }


def in_sight(facts: Mapping[str, Any]) -> bool:
    """Whether it is, or was, a process of this boot of this machine, with numbers as we see them."""
    return (
        facts.get("host") == platform.node()
        and facts.get("boot_id") in (None, "", boot_id())
        and facts.get("pid_space") in (None, pid_space())
    )


def is_dead(facts: Mapping[str, Any]) -> bool:
    """For certain. False for whatever cannot be seen from here."""
    if not in_sight(facts) or not facts.get("pid"):
        return False
    try:
        os.kill(int(facts["pid"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError, OverflowError):
        return False
    return facts.get("started") not in (None, started(int(facts["pid"])))


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def pid_space() -> str | None:
    """Containers count their processes apart, on one machine and often with one name."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def started(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
