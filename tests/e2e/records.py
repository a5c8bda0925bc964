"""A row of a long test's figures in docs/RELIABILITY.md, where MODELKEEP_TEST_RECORD=1 asks for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from tests.e2e.harness import ROOT


def record(table: str, figures: Sequence[Any]) -> None:
    """Add date, commit and `figures` to the table whose heading begins with `table`."""
    if os.environ.get("MODELKEEP_TEST_RECORD") != "1":
        return
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    )
    cells = [datetime.now(UTC).strftime("%Y-%m-%d"), commit.stdout.strip(), *(str(figure) for figure in figures)]
    path = ROOT / "docs" / "RELIABILITY.md"
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if line.startswith(table))
    while end < len(lines) and lines[end].startswith("| "):
        end += 1
    lines.insert(end, "| " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")
