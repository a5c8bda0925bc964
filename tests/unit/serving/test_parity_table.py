"""The page that lists the differences from Triton is the list that the parity test goes by."""

from __future__ import annotations

from pathlib import Path

from tests.integration.serving.parity.listed import table

PAGE = Path(__file__).resolve().parents[3] / "docs" / "API.md"


def test_the_page_has_every_difference_and_no_other() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## Differences from Triton\n")[2]
    assert [line for line in section.splitlines() if line.startswith("|")] == table()
