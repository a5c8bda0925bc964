"""`register`, and the commands about models and their versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from modelkeep import output, shown
from modelkeep.commands.common import Json, Local, Where, known, moment, opened, pair
from modelkeep.commands.discover import models_discover
from modelkeep.commands.exporting import models_export

models_app = typer.Typer(help="Models and their versions.", invoke_without_command=True)

Page = Annotated[int, typer.Option("--page", min=1)]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="Rows of a page.")]
Version = Annotated[str | None, typer.Argument(help="One of them, in full.")]
Why = Annotated[str, typer.Option("--reason", help="Why; it goes on record.")]


def register(
    path: Annotated[
        Path,
        typer.Argument(
            help="ONNX, .pt2, TorchScript, CoreML; an MLflow model; or a folder with one and what belongs to it."
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the model.")],
    version: Annotated[str | None, typer.Option("--version", help="Default: the next number.")] = None,
    golden: Annotated[
        Path | None, typer.Option("--golden", help="Golden cases (.npz): input.NAME, label, output.NAME.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE, as often as you like.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="classifier, predictor, extractor or router.")] = None,
    description: Annotated[str | None, typer.Option("--description", help="What it does.")] = None,
    author: Annotated[str | None, typer.Option("--author", help="Who made it.")] = None,
    architecture: Annotated[str | None, typer.Option("--architecture", help="resnet18, …")] = None,
    dataset: Annotated[str | None, typer.Option("--training-dataset", help="What it was trained on.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", help="KEY=VALUE, as often as you like; training_metrics.accuracy=0.98."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Inspect a model file, store it, and note it as a new version. Nothing in it is executed."""
    from registry import modeltoml, versions

    tags = dict(pair(item) for item in tag or [])
    facts = modeltoml.given(
        {"description": description, "author": author, "architecture": architecture, "training_dataset": dataset},
        dict(pair(item, "--metadata") for item in metadata or []),
    )
    with opened() as context:
        result = versions.register(
            context.database,
            context.artifacts,
            path,
            name=name,
            version=version,
            golden=golden,
            tags=tags,
            kind=kind,
            facts=facts,
            max_bytes=context.settings.models.max_file_bytes,
        )
    if as_json:
        output.document(result.as_dict())
        return
    what = "registered" if result.created else "is registered already, with the same bytes: nothing to do"
    output.say(
        f"{result.model} {result.version} {what} ({result.format}, {output.size(result.size_bytes)}, {result.digest[:12]}…)"
    )
    if result.format == "coreml":
        from registry import coreml

        output.say(coreml.WHERE_IT_RUNS)
    elif result.created:
        output.say(f"next: modelkeep promote {result.model} {result.version}")


@models_app.callback()
def models(
    context: typer.Context,
    model: Annotated[str | None, typer.Option("--model", help="Only versions of this model.")] = None,
    state: Annotated[str | None, typer.Option("--state", help="registered, validated, rejected or archived.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="K=V", help="Only those with this tag.")] = None,
    environment: Annotated[str | None, typer.Option("--environment", help="Only those with a place in it.")] = None,
    page: Page = 1,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """List versions, the newest first, and where they stand."""
    from registry import catalogue

    if context.invoked_subcommand is not None:
        return
    wanted = catalogue.Wanted(model, state, pair(tag) if tag else None, environment)
    with opened() as registry, registry.database.read() as session:
        if model is not None:
            known(session, model)
        found = catalogue.page(session, wanted, page=page, limit=limit)
    output.document(found) if as_json else shown.versions(found)


@models_app.command("show")
def models_show(name: str, version: Version = None, page: Page = 1, limit: Limit = 50, as_json: Json = False) -> None:
    """A model with its versions; or one version in full: figures, lineage, where it stands."""
    from registry import catalogue

    with opened() as registry, registry.database.read() as session:
        known(session, name)
        if version is not None:
            one = catalogue.version_in_full(session, name, version)
            output.document(one) if as_json else shown.version(one)
            return
        model = catalogue.model_in_full(session, name)
        found = catalogue.page(session, catalogue.Wanted(name), page=page, limit=limit)
    if as_json:
        output.document({**model, **found})
    else:
        shown.model(model)
        shown.versions(found)


@models_app.command("history")
def models_history(
    name: str,
    environment: Annotated[str | None, typer.Option("--environment", help="Only there; default: everywhere.")] = None,
    since: Annotated[str | None, typer.Option("--since", help='From then on: "2d", "yesterday 03:12".')] = None,
    local: Local = False,
    page: Page = 1,
    limit: Limit = 50,
    as_json: Json = False,
) -> None:
    """Every change of what answers for a model, the newest first: who made it, why, by which promotion and run."""
    from registry import history

    begin = moment(since, local=local)
    with opened() as registry, registry.database.read() as session:
        known(session, name)
        found = history.changes(session, name, environment=environment, since=begin, page=page, limit=limit)
    output.document(found) if as_json else shown.changes(found)


@models_app.command("at")
def models_at(
    when: Annotated[str, typer.Argument(metavar="TIME", help='2026-03-10T03:12Z, "03:12 last Tuesday", "2d ago".')],
    model: Annotated[str | None, typer.Option("--model", help="Only this model.")] = None,
    environment: Where = None,
    local: Local = False,
    as_json: Json = False,
) -> None:
    """What was live at a time, in which share, and who put it there."""
    from registry import history, moments

    asked = moments.parse(when, local=local)
    with opened() as registry, registry.database.read() as session:
        if model is not None:
            known(session, model)
        found = history.at(session, environment or registry.settings.environment, asked, model)
    output.document(found) if as_json else shown.moment(found)


@models_app.command("compare")
def models_compare(name: str, a: str, b: str, as_json: Json = False) -> None:
    """Two versions of a model side by side: what differs in signature, size, figures, traffic."""
    from registry import catalogue

    with opened() as registry, registry.database.read() as session:
        found = catalogue.compare(session, name, a, b)
    output.document(found) if as_json else shown.comparison(found)


@models_app.command("tag", context_settings={"ignore_unknown_options": True})
def models_tag(
    name: str,
    version: str,
    changes: Annotated[list[str], typer.Argument(metavar="K=V|-K", help="Set a tag, or take one away.")],
    as_json: Json = False,
) -> None:
    """Set tags of a version, or take them away."""
    from registry import catalogue

    wanted: dict[str, str | None] = {}
    for change in changes:
        if change.startswith("-") and "=" not in change:
            wanted[change[1:]] = None
        else:
            key, value = pair(change)
            wanted[key] = value
    with opened() as registry:
        tags = catalogue.tag(registry.database, name, version, wanted)
    if as_json:
        output.document({"model": name, "version": version, "tags": tags})
    else:
        output.say(f"{name} {version}: " + (", ".join(f"{k}={v}" for k, v in sorted(tags.items())) or "no tags"))


@models_app.command("describe")
def models_describe(
    name: str,
    description: Annotated[str | None, typer.Option("--description", help="What the model is for.")] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="classifier, predictor, extractor or router.")] = None,
    as_json: Json = False,
) -> None:
    """Say what a model is for, and of which kind."""
    from registry import catalogue

    with opened() as registry:
        found = catalogue.describe_model(registry.database, name, description=description, kind=kind)
    if as_json:
        output.document(found)
    else:
        output.say(f"{name} ({found['kind'] or 'of no stated kind'}): {found['description'] or 'no description'}")


@models_app.command("archive")
def models_archive(name: str, version: str, reason: Why, as_json: Json = False) -> None:
    """Take a version out of use for good. Its record and its bytes stay."""
    from registry import catalogue

    with opened() as registry:
        found = catalogue.archive(registry.database, name, version, reason=reason)
    if as_json:
        output.document(found)
        return
    output.say(f"{name} {version} is archived (it was {found['before']})")
    if found["rollback_points"]:
        output.say(f"{found['rollback_points']} rollback points name it: nothing can go back to it from now on")


@models_app.command("delete")
def models_delete(name: str, version: str, reason: Why, as_json: Json = False) -> None:
    """Delete the bytes of an archived version that nothing refers to. The record stays."""
    from registry import removal

    with opened() as registry:
        found = removal.delete(registry.database, registry.artifacts, name, version, reason=reason)
    if as_json:
        output.document(found.as_dict())
        return
    kept = f", {found.files_kept} kept, which others need" if found.files_kept else ""
    was = f"was deleted at {found.deleted_at[:19]}" if found.again else "is deleted"
    output.say(
        f"{name} {version} {was}: {found.files_removed} files removed ({output.size(found.bytes_removed)}){kept}"
    )


models_app.command("discover")(models_discover)
models_app.command("export")(models_export)
