"""`drill`: hold one now. The deployment recovery-drill does it every week."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Json
from registry.settings import load_settings

if TYPE_CHECKING:
    from tasks.backup.drill import Drill


def drill(
    html: Annotated[
        Path | None, typer.Option("--html", help="Where the page goes; default: drill.html in home.")
    ] = None,
    show: Annotated[bool, typer.Option("--last", help="Hold none: write the page of those so far.")] = False,
    as_json: Json = False,
) -> None:
    """Restore the newest backup into a private place, serve it, compare it with what is live, and damage a copy to be told so."""
    from tasks.backup import drill as drilling
    from tasks.backup import drill_page

    settings = load_settings()
    page = html or settings.home / "drill.html"
    if show:
        drills = drilling.history(settings.home)
        drill_page.write(page, drills)
        if as_json:
            output.document(drills)
        else:
            output.say(f"{drill_page.headline(drills[-1] if drills else None)}: {page}")
        raise typer.Exit(0)
    found = drilling.held(settings, say=lambda text: output.say(text, to_stderr=True))
    drill_page.write(page, drilling.history(settings.home))
    if as_json:
        output.document(found.as_dict())
    else:
        _show(found, page)
    raise typer.Exit(0 if found.passed else 1)


def _show(found: Drill, page: Path) -> None:
    from tasks.backup.progress import duration

    output.table(
        ["component", "size", "RPO", "RTO", "result"],
        [
            [
                one.component, output.size(one.size_bytes), duration(one.rpo_seconds),
                "" if one.rto_seconds is None else f"{one.rto_seconds:.1f} s", one.failed or one.unverifiable or "restored and compared",
            ]
            for one in found.components
        ],
        empty="the backup is empty",
    )  # fmt: skip
    for model in found.served.models:
        output.say(f"{model.model} {model.version}: {model.outcome}" + (f" ({model.why})" if model.why else ""))
    output.say(f"negative drill: {found.negative.what}: " + ("told" if found.negative.told else "NOT told"))
    output.say(f"backup {found.backup_id}: {'passed' if found.passed else 'FAILED'}; {page}")
