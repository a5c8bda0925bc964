"""What every command needs: the registry opened, options that many take, and a model's name that must be known."""

from __future__ import annotations

import datetime as dt
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from registry import names
from registry.errors import UsageError
from registry.settings import Settings, load_settings

if TYPE_CHECKING:
    from registry.database import Database
    from registry.store import ArtifactStore

Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output; logs go to standard error.")]
Where = Annotated[str | None, typer.Option("--environment", help="Default: the environment of the settings.")]
Reason = Annotated[str | None, typer.Option("--reason", help="Why; it goes on record.")]
Local = Annotated[
    bool, typer.Option("--local", help="Read times without an offset in this machine's zone, not as UTC.")
]


@dataclass(frozen=True, slots=True)
class Context:
    settings: Settings
    database: Database
    artifacts: ArtifactStore


@contextmanager
def opened() -> Iterator[Context]:
    """Settings, and the registry at this release's schema. The command acts as the key of the settings, where there is one."""
    from registry import actor, client_tls, keys
    from registry.connect import open_database
    from registry.store import open_store

    settings = load_settings()
    client_tls.publish(settings.client)
    database = open_database(settings)
    database.prepare()
    try:
        text = keys.presented(settings)
        if text is not None:
            key = keys.of_settings(database, text)
            why = f"key {key.name} has role {key.role}: it may look, and change nothing; set MODELKEEP_API_KEY to one of role operate"
            refusal = "" if keys.allows(key.role, "operate") else why
            actor.act_as(actor.Who(key.actor, key_id=key.key_id, via="command"), refusal=refusal)
        yield Context(settings, database, open_store(settings.artifacts))
    finally:
        actor.act_as(None)
        database.dispose()


def known(session: Any, name: str) -> None:
    """Raise NotFoundError for a model that does not exist."""
    from registry import versions
    from registry.schema import Model

    names.check_model_name(name)
    if session.get(Model, name) is None:
        versions.get(session, name, "")


def moment(text: str | None, *, local: bool = False) -> dt.datetime | None:
    """A time as a person types it. Raises UsageError, with examples."""
    from registry import moments

    return None if text is None else moments.parse(text, local=local)


def pair(text: str, option: str = "--tag") -> tuple[str, str]:
    key, mark, value = text.partition("=")
    if not mark or not key:
        raise UsageError(f"{option} {text!r}: KEY=VALUE is needed")
    return key, value


def log_to_stderr(level: str) -> None:
    logging.basicConfig(stream=sys.stderr, level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
