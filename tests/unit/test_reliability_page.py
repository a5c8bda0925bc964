"""docs/RELIABILITY.md: the table of faults names only tests that there are, and misses none of the faults that were asked for."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = (
    "segfaults", "exhausts the memory", "bad input inside a batch", "SIGKILL of the flow", "SIGKILL of Prefect's worker",
    "SIGKILL of Prefect's server", "SIGKILL of the inference server", "SIGKILL of the database", "gone for 5 min",
    "moment of the commit", "Two flows", "SIGSTOP", "Clock jumps", "never reaches the generation", "Disk full", "corrupted on disk",
    "restored from yesterday", "store unreachable", "hypothesis", "raises, answers NaN, answers another shape", "segfaults while it is loaded",
    "hangs", "exceeded by a burst", "fuzzer", "Slowloris", "idle connections", "stop reading", "Half-closed", "Redis killed", "Redis Cluster",
    "damaged last state", "soak",
)  # fmt: skip


def rows(text: str) -> list[tuple[str, str, list[str]]]:
    """(fault, what happens, tests) of the section Faults."""
    section = re.search(r"^## Faults\n(.*?)^#+ ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    found = []
    for line in section.group(1).splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells[0] != "fault" and set(cells[0]) != {"-"}:
            assert len(cells) == 3, f"not three cells: {line}"
            found.append((cells[0], cells[1], re.findall(r"`(tests/[^`]+)`", cells[2])))
    return found


def is_there(name: str) -> bool:
    """Whether `tests/...py::test_name` is a test function of that file."""
    path, _, function = name.partition("::")
    if not function.startswith("test_") or not (ROOT / path).is_file():
        return False
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


@pytest.fixture(scope="module")
def table() -> list[tuple[str, str, list[str]]]:
    return rows((ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8"))


def test_every_test_that_the_table_of_faults_names_exists(table: list[tuple[str, str, list[str]]]) -> None:
    assert [name for _, _, tests in table for name in tests if not is_there(name)] == []


def test_every_fault_says_what_happens_and_has_a_test(table: list[tuple[str, str, list[str]]]) -> None:
    assert [fault for fault, happens, tests in table if not happens or not tests] == []


def test_no_fault_is_missing(table: list[tuple[str, str, list[str]]]) -> None:
    assert [fault for fault in FAULTS if not any(fault in row[0] for row in table)] == []


@pytest.mark.parametrize(
    "name",
    [
        "tests/unit/test_reliability_page.py::test_that_is_not_there",
        "tests/unit/test_reliability_page.py::is_there",
        "tests/unit/test_reliability_page.py",
        "tests/unit/no_such_file.py::test_every_fault_says_what_happens_and_has_a_test",
    ],
)
def test_a_name_without_a_test_is_found(name: str) -> None:
    assert not is_there(name)
