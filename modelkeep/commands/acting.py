"""Who acts in a command that must work without the registry too: those of the backups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from modelkeep import output
from modelkeep.commands.common import opened
from registry.errors import StorageError, UnavailableError
from registry.settings import Settings, load_settings


@contextmanager
def acting() -> Iterator[Settings]:
    """Who acts is known by the registry; where that does not answer, the system's user does: a backup changes nothing."""
    from registry.connect import open_database
    from tasks.backup.registry_now import vanished

    settings = load_settings()
    with ExitStack() as stack:
        why = vanished(settings, open_database(settings))
        if why is None:
            try:
                stack.enter_context(opened())
            except (UnavailableError, StorageError) as error:
                why = str(error)
        if why is not None:
            output.problem(f"without the registry: {why}")
        yield settings
