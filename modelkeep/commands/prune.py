"""`backups prune`: what the policy lets go, with its rule for each; deleted only with --apply."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from modelkeep import output
from modelkeep.commands.acting import acting
from modelkeep.commands.common import Json
from registry import clock
from registry.settings import load_settings

if TYPE_CHECKING:
    from tasks.backup.prune import Pruned


def prune(
    apply: Annotated[bool, typer.Option("--apply", help="Delete what the preview lets go.")] = False,
    as_json: Json = False,
) -> None:
    """Show which backups and which shipped logs stay and which go, with the rule; delete them with --apply."""
    from registry import actor
    from tasks.backup import prune as pruning
    from tasks.backup.repository import open_repository

    if apply:
        with acting() as settings:
            actor.current()  # a key that may only look is refused before anything is touched
            found = pruning.carry_out(settings, open_repository(settings), now=clock.now(), say=_log)
    else:
        settings = load_settings()
        grace = dt.timedelta(hours=settings.backup.gc_grace_hours)
        found = pruning.preview(open_repository(settings), pruning.policy_of(settings), clock.now(), grace)
    if as_json:
        output.document(found.as_dict())
    else:
        _show(found)
    raise typer.Exit(3 if found.troubles else 0)


def _log(line: str) -> None:
    output.say(line, to_stderr=True)


def _shortened(rules: Sequence[str]) -> str:
    """The rules, each once with the components that it is about: of seven components each has the same ones."""
    about: dict[str, list[str]] = {}
    for rule in rules:
        component, mark, text = rule.partition(": ")
        about.setdefault(text if mark else rule, []).extend([component] if mark else [])
    every = {name for names in about.values() for name in names}
    return "; ".join(
        text if set(names) == every or not names else f"{text} ({', '.join(names)})" for text, names in about.items()
    )


def _show(found: Pruned) -> None:
    output.table(
        ["backup", "state", "", "rule"],
        [
            [
                one.backup_id,
                found.backups[one.backup_id]["state"],
                "stays" if one.keep else "goes",
                _shortened(one.rules),
            ]
            for one in found.decisions
        ],
        empty="there is no backup",
    )
    for backup_id, why in found.unreadable.items():
        output.problem(f"{backup_id} stays, and no object is deleted, while its manifest cannot be read: {why}")
    for backup_id, why in found.kept_by_place.items():
        output.problem(f"{backup_id} could not be removed: {why}")
    if not found.applied:
        goes = len(found.goes)
        output.say(f"{goes} of {len(found.decisions)} go with --apply" if goes else "nothing is to go")
        _show_logs(found)
        return
    output.say(f"{len(found.removed)} removed")
    for one in found.garbage:
        output.say(
            f"{one.place}: {one.deleted} objects deleted ({output.size(one.deleted_bytes)}), {one.marked} marked for the next time"
            + (f"; nothing else is deleted: {one.waits}" if one.waits else "")
        )
    _show_logs(found)


def _show_logs(found: Pruned) -> None:
    """What somebody must look at, with the other problems; the rest with the result. Each once."""
    for one in found.logs.databases:
        size = one.removed_bytes if found.applied else sum(item.size_bytes for item in one.goes)
        tell = output.say if one.trouble is None else output.problem
        tell(one.text(applied=found.applied) + (f" ({output.size(size)})" if size else ""))
    if found.logs.waiting is not None:
        (output.problem if found.logs.failed else output.say)(found.logs.waiting)
