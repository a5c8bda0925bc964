"""Objects that no backup needs: marked first, deleted a day later, so that a backup that runs meanwhile loses nothing.

What holds it together: a backup announces itself by an intent before it looks at what is stored; a deletion announces itself by
`deleting.json` before it looks for intents. Whoever comes second sees the other, and waits (the backup) or goes home (the
deletion). A backup never uses a marked object without writing it again, and a rewritten object is not the one that was marked.
Who deletes shipped logs announces itself by the same file, which says so.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, StorageError
from tasks.backup import codec, whose
from tasks.backup.known import Known
from tasks.backup.manifest import ManifestError
from tasks.backup.places import Place, Stat

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

FLAG = "deleting.json"
FORMAT = "modelkeep-backup-garbage"
FORMAT_VERSION = 1
GARBAGE, LOGS = "garbage", "logs"
"""What a deletion does, as its flag says."""
_WORDS = {
    GARBAGE: ("garbage is being collected", "a collection of garbage"),
    LOGS: ("shipped logs are being deleted", "a deletion of shipped logs"),
}
AT_ONCE = 20_000
"""Objects that one mark names at most."""
_BEAT_SECONDS = 15.0
STALE_SECONDS = 900.0
"""A deletion whose flag has stood still for so long is dead: more than one call to a store can take with all its attempts, since
between two of them the flag is looked at."""
DEAD_INTENT_SECONDS = 6 * 3600.0
"""A backup or deletion that has not beaten for so long is dead; one that we can see, as soon as its process is."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What was done at one place. `waits` says why nothing was deleted there though something is due."""

    place: str
    marked: int = 0
    marked_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    refused: int = 0
    """Objects that the place did not let go (an object lock): they are marked again another day."""
    waits: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def collect(
    repository: Repository,
    *,
    now: dt.datetime,
    grace: dt.timedelta,
    monotonic: Callable[[], float] = time.monotonic,
) -> list[Collected]:
    """Delete what was marked at least `grace` ago and is still needed by nobody, then mark what nobody needs now.

    Nothing happens while a manifest cannot be read or a place does not answer: what it needs is then unknown (`waits` says so).
    Raises StorageError where a place fails in the middle; another call goes on.
    """
    with Known(repository.scratch) as known:
        with deleting(repository, monotonic) as ours:
            why = _learn(repository, known)
            if why is not None:
                return [Collected(place.shown, waits=why) for place in repository.all_places()]
            found = [_delete_due(flag, known, now - grace, ours.waits) for flag in ours.flags]
        return [_mark(flag.place, known, one, now) for flag, one in zip(ours.flags, found, strict=True)]


@contextlib.contextmanager
def deleting(
    repository: Repository, monotonic: Callable[[], float] = time.monotonic, *, doing: str = GARBAGE
) -> Iterator[Deletion]:
    """Announce a deletion at every place, and look for backups after that. Raises ConflictError where another is at work, StorageError."""
    flags = [_Flag(place, monotonic, doing) for place in repository.all_places()]
    with contextlib.ExitStack() as stack:  # one that cannot be taken down keeps no other up
        for flag in flags:
            stack.callback(flag.lower)
            flag.raise_it()
        yield Deletion(flags, _living(repository, flags))


def distrust(repository: Repository, damaged: Iterable[tuple[str, str]], *, now: dt.datetime) -> int:
    """Mark objects that hold other bytes than they should, (place, object) of each: the next backup that has these bytes writes them
    again, which makes every older backup right that refers to them too. What is needed is never deleted by a mark. Returns how
    many. Raises StorageError.
    """
    count = 0
    by_place: dict[str, list[str]] = {}
    for shown, object_id in damaged:
        by_place.setdefault(shown, []).append(object_id)
    for place in repository.all_places():
        found = {
            object_id: clock.text(stat.modified)
            for object_id in by_place.get(place.shown, ())
            if (stat := place.stat(codec.object_name(object_id))) is not None
        }
        if found:
            _write_mark(place, found, now, 0)
            count += len(found)
    return count


def wait_for_deletion(
    repository: Repository,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """A backup calls this right after it has announced itself, before it looks at what is stored. Raises StorageError."""
    for place in repository.all_places():
        seen: dt.datetime | None = None
        since = monotonic()
        while (stat := place.stat(FLAG)) is not None:
            if stat.modified != seen:
                if seen is None:
                    say(f"{_words(place)[0]} in {place.shown}: waiting for its end")
                seen, since = stat.modified, monotonic()
            elif monotonic() - since > STALE_SECONDS or _is_of_dead_process(place):
                say(f"{_words(place)[1]} in {place.shown} was cut off: its flag is removed")
                place.delete(FLAG)
                break
            sleep(0.2)


class _Flag:
    """`deleting.json` at one place, while it is ours."""

    def __init__(self, place: Place, monotonic: Callable[[], float], doing: str = GARBAGE) -> None:
        self.place, self._doing = place, doing
        self._token = secrets.token_hex(8)
        self._monotonic = monotonic
        self._beaten = 0.0
        self._up = False

    def raise_it(self) -> None:
        """Raises ConflictError where another deletion is at work, StorageError."""
        seen = self.place.stat(FLAG)
        if seen is not None and (_is_of_dead_process(self.place) or _age(seen) > DEAD_INTENT_SECONDS):
            self.place.delete(FLAG)
            seen = None
        try:
            if seen is None:
                self._put(only_new=True)  # of two that saw none, one comes first
                self._up = True
                return
        except ConflictError:
            seen = self.place.stat(FLAG)
        raise ConflictError(
            f"{_words(self.place)[0]} in {self.place.shown} since {seen.modified if seen else 'just now'}: wait for its end; where "
            f"it was killed on another machine, remove {FLAG} there"
        )

    def still_ours(self) -> bool:
        """Beat, and see that no backup took us for dead."""
        if self._monotonic() - self._beaten < _BEAT_SECONDS:
            return True
        mine = self._is_mine()
        if mine:
            self._put()
        return mine

    def lower(self) -> None:
        if self._up and self._is_mine():
            self.place.delete(FLAG)
        self._up = False

    def _is_mine(self) -> bool:
        return (_said(self.place) or {}).get("token") == self._token

    def _put(self, *, only_new: bool = False) -> None:
        value = {"token": self._token, "doing": self._doing, "at": clock.text(clock.now()), **whose.identity()}
        self.place.put(FLAG, json.dumps(value).encode(), only_new=only_new)
        self._beaten = self._monotonic()


@dataclass(frozen=True, slots=True)
class Deletion:
    """One that is announced. `running`: a backup that is under way, or may be: then nothing may be deleted."""

    flags: list[_Flag]
    running: str | None

    @property
    def waits(self) -> str | None:
        """Why nothing may be deleted, and None where it may."""
        return None if self.running is None else f"backup {self.running} is under way"

    def still_ours(self) -> bool:
        return all(flag.still_ours() for flag in self.flags)


def _age(stat: Stat) -> float:
    """Seconds, as far as the clocks of the place and of this machine agree."""
    return (clock.now() - stat.modified).total_seconds()


def _is_of_dead_process(place: Place) -> bool:
    """Only where it was a process of this very machine, which can be looked for."""
    value = _said(place)
    return value is None or whose.is_dead(value)


def _words(place: Place) -> tuple[str, str]:
    """(what the deletion there is doing, what it is). A flag that does not say so, of an older release, is one of garbage."""
    return _WORDS[LOGS if (_said(place) or {}).get("doing") == LOGS else GARBAGE]


def _said(place: Place) -> dict[str, Any] | None:
    """What the flag says: None where there is none, nothing where it cannot be read. Raises StorageError."""
    try:
        value = json.loads(place.get(FLAG))
    except NotFoundError:
        return None
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _living(repository: Repository, flags: Iterable[_Flag]) -> str | None:
    """A backup that is under way, or may be. The flags were just written: they tell what time it is at each place."""
    newest = max((stat.modified for flag in flags if (stat := flag.place.stat(FLAG)) is not None), default=None)
    for intent in repository.intents():
        if whose.is_dead(intent.facts):
            continue
        if newest is None or (newest - intent.modified).total_seconds() < DEAD_INTENT_SECONDS:
            return intent.backup_id
    return None


def _learn(repository: Repository, known: Known) -> str | None:
    """All that manifests refer to. Returns why that is not known."""
    scan = repository.scan()
    if (why := scan.unanswered or scan.unbelieved) is not None:
        return why
    read: set[str] = set()
    for record in scan.manifests:
        for component in record.components:
            if component.index is None:
                continue
            known.learn(component.index.chunks)
            if component.index.sha256 in read:
                continue
            try:
                known.learn(repository.chunks(record, component.name))
            except (ArtifactError, ManifestError) as error:
                return f"the index of {component.name} in backup {record.backup_id} cannot be read: {error}"
            read.add(component.index.sha256)
    return None


def _objects(place: Place) -> Iterator[tuple[str, Stat]]:
    for stat in place.list(codec.PREFIX):
        yield stat.name.rpartition("/")[2], stat


def _marks(place: Place) -> Iterator[tuple[str, dt.datetime, dict[str, str]]]:
    """(name, when, {object: modified}) of each mark. Raises StorageError for one that cannot be read."""
    for stat in list(place.list("gc/")):
        try:
            value = json.loads(place.get(stat.name))
            yield (
                stat.name,
                dt.datetime.fromisoformat(value["at"]),
                {str(key): str(one) for key, one in value["objects"].items()},
            )
        except NotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(
                f"{stat.name} in {place.shown} cannot be read ({error!r}): remove it; what it named is marked again"
            ) from error


def _delete_due(flag: _Flag, known: Known, before: dt.datetime, waits: str | None) -> Collected:
    place = flag.place
    deleted = size = refused = 0
    for name, at, objects in _marks(place):
        if at > before:
            continue
        if waits is not None:
            return Collected(place.shown, waits=waits)
        for object_id, modified in objects.items():
            if known.chunk(object_id) is not None:
                continue
            stat = place.stat(codec.object_name(object_id))
            if stat is None or clock.text(stat.modified) != modified:
                continue  # gone, or written again since
            if not flag.still_ours():
                return Collected(place.shown, 0, 0, deleted, size, refused, "the flag was taken away: a backup began")
            try:
                place.delete(stat.name)
            except StorageError:
                refused += 1
                continue
            deleted, size = deleted + 1, size + stat.size_bytes
        place.delete(name)
    return Collected(place.shown, 0, 0, deleted, size, refused)


def _mark(place: Place, known: Known, done: Collected, now: dt.datetime) -> Collected:
    """What nobody needs and no mark names yet."""
    named = {object_id for _, _, objects in _marks(place) for object_id in objects}
    batch: dict[str, str] = {}
    count = size = number = 0
    for object_id, stat in _objects(place):
        if object_id in named or known.chunk(object_id) is not None:
            continue
        batch[object_id] = clock.text(stat.modified)
        count, size = count + 1, size + stat.size_bytes
        if len(batch) == AT_ONCE:
            _write_mark(place, batch, now, number)
            batch, number = {}, number + 1
    if batch:
        _write_mark(place, batch, now, number)
    return Collected(place.shown, count, size, done.deleted, done.deleted_bytes, done.refused, done.waits)


def _write_mark(place: Place, objects: dict[str, str], now: dt.datetime, number: int) -> None:
    value = {"format": FORMAT, "format_version": FORMAT_VERSION, "at": clock.text(now), "objects": objects}
    name = f"gc/{now.astimezone(dt.UTC):%Y%m%dT%H%M%S.%fZ}-{number}-{secrets.token_hex(3)}.json"
    place.put(name, (json.dumps(value, sort_keys=True) + "\n").encode())
