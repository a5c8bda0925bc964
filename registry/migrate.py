"""Bring the schema up or down with Alembic. Imported only where a migration is due: Alembic costs a quarter of a second."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from registry.database import Database
from registry.errors import UsageError

FOLDER = Path(__file__).parent / "migrations"


COPYING = "copying"
"""In place of a revision: an unfinished copy of another registry, which nobody shall take for one. See registry.copying."""

STATEMENT_SECONDS = 3600.0
"""How long one step may take on a server. A step over a million rows is slow, and must not be taken for a dead server."""


def known() -> list[str]:
    """Revisions that this code knows, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_scripts()).walk_revisions()]


def upgrade(database: Database, revision: str = "head") -> None:
    """To the newest revision (or to an earlier one). Raises UsageError where the database is newer than this code.

    What a killed upgrade left half done is finished by the next one. Of several at once one does it and the others wait.
    """
    found = database.revision()
    revisions = known()
    if found == COPYING:
        raise UsageError(
            f"the registry {database.shown} is an unfinished copy: repeat modelkeep db copy-to from where it was copied, or the "
            "modelkeep recover that was interrupted"
        )
    if found is not None and found not in revisions:
        raise UsageError(
            f"the registry {database.shown} has schema revision {found}, which this modelkeep (up to {revisions[0]}) does not know: "
            "upgrade modelkeep, or point it at another registry"
        )
    with database.translated(), _config(database) as settings:
        command.upgrade(settings, revision)


def downgrade(database: Database, revision: str) -> None:
    """To an older revision; "base" is an empty database."""
    with database.translated(), _config(database) as settings:
        command.downgrade(settings, revision)


@contextlib.contextmanager
def _config(database: Database) -> Iterator[Config]:
    """Alembic's settings, with an engine that is patient where a server answers."""
    patient = database
    if not database.sqlite:
        patient = Database(
            database.url.render_as_string(hide_password=False),
            pool={"pool_size": 1, "max_overflow": 0},
            answer_seconds=database.answer_seconds,
            statement_seconds=STATEMENT_SECONDS,
        )
    settings = _scripts()
    settings.attributes["writer"] = patient.engine.execution_options(modelkeep_write=True)
    try:
        yield settings
    finally:
        if patient is not database:
            patient.dispose()


def _scripts() -> Config:
    settings = Config()
    settings.set_main_option("script_location", str(FOLDER).replace("%", "%%"))  # Alembic interpolates
    return settings
