"""What the commands print: tables for people, one JSON document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

_WIDEST = 10_000


def document(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def say(text: str, *, to_stderr: bool = False) -> None:
    print(text, file=sys.stderr if to_stderr else sys.stdout, flush=True)


def problem(text: str) -> None:
    print(f"modelkeep: {text}", file=sys.stderr, flush=True)


def usage_error(error: Exception) -> int | None:
    """The exit code of an error that Click raised, printed its way; None for any other."""
    import click

    # typer brings its own copy of click's exceptions in some releases: go by what they can do
    if isinstance(error, click.ClickException) or (hasattr(error, "exit_code") and hasattr(error, "show")):
        error.show()
        return int(error.exit_code)
    if type(error).__name__ == "Abort":
        problem("aborted")
        return 1
    return None


def size(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        say(empty)
        return
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        drawn.add_column(header, overflow="fold")
    for row in rows:
        drawn.add_row(*("" if cell is None else str(cell) for cell in row))
    # In a log or a pipe a row is a line: nobody's terminal says how wide, and grep finds it whole.
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDEST).print(drawn)


def promotions(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        document(rows)
        return
    table(
        ["id", "model", "version", "state", "step", "by", "begun", "why"],
        [
            [r["id"], r["model"], r["version"], r["state"], r["step"], r["actor"], r["created_at"][:19], r["reason"]]
            for r in rows
        ],
        empty="no promotions yet; start one: modelkeep promote NAME VERSION",
    )


def promotion(row: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    say(
        f"{row['model']} {row['version']} in {row['environment']}: {row['state']}"
        + (f" ({row['reason']})" if row["reason"] else "")
    )
    table(
        ["when", "step", "what", "why"],
        [[step["at"][11:19], step["step"], step["title"], step["detail"]] for step in steps],
        empty="nothing is on record yet",
    )
    say(f"promotion {row['id']}")


def account(found: dict[str, Any]) -> None:
    """What goes with the story of a promotion: what it waits for, its evidence, how long it took."""
    if found["evidence"]:
        say("")
        table(
            ["stream", "candidate", "stable", "evidence", "of"],
            [
                [
                    item["stream"],
                    f"{item['candidate']['bad']}/{item['candidate']['requests']}",
                    f"{item['stable']['bad']}/{item['stable']['requests']}",
                    f"{item['e_value']:.3g}",
                    f"{item['threshold']:g}",
                ]
                for item in found["evidence"]
            ],
            empty="",
        )
    took = [
        f"{name} {found[key]:.1f} s"
        for name, key in (("validation", "validation_seconds"), ("swap", "swap_seconds"), ("watch", "watch_seconds"))
        if found[key] is not None
    ]
    if took:
        say(f"took: {', '.join(took)}")
    if found["waits_for"]:
        say(f"waits for {found['waits_for']}")


def events(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        document(rows)
        return
    table(
        ["seq", "when", "actor", "action", "subject", "reason"],
        [[e["seq"], e["at"][:19], e["actor"], e["action"], e["subject"], e["reason"][:100]] for e in rows],
        empty="the audit trail has no such event",
    )


def status(found: dict[str, Any]) -> None:
    say(f"environment {found['environment']}, generation {found['generation']}")
    table(
        ["model", "stable", "candidate", "share"],
        [
            [
                m["model"],
                m["stable"],
                m["candidate"],
                "shadow" if m["shadow"] else f"{m['weight']:.0%}" if m["candidate"] else None,
            ]
            for m in found["models"]
        ],
        empty="no model is served yet; promote one: modelkeep promote NAME VERSION",
    )
    say("")
    table(
        ["server", "address", "generation", "answers", "errors"],
        [
            [
                s["id"],
                s["address"],
                s["generation"],
                "yes" if s["answers"] else "no",
                "; ".join(f"{k}: {v}" for k, v in s["errors"].items()),
            ]
            for s in found["servers"]
        ],
        empty="no server has reported yet; start one: modelkeep serve",
    )
    for running in found["promotions_running"]:
        say(
            f"\npromotion {running['id']}: {running['model']} {running['version']}, step {running['step']}, by {running['actor']}"
        )

    say("")
    backups(found["backups"])


def backups(found: dict[str, Any] | None) -> None:
    """What `status` says of them: by component the age of the newest one, and of the newest that was verified."""
    from tasks.backup.progress import duration

    if found is None:
        say("no backup was ever taken from here; take one: modelkeep backup")
        return

    def age(seconds: float | None) -> str:
        return "never" if seconds is None else f"{duration(seconds)} ago"

    table(
        ["backup of", "taken", "verified one of", "size"],
        [
            [name, age(row["age_seconds"]), age(row["verified_age_seconds"]), size(row["size_bytes"] or 0)]
            for name, row in found["components"].items()
        ],
        empty="no component was ever backed up",
    )
    last = found["last"]
    if last is None:
        say("no backup was ever taken from here; take one: modelkeep backup")
    else:
        say(f"the last backup, {last['backup_id']}, is {last['state']}")
    for name, why in {**((last or {}).get("errors") or {}), **found["damaged"]}.items():
        say(f"  {name or 'backup'}: {why}")
    for name, row in found["logs"].items():
        _logs(name, row)


def _logs(name: str, row: dict[str, Any]) -> None:
    from tasks.backup.progress import duration

    if row["covers_until"] is None:
        say(f"logs of {name}: none was shipped yet; the deployment ship-logs does it, or modelkeep backups ship-logs")
    else:
        say(f"logs of {name}: shipped up to {row['covers_until']}, {duration(row['age_seconds'])} ago")
        if row["late"]:
            say(
                "  that is more than three runs ago: look at the deployment ship-logs, or run modelkeep backups ship-logs"
            )
    if row["failed"]:
        say(f"  not shipped: {row['failed']}")
    if row["gap"]:
        say(f"  {row['gap']}")
    if row["lost"]:
        lost = row["lost"]
        say(f"  between {lost['from']} and {lost['until']} it cannot be brought back to a moment: {lost['why']}")


def findings(rows: Sequence[Any]) -> None:
    table(["", "what", "finding"], [[row.level, row.what, row.text] for row in rows], empty="nothing to report")
