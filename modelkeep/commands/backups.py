"""`backup`, and the commands that show, check and hold backups. None of them needs the registry; deleting is `prune`'s."""

from __future__ import annotations

import dataclasses
import datetime as dt
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from modelkeep import output
from modelkeep.commands.acting import acting
from modelkeep.commands.common import Json, Local, Reason, moment
from modelkeep.commands.prune import prune
from modelkeep.commands.ship_logs import ship_logs
from registry import clock
from registry.errors import ModelkeepError, RefusedError, UsageError
from registry.settings import Settings, load_settings

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State

    from tasks.backup.progress import Moment

Identity = Annotated[
    str, typer.Argument(metavar="ID", help="As in `modelkeep backups list`; or a manifest's path or URL.")
]
Here = Annotated[
    bool,
    typer.Option(
        "--no-prefect", help="Do it without a flow run, where Prefect is in trouble: it then shows up nowhere."
    ),
]
KeyPath = Annotated[Path, typer.Argument(metavar="PATH", help="The file to write; one that exists is not touched.")]

backups_app = typer.Typer(help="Backups: what there is, and whether it restores.", invoke_without_command=True)
backups_app.command()(prune)
backups_app.command("ship-logs")(ship_logs)


def backup(
    components: Annotated[
        str,
        typer.Option(
            "--components",
            help="all; daily (registry, models, databases); or of registry, models, database, vectors, queues, files, config, with commas "
            "between; database:NAME, files:NAME.",
        ),
    ] = "all",
    reason: Reason = None,
    here: Here = False,
    as_json: Json = False,
) -> None:
    """Back up everything, or some of it, under one manifest."""
    from tasks.backup import kinds

    with acting() as settings:
        names = kinds.wanted(components)
        kinds.parts(settings, names)  # a wrong name shall not wait for Prefect
        if here:
            from tasks.backup import progress, run

            with _bar():
                outcome = run.back_up(settings, run.Request(names, reason or ""), tell=_log, show=progress.show)
            _done(outcome.as_dict(), as_json, outcome.exit_code)
        from modelkeep import prefect_env

        prefect_env.use(settings)
        from flows.backup import Backup
        from flows.backup import backup as flow

        with _bar():
            state = flow(Backup(components=components, reason=reason or ""), return_state=True)
    _done(_result(state, "the backup failed"), as_json, {"Complete": 0, "Partial": 3}.get(str(state.name), 1))


def _done(found: dict[str, Any], as_json: bool, code: int) -> NoReturn:
    if as_json:
        output.document(found)
    else:
        _show_outcome(found)
    raise typer.Exit(code)


def _log(line: str) -> None:
    output.say(line, to_stderr=True)


def _result(state: State[Any], otherwise: str) -> Any:
    """What the flow found. Exits where it refused, or where another holds the lock."""
    if state.name in ("Refused", "Locked"):
        output.problem(state.message or str(state.name))
        raise typer.Exit(4 if state.name == "Locked" else 1)
    found = getattr(state.data, "result", state.data)
    if found is None or isinstance(found, BaseException) or not isinstance(found, dict | list):
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, ModelkeepError) else ModelkeepError(state.message or otherwise)
    return found


@contextmanager
def _bar() -> Iterator[None]:
    """A line that moves, where somebody looks; elsewhere the log has a line every ten seconds."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from tasks.backup import progress

    columns = (TextColumn("{task.description}"), BarColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task("backup", total=None)

        def view(seen: Moment) -> None:
            drawn.update(task, description=seen.text(), completed=seen.done_bytes, total=seen.total_bytes)

        with progress.viewed(view):
            yield


def _show_outcome(found: dict[str, Any]) -> None:
    output.table(
        ["component", "state", "entries", "size", "stored", "new", ""],
        [
            [
                one["name"], one["state"], one["entries"], output.size(one["size_bytes"]), output.size(one["stored_bytes"]),
                output.size(one["new_bytes"]), one["error"] or "; ".join(one["warnings"]),
            ]
            for one in found["components"]
        ],
        empty="nothing was backed up",
    )  # fmt: skip
    for place, what in found["places"].items():
        output.say(f"{place}: {what}")
    for note in found["notes"]:
        output.say(note)
    output.say(f"backup {found['backup_id']} is {found['state']}")


@backups_app.callback()
def backups_list(context: typer.Context, as_json: Json = False) -> None:
    """List backups, the newest first."""
    if context.invoked_subcommand is None:
        _list(as_json)


@backups_app.command("list")
def backups_list_command(as_json: Json = False) -> None:
    """List backups, the newest first."""
    _list(as_json)


def _list(as_json: bool) -> None:
    from tasks.backup import listing
    from tasks.backup.progress import duration
    from tasks.backup.repository import open_repository

    repository = open_repository(load_settings())
    rows = listing.listed(repository)
    if as_json:
        output.document(rows)
        return
    output.table(
        ["id", "age", "components", "new", "stored", "state", "copies", "held"],
        [
            [
                row["backup_id"],
                None if row["age_seconds"] is None else duration(row["age_seconds"]),
                ", ".join(one["name"] + ("" if one["state"] == "complete" else "!") for one in row["components"])
                or ", ".join(row["requested"]),
                output.size(row["new_bytes"]),
                output.size(row["stored_bytes"]),
                row["state"] + (f": {row['why']}" if row["why"] else ""),
                f"{len(row['places'])} of {len(repository.places)}",
                ", ".join(filter(None, ["pinned" if row["pinned"] else "", row["keep_until"]])),
            ]
            for row in rows
        ],
        empty="no backups yet; take one: modelkeep backup",
    )


@backups_app.command("show")
def backups_show(reference: Identity, as_json: Json = False) -> None:
    """Everything that is known of one: components, versions, checks, where it is."""
    from tasks.backup import listing
    from tasks.backup.repository import open_repository

    found = listing.shown(open_repository(load_settings()), reference)
    if as_json:
        output.document(found)
        return
    manifest = found["manifest"]
    output.say(f"backup {found['backup_id']}, number {found['sequence']}: {found['state']}")
    if found["why"]:
        output.say(f"why: {found['why']}")
    output.say(
        f"taken {found['began_at']} to {found['ended_at']}" + (f" ({found['reason']})" if found["reason"] else "")
    )
    output.say(f"installation {manifest['installation']}")
    output.table(
        ["component", "kind", "state", "entries", "size", "stored", "verified", ""],
        [
            [
                one["name"], one["kind"], one["state"], one["entries"], output.size(one["size_bytes"]),
                output.size(one["stored_bytes"]), "yes" if one["verified"] else "no",
                one["error"] or "; ".join(one["warnings"]),
            ]
            for one in found["components"]
        ],
        empty="no components",
    )  # fmt: skip
    for place in found["places"]:
        output.say(f"in {place}")
    for place in found["missing_at"]:
        output.say(f"not in {place}")
    encryption = manifest["encryption"]
    output.say(f"encrypted with {encryption['method']}, key {encryption['key_id']}" if encryption else "not encrypted")
    output.say("programs: " + ", ".join(f"{name} {version}" for name, version in manifest["programs"].items()))
    output.table(
        ["when", "noted", "what"],
        [[note["at"][:19], note["state"], _facts(note["facts"])] for note in found["notes"]],
        empty="nothing is noted",
    )


def _facts(facts: dict[str, Any]) -> str:
    outcomes = facts.get("components")
    if isinstance(outcomes, dict):
        return ", ".join(f"{name} {one['outcome']}" for name, one in outcomes.items())
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value not in ("", None))


@backups_app.command("verify")
def backups_verify(
    reference: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Default: what the schedule would check now.")
    ] = None,
    sample: Annotated[
        float | None,
        typer.Option("--sample", metavar="SHARE", help="Read back this share of it, instead of restoring all."),
    ] = None,
    here: Here = False,
    as_json: Json = False,
) -> None:
    """Restore a backup into private servers and folders and compare it with its manifest."""
    if sample is not None and not 0 < sample <= 1:
        raise UsageError(f"--sample {sample:g}: a share above 0 and at most 1, as in 0.05")
    if sample is not None and reference is None:
        raise UsageError("--sample needs the ID of a backup")
    with acting() as settings:
        if reference is not None:
            from tasks.backup.repository import open_repository

            # a wrong one shall not wait for Prefect
            reference = open_repository(settings).manifest(reference).backup_id
        if here:
            _verify_here(settings, reference, sample, as_json)
        from modelkeep import prefect_env

        prefect_env.use(settings)
        from flows.verify_backups import VerifyBackups, verify_backups

        state = verify_backups(VerifyBackups(backup=reference, sample=sample), return_state=True)
    reports = _result(state, "the verification failed")
    _checked(reports, as_json, named=reference is not None, failed=state.is_failed())


def _verify_here(settings: Settings, reference: str | None, sample: float | None, as_json: bool) -> NoReturn:
    from tasks.backup import verify
    from tasks.backup.repository import open_repository

    share_of_others = settings.backup.sample_share
    due = [(reference, sample)] if reference is not None else verify.due(open_repository(settings), share_of_others)
    reports = [verify.verify(settings, one, share=share, tell=_log) for one, share in due]
    failed = any(one.exit_code == 1 for one in reports)
    _checked([one.as_dict() for one in reports], as_json, named=reference is not None, failed=failed)


def _checked(reports: list[dict[str, Any]], as_json: bool, *, named: bool, failed: bool) -> NoReturn:
    if as_json:
        output.document(reports[0] if named and reports else reports)
    else:
        for report in reports:
            _show_report(report)
        if not reports:
            output.say("no backup is due for a check")
    unverifiable = any(one["outcome"] == "unverifiable" for report in reports for one in report["components"].values())
    raise typer.Exit(1 if failed else 3 if unverifiable else 0)


def _show_report(report: dict[str, Any]) -> None:
    output.table(
        ["component", "outcome", "seconds", "compared", ""],
        [
            [name, one["outcome"], one["seconds"], ", ".join(f"{key} {value}" for key, value in one["checked"].items()), one["why"]]
            for name, one in report["components"].items()
        ],
        empty="it has no component that could be checked",
    )  # fmt: skip
    output.say(f"backup {report['backup_id']} is {report['state']}")


@backups_app.command("pin")
def backups_pin(reference: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """Never prune it, until it is unpinned."""
    from tasks.backup import holding

    with acting() as settings:
        _held(holding.pin(settings, reference, reason=reason or ""), as_json)


@backups_app.command("unpin")
def backups_unpin(reference: Identity, reason: Reason = None, as_json: Json = False) -> None:
    """Leave it to the retention policy again."""
    from tasks.backup import holding

    with acting() as settings:
        _held(holding.unpin(settings, reference, reason=reason or ""), as_json)


@backups_app.command("keep")
def backups_keep(
    reference: Identity,
    until: Annotated[
        str, typer.Option("--until", help="A time, as 2027-01-31 or 2027-01-31T12:00:00Z; never an earlier one.")
    ],
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """Do not prune it before a date, whatever else is said (a legal hold)."""
    from tasks.backup import holding

    end = _future(until)
    with acting() as settings:
        _held(holding.keep(settings, reference, end, reason=reason or ""), as_json)


def _future(text: str) -> dt.datetime:
    """A date or a time as ISO 8601 has it, in UTC where it names no offset. Raises UsageError."""
    try:
        found = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"--until {text!r} is no time: 2027-01-31 or 2027-01-31T12:00:00Z is meant") from error
    return found if found.tzinfo is not None else found.replace(tzinfo=dt.UTC)


def _held(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.document(found)
        return
    words = ["pinned" if found["pinned"] else "not pinned"]
    words += [f"kept until {found['keep_until']}"] if found["keep_until"] else []
    output.say(f"backup {found['backup_id']} ({found['state']}) is {', '.join(words)}")
    if found["note"]:
        output.problem(found["note"])


@backups_app.command("undelete")
def backups_undelete(
    before: Annotated[str, typer.Option("--before", help="A moment before it was done: 2026-03-10T03:12Z, '3h ago'.")],
    local: Local = False,
    as_json: Json = False,
) -> None:
    """Put back what was deleted or overwritten in a bucket that keeps versions; nothing is taken away."""
    from registry import actor
    from tasks.backup import undelete
    from tasks.backup.places import open_places

    asked = moment(before, local=local)
    assert asked is not None
    with acting() as settings:
        actor.current()
        found = undelete.put_back(open_places(settings), asked)
    if as_json:
        output.document([dataclasses.asdict(one) for one in found])
    for one in found:
        if not as_json:
            output.say(
                f"{one.place}: {one.looked_at} names looked at, {len(one.deleted)} deleted ones and {len(one.overwritten)} overwritten "
                "ones are back as they were"
            )
        for name, why in one.lost.items():
            output.problem(f"{name} is not back: {why}")
    raise typer.Exit(3 if any(one.lost for one in found) else 0)


@backups_app.command("new-key")
def backups_new_key(path: KeyPath, as_json: Json = False) -> None:
    """Write a new key that only you can read; with `backup_key_file = PATH` backups are encrypted and signed by it."""
    from tasks.backup import keyring

    key = keyring.new_key(path.expanduser().absolute())
    if as_json:
        output.document({"key_id": key.key_id, "path": str(path)})
    else:
        output.say(
            f"key {key.key_id} is in {path}. Set backup_key_file to it, and keep a copy where neither this machine nor the backups "
            "are: without it nobody can read them."
        )


@backups_app.command("rotate-key")
def backups_rotate_key(
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The file of the new key: modelkeep backups new-key.")],
    as_json: Json = False,
) -> None:
    """Let another key open the backups, and no longer the one of the settings. No data is written again."""
    from registry import actor
    from tasks.backup import keyring
    from tasks.backup.repository import open_repository

    with acting() as settings:
        actor.current()
        if settings.backup_key_file is None:
            raise RefusedError("backup_key_file is not set: the backups are not encrypted by a key of these settings")
        before = keyring.read_key(settings.backup_key_file)
        after = keyring.read_key(new.expanduser().absolute())
        keyring.rotate(open_repository(settings).all_places(), before, after)
    found = {"from": before.key_id, "to": after.key_id, "at": clock.text(clock.now())}
    if as_json:
        output.document(found)
    else:
        output.say(f"key {after.key_id} opens the backups now, {before.key_id} no longer: set backup_key_file to {new}")
