"""Where the tables of a benchmark go: between its marks of the page, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks._tell import put_into

PAGE = Path(__file__).resolve().parents[3] / "docs/PERFORMANCE.md"
BEGIN, END = "<!-- bench-one: begin -->", "<!-- bench-one: end -->"


def test_tables_go_between_the_marks_and_the_rest_of_the_page_stays() -> None:
    page = f"# Before\n{BEGIN}\nold\n{END}\nafter\n"
    once = put_into(page, "new\n", name="bench-one")
    assert once == f"# Before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert put_into(once, "new\n", name="bench-one") == once
    for wrong in ("no marks", page + page, f"{END}\n{BEGIN}"):
        with pytest.raises(ValueError, match="once each"):
            put_into(wrong, "new", name="bench-one")


@pytest.mark.parametrize("name", ["bench-serving", "bench-backup"])
def test_the_page_has_the_marks_of_each(name: str) -> None:
    assert "| new |" in put_into(PAGE.read_text(encoding="utf-8"), "| new |", name=name)
