"""The registry's database."""

from __future__ import annotations

import typer

from modelkeep import output
from registry.settings import load_settings

database_app = typer.Typer(help="The registry's database.", no_args_is_help=True)


@database_app.command("upgrade")
def database_upgrade() -> None:
    """Bring the registry to this release's schema; refuses a newer one."""
    from registry.connect import open_database

    settings = load_settings()
    database = open_database(settings)
    before = database.revision()
    database.prepare()
    output.say(f"the registry is at schema revision {database.revision()}" + ("" if before else " (new)"))
