"""What the large benchmarks share: what they say while they run, where and of what the figures are, and where these go."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def say(what: str) -> Iterator[None]:
    """Tell how long it took, on standard error."""
    began = time.monotonic()
    yield
    print(f"{time.strftime('%H:%M:%S')} {what}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}"


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="where the document goes; absent: standard output")
    parser.add_argument("--markdown", type=Path, help="where the tables go; absent: standard error")
    parser.add_argument("--into", type=Path, help="put the tables into this page too, between its marks")


def put_out(options: argparse.Namespace, document: dict[str, Any], tables: str, *, name: str) -> None:
    """To where the options want it. `name`: the benchmark's, as in the marks of the page."""
    text = json.dumps(document, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    else:
        print(text)
    if options.markdown:
        options.markdown.write_text(tables)
    if options.into:
        options.into.write_text(put_into(options.into.read_text(), tables, name=name))
    print(tables, file=sys.stderr)


def put_into(page: str, tables: str, *, name: str) -> str:
    """A page with the tables between its two marks. Raises ValueError where it has them not, once each and in this order."""
    begins, ends = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = page.partition(begins)
    _, end, after = rest.partition(ends)
    if not begin or not end or begins in after or ends in after:
        raise ValueError(f"the page must have {begins} and then {ends}, once each")
    return f"{before}{begins}\n{tables.strip()}\n{ends}{after}"
