"""`register`, and the commands that read models and their versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json, known, opened, pair

models_app = typer.Typer(help="Models and their versions.", invoke_without_command=True)


def register(
    path: Annotated[Path, typer.Argument(help="An ONNX or TorchScript file, or a folder that holds one.")],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    version: Annotated[str | None, typer.Option("--version", help="Default: the next number.")] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Golden cases (.npz): input.NAME, label, output.NAME.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE, as often as you like.")] = None,
    as_json: Json = False,
) -> None:
    """Inspect a model file, store it, and note it as a new version. Nothing in it is executed."""
    from registry import versions

    tags = dict(pair(item) for item in tag or [])
    with opened() as context:
        result = versions.register(
            context.database,
            context.artifacts,
            path,
            name=name,
            version=version,
            golden=golden,
            tags=tags,
            max_bytes=context.settings.models.max_file_bytes,
        )
    if as_json:
        output.document(result.as_dict())
        return
    what = "registered" if result.created else "is registered already, with the same bytes: nothing to do"
    output.say(
        f"{result.model} {result.version} {what} ({result.format}, {output.size(result.size_bytes)}, {result.digest[:12]}…)"
    )
    if result.created:
        output.say(f"next: modelkeep promote {result.model} {result.version}")


@models_app.callback()
def models(context: typer.Context, as_json: Json = False) -> None:
    """List every version and where it stands."""
    from registry import versions

    if context.invoked_subcommand is None:
        with opened() as registry, registry.database.read() as session:
            output.versions(versions.listed(session), as_json=as_json)


@models_app.command("show")
def models_show(name: str, as_json: Json = False) -> None:
    """The versions of one model."""
    from registry import versions

    with opened() as registry, registry.database.read() as session:
        known(session, name)
        output.versions(versions.listed(session, name), as_json=as_json)
