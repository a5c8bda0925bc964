"""The configuration in a backup: what it takes to set this installation up again by hand, without a secret in it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import ArtifactError, ConflictError, RefusedError, StorageError, UsageError
from registry.redaction import HIDDEN, redact
from registry.settings import Settings
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.untree import safe

TOML, SHOWN, ENVIRONMENT, DEPLOYMENTS, PIP, SYSTEM = (
    "modelkeep.toml",
    "settings.json",
    "environment.json",
    "prefect.yaml",
    "pip-freeze.txt",
    "system-packages.txt",
)
PACKAGES_SECONDS = 60.0
_SECRET = re.compile(r"(?i)(password|passwd|secret|token|api_?key|access_?key)")
_NO_SECRET = re.compile(r"(?i)_file$")
_TOML_LINE = re.compile(
    r"""(?ix) ^(\s*\#?\s* ["']?[\w.-]*(?:password|passwd|secret|token|api_?key|access_?key)[\w-]*["']? \s*=\s*)
    (\"{3}.*|'{3}.*|"(?:\\.|[^"\\])*"|'[^']*'|[^\#]*?) (\s*(?:\#.*)?)$"""
)


@dataclass(frozen=True, slots=True)
class ConfigPart:
    settings: Settings
    name: str = "config"
    kind: str = "config"

    def capture(self, sink: Sink) -> Captured:
        """Raises StorageError where modelkeep.toml cannot be read."""
        files: dict[str, bytes] = {}
        secrets: list[str] = []
        path = self.settings.config_file
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise StorageError(f"{path} cannot be read: {error}") from error
            clean, secrets = without_secrets(text)
            files[TOML] = clean.encode()
        files[SHOWN] = _json(self.settings.describe())
        names, hidden = environment(os.environ)
        files[ENVIRONMENT], secrets = _json(names), [*secrets, *hidden]
        deployments = Path(__file__).resolve().parents[2] / DEPLOYMENTS
        if deployments.is_file():
            files[DEPLOYMENTS] = redact(deployments.read_text(encoding="utf-8")).encode()
        else:
            sink.warn(
                f"{DEPLOYMENTS} is not beside the program: the deployments are those of the release ({_release()})"
            )
        files[PIP] = installed()
        packages = system_packages()
        if packages is None:
            sink.warn("the packages of the system could not be listed: dpkg-query is not there, or does not answer")
        else:
            files[SYSTEM] = packages
        for name, data in files.items():
            sink.add(Entry(name, "file", sink.store([data]), {"size": len(data), "sha256": _digest(data)}))
        return Captured(
            facts={
                "files": {name: _digest(data) for name, data in files.items()},
                "config_file": None if path is None else str(path),
                "secrets": secrets,
            },
            snapshot={"consistent": True, "how": "read once", "at": clock.text(clock.now())},
            programs={"modelkeep": _release(), "python": platform.python_version()},
        )


def parts(settings: Settings) -> list[Part]:
    return [ConfigPart(settings)]


def occupied(target: Target) -> str | None:
    """Always None: what stands there is never overwritten without force, what comes back lies beside it."""
    return None


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Write the files into the folder `target.path`. Where one of another content stands, it comes as NAME.restored, unless
    `target.force` says otherwise. `only` takes their names.

    Returns what was written, and the secrets to fill in: they are in no backup. Raises ArtifactError, ConflictError, StorageError.
    """
    if target.path is None:
        raise UsageError("the configuration is restored into a folder: its path is missing")
    written, beside = [], []
    try:
        target.path.mkdir(parents=True, exist_ok=True)
        for name, data in _read(source).items():
            if target.only and name not in target.only:
                continue
            place = target.path.joinpath(*safe(name))
            if os.path.lexists(place) and not target.force and _other(place, data):
                place = place.with_name(f"{place.name}.restored")
                beside.append(place.name)
            _write(place, data)
            written.append(place.name)
    except OSError as error:
        raise StorageError(f"the configuration could not be written to {target.path}: {error}") from error
    return {
        "folder": str(target.path),
        "written": written,
        "beside": beside,
        "fill_in": list(source.record.facts.get("secrets", [])),
    }


def verify(source: Source, folder: Path) -> Compared:
    """All files by their hashes; modelkeep.toml and the settings are read as what they are."""
    try:
        files = _read(source)
        found = restore(source, Target(path=folder / "config"))
        if TOML in files:
            tomllib.loads((folder / "config" / TOML).read_text(encoding="utf-8"))
        rows = json.loads((folder / "config" / SHOWN).read_text(encoding="utf-8"))
    except (ArtifactError, RefusedError, ValueError) as error:
        return Compared((str(error),))
    return Compared((), {"files": len(found["written"]), "settings": len(rows)})


def without_secrets(text: str) -> tuple[str, list[str]]:
    """A modelkeep.toml whose secrets are ***, also in its comments, and the dotted keys that they belong to."""
    import tomlkit

    document = tomlkit.parse(text)
    hidden: list[str] = []
    _hide(document, "", hidden)
    clean = redact(tomlkit.dumps(document))
    lines = [
        _TOML_LINE.sub(_hidden_line, line) if line.lstrip().startswith("#") else line for line in clean.split("\n")
    ]
    return "\n".join(lines), hidden


def _hide(node: Any, prefix: str, hidden: list[str]) -> None:
    pairs = list(node.items()) if isinstance(node, Mapping) else list(enumerate(node))
    for key, value in pairs:
        name = f"{prefix}{_called(key, value)}"
        if isinstance(value, Mapping) or (isinstance(value, list) and not isinstance(value, str)):
            _hide(value, f"{name}.", hidden)
        elif isinstance(value, str):
            if isinstance(key, str) and is_secret(key):
                node[key] = HIDDEN
                hidden.append(name)
            elif redact(value) != value:
                node[key] = redact(value)
                hidden.append(name)


def _called(key: Any, value: Any) -> str:
    """Of a list of tables, the name of the table rather than its number."""
    return str(value["name"]) if isinstance(key, int) and isinstance(value, Mapping) and "name" in value else str(key)


def _hidden_line(match: re.Match[str]) -> str:
    return f'{match[1]}"{HIDDEN}"{match[3]}'


def is_secret(name: str) -> bool:
    return bool(_SECRET.search(name)) and not _NO_SECRET.search(name)


def environment(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """MODELKEEP_* by name, without secret values, and the names of those that had one."""
    found: dict[str, str] = {}
    hidden: list[str] = []
    for name in sorted(one for one in environ if one.startswith("MODELKEEP_")):
        value = HIDDEN if is_secret(name) else redact(environ[name])
        found[name] = value
        if value != environ[name]:
            hidden.append(name)
    return found, hidden


def installed() -> bytes:
    """Name and version of every Python package, as `pip freeze` writes them."""
    names = {f"{one.name}=={one.version}" for one in metadata.distributions()}
    return "".join(f"{name}\n" for name in sorted(names, key=str.lower)).encode()


def system_packages() -> bytes | None:
    """Name and version of every Debian package, sorted. None where that cannot be had."""
    program = shutil.which("dpkg-query")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-W", "-f", "${Package} ${Version}\\n"],
            capture_output=True, timeout=PACKAGES_SECONDS, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return b"".join(sorted(done.stdout.splitlines(keepends=True))) if done.returncode == 0 else None


def _read(source: Source) -> dict[str, bytes]:
    """Raises ArtifactError where a file is missing or is another one."""
    files: dict[str, bytes] = {}
    for entry in source.entries():
        if entry.stream is None:
            raise ArtifactError(f"{entry.name} of the configuration has no content")
        files[entry.name] = b"".join(source.open(entry.stream))
    if (found := {name: _digest(data) for name, data in files.items()}) != source.record.facts["files"]:
        differing = sorted({*found.items()} ^ {*source.record.facts["files"].items()})
        raise ArtifactError(f"{differing[0][0]} of the configuration is not what the manifest says")
    return files


def _other(place: Path, data: bytes) -> bool:
    try:
        return place.is_symlink() or place.read_bytes() != data
    except OSError:
        return True


def _write(place: Path, data: bytes) -> None:
    if place.is_dir():
        raise ConflictError(f"{place} is a folder: nothing is put in its place")
    fresh = place.with_name(f".{place.name}.new")
    fresh.unlink(missing_ok=True)
    with fresh.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(place)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, default=str) + "\n").encode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _release() -> str:
    try:
        return metadata.version("modelkeep")
    except metadata.PackageNotFoundError:
        return f"not installed, run by {sys.executable}"
