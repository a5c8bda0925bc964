"""Whether the tests of faults can fail: a copy of the tree, one defence taken out of it, and the test that is about it must fail.

`python -m tests.defences` does that for ten drawn at random (`--seed`, `--number`), `--all` for every one, `--test NAME` for one, and
prints a table. Exit code 1: a test passed without its defence, or fails with it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.backup_faults import FAULTS, ROOT
from tests.defence_list import DEFENCES, Defence

SEED, NUMBER = 2026, 10
TEST_SECONDS = 300
HANGS_SECONDS = 60
"""A test that does not end without its defence is given up after so long."""
ALL_SECONDS = 3600.0
MODULES = ("registry", "tasks.backup.run", "tests.backup_faults", "modelkeep", "serving")
SHOWN = 150

Place = tuple[str, str]
"""(component, step) of tests/backup_faults.py."""

_FAILED = re.compile(r"^FAILED (\S+?::\w+)")
_SAID = re.compile(r"^E {2,}(\S.*)$", re.MULTILINE)
_CHAINED = re.compile(r"the direct cause of the following exception:|During handling of the above exception")
_PATHS = re.compile(r"(?:/[\w.+-]+){2,}/")


@dataclass(frozen=True)
class Shown:
    """What came of one test. `failed`: what it said without its defence; None where it passed, which is a finding."""

    place: Place
    defence: Defence
    failed: str | None
    problem: str | None = None
    """Why it shows nothing: it fails with its defence too, or it was not run to its end."""

    @property
    def good(self) -> bool:
        return self.failed is not None and self.problem is None

    @property
    def row(self) -> str:
        said = self.problem or self.failed or "**nothing: it passed**"
        cells = (" × ".join(self.place), f"`{self.defence.test.rpartition('/')[2]}`", self.defence.what, _cell(said))
        return f"| {' | '.join(cells)} |"


def every() -> list[tuple[Place, str]]:
    return [(place, test) for place, tests in FAULTS.items() for test in tests]


def draw(seed: int, number: int = NUMBER) -> list[tuple[Place, str]]:
    """So many of the tests of faults, the same for the same seed."""
    return random.Random(seed).sample(every(), number)


def defence_of(test: str) -> Defence:
    """Raises KeyError."""
    return {one.test: one for one in DEFENCES}[test]


class Copy:
    """The tree as git knows it (with what is changed and new in it), at another place, to be damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        for name in map(os.fsdecode, filter(None, listed.split(b"\0"))):
            if (source := ROOT / name).is_file():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
        # No bytecode is written: a file that is changed twice in a second with the same size would be taken for the one before.
        self.environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        code = f"import {', '.join(MODULES)}\nfor one in ({', '.join(MODULES)}): print(one.__file__)"
        said = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=self.environment, capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        if strangers := [one for one in said.stdout.splitlines() if not Path(one).is_relative_to(folder)]:
            raise RuntimeError(f"the copy in {folder} would test another tree: {strangers}")

    @contextlib.contextmanager
    def without(self, defence: Defence) -> Iterator[None]:
        """Raises ValueError where the text of a change does not stand in its file exactly once."""
        before: dict[Path, str] = {}
        try:
            for module, code, without in defence.changes:
                path = self.folder / module
                text = path.read_text(encoding="utf-8")
                if text.count(code) != 1:
                    raise ValueError(f"{code!r} stands {text.count(code)} times in {module}")
                before.setdefault(path, text)
                path.write_text(text.replace(code, without), encoding="utf-8")
            yield
        finally:
            for path, text in before.items():
                path.write_text(text, encoding="utf-8")

    def pytest(self, test: str, *, seconds: int = TEST_SECONDS) -> subprocess.CompletedProcess[str]:
        """The test function with all its parameters, up to the first that fails. Raises subprocess.TimeoutExpired."""
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-m",
            "",
            "-p",
            "no:cacheprovider",
            "--tb=short",
            "-q",
            "-rfEs",
        ]
        return subprocess.run(
            [*command, f"--timeout={seconds}", test],
            cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=ALL_SECONDS, check=False,
        )  # fmt: skip


@contextlib.contextmanager
def copied() -> Iterator[Copy]:
    with tempfile.TemporaryDirectory(prefix="mk-defences-", ignore_cleanup_errors=True) as folder:
        yield Copy(Path(folder).resolve())


def show(copy: Copy, place: Place, defence: Defence, *, unchanged: bool = True) -> Shown:
    """Run the test with its defence (where asked) and without it."""
    try:
        if unchanged:
            whole = copy.pytest(defence.test)
            if whole.returncode != 0 or not re.search(r"\b\d+ passed", whole.stdout):
                return Shown(place, defence, None, f"it does not pass with its defence: {said(whole.stdout)}")
        with copy.without(defence):
            found = copy.pytest(defence.test, seconds=HANGS_SECONDS if defence.hangs else TEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        return Shown(place, defence, None, f"it was not over after {error.timeout:.0f} s")
    if found.returncode == 0:
        skipped = not re.search(r"\b\d+ passed", found.stdout)
        return Shown(place, defence, None, "it was skipped" if skipped else None)
    if found.returncode != 1 or defence.test not in failures(found.stdout):
        return Shown(place, defence, None, f"pytest ended with {found.returncode}: {said(found.stdout + found.stderr)}")
    return Shown(place, defence, said(found.stdout))


def failures(output: str) -> set[str]:
    """The test functions that pytest's summary names as failed. One whose servers did not come up shows nothing."""
    return {match[1] for line in output.splitlines() if (match := _FAILED.match(line))}


def said(output: str) -> str:
    """The first line of the last error, without the folders of paths: the ones before are what it was raised from."""
    lines = _SAID.findall(_CHAINED.split(output)[-1])
    text = lines[0] if lines else (output.strip().splitlines() or ["nothing was printed"])[-1]
    return _PATHS.sub("…/", " ".join(text.split()))


def _cell(text: str) -> str:
    short = text if len(text) <= SHOWN else text[:SHOWN] + "…"
    return short if short.startswith("**") else f"`{short.replace('`', chr(39)).replace('|', '¦')}`"


def table(found: Sequence[Shown]) -> str:
    """Markdown."""
    head = ("fault", "test", "defence that was taken out", "what failed")
    return "\n".join([f"| {' | '.join(head)} |", "| --- | --- | --- | --- |", *(one.row for one in found)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.defences", description=__doc__)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--number", type=int, default=NUMBER)
    parser.add_argument("--all", action="store_true", help="every test of faults")
    parser.add_argument("--test", action="append", default=[], help="those whose name ends so")
    parser.add_argument("--changed-only", action="store_true", help="do not run the tests unchanged first")
    asked = parser.parse_args(arguments)
    chosen = every() if asked.all or asked.test else draw(asked.seed, asked.number)
    if asked.test:
        chosen = [one for one in chosen if one[1].endswith(tuple(asked.test))]
        if not chosen:
            parser.error(f"no test of faults ends with {' or '.join(asked.test)}")
    found = []
    with copied() as copy:
        for place, test in chosen:
            found.append(show(copy, place, defence_of(test), unchanged=not asked.changed_only))
            word = "fails without its defence" if found[-1].good else "IS NOT SHOWN"
            print(f"{len(found)}/{len(chosen)} {test} {word}", file=sys.stderr)
            print(f"    {found[-1].problem or found[-1].failed or 'it passed'}", file=sys.stderr, flush=True)
    print(table(found))
    bad = [one for one in found if not one.good]
    print(f"\n{len(found) - len(bad)} of {len(found)} tests fail without their defence.")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
