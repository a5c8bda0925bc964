"""Every section of docs/RUNBOOKS.md that shows commands is run by a test, which names it in its `SECTIONS` (or `SECTION`)."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests import printed

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = ROOT / "docs/RUNBOOKS.md"
NOT_RUN: dict[str, str] = {}
"""Sections that nothing runs, with the reason."""


def with_commands(page: str) -> list[str]:
    """The titles of the sections (`## `) that have a block, of whatever kind."""
    sections = re.split(r"^## ", page, flags=re.MULTILINE)[1:]
    return [one.splitlines()[0] for one in sections if re.search(r"^```", one, flags=re.MULTILINE)]


def sections(module: ModuleType) -> tuple[str, ...]:
    """The sections that a test module runs."""
    return tuple(module.SECTIONS) if hasattr(module, "SECTIONS") else (str(module.SECTION),)


@pytest.fixture(scope="module")
def runners() -> list[ModuleType]:
    """The test modules that read commands from the page."""
    paths = [
        path
        for path in (ROOT / "tests/e2e").glob("test_*.py")
        if "docs/RUNBOOKS.md" in path.read_text(encoding="utf-8")
    ]
    return [importlib.import_module(f"tests.e2e.{path.stem}") for path in sorted(paths)]


def test_every_section_with_commands_is_run_by_one_test(runners: list[ModuleType]) -> None:
    named = [section for module in runners for section in sections(module)]
    assert len(named) == len(set(named)), "a section is run by two tests"
    assert sorted(named) == sorted(set(with_commands(RUNBOOKS.read_text(encoding="utf-8"))) - set(NOT_RUN))


def test_every_command_of_the_page_is_in_the_part_of_one_test(runners: list[ModuleType]) -> None:
    parts = [module.page() if hasattr(module, "page") else module.runbook() for module in runners]
    run = [(call.section, call.command) for part in parts for call in printed.calls(part)]
    on_the_page = [(call.section, call.command) for call in printed.calls(RUNBOOKS.read_text(encoding="utf-8"))]
    assert sorted(run) == sorted(on_the_page) and len(on_the_page) > 60


@pytest.mark.parametrize("kind", ["", "bash", "console", "sql"])
def test_a_section_with_a_block_of_any_kind_is_seen(kind: str) -> None:
    page = f"# Page\n\n## Prose\n\nText.\n\n## Commands\n\n### Below\n\n```{kind}\nmodelkeep status\n```\n\n## More prose\n"
    assert with_commands(page) == ["Commands"]
