"""docs/SYSTEMS.md: every requirement once, in a legal state, and what counts as built names files that exist."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STATES = ("open", "part", "done")
HEADER = ("ID", "what", "state", "where")
# How many requirements each of the documents has; none may get lost.
COUNTS = {"S0": 59, "S1": 91, "S2": 134, "S3": 75, "X": 10}


@dataclass(frozen=True)
class Row:
    """One requirement of the table."""

    id: str
    what: str
    state: str
    where: str


def parse(text: str) -> list[Row]:
    """The rows of all tables of a Markdown text; a line that is no row of four cells is an error."""
    rows = []
    for line in text.splitlines():
        if not line.startswith("|"):
            continue
        cells = tuple(cell.strip() for cell in line.strip().strip("|").split("|"))
        if cells == HEADER or set("".join(cells)) == {"-"}:
            continue
        assert len(cells) == 4, f"not four cells: {line}"
        rows.append(Row(*cells))
    return rows


def faults(row: Row) -> list[str]:
    """What is wrong with one row, in words."""
    found = []
    if not re.fullmatch(r"S[0-3]-\d{3}|X-\d{2}", row.id):
        found.append(f"{row.id}: not an ID")
    if not row.what:
        found.append(f"{row.id}: does not say what")
    if row.state not in STATES:
        found.append(f"{row.id}: state {row.state!r} is none of {', '.join(STATES)}")
    if row.state in ("part", "done"):
        files = re.findall(r"`([^`]+)`", row.where)
        if not files:
            found.append(f"{row.id}: {row.state}, but names no file")
        found.extend(
            f"{row.id}: no such file: {file}" for file in files if not (ROOT / file.partition("::")[0]).exists()
        )
        if row.state == "done" and not any(file.startswith("tests/") for file in files):
            found.append(f"{row.id}: done, but names no test")
    elif not re.fullmatch(r"issue \d+(, \d+)*|later", row.where):
        found.append(f"{row.id}: open, so it names its issue or 'later', not {row.where!r}")
    return found


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return parse((ROOT / "docs" / "SYSTEMS.md").read_text(encoding="utf-8"))


def test_every_row_is_legal_and_what_counts_as_built_exists(rows: list[Row]) -> None:
    assert [fault for row in rows for fault in faults(row)] == []


def test_no_requirement_is_there_twice(rows: list[Row]) -> None:
    ids = [row.id for row in rows]
    assert sorted({one for one in ids if ids.count(one) > 1}) == []


def test_no_requirement_got_lost(rows: list[Row]) -> None:
    counts = {document: sum(row.id.startswith(f"{document}-") for row in rows) for document in COUNTS}
    assert counts == COUNTS


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row("S0-1", "what", "open", "later"), "not an ID"),
        (Row("S0-001", "", "open", "later"), "does not say what"),
        (Row("S0-001", "what", "almost", "later"), "none of"),
        (Row("S0-001", "what", "open", "soon"), "names its issue"),
        (Row("S0-001", "what", "part", "issue 3"), "names no file"),
        (Row("S0-001", "what", "part", "`no/such/file.py`"), "no such file"),
        (Row("S0-001", "what", "done", "`pyproject.toml`"), "names no test"),
    ],
)
def test_a_faulty_row_is_found(row: Row, fault: str) -> None:
    found = faults(row)
    assert len(found) == 1
    assert fault in found[0]


def test_a_done_row_may_name_one_test_of_a_file() -> None:
    assert (
        faults(Row("X-07", "ports", "done", "`pyproject.toml`, `tests/unit/test_systems_table.py::test_ports`")) == []
    )
