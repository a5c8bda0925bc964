"""A repository: the places that hold the same backups, their keyring, and all that is read and written there.

Streams are written by writer.py and read by source.py; what is stored is described in docs/BACKUP_FORMAT.md.
"""

from __future__ import annotations

import datetime as dt
import json
import platform
import random
import re
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, StorageError, UsageError
from tasks.backup import documents, manifest, states, upkeep
from tasks.backup.findings import Intent as Intent
from tasks.backup.findings import Kept as Kept
from tasks.backup.findings import Scan as Scan
from tasks.backup.keyring import PREFIX as KEYS
from tasks.backup.keyring import FileKey, Keyring, open_keyring, read_key, set_aside
from tasks.backup.manifest import SUFFIX, Chunk, Manifest, ManifestError
from tasks.backup.places import DirectoryPlace, Place, open_place, open_places
from tasks.backup.source import ComponentSource
from tasks.backup.states import Note
from tasks.backup.writer import Progress, Writer

if TYPE_CHECKING:
    from registry.settings import Settings

BACKUP_ID = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{6}")
SPOOL = "backups-spool"
RECENT = 3
"""So many of the newest backups of a component say what is stored of it. What only older ones know is read and checked."""
DAMAGED = states.DAMAGED
KEPT = "kept"
"""Noted where a place failed: where the backup is, and where it is missing."""
READERS = 8


def new_backup_id(now: dt.datetime) -> str:
    """Sorts by time; the random end tells two of one second apart."""
    return f"{now.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def manifest_name(backup_id: str) -> str:
    return f"{check_backup_id(backup_id)}{SUFFIX}"


def check_backup_id(backup_id: str) -> str:
    """Raises UsageError."""
    if not BACKUP_ID.fullmatch(backup_id):
        raise UsageError(
            f"{backup_id!r} is no id of a backup: they look like 20261121T020000Z-0a1b2c (`modelkeep backups list`)"
        )
    return backup_id


def locate(reference: str) -> tuple[str | None, str]:
    """(location, backup id) of an id, or of a path or URL of a manifest. Raises UsageError."""
    location, _, name = reference.rpartition("/")
    backup_id = check_backup_id(name.removesuffix(SUFFIX))
    if location:
        return location, backup_id
    return (str(Path.cwd()) if name.endswith(SUFFIX) else None), backup_id


class Repository:
    """Places that hold the same backups. With an empty list it can hold nothing.

    `spool`: a folder for what no place takes; used only where no place is a directory. `scratch`: for temporary files.
    """

    def __init__(
        self,
        places: Sequence[Place],
        keyring: Keyring | None = None,
        *,
        spool: Path | None = None,
        scratch: Path | None = None,
    ) -> None:
        if not places:
            raise UsageError("no place for backups is named: set `backups` to a directory or s3://bucket/prefix")
        self.places = list(places)
        self.keyring = keyring
        self.scratch = scratch
        local = any(isinstance(place, DirectoryPlace) for place in places)
        self.spool = None if spool is None or local else DirectoryPlace(spool)
        self.spool_number = -1 if self.spool is None else len(self.places)
        self.down: dict[int, str] = {}
        """Place -> why it is left out since."""
        self._elsewhere: list[Place] = []
        self._lock = threading.Lock()

    # places -----------------------------------------------------------------------------------------------------------

    @property
    def shown(self) -> list[str]:
        return [place.shown for place in self.places]

    def only(self, place: Place) -> Repository:
        """The same repository as far as one place goes."""
        return Repository([place], self.keyring, scratch=self.scratch)

    def all_places(self) -> list[Place]:
        """The places by their numbers; the spool is the last where there is one."""
        return self.places if self.spool is None else [*self.places, self.spool]

    def reading(self) -> list[Place]:
        """Where to look for an object, the nearest first."""
        found = [*self.all_places(), *self._elsewhere]
        return sorted(found, key=lambda place: not isinstance(place, DirectoryPlace))

    def up(self) -> list[int]:
        """The places that are written to: those that have not failed; else the spool; else none."""
        with self._lock:
            working = [number for number in range(len(self.places)) if number not in self.down]
            if working or self.spool is None or self.spool_number in self.down:
                return working
            return [self.spool_number]

    def is_down(self, number: int, error: StorageError) -> None:
        """Leave the place out from now on. Raises `error` where nothing is left to write to."""
        with self._lock:
            self.down.setdefault(number, str(error))
        if not self.up():
            raise StorageError("no place takes the backup: " + "; ".join(dict.fromkeys(self.down.values()))) from error

    def put_at(
        self,
        targets: Sequence[int],
        name: str,
        data: bytes,
        *,
        only_new: bool = False,
        keep_until: dt.datetime | None = None,
    ) -> list[int]:
        """Put at each of the places; where that leaves none, at those that are up then. Returns where it is."""
        places, done = self.all_places(), []
        pending = [number for number in targets if number not in self.down]
        tried: set[int] = set()
        while True:
            for number in pending:
                tried.add(number)
                try:
                    places[number].put(name, data, only_new=only_new, keep_until=keep_until)
                    done.append(number)
                except StorageError as error:
                    self.is_down(number, error)
            if done:
                return done
            pending = [number for number in self.up() if number not in tried]
            if not pending:
                raise StorageError(f"{name} is nowhere: " + "; ".join(self.down.values()))

    def keep_at(self, name: str, until: dt.datetime) -> None:
        """Lock an object that is there already for longer, where a place can. Raises StorageError after all were asked, where one failed."""
        failed: list[str] = []
        for number in self.up():
            place = self.all_places()[number]
            try:
                if (keep := getattr(place, "keep", None)) is not None:
                    keep(name, until)
            except StorageError as error:
                failed.append(str(error))
        if failed:
            raise StorageError("; ".join(failed))

    def keep_keys(self, until: dt.datetime | None) -> None:
        """Lock the wrapped data key for as long as what it opens: without it all that is locked would be worth nothing.

        Raises StorageError where a place could not, after all were asked. A manifest is then not written: nothing would lock the key
        later, and `object_lock` promises that. What counts by itself and is stored by now (a shipped log) is told with a warning.
        """
        if until is not None and self.keyring is not None:
            self.keep_at(f"{KEYS}{self.keyring.key_id}.json", until)

    def flush(self) -> None:
        """Raises StorageError."""
        for number in self.up():
            try:
                self.all_places()[number].flush()
            except StorageError as error:
                self.is_down(number, error)  # what this place has is not certain; the others have it too

    # writing ----------------------------------------------------------------------------------------------------------

    def writer(
        self, backup_id: str, *, progress: Progress | None = None, keep_until: dt.datetime | None = None
    ) -> Writer:
        """Begin the intent before this: from then on garbage collection leaves alone what the writer reuses."""
        return Writer(self, check_backup_id(backup_id), progress=progress, keep_until=keep_until)

    def write_manifest(self, record: Manifest, *, keep_until: dt.datetime | None = None) -> Kept:
        """Sign and store it, last of all, and read it back. Raises ConflictError, StorageError where no place has it or one locks no key."""
        self.flush()
        text = self.signed(record).text()
        name = manifest_name(record.backup_id)
        self.keep_keys(keep_until)
        where = self.put_at(self.up(), name, text, only_new=True, keep_until=keep_until)
        for number in where:
            place = self.all_places()[number]
            place.flush()
            if place.get(name) != text:
                raise StorageError(f"{name} reads back from {place.shown} with other bytes: the backup does not count")
        missing = {self.places[number].shown: why for number, why in self.down.items() if number < len(self.places)}
        kept = Kept(tuple(self.all_places()[number].shown for number in where), missing)
        if missing:
            self.note_state(record.backup_id, KEPT, {"at": list(kept.at), "missing": dict(missing)})
        return kept

    def signed(self, record: Manifest) -> Manifest:
        if self.keyring is None:
            return replace(record, encryption=None).sealed()
        encryption = {"method": "aes-256-gcm", "key_id": self.keyring.data_key_id}
        return replace(record, encryption=encryption).signed(self.keyring.signing_key, self.keyring.data_key_id)

    # reading ----------------------------------------------------------------------------------------------------------

    def scan(self) -> Scan:
        """Every manifest of every place, each read and checked. A place that does not answer is named, not passed over."""
        named: dict[str, list[Place]] = {}
        unread: dict[str, str] = {}
        for place in [*self.all_places(), *self._elsewhere]:
            try:
                # ids begin with the year: a longer list would go through every object of a bucket
                for one in place.list("2"):
                    if one.name.endswith(SUFFIX) and "/" not in one.name:
                        named.setdefault(one.name.removesuffix(SUFFIX), []).append(place)
            except StorageError as error:
                unread[place.shown] = str(error)
        found: list[Manifest] = []
        broken: dict[str, str] = {}
        at: dict[str, tuple[str, ...]] = {}
        with ThreadPoolExecutor(READERS, thread_name_prefix="backup-list") as pool:
            for backup_id, (record, good, problems) in zip(
                sorted(named),
                pool.map(lambda one: self._copies(one, named[one]), sorted(named)),
                strict=True,
            ):
                if record is None:
                    if problems:
                        broken[backup_id] = "; ".join(problems)
                else:
                    found.append(record)
                    at[backup_id] = good
        return Scan(tuple(found), broken, unread, at)

    def manifests(self) -> list[Manifest]:
        """The manifests that can be believed, oldest first. `scan` says which could not."""
        return list(self.scan().manifests)

    def manifest(self, reference: str) -> Manifest:
        """By id, or by path or URL of its file (its location is then read from as well).

        Raises NotFoundError, ManifestError, StorageError, UsageError.
        """
        location, backup_id = locate(reference)
        places = [*self.all_places(), *self._elsewhere]
        if location is not None:
            place = open_place(location, endpoint_url=self._endpoint_url())
            if place.shown not in {one.shown for one in places}:
                self._elsewhere.append(place)
            places = [place]
        record, _, problems = self._copies(backup_id, places)
        if record is not None:
            return record
        if problems:
            raise ManifestError("; ".join(problems))
        raise NotFoundError(
            f"there is no backup {backup_id} in {', '.join(place.shown for place in places)}: `modelkeep backups list` shows them"
        )

    def source(self, record: Manifest, component: str) -> ComponentSource:
        """Raises NotFoundError where the backup has no such component."""
        found = record.component(component)
        if found is None:
            names = ", ".join(one.name for one in record.components) or "nothing"
            raise NotFoundError(f"backup {record.backup_id} has no component {component!r}: it has {names}")
        return ComponentSource(self, found)

    def chunks(self, record: Manifest, component: str | None = None) -> Iterator[Chunk]:
        """Every chunk that a backup refers to, those of the indexes too; of one component, or of all. With repeats."""
        for one in record.components:
            if one.index is None or component not in (None, one.name):
                continue
            yield from one.index.chunks
            for entry in ComponentSource(self, one).entries():
                if entry.stream is not None:
                    yield from entry.stream.chunks

    def recent_chunks(self, component: str) -> Iterator[Iterator[Chunk]]:
        """The chunks of the newest backups of a component. One whose index cannot be read is passed over: others tell."""
        with self._lock:
            if not hasattr(self, "_recent"):
                self._recent = sorted(self.manifests(), key=lambda one: one.backup_id, reverse=True)
        holding = [one for one in self._recent if (found := one.component(component)) and found.index is not None]
        for record in holding[:RECENT]:
            yield self._readable(record, component)

    def _readable(self, record: Manifest, component: str) -> Iterator[Chunk]:
        try:
            yield from self.chunks(record, component)
        except (ArtifactError, StorageError, ManifestError):
            # An older backup that is damaged: verification tells of it. Here it only means that less is known.
            return

    def _copies(self, backup_id: str, places: Sequence[Place]) -> tuple[Manifest | None, tuple[str, ...], list[str]]:
        """The manifest, the places with a good copy, and what is wrong with the others."""
        name = manifest_name(backup_id) if BACKUP_ID.fullmatch(backup_id) else f"{backup_id}{SUFFIX}"
        found: Manifest | None = None
        good: list[str] = []
        problems: list[str] = []
        for place in places:
            try:
                record = self.read_manifest(place.get(name), f"{name} in {place.shown}")
                if record.backup_id != backup_id:
                    raise ManifestError(f"{name} in {place.shown} is the manifest of backup {record.backup_id}")
            except NotFoundError:
                continue
            except (ManifestError, StorageError) as error:
                problems.append(str(error))
                continue
            if found is not None and record.as_dict() != found.as_dict():
                problems.append(f"{name} in {place.shown} is another than in {good[0]}")
                return None, (), problems
            found = record
            good.append(place.shown)
        return found, tuple(good), problems

    def read_manifest(self, text: bytes, name: str) -> Manifest:
        """Raises ManifestError."""
        if self.keyring is not None:
            return manifest.read(text, name=name, key=self.keyring.signing_key)
        record = manifest.read(text, name=name)
        manifest.check_digest(json.loads(text), name)
        return record

    def _endpoint_url(self) -> str | None:
        urls = (getattr(place, "endpoint_url", None) for place in self.places)
        return next((url for url in urls if url), None)

    # states -----------------------------------------------------------------------------------------------------------

    def note_state(self, backup_id: str, state: str, facts: Mapping[str, Any] | None = None) -> Note:
        """Add to the record of a backup, at every place that takes it. Raises StorageError where none does.

        Its time is later than that of every note before it, whatever the clock says: the newest check decides.
        """
        moment = max(clock.now(), self._newest_note(check_backup_id(backup_id)) + dt.timedelta(microseconds=1))
        while True:
            value = {
                "format": documents.STATE, "format_version": 1, "backup_id": backup_id, "state": state,
                "at": clock.text(moment), "host": platform.node(), "facts": dict(facts or {}),
            }  # fmt: skip
            name = f"states/{backup_id}/{moment.astimezone(dt.UTC):%Y%m%dT%H%M%S.%fZ}-{state}.json"
            try:
                self.put_at(self.up(), name, documents.text(value, self.keyring), only_new=True)
            except ConflictError:  # two in one microsecond
                moment += dt.timedelta(microseconds=1)
                continue
            return Note(state, str(value["at"]), dict(facts or {}))

    def _newest_note(self, backup_id: str) -> dt.datetime:
        names = [name for place in self.all_places() for name in self._listed(place, f"states/{backup_id}/")]
        return max(map(states.noted_at, names), default=states.LONG_AGO)

    def states(self, backup_id: str) -> list[Note]:
        """What was noted of a backup, oldest first. What cannot be believed has the state "damaged"."""
        return self.all_states(backup_id).get(backup_id, [])

    def all_states(self, backup_id: str | None = None) -> dict[str, list[Note]]:
        """The notes of every backup, or of one, also of those that have no manifest (running, failed, pruned)."""
        prefix = "states/" if backup_id is None else f"states/{check_backup_id(backup_id)}/"
        named: dict[str, list[Place]] = {}
        for place in [*self.all_places(), *self._elsewhere]:
            for one in self._listed(place, prefix):
                named.setdefault(one, []).append(place)
        found: dict[str, list[Note]] = {}
        with ThreadPoolExecutor(READERS, thread_name_prefix="backup-states") as pool:
            for name, note in zip(
                sorted(named), pool.map(lambda one: self._note(one, named[one]), sorted(named)), strict=True
            ):
                if note is not None:
                    found.setdefault(name.split("/")[1], []).append(note)
        return found

    def _note(self, name: str, places: Sequence[Place]) -> Note | None:
        problems: list[str] = []
        for place in places:
            try:
                value = documents.read(
                    place.get(name), documents.STATE, f"{name} in {place.shown}", self.keyring, name.split("/")[1]
                )
                return Note(str(value["state"]), str(value["at"]), dict(value["facts"]))
            except NotFoundError:
                continue
            except (ManifestError, StorageError, KeyError, TypeError, ValueError) as error:
                problems.append(str(error))
        if not problems:
            return None
        return Note(DAMAGED, clock.text(states.noted_at(name)), {"name": name, "why": "; ".join(problems)})

    def _listed(self, place: Place, prefix: str) -> list[str]:
        """Empty where the place does not answer, but only as long as another one does."""
        try:
            return [one.name for one in place.list(prefix) if one.name.endswith(".json")]
        except StorageError as error:
            if place in self.places:
                self.is_down(self.places.index(place), error)
            return []

    # intents and marks ------------------------------------------------------------------------------------------------

    def begin_intent(self, backup_id: str, facts: Mapping[str, Any]) -> None:
        """Say that a backup is under way, or once more with a new heartbeat. Raises StorageError where no place takes it."""
        value = {"format": documents.INTENT, "format_version": 1, "backup_id": check_backup_id(backup_id), **facts}
        self.put_at(self.up(), f"intents/{backup_id}.json", (json.dumps(value, sort_keys=True) + "\n").encode())

    beat_intent = begin_intent

    def end_intent(self, backup_id: str) -> None:
        """A place that does not answer keeps it until `copy_missing`, or until garbage collection finds it dead."""
        for number, place in enumerate(self.all_places()):
            if number in self.down:
                continue
            try:
                place.delete(f"intents/{check_backup_id(backup_id)}.json")
            except StorageError as error:
                with self._lock:
                    self.down.setdefault(number, str(error))

    def intents(self) -> list[Intent]:
        """Of all places, the newest copy of each. One that cannot be read counts as well, without facts.

        Raises StorageError where a place does not answer: what is under way there is then unknown.
        """
        found: dict[str, Intent] = {}
        for place in self.all_places():
            for one in place.list("intents/"):
                backup_id = one.name.removeprefix("intents/").removesuffix(".json")
                try:
                    facts = json.loads(place.get(one.name))
                except NotFoundError:
                    continue
                except ValueError:
                    facts = {}
                before = found.get(backup_id)
                if before is None or before.modified < one.modified:
                    found[backup_id] = Intent(backup_id, facts if isinstance(facts, dict) else {}, one.modified)
        return [found[key] for key in sorted(found)]

    def marked_objects(self, place: Place) -> Iterator[str]:
        """The ids of objects that a gc/ file of the place names. Raises StorageError, also where one cannot be read."""
        for one in place.list("gc/"):
            try:
                yield from map(str, json.loads(place.get(one.name))["objects"])
            except NotFoundError:
                continue  # phase 2 has just ended
            except (ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"{one.name} in {place.shown} cannot be read ({error!r}): which objects may be deleted is unknown; remove that file"
                ) from error

    # looking after it: upkeep.py --------------------------------------------------------------------------------------

    def check(
        self,
        record: Manifest,
        *,
        components: Sequence[str] | None = None,
        read: bool = True,
        share: float = 1.0,
        random_source: random.Random | None = None,
    ) -> upkeep.Checked:
        """Whether all objects of a backup are there and right: `upkeep.check`."""
        return upkeep.check(self, record, components=components, read=read, share=share, random_source=random_source)

    def missing(self, record: Manifest, components: Sequence[str] | None = None) -> list[str]:
        """The objects that no place lists: `upkeep.missing`."""
        return upkeep.missing(self, record, components)

    def copy_missing(self) -> upkeep.Copied:
        """Bring to every place what it lacks: `upkeep.copy_missing`."""
        return upkeep.copy_missing(self)


def open_repository(
    settings: Settings, *, location: str | None = None, create: bool = False, key: FileKey | None = None
) -> Repository:
    """The repository of the settings, or the one at `location`. With `create` its key is made where there is none yet.

    Raises SettingsError, BackupKeyError, StorageError.
    """
    places = (
        open_places(settings) if location is None else [open_place(location, endpoint_url=settings.s3_endpoint_url)]
    )
    if key is None and settings.backup_key_file is not None:
        key = read_key(settings.backup_key_file)
    spool = settings.home / SPOOL if location is None else None
    if create and key is not None and spool is not None:
        set_aside(spool, key)
    repository = Repository(places, spool=spool)
    repository.keyring = open_keyring(repository.all_places(), key, create=create)
    return repository
