"""One thing of a stored backup damaged, by case: which thing, how, with and without a key. Run by test_damage.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[Path, Path], None]
"""(the file, another one of its kind)."""


def _flip(share: float) -> Damage:
    def act(path: Path, other: Path) -> None:
        data = bytearray(path.read_bytes())
        data[min(int(len(data) * share), len(data) - 1)] ^= 0x04
        _write(path, bytes(data))

    return act


def _write(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def _edited(path: Path, other: Path) -> None:
    """As somebody would who wants it to be believed: valid JSON with one value changed; of an object, the last byte."""
    data = path.read_bytes()
    try:
        value = json.loads(data)
    except ValueError:
        _write(path, data[:-1] + bytes([data[-1] ^ 0xFF]))
        return
    for name in ("state", "host", "made_at"):
        if name in value:
            value[name] = "verified" if name == "state" else "2020-01-01T00:00:00.000000Z"
    _write(path, json.dumps(value).encode())


DAMAGES: dict[str, Damage] = {
    "first bit": _flip(0.0),
    "a bit at a quarter": _flip(0.25),
    "a bit in the middle": _flip(0.5),
    "a bit at three quarters": _flip(0.75),
    "a bit near the end": _flip(0.97),
    "cut in half": lambda path, other: _write(path, path.read_bytes()[: path.stat().st_size // 2]),
    "a byte missing": lambda path, other: _write(path, path.read_bytes()[:-3]),
    "a byte more": lambda path, other: _write(path, path.read_bytes() + b"\x00"),
    "empty": lambda path, other: _write(path, b""),
    "zeros": lambda path, other: _write(path, bytes(path.stat().st_size)),
    "gone": lambda path, other: path.unlink(),
    "another's bytes": lambda path, other: _write(path, other.read_bytes()),
    "edited": _edited,
}
THINGS = ("object", "index", "manifest", "key", "state")


@dataclass(frozen=True)
class Case:
    step: str
    """What is damaged."""
    fault: str
    encrypted: bool
    component: str = "storage"

    @property
    def id(self) -> str:
        return f"{self.step}: {self.fault}, {'with' if self.encrypted else 'without'} a key"

    def act(self, path: Path, other: Path) -> None:
        DAMAGES[self.fault](path, other)


CASES = [
    Case(thing, damage, encrypted)
    for thing in THINGS
    for damage in DAMAGES
    for encrypted in (False, True)
    if encrypted or thing != "key"
]
