"""Ten model files backed up twice, one of them changed between: by us, by tar, by restic, in turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks._backup_home import Home, room, weights_file
from tasks.backup.chain import find

COUNT = 10
OURS, TAR, TAR_ZSTD = "modelkeep", "tar", "tar | zstd -1"
RESTIC, RESTIC_AUTO = "restic, compression off", "restic, compression auto"

Tool = Callable[[Path], None]
"""Backs up into a folder, which has what it wrote there the first time, or is empty."""


def measure(folder: Path, mb: int, rounds: int) -> dict[str, Any]:
    """Seconds and bytes of each tool, by round. Raises NotMeasuredError where the disk is too small."""
    room(folder, 12 * mb * 1_000_000)
    size = mb * 1_000_000 // COUNT
    files = [folder / "files" / f"{number}.onnx" for number in range(COUNT)]
    for number, path in enumerate(files):
        weights_file(path, size, number)
    other = folder / "other.onnx"
    weights_file(other, size, COUNT)
    first = folder / "first.onnx"
    shutil.copyfile(files[0], first)
    home = Home(folder / "ours")
    stored = [home.store().put(path) for path in files]
    changed = home.store().put(other)
    home.registry(folder / "unused", stored, 100)
    tools, prepare, absent, versions = _tools(folder, home)
    found: dict[str, dict[str, list[float]]] = {
        name: {"first": [], "second": [], "first_bytes": [], "second_bytes": []} for name in tools
    }
    names = list(tools)
    for number in range(rounds):
        start = number % len(names)
        order = [*names[start:], *names[:start]]
        places = {name: folder / f"round{number}" / str(names.index(name)) for name in order}
        for turn, origin, version in (("first", first, stored[0]), ("second", other, changed)):
            _become(files[0], origin)  # the others keep their time, by which restic knows what it need not read
            home.change(folder / "unused", 0, version)
            for name in order:
                if turn == "first":
                    places[name].mkdir(parents=True)
                    prepare.get(name, _nothing)(places[name])
                began = time.perf_counter()
                tools[name](places[name])
                found[name][turn].append(round(time.perf_counter() - began, 3))
                found[name][f"{turn}_bytes"].append(_size(places[name]))
        shutil.rmtree(folder / f"round{number}")
    return {"mb": mb, "files": COUNT, "tools": found, "absent": absent, "versions": versions}


def _become(path: Path, origin: Path) -> None:
    """A copy that is on the disk when this returns, so that no turn pays for it."""
    shutil.copyfile(origin, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _nothing(_place: Path) -> None:
    pass


def _tools(folder: Path, home: Home) -> tuple[dict[str, Tool], dict[str, Tool], dict[str, str], dict[str, str]]:
    """What can be had here, what is done before it is timed, what cannot be had and why, and which versions."""
    origin = folder / "files"

    def ours(place: Path) -> None:
        home.back_up(place, "models")

    def tar(place: Path) -> None:
        with (place / "models.tar").open("wb") as target:
            subprocess.run(["tar", "-cf", "-", "-C", origin, "."], stdout=target, check=True)
            os.fsync(target.fileno())  # as the others do: else the disk is measured with one and not with the other

    def tar_zstd(place: Path) -> None:
        with (place / "models.tar.zst").open("wb") as target:
            left = subprocess.Popen(["tar", "-cf", "-", "-C", origin, "."], stdout=subprocess.PIPE)
            assert left.stdout is not None
            right = subprocess.Popen([zstd, "-1", "-q"], stdin=left.stdout, stdout=target)
            left.stdout.close()
            if (right.wait(), left.wait()) != (0, 0):
                raise RuntimeError("tar | zstd failed")
            os.fsync(target.fileno())

    def restic(place: Path, *words: str) -> None:
        environ = {
            **os.environ,
            "RESTIC_PASSWORD": "of a benchmark",
            "RESTIC_CACHE_DIR": str(folder / "restic-cache"),
            "RESTIC_REPOSITORY": str(place / "repository"),
        }
        subprocess.run([program, *words], env=environ, check=True, stdin=subprocess.DEVNULL)

    def restic_init(place: Path) -> None:
        restic(place, "init", "-q")

    zstd = str(find("zstd"))
    tools: dict[str, Tool] = {OURS: ours, TAR: tar, TAR_ZSTD: tar_zstd}
    versions = {"tar": _version("tar", "--version"), "zstd": _version(zstd, "--version")}
    program = shutil.which("restic") or ""
    if not program:
        why = "restic is not installed (Debian: apt-get install restic)"
        return tools, {}, {RESTIC: why, RESTIC_AUTO: why}, versions
    versions["restic"] = _version(program, "version")
    tools[RESTIC] = lambda place: restic(place, "backup", "-q", "--compression", "off", str(origin))
    tools[RESTIC_AUTO] = lambda place: restic(place, "backup", "-q", "--compression", "auto", str(origin))
    return tools, {RESTIC: restic_init, RESTIC_AUTO: restic_init}, {}, versions


def _version(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).splitlines()[0].strip() if done.stdout or done.stderr else "unknown"


def _size(folder: Path) -> float:
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
