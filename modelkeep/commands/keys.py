"""`keys`: who may ask the servers what, and in whose name people act."""

from __future__ import annotations

import datetime as dt
import re
import time
from typing import TYPE_CHECKING, Annotated

import typer

from modelkeep import output
from modelkeep.commands.common import Context, Json, Reason, opened
from registry import clock
from registry.errors import UsageError

if TYPE_CHECKING:
    from tasks.servers import Access

keys_app = typer.Typer(help="API keys: create, list, revoke. Servers follow without a restart.", no_args_is_help=True)

_SPAN = re.compile(r"(\d+)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_FOLLOW_SECONDS = 5.0
"""How long a server has to follow before it counts as one that says nothing."""
_AGAIN_SECONDS = 0.1


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose key it is; it goes on record with all that he does.")],
    role: Annotated[str, typer.Option("--role", help="view, infer or operate; each may do what those before it may.")],
    expires: Annotated[str | None, typer.Option("--expires", help="As in 90d, 12h, 30m. Default: never.")] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Inference requests, as in 600/minute, or none. Default: security.rate_limit."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a key, and print it: once."""
    from registry import keys
    from tasks import servers

    seconds = None if expires is None else span_seconds(expires)
    with opened() as context:
        who = keys.of_command(context.database, context.settings)
        before = servers.access(context.database)
        made, text = keys.create(context.database, name=name, role=role, who=who, expires_in_seconds=seconds, rate=rate)
        if not as_json:
            output.say(text)  # now, whatever comes: it is kept nowhere else
        try:
            told = _tell(context, before)
        except BaseException:
            if as_json:
                output.document({**made.as_dict(), "key": text})
            raise
    if as_json:
        output.document({**made.as_dict(), "key": text, **told})
        return
    until = "" if made.expires_at is None else f", until {clock.text(made.expires_at)[:19]}Z"
    limited = "" if made.rate is None else f", rate {made.rate}"
    output.say(
        f"key {made.id} of {made.name}, role {made.role}{limited}{until}. Keep it now: nobody can show it again. {_heard(told)}",
        to_stderr=True,
    )


@keys_app.command("list")
def keys_list(as_json: Json = False) -> None:
    """Every key, without its secret."""
    from registry import keys

    with opened() as context, context.database.read() as session:
        rows = [found.as_dict() for found in keys.listed(session)]
    if as_json:
        output.document(rows)
        return
    output.table(
        ["id", "name", "role", "rate", "state", "created", "by", "expires", "revoked by"],
        [
            [r["id"], r["name"], r["role"], r["rate"] or "", r["state"], r["created_at"][:19], r["created_by"],
             (r["expires_at"] or "never")[:19], r["revoked_by"]]
            for r in rows
        ],
        empty="no keys yet; make one: modelkeep keys create NAME --role view",
    )  # fmt: skip


@keys_app.command("revoke")
def keys_revoke(
    identity: Annotated[str, typer.Argument(metavar="ID", help="Its id, or its name.")],
    reason: Reason = None,
    as_json: Json = False,
) -> None:
    """End a key. Exit 3 where a server did not say within 5 s that it refuses it from now on."""
    from registry import keys
    from tasks import servers

    with opened() as context:
        who = keys.of_command(context.database, context.settings)
        before = servers.access(context.database)
        ended = keys.revoke(context.database, identity, who=who, reason=reason or "")
        told = _tell(context, before)
    if as_json:
        output.document({**ended.as_dict(), **told})
    else:
        output.say(f"key {ended.id} of {ended.name} is revoked (by {ended.revoked_by}). {_heard(told)}")
    raise typer.Exit(3 if told["silent"] else 0)


def span_seconds(text: str) -> float:
    """Seconds of a span of time like 90d. Raises UsageError."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise UsageError(f"{text!r} is no span of time: a number and s, m, h, d or w, as in 90d")
    return float(int(found[1]) * _SECONDS[found[2]])


def _tell(context: Context, before: Access) -> dict[str, list[str]]:
    """Have the servers look now. Which of those that reported within the last day know the keys as they are, and which did not say so.

    `before`: what they took before the change, which may have been of the very key that they take from us.
    """
    from registry import keys, replicas
    from tasks import servers

    with context.database.read() as session:
        wanted, rows = keys.counter(session), replicas.listed(session)
    yesterday = clock.text(clock.now() - dt.timedelta(days=1))
    rows = [row for row in rows if row["reported_at"] > yesterday]
    servers.nudge([row["address"] for row in rows], access=before)
    told: dict[str, list[str]] = {"follow": [], "silent": []}
    deadline = time.monotonic() + _FOLLOW_SECONDS
    while rows:
        # Read each time: where the internal key was revoked, the servers agree on another, and take only that one.
        shown, silent = servers.access(context.database), []
        for row in rows:
            info = servers.model_info(row["address"], access=shown, timeout_seconds=1.0)
            there = info is not None and info.get("replica") == row["id"] and (info.get("keys") or 0) >= wanted
            if there:
                told["follow"].append(row["id"])
            else:
                silent.append(row)
        rows = silent
        if time.monotonic() >= deadline:
            told["silent"] = [row["id"] for row in rows]
            break
        if rows:
            time.sleep(_AGAIN_SECONDS)
    return told


def _heard(told: dict[str, list[str]]) -> str:
    text = f"{len(told['follow'])} server(s) know it"
    if told["silent"]:
        text += f"; no word from {', '.join(told['silent'])}: they follow at their next poll, or when they reach the registry"
    return text
