"""A backup damaged in one of the known ways, in the eyes of whoever reads it: what is stored is not touched. For negative drills."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from registry.errors import ModelkeepError, NotFoundError, StorageError
from tasks.backup import codec
from tasks.backup.manifest import SUFFIX, Chunk, Manifest
from tasks.backup.places import Place, Stat
from tasks.backup.repository import Repository

WAYS: Mapping[str, str] = {
    "flipped-bit": "one bit of an object is another",
    "missing-object": "an object is gone",
    "cut-object": "an object ends in its middle",
    "swapped-object": "an object holds the bytes of another one",
    "damaged-index": "one bit of a component's index is another",
    "cut-manifest": "the manifest ends in its middle",
    "edited-manifest": "the manifest names another digest for a component's index",
}


@dataclass(frozen=True, slots=True)
class Told:
    """Whether the damage was told of, and in which words."""

    way: str
    what: str
    told: bool
    words: str

    def as_dict(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__slots__}


class DamagedPlace:
    """A place, to be read from, in which some names hold other bytes, or None where they are gone.

    `silent`: why the real one did not answer, as it said first; None: it did each time.
    """

    def __init__(self, place: Place, changed: Mapping[str, Callable[[bytes], bytes] | None]) -> None:
        self._place = place
        self._changed = dict(changed)
        self.shown = place.shown
        self.silent: str | None = None

    def get(self, name: str) -> bytes:
        with self._asked():
            data = self._place.get(name)
        if name not in self._changed:
            return data
        change = self._changed[name]
        if change is None:
            raise NotFoundError(f"{name} is not in {self.shown}")
        return change(data)

    def stat(self, name: str) -> Stat | None:
        with self._asked():
            return None if name in self._changed and self._changed[name] is None else self._place.stat(name)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        with self._asked():
            for stat in self._place.list(prefix):
                if stat.name not in self._changed or self._changed[stat.name] is not None:
                    yield stat

    def put(self, name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        raise StorageError(f"{name}: nothing is written during a negative drill")

    def delete(self, name: str) -> bool:
        raise StorageError(f"{name}: nothing is deleted during a negative drill")

    def flush(self) -> None:
        pass

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except StorageError as error:
            self.silent = self.silent or str(error)
            raise


def look(repository: Repository, manifest: Manifest, way: str) -> Told:
    """Damage the backup in this way wherever it is, read all of it, and see whether that is told. `repository` is the sound one."""
    try:
        changed = _changes(repository, manifest, way)
    except ModelkeepError as error:  # the backup itself is damaged: that is told by the drill's other half
        return Told(way, WAYS[way], False, f"no copy could be damaged: {error}")
    places = [DamagedPlace(place, changed) for place in repository.reading()]
    damaged = Repository(places, repository.keyring, scratch=repository.scratch)
    what = f"{WAYS[way]} ({', '.join(changed)})"
    names = [name.rpartition("/")[2] for name in changed]
    try:
        record = damaged.manifest(manifest.backup_id)
        found = damaged.check(record)
    except ModelkeepError as error:
        return _silent(way, what, places) or _told(way, what, names, str(error))
    if (silent := _silent(way, what, places)) is not None:
        return silent
    if found.good:
        return Told(way, what, False, f"{found.objects} objects were read and nothing was noticed")
    return _told(way, what, names, "; ".join(found.problems))


def _silent(way: str, what: str, places: Sequence[DamagedPlace]) -> Told | None:
    """A store that does not answer names what it was asked for, as one that tells of the damage does: nothing is known then."""
    silent = [one.silent for one in places if one.silent is not None]
    return Told(way, what, False, f"a place did not answer: {'; '.join(silent)}") if silent else None


def _told(way: str, what: str, names: list[str], words: str) -> Told:
    """Told is who names what was damaged: another trouble of the same backup is no answer to this question."""
    if any(name in words for name in names):
        return Told(way, what, True, words)
    return Told(way, what, False, f"something else was told: {words}")


def _changes(repository: Repository, manifest: Manifest, way: str) -> dict[str, Callable[[bytes], bytes] | None]:
    """{name: what it holds instead}. Raises ValueError for a way that is not in WAYS."""
    name = f"{manifest.backup_id}{SUFFIX}"
    if way == "cut-manifest":
        return {name: lambda data: data[: len(data) // 2]}
    if way == "edited-manifest":
        return {name: _edited}
    if way == "damaged-index":
        return {_object(_index(manifest)): _flipped}
    one, other = _two(repository, manifest)
    match way:
        case "flipped-bit":
            return {_object(one): _flipped}
        case "missing-object":
            return {_object(one): None}
        case "cut-object":
            return {_object(one): lambda data: data[: len(data) // 2]}
        case "swapped-object":
            instead = _stored(repository, _object(other))
            return {_object(one): lambda _: instead}
    raise ValueError(f"{way!r} is no way of damage: there are {', '.join(WAYS)}")


def _stored(repository: Repository, name: str) -> bytes:
    """As the first place that has it does. Raises NotFoundError, StorageError."""
    for place in repository.reading():
        if place.stat(name) is not None:
            return place.get(name)
    raise NotFoundError(f"{name} is in no place of the backups")


def _object(chunk: Chunk) -> str:
    return codec.object_name(chunk.object)


def _index(manifest: Manifest) -> Chunk:
    found = next((one.index.chunks[0] for one in manifest.components if one.index and one.index.chunks), None)
    if found is None:
        raise NotFoundError(f"backup {manifest.backup_id} has no index: there is nothing in it that could be damaged")
    return found


def _two(repository: Repository, manifest: Manifest) -> tuple[Chunk, Chunk]:
    """The largest object and another one; the index where there is no other."""
    largest: Chunk | None = None
    other = _index(manifest)
    for chunk in repository.chunks(manifest):
        if largest is None or chunk.stored_bytes > largest.stored_bytes:
            if largest is not None:
                other = largest
            largest = chunk
        elif chunk.object != largest.object:
            other = chunk
    assert largest is not None
    return largest, other


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _edited(data: bytes) -> bytes:
    document = json.loads(data)
    for component in document["components"]:
        if component["index"] is not None:
            digest = component["index"]["sha256"]
            component["index"]["sha256"] = digest[::-1] if digest != digest[::-1] else "0" * 64
            break
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
