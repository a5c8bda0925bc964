"""`models export`: a version as a directory that stands by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, known, opened


def models_export(
    name: str,
    version: str,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="A new or an empty directory.")],
    mlflow: Annotated[bool, typer.Option("--mlflow", help="So that mlflow.pyfunc.load_model can load it.")] = False,
    as_json: Json = False,
) -> None:
    """Write a version to a directory: its files, what is known of it, and checksums for `sha256sum -c`."""
    from registry import exporting

    with opened() as context:
        with context.database.read() as session:
            known(session, name)
        found = exporting.export(context.database, context.artifacts, name, version, target, mlflow=mlflow)
    if as_json:
        output.document(found)
        return
    output.say(
        f"{name} {version} exported to {found['directory']} "
        f"({len(found['files'])} files, {output.size(found['size_bytes'])}, {found['digest'][:12]}…)"
    )
    output.say("check it: sha256sum -c SHA256SUMS, in that directory")
