"""The faults of backups are many, each another one, and docs/RELIABILITY.md tells of no more than there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import backup_faults

ROOT = Path(__file__).resolve().parents[2]
LEAST = 200


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str, str], list[str]]:
    return backup_faults.cases(backup_faults.collected())


def test_at_least_two_hundred_faults_are_injected_each_another_one(
    found: dict[tuple[str, str, str], list[str]],
) -> None:
    every = [(*place, fault) for place, faults in found.items() for fault in faults]
    assert len(set(every)) == len(every) >= LEAST


def test_every_test_of_the_list_exists(found: dict[tuple[str, str, str], list[str]]) -> None:
    there = {name for _, _, name in found}
    assert [name for names in backup_faults.FAULTS.values() for name in names if name not in there] == []


def test_the_page_tells_of_no_more_faults_than_there_are(found: dict[tuple[str, str, str], list[str]]) -> None:
    page = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    section = page.partition("## Faults of backups\n")[2].partition("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    steps = rows[0][1:-1]
    there = backup_faults.counts(found)
    assert {row[0] for row in rows[2:]} == {component for component, _ in there}, "python -m tests.backup_faults"
    together = 0
    for component, *cells, last in rows[2:]:
        told = {step: int(cell) for step, cell in zip(steps, cells, strict=True) if cell}
        assert sum(told.values()) == int(last)
        too_many = {step: number for step, number in told.items() if number > there.get((component, step), 0)}
        assert not too_many, f"{component}: {too_many}: python -m tests.backup_faults prints the table"
        together += int(last)
    written = re.search(r"^([\d,]+) faults\b", section, re.MULTILINE)
    assert written is not None and int(written[1].replace(",", "")) == together
