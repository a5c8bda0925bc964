"""The registry's database: its schema, and its move to another database."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json
from registry.errors import UsageError
from registry.settings import load_settings

database_app = typer.Typer(help="The registry's database.", no_args_is_help=True)


@database_app.command("upgrade")
def database_upgrade(as_json: Json = False) -> None:
    """Bring the registry to this release's schema; refuses a newer one."""
    from registry.connect import open_database

    database = open_database(load_settings())
    database.make_folder()
    before = database.revision()
    database.prepare()
    after = database.revision()
    if as_json:
        output.document({"registry": database.shown, "before": before, "revision": after})
        return
    note = "" if before == after else " (new)" if before is None else f" (was {before})"
    output.say(f"the registry is at schema revision {after}{note}")


@database_app.command("copy-to")
def database_copy_to(
    url: Annotated[
        str,
        typer.Argument(
            help="An empty database: sqlite:////FILE, mysql+pymysql://… or postgresql+psycopg://…; - reads it from the input."
        ),
    ],
    as_json: Json = False,
) -> None:
    """Copy the registry into an empty database of any kind, check it there, and give it a new epoch."""
    from modelkeep.commands import common
    from registry import copying
    from registry.database import Database
    from registry.migrate import STATEMENT_SECONDS
    from registry.sections import check_database_url

    if url == "-":
        url = sys.stdin.readline().strip()
    try:
        check_database_url(url)
    except ValueError as error:
        raise UsageError(f"URL: {error}") from error
    with common.opened() as context:
        target = Database(url, statement_seconds=STATEMENT_SECONDS)
        try:
            done = copying.copy(
                context.database,
                target,
                on_table=lambda table, rows: output.say(f"{rows:>10} {table}", to_stderr=True) if rows else None,
            )
        finally:
            target.dispose()
    if as_json:
        output.document(done.as_dict())
        return
    output.say(
        f"copied {sum(done.rows.values())} rows and {done.events} events to {done.target}; counts and audit chain hold there"
    )
    if done.faults:
        output.say(f"the audit chain had faults before, and has them there too: {'; '.join(done.faults)}")
    if done.behind:
        output.say(
            f"{done.behind} events came after the copy began and are not in it: stop what writes, and copy again"
        )
    output.say(
        "to use it, set database_url (MODELKEEP_DATABASE_URL) to it for every server, worker and command, and restart them"
    )
