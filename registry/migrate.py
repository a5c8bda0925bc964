"""Bring the schema up or down with Alembic. Imported only where a migration is due: Alembic costs a quarter of a second."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory

from registry.database import Database
from registry.errors import UsageError

FOLDER = Path(__file__).parent / "migrations"


def config(database: Database) -> Config:
    settings = _scripts()
    settings.attributes["engine"] = database.engine
    settings.attributes["writer"] = database.engine.execution_options(modelkeep_write=True)
    return settings


def known() -> list[str]:
    """Revisions that this code knows, the newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_scripts()).walk_revisions()]


def upgrade(database: Database) -> None:
    """To the newest revision. Raises UsageError where the database is newer than this code."""
    found = database.revision()
    revisions = known()
    if found is not None and found not in revisions:
        raise UsageError(
            f"the registry {database.url.render_as_string(hide_password=True)} has schema revision {found}, "
            f"which this modelkeep (up to {revisions[0]}) does not know: upgrade modelkeep, or point it at another registry"
        )
    with database.translated():
        command.upgrade(config(database), "head")


def downgrade(database: Database, revision: str) -> None:
    """To an older revision; "base" is an empty database."""
    with database.translated():
        command.downgrade(config(database), revision)


def _scripts() -> Config:
    settings = Config()
    settings.set_main_option("script_location", str(FOLDER).replace("%", "%%"))  # Alembic interpolates
    return settings
