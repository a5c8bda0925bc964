"""What stands in a manifest about the installation and the machine it ran on. What cannot be read is absent, never made up."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import select

from registry.database import Database
from registry.schema import AuditEvent, AuditHead, Environment
from registry.settings import Settings

_LIBRARIES = ("modelkeep", "sqlalchemy", "zstandard", "cryptography", "boto3", "chromadb", "redis", "onnxruntime")


def programs() -> dict[str, str]:
    """Versions of Python and of the libraries that take part, by their names on the package index."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def facts(settings: Settings) -> dict[str, Any]:
    """The machine: its name, processors, memory, GPUs and disks. Sizes in bytes."""
    return {
        "host": platform.node(),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpus(),
        "disk": disks(settings),
    }


def gpus() -> list[dict[str, Any]] | None:
    """Every GPU that the driver knows; None where there is no driver, or it does not answer."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None
    try:
        driver = _text(pynvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(
                {
                    "name": _text(pynvml.nvmlDeviceGetName(handle)),
                    "memory_total_bytes": int(memory.total),
                    "memory_used_bytes": int(memory.used),
                    "driver": driver,
                }
            )
        return found
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def disks(settings: Settings) -> dict[str, dict[str, int]]:
    """Total, used and free bytes of the file systems that hold home, artifacts and backups, by folder."""
    places = [str(settings.home), settings.artifacts, *settings.backups]
    found = {}
    for place in dict.fromkeys(one for one in places if "://" not in one):
        there = next((path for path in (Path(place), *Path(place).parents) if path.exists()), None)
        if there is not None:
            usage = shutil.disk_usage(there)
            found[place] = {"total_bytes": usage.total, "used_bytes": usage.used, "free_bytes": usage.free}
    return found


def shown_settings(settings: Settings) -> dict[str, Any]:
    """Every setting with its value; secrets are hidden."""
    return {row["key"]: row["value"] for row in settings.describe()}


def installation(database: Database) -> str | None:
    """The id of the installation: the hash of the first event of its audit chain, which no other registry has, and which
    copies and restores keep. None where nothing is on record yet."""
    with database.read() as session:
        return session.scalar(select(AuditEvent.hash).where(AuditEvent.seq == 1))


def registry_now(database: Database) -> dict[str, Any]:
    """Revision, audit head, epochs and generations as they are now."""
    revision = database.revision()
    with database.read() as session:
        head = session.execute(select(AuditHead.seq, AuditHead.hash).where(AuditHead.id == 1)).one_or_none()
        environments = session.execute(select(Environment.name, Environment.epoch, Environment.generation)).all()
    return {
        "revision": revision,
        "audit_head": None if head is None else {"seq": head.seq, "hash": head.hash},
        "environments": {name: {"epoch": epoch, "generation": generation} for name, epoch, generation in environments},
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
