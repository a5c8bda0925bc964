"""scripts/read_backup.py: sixty lines that bring a component back where modelkeep is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tests.backup_content import FIRST, NAME, back_up, content, keyed

READER = Path(__file__).resolve().parents[3] / "scripts" / "read_backup.py"


def read(*arguments: object, key_file: Path | None = None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """-I: neither the working directory nor PYTHONPATH counts, so that no module of ours can be found."""
    environment = {"PATH": os.environ["PATH"]} | ({} if key_file is None else {"KEY_FILE": str(key_file)})
    refusing = (
        "import sys, runpy\n"
        "for room in ('registry', 'tasks', 'modelkeep', 'serving'): sys.modules[room] = None\n"
        f"sys.argv = {[str(READER), *map(str, arguments)]!r}\n"
        f"runpy.run_path({str(READER)!r}, run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-c", refusing], env=environment, cwd=cwd, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_the_reader_lists_and_restores_and_refuses_what_was_changed(encrypted: bool, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    place = DirectoryPlace(folder)
    keyring = keyed([place], tmp_path)[1] if encrypted else None
    key_file = tmp_path / "backup.key" if encrypted else None
    files = {**content(), "folder/large": os.urandom(1000) + bytes(17 << 20), "b\udcffd": b"no UTF-8"}
    back_up(Repository([place], keyring), FIRST, files)
    manifest = folder / f"{FIRST}.manifest.json"

    done = read(manifest, key_file=key_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:4] == [NAME, "files", "complete", str(len(files))]
    done = read(manifest, NAME, key_file=key_file, cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(files)
    done = read(manifest, NAME, tmp_path / "out", key_file=key_file, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data

    text = manifest.read_text()
    manifest.write_text(text.replace('"entries": 6', '"entries": 7'))
    done = read(manifest, key_file=key_file, cwd=tmp_path)
    assert done.returncode == 1 and "was edited" in done.stderr
    manifest.write_text(text)
    for path in (folder / "objects").rglob("*/*"):
        path.chmod(0o644)
        path.write_bytes(bytes(path.stat().st_size))
    done = read(manifest, NAME, tmp_path / "again", key_file=key_file, cwd=tmp_path)
    assert done.returncode != 0


def test_the_reader_has_sixty_lines_and_names_nothing_of_ours() -> None:
    text = READER.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    imported = {
        line.split()[1].partition(".")[0] for line in text.splitlines() if line.strip().startswith(("import ", "from "))
    }
    assert imported <= {*sys.stdlib_module_names, "zstandard", "cryptography"}
