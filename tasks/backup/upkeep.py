"""Looking after what is stored: is it all there and right, and does every place have it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from registry.errors import ArtifactError, ConflictError, NotFoundError, StorageError
from tasks.backup import codec, garbage, states
from tasks.backup.known import Known
from tasks.backup.manifest import Chunk, Manifest, ManifestError
from tasks.backup.places import DirectoryPlace, Place

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

THREADS = 4
MANY = 20
"""So many problems are named one by one."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check found. `problems` are those that cost content; `elsewhere` those that another place makes good."""

    objects: int = 0
    bytes_read: int = 0
    problems: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()
    """(place, object) of what is there and holds other bytes than it should."""

    @property
    def good(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class Copied:
    """What `copy_missing` did: backup id -> the places that have it since; place -> why it still lacks something."""

    copied: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    objects: int = 0
    bytes: int = 0


def check(
    repository: Repository,
    record: Manifest,
    *,
    components: Sequence[str] | None = None,
    read: bool = True,
    share: float = 1.0,
    random_source: random.Random | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Checked:
    """Are all objects of a backup at every place that has its manifest, and right?

    With `read` the bytes are read back and decoded, of the given share of the objects (drawn at random; the indexes always,
    because without them nothing is known). Without `read` only names and sizes are compared. Raises StorageError where a place
    does not answer: then nothing is known.
    """
    draw = random_source or random.Random()
    places = [place for place in repository.reading() if place.shown in _holders(repository, record)]
    problems: list[str] = []
    elsewhere: list[str] = []
    damaged: list[tuple[str, str]] = []
    seen = bytes_read = 0
    with Known(repository.scratch) as known, ThreadPoolExecutor(THREADS, thread_name_prefix="backup-check") as pool:
        for number, place in enumerate(places):
            known.listed(number, _objects(place))
        for component in record.components:
            if component.index is None or (components is not None and component.name not in components):
                continue
            try:
                chunks = _fresh(known, repository.chunks(record, component.name), component.name)
                indexes = {one.object for one in component.index.chunks}
                for batch in _batches(chunks, 32):
                    work = [
                        (one, read and (share >= 1.0 or one.object in indexes or draw.random() < share))
                        for one in batch
                    ]
                    for one, (bad, size, wrong) in zip(
                        work, pool.map(lambda one: _examine(repository, places, known, *one), work), strict=True
                    ):
                        seen += 1
                        damaged += [(place, one[0].object) for place in wrong]
                        bytes_read += size
                        if bad:
                            (problems if len(bad) == len(places) else elsewhere).extend(bad)
                        if progress is not None:
                            progress(one[0].size_bytes, None)
            except (ArtifactError, ManifestError) as error:
                problems.append(f"the index of {component.name}: {error}")
                for chunk in component.index.chunks:
                    damaged += [(place, chunk.object) for place in _examine(repository, places, known, chunk, True)[2]]
    if not places:
        problems.append(f"no place has a manifest of {record.backup_id} that can be believed")
    return Checked(seen, bytes_read, _few(problems), _few(elsewhere), tuple(dict.fromkeys(damaged)))


def missing(repository: Repository, record: Manifest, components: Sequence[str] | None = None) -> list[str]:
    """The names of the objects that no place lists: a quick look before a recovery, by names only.

    Raises ArtifactError where an index cannot be read, StorageError where a place does not answer.
    """
    wanted = [one.name for one in record.components if components is None or one.name in components]
    gone = []
    with Known(repository.scratch) as known:
        for number, place in enumerate(repository.reading()):
            known.listed(number, _objects(place))
        for name in wanted:
            for chunk in _fresh(known, repository.chunks(record, name), record.backup_id):
                if not known.at(chunk.object):
                    gone.append(codec.object_name(chunk.object))
    return gone


def copy_missing(repository: Repository) -> Copied:
    """Bring to every place the keys, backups and notes that another one (or the spool) has, and empty the spool.

    What was pruned is not brought back. A place that fails is named in `failed`; the others get theirs. Repeat it at any time.
    """
    scan = repository.scan()
    notes = repository.all_states()
    copied: dict[str, list[str]] = {}
    failed: dict[str, str] = dict(scan.unread)
    total = _Count()
    for place in repository.places:
        if place.shown in failed:
            continue
        lacking = [
            record
            for record in scan.manifests
            if place.shown not in scan.at[record.backup_id]
            and not any(note.state == states.PRUNED for note in notes.get(record.backup_id, ()))
        ]
        try:
            _copy_small(repository, place, "keys/", scan.unread)
            if lacking:
                with Known(repository.scratch) as known:
                    for record in lacking:
                        _copy_backup(repository, place, record, known, total)
                        copied.setdefault(record.backup_id, []).append(place.shown)
            _copy_small(repository, place, "states/", scan.unread)
        except StorageError as error:
            failed[place.shown] = str(error)
    for backup_id, shown in copied.items():
        repository.note_state(backup_id, states.COPIED, {"to": shown})
    if repository.spool is not None and not failed:
        _empty_spool(repository.spool, repository)
    return Copied({key: tuple(value) for key, value in copied.items()}, failed, total.objects, total.bytes)


@dataclass(slots=True)
class _Count:
    objects: int = 0
    bytes: int = 0


def _copy_backup(repository: Repository, place: Place, record: Manifest, known: Known, total: _Count) -> None:
    """Objects first, manifest last, under an intent of its own so that garbage collection there takes none of them."""
    from tasks.backup.repository import manifest_name

    intent = f"intents/{record.backup_id}.json"
    place.put(intent, b'{"format": "modelkeep-backup-intent", "format_version": 1, "what": "copy"}\n')
    try:
        garbage.wait_for_deletion(repository.only(place))
        known.listed(0, _objects(place))
        known.marked(0, repository.marked_objects(place))
        for chunk in _fresh(known, repository.chunks(record), record.backup_id):
            if known.at(chunk.object).get(0) == chunk.stored_bytes and not known.marked_at(chunk.object):
                continue
            data = _stored(repository, chunk, place)
            place.put(codec.object_name(chunk.object), data)
            known.stored(chunk, [0])
            total.objects += 1
            total.bytes += len(data)
        place.flush()
        name = manifest_name(record.backup_id)
        text = _text(repository, name)
        # Not only_new: a copy that is there is a damaged one, or it would have counted.
        place.put(name, text)
        place.flush()
        if place.get(name) != text:
            raise StorageError(f"{name} reads back from {place.shown} with other bytes: the copy does not count")
    finally:
        place.delete(intent)


def _text(repository: Repository, name: str) -> bytes:
    """The manifest as it was written, which is what was signed."""
    for place in repository.reading():
        try:
            text = place.get(name)
            repository.read_manifest(text, f"{name} in {place.shown}")
            return text
        except (NotFoundError, ManifestError, StorageError):
            continue  # scan has found a good one a moment ago
    raise StorageError(f"{name} is nowhere to be read any more")


def _stored(repository: Repository, chunk: Chunk, but: Place) -> bytes:
    """The object as it is stored at another place. Raises StorageError where none has it right."""
    problems = []
    for place in repository.reading():
        if place is but:
            continue
        try:
            data = place.get(codec.object_name(chunk.object))
            codec.decode(data, chunk, repository.keyring)
            return data
        except (ArtifactError, NotFoundError, StorageError) as error:
            problems.append(f"{place.shown}: {error}")
    raise StorageError(f"object {chunk.object} could not be copied to {but.shown}: {'; '.join(problems)}")


def _copy_small(repository: Repository, place: Place, prefix: str, unread: Mapping[str, str]) -> None:
    """Files that are never changed once they are there: notes and wrapped keys. Only what other places have and this not."""
    there = {one.name for one in place.list(prefix)}
    for other in repository.all_places():
        if other is place or other.shown in unread:
            continue
        for one in other.list(prefix):
            if one.name in there:
                continue
            try:
                place.put(one.name, other.get(one.name), only_new=True)
            except (ConflictError, NotFoundError):
                continue  # written or removed this moment, by somebody else
            there.add(one.name)


def _empty_spool(spool: DirectoryPlace, repository: Repository) -> None:
    """Every place has all of it now. The keys stay: with them a backup can begin while the store does not answer. Shipped logs are no
    part of it: `logs.Shelf.copy_missing` brings them there, and takes them away here.
    """
    if any(True for _ in spool.list("intents/")):
        return
    for one in list(spool.list()):
        if not one.name.startswith(("keys/", "logs/")):
            spool.delete(one.name)


def _examine(
    repository: Repository, places: Sequence[Place], known: Known, chunk: Chunk, read: bool
) -> tuple[list[str], int, list[str]]:
    """(what is wrong at which places, bytes read, the places where it is there and wrong)."""
    at = known.at(chunk.object)
    bad: list[str] = []
    wrong: list[str] = []
    size = 0
    for number, place in enumerate(places):
        name = codec.object_name(chunk.object)
        if number not in at:
            bad.append(f"{name} is not in {place.shown}")
        elif read or at[number] != chunk.stored_bytes:
            # Another size can be right as well: codec.decode says when.
            try:
                data = place.get(name)
                size += len(data)
                codec.decode(data, chunk, repository.keyring)
            except NotFoundError:
                bad.append(f"{name} is not in {place.shown}")
            except ArtifactError as error:
                bad.append(f"{name} in {place.shown}: {error}")
                wrong.append(place.shown)
    return bad, size, wrong


def _holders(repository: Repository, record: Manifest) -> set[str]:
    """The places that have this manifest: the others may lack objects. What is on its way to one is no fault."""
    from tasks.backup.repository import manifest_name

    found = set()
    for place in repository.reading():
        try:
            text = place.get(manifest_name(record.backup_id))
            repository.read_manifest(text, f"{record.backup_id} in {place.shown}")
        except (NotFoundError, ManifestError):
            continue
        found.add(place.shown)
    if repository.spool is not None and repository.spool.shown in found:
        # With the store away in the middle of a backup, it is in the store and in the spool together.
        found |= {place.shown for place in repository.places}
    return found


def _objects(place: Place) -> Iterable[tuple[str, int]]:
    return ((one.name.rpartition("/")[2], one.size_bytes) for one in place.list(codec.PREFIX))


def _fresh(known: Known, chunks: Iterable[Chunk], label: str) -> Iterable[Chunk]:
    """Each object once."""
    for chunk in chunks:
        if known.first_use(label, chunk):
            yield chunk


def _batches(chunks: Iterable[Chunk], size: int) -> Iterable[list[Chunk]]:
    batch: list[Chunk] = []
    for chunk in chunks:
        batch.append(chunk)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _few(texts: Sequence[str]) -> tuple[str, ...]:
    if len(texts) <= MANY:
        return tuple(texts)
    return (*texts[:MANY], f"and {len(texts) - MANY} more")
