"""`modelkeep doctor`: what modelkeep needs on this machine, checked, each with its remedy."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from registry.connect import open_database
from registry.errors import ModelkeepError
from registry.settings import Settings


@dataclass(frozen=True, slots=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    what: str
    text: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(settings: Settings) -> list[Finding]:
    from modelkeep import prefect_env
    from tasks import servers

    findings = [
        Finding("ok", "python", sys.version.split()[0]),
        Finding("ok", "profile", f"{settings.hardware.name} ({settings.source('profile')})"),
    ]
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(settings.home).free
        level: Literal["ok", "warning"] = "ok" if free > 2e9 else "warning"
        findings.append(Finding(level, "home", f"{settings.home}, {free / 1e9:.1f} GB free"))
    except OSError as error:
        findings.append(
            Finding(
                "error", "home", f"{settings.home}: {error.strerror}; set MODELKEEP_HOME to a folder you can write to"
            )
        )
    try:
        database = open_database(settings)
        database.prepare()
        findings.append(Finding("ok", "registry", f"schema revision {database.revision()}"))
        alive = servers.alive(database, settings.environment)
        text = ", ".join(alive.values()) if alive else "none answers; start one: modelkeep serve"
        findings.append(Finding("ok" if alive else "warning", "servers", text))
    except ModelkeepError as error:
        findings.append(Finding("error", "registry", str(error)))
    answers = prefect_env.prefect_answers(settings)
    text = settings.prefect.api_url if answers else f"none at {settings.prefect.api_url}; start it: modelkeep up"
    findings.append(Finding("ok" if answers else "warning", "prefect", text))
    return findings
