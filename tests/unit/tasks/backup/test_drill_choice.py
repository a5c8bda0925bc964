"""Which backup a drill is held with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tasks.backup.drill import chosen
from tasks.backup.manifest import COMPLETE

DAILY, FULL = ("registry", "models"), ("registry", "models", "vectors")


def backup(sequence: int, began: str, requested: str, parts: tuple[str, ...], state: str = COMPLETE) -> Any:
    components = tuple(SimpleNamespace(name=name, state=state) for name in parts)
    return SimpleNamespace(
        sequence=sequence,
        backup_id=f"b{sequence}",
        began_at=f"2026-11-{began}:00+00:00",
        requested=(requested,),
        components=components,
    )


@pytest.mark.parametrize(
    ("manifests", "want"),
    [
        ([backup(1, "22T01:00", "all", FULL), backup(2, "22T02:00", "daily", DAILY)], "b1"),
        ([backup(1, "15T01:00", "all", FULL), backup(2, "18T02:00", "daily", DAILY)], "b2"),
        ([backup(1, "22T01:00", "all", FULL), backup(2, "22T03:00", "all", FULL)], "b2"),
        ([backup(1, "21T02:00", "daily", DAILY), backup(2, "22T02:00", "daily", DAILY)], "b2"),
        ([backup(1, "22T01:00", "all", FULL, "failed"), backup(2, "22T02:00", "daily", DAILY)], "b2"),
        ([backup(1, "22T01:00", "all", FULL), backup(2, "22T04:00", "vectors", ("vectors",))], "b1"),
        ([backup(1, "22T01:00", "vectors", ("vectors",)), backup(2, "22T02:00", "vectors", ("vectors",))], "b2"),
    ],
    ids=["as scheduled", "midweek", "two full", "daily ones", "failed", "a part", "nothing whole"],
)
def test_the_newest_is_taken_and_one_of_everything_of_the_same_day_before_it(manifests: list[Any], want: str) -> None:
    assert chosen(manifests).backup_id == want
    assert chosen(manifests[::-1]).backup_id == want
