"""The plan of a recovery says the same in Prefect's UI as on the command line."""

from __future__ import annotations

import datetime as dt

import pytest

from modelkeep.commands import recover as command
from tasks.backup import recovery
from tasks.backup.manifest import COMPLETE, Component, Manifest
from tasks.backup.point import Point
from tasks.backup.recover import Plan, Step
from tasks.backup.selection import Chosen
from tasks.backup.states import Standing

AT = "2026-11-21T02:00:00.000000Z"
MOMENT = "2026-11-21T14:03:07.000000Z"


def plan(*, point: bool = True, missing: tuple[str, ...] = (), warnings: tuple[str, ...] = ()) -> Plan:
    component = Component("database:app", "mariadb", COMPLETE, AT, AT)
    way = Point("database:app", dt.datetime.fromisoformat(MOMENT), MOMENT, {}, ()) if point else None
    step = Step(Chosen(component), None, None, "/srv/app", None, point=way)
    manifest = Manifest("20261121T020000Z-0a1b2c", "0" * 64, COMPLETE, AT, AT, ("all",), (component,))
    standing = Standing("verified", None, frozenset(), None, None, False, None, False, None)
    return Plan(manifest, standing, (step,), missing, ("it is not empty",), warnings, MOMENT)


def test_that_shipped_logs_are_applied_is_said_in_both_places(capsys: pytest.CaptureFixture[str]) -> None:
    one = plan(missing=("queues",), warnings=("never restored",))
    assert one.remarks == [
        f"database:app: then the shipped logs are applied: no log, up to {MOMENT}",
        "missing: queues failed when the backup was taken",
        "warning: never restored",
    ]
    command._show_plan(one)
    said = capsys.readouterr()
    shown = recovery.shown_plan(one).splitlines()
    for text in one.remarks:
        assert text in said.out.splitlines() and f"- {text}" in shown
    assert "modelkeep: it is not empty" in said.err and shown[-1] == "- **in the way**: it is not empty"


def test_the_table_ends_before_what_is_said_below_it() -> None:
    lines = recovery.shown_plan(plan(point=False)).splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("|"))
    assert lines[last + 1 :] == ["", "- **in the way**: it is not empty"]
