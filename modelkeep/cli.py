"""The command line. It reads, or it starts the flow that does.

Prefect is imported only where a flow starts, and the registry (SQLAlchemy: a third of a second) only where a command needs it,
so that `serve` holds its socket soon. The commands live in modelkeep.commands.
"""

from __future__ import annotations

import sys

import typer

from modelkeep import output
from modelkeep.commands.approve import approve, reject
from modelkeep.commands.audit import audit_app
from modelkeep.commands.backups import backup, backups_app
from modelkeep.commands.database import database_app
from modelkeep.commands.drill import drill
from modelkeep.commands.keys import keys_app
from modelkeep.commands.models import models_app, register
from modelkeep.commands.promotions import promote, promotions_app
from modelkeep.commands.recover import recover
from modelkeep.commands.rollback import rollback
from modelkeep.commands.running import demo, deploy, doctor, serve, status, up
from modelkeep.config_command import config_app
from registry.errors import ModelkeepError

app = typer.Typer(
    name="modelkeep",
    help="Keeps the models of a GPU box promoted, served, watched, backed up and recoverable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    register,
    promote,
    approve,
    reject,
    rollback,
    backup,
    recover,
    drill,
    status,
    serve,
    up,
    deploy,
    demo,
    doctor,
):
    app.command()(command)
app.add_typer(config_app, name="config", help="Settings: show, set, validate.")
app.add_typer(audit_app, name="audit")
app.add_typer(models_app, name="models")
app.add_typer(promotions_app, name="promotions")
app.add_typer(database_app, name="db")
app.add_typer(keys_app, name="keys")
app.add_typer(backups_app, name="backups")


def main(arguments: list[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0 done, 1 failed or refused, 2 bad usage, 3 partly done, 4 locked."""
    command = typer.main.get_command(app)
    try:
        code = command.main(args=arguments, prog_name="modelkeep", standalone_mode=False)
    except ModelkeepError as error:
        output.problem(str(error))
        return error.exit_code
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        output.problem("interrupted")
        return 130
    except Exception as error:
        usage = output.usage_error(error)
        if usage is None:
            raise
        return usage
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main())
