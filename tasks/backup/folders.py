"""Folders in a backup (uploads, any `[[files]]`): what is there, with names of any bytes, links, holes, owners and times."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import ArtifactError, ConflictError, NotFoundError, RefusedError, StorageError, UsageError
from registry.settings import Settings
from tasks.backup import tree
from tasks.backup.components import Captured, Compared, Part, Sink, Source, Target
from tasks.backup.manifest import Entry
from tasks.backup.untree import MARK, Untree, selected

SMALL_BYTES = 64 << 10
"""Files up to this size are stored many together."""
PACK_BYTES = 8 << 20
TRIES = 3
_WARNED = 50
_NAMED = 20


@dataclass(frozen=True, slots=True)
class FilesPart:
    name: str
    path: Path
    exclude: tuple[str, ...] = ()
    own: tuple[Path, ...] = ()
    """Folders that backups are written to: where one lies below `path`, a backup would be of itself."""
    kind: str = "files"

    def capture(self, sink: Sink) -> Captured:
        """Raises NotFoundError where the folder is missing, StorageError that names what cannot be read."""
        work = _Capture(sink)
        try:
            root = self.path.stat()
            if (self.path / MARK).exists():  # a backup of it would verify, and push better ones out
                raise StorageError(
                    f"{self.path} of {self.name} is half restored: repeat the recovery that was cut off; where what is there is good as it "
                    f"is, remove {self.path / MARK}"
                )
            excluded, counting = (_Excluded(list(self.exclude), self._within()) for _ in range(2))
            work.total_bytes = sum(
                min(found.status.st_size, found.status.st_blocks * 512)
                for found in tree.walk(self.path, counting, lambda name, error: None)
                if stat.S_ISREG(found.status.st_mode)
            )
            for found in tree.walk(self.path, excluded, work.problem):
                work.take(found)
            work.flush()
        except FileNotFoundError as error:
            raise NotFoundError(
                f"the folder {self.path} of {self.name} is not there: correct its path in [[files]]"
            ) from error
        except NotADirectoryError as error:
            raise UsageError(f"{self.path} of {self.name} is no folder: correct its path in [[files]]") from error
        except PermissionError as error:
            raise StorageError(f"the folder {self.path} of {self.name} cannot be read: {error.strerror}") from error
        for name in excluded.own:
            sink.warn(f"{shown(name)} is left out: backups are written there")
        work.warnings.tell(sink)
        if work.unread:
            more = f"; and {len(work.unread) - _NAMED} more" if len(work.unread) > _NAMED else ""
            raise StorageError(
                f"{len(work.unread)} names below {self.path} cannot be read, so {self.name} is not whole: "
                f"{'; '.join(work.unread[:_NAMED])}{more}. Let the user of the backup read them, or name them in `exclude`"
            )
        facts = {
            "path": str(self.path),
            "root": tree.metadata(root),
            "counts": dict(sorted(work.counts.items())),
            "bytes": work.content_bytes,
            "excluded": excluded.count,
            "tree_sha256": work.digest.hexdigest(),
        }
        return Captured(
            facts=facts,
            snapshot={
                "consistent": False,
                "why": "a folder has no snapshot: each file is of one moment, which lies between the backup's begin and end",
                "at": clock.text(clock.now()),
            },
        )

    def _within(self) -> set[str]:
        """The names below `path` under which backups are written. Raises UsageError where it is itself such a place."""
        root, found = self.path.resolve(), set()
        for one in self.own:
            place = one.resolve()
            if place == root:
                raise UsageError(f"{self.path} of {self.name} is where backups are written: it cannot be in them")
            if place.is_relative_to(root):
                found.add(str(place.relative_to(root)))
        return found


class _Excluded:
    def __init__(self, patterns: list[str], own: set[str]) -> None:
        self._fits, self._own = tree.pattern(patterns), own
        self.count = 0
        self.own: list[str] = []

    def __call__(self, name: str) -> bool:
        if name in self._own:
            self.own.append(name)
            return True
        fits = self._fits(name)
        self.count += fits
        return fits


class _Warnings:
    """The first ones of each kind in full, the rest as a number: a manifest is no log."""

    def __init__(self) -> None:
        self._kinds: dict[str, list[str]] = {}
        self._more: Counter[str] = Counter()

    def add(self, kind: str, name: str) -> None:
        listed = self._kinds.setdefault(kind, [])
        if len(listed) < _WARNED:
            listed.append(name)
        else:
            self._more[kind] += 1

    def tell(self, sink: Sink) -> None:
        for kind, names in self._kinds.items():
            for name in names:
                sink.warn(f"{shown(name)}: {kind}")
            if more := self._more[kind]:
                sink.warn(f"{more} more: {kind}")


@dataclass(slots=True)
class _Capture:
    sink: Sink
    total_bytes: int = 0
    done_bytes: int = 0
    content_bytes: int = 0
    unread: list[str] = field(default_factory=list)
    warnings: _Warnings = field(default_factory=_Warnings)
    counts: Counter[str] = field(default_factory=Counter)
    digest: Any = field(default_factory=hashlib.sha256)
    _linked: dict[tuple[int, int], str] = field(default_factory=dict)
    _pack: list[tuple[str, bytes, dict[str, Any]]] = field(default_factory=list)
    _pack_bytes: int = 0
    _packs: int = 0

    def problem(self, name: str, error: OSError) -> None:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            self.warnings.add("vanished while the backup was taken, and is not in it", name)
        elif error.errno in (errno.ELOOP, errno.ENOTDIR):
            self.warnings.add("was replaced by something else while the backup was taken, and is not in it", name)
        else:
            self.unread.append(f"{shown(name)}: {error.strerror or error}")

    def take(self, found: tree.Found) -> None:
        try:
            mode = found.status.st_mode
            if stat.S_ISDIR(mode):
                self._add(Entry(found.name, "folder", None, tree.metadata(found.status)))
            elif stat.S_ISLNK(mode):
                to = os.readlink(found.base, dir_fd=found.parent)
                self._add(Entry(found.name, "link", None, {**tree.metadata(found.status), "to": to}))
            elif stat.S_ISREG(mode):
                self._file(found)
            else:
                self.warnings.add(f"is a {_special(mode)}, which has no content, and is left out", found.name)
                self.counts["left out"] += 1
        except OSError as error:
            self.problem(found.name, error)

    def _file(self, found: tree.Found) -> None:
        status = found.status
        if status.st_nlink > 1:
            first = self._linked.get((status.st_dev, status.st_ino))
            if first is not None:
                self._add(Entry(found.name, "hardlink", None, {"to": first}))
                return
        before = self.counts["file"]
        for left in reversed(range(TRIES)):
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
            handle = os.open(found.base, flags, dir_fd=found.parent)
            try:
                if self._read(found, handle, last=left == 0):
                    break
            finally:
                os.close(handle)
        if status.st_nlink > 1 and self.counts["file"] > before:
            self._linked[status.st_dev, status.st_ino] = found.name

    def _read(self, found: tree.Found, handle: int, *, last: bool) -> bool:
        """False where it changed meanwhile in a way that makes another reading worth while."""
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            self.warnings.add("was replaced by something else while the backup was taken, and is not in it", found.name)
            return True
        small = status.st_size <= SMALL_BYTES and status.st_nlink == 1
        extents = [(0, status.st_size)] if small else tree.extents_of(handle, status.st_size, status.st_blocks)
        if small and not status.st_size:
            extents = []
        begun = self.done_bytes
        reading = tree.Reading(handle, extents, self._told)
        data = b"".join(reading) if small else b""
        stream = None if small else self.sink.store(reading)
        after = os.fstat(handle)
        facts: dict[str, Any] = {**tree.metadata(status), "size": status.st_size}
        if found_attributes := tree.attributes(handle):
            facts["xattrs"] = found_attributes
        if reading.short or tree.changed(status, after):
            if not reading.short and after.st_size > status.st_size:
                self.warnings.add("grew while it was read: it is kept as long as it was at first", found.name)
            elif not last:
                self.done_bytes = begun
                return False
            else:
                self.warnings.add(
                    f"changed each of the {TRIES} times it was read: what is kept may be a mixture of its states",
                    found.name,
                )
                facts["torn"] = True
                if reading.short:
                    extents = reading.read_extents()
                    facts["size"] = max((start + length for start, length in extents), default=0)
        facts["sha256"] = reading.digest.hexdigest()
        if (extents and extents != [(0, facts["size"])]) or (facts["size"] and not extents):
            facts["extents"] = [list(one) for one in extents]
        self.content_bytes += reading.got
        if small:
            self._packed(found.name, data, facts)
        else:
            self._add(Entry(found.name, "file", stream, facts))
        return True

    def _told(self, size: int) -> None:
        self.done_bytes += size
        self.sink.progress(self.done_bytes, max(self.total_bytes, self.done_bytes))

    def _packed(self, name: str, data: bytes, facts: dict[str, Any]) -> None:
        """Where a pack ends is said by the names, so that a new file changes one pack and does not move the next ones."""
        self._pack.append((name, data, facts))
        self._pack_bytes += len(data)
        mark = zlib.crc32(name.encode("utf-8", "surrogateescape"))
        if (
            mark % 512 == 0
            or self._pack_bytes >= PACK_BYTES
            or (self._pack_bytes >= PACK_BYTES // 2 and mark % 16 == 0)
        ):
            self.flush()

    def flush(self) -> None:
        if not self._pack:
            return
        self._packs += 1
        pack, offset = f"packs/{self._packs:06d}", 0
        stream = self.sink.store(data for _, data, _ in self._pack)
        self.sink.add(Entry(pack, "pack", stream))
        for name, data, facts in self._pack:
            self._add(Entry(name, "file", None, {**facts, "pack": pack, "offset": offset}))
            offset += len(data)
        self._pack, self._pack_bytes = [], 0

    def _add(self, entry: Entry) -> None:
        self.sink.add(entry)
        self.counts[entry.kind] += 1
        self.digest.update(tree.line(entry.name, entry.kind, entry.facts))


def parts(settings: Settings) -> list[Part]:
    places = [Path(one.removeprefix("file://")) for one in settings.backups if not one.startswith("s3://")]
    own = (*places, settings.home / "backup-work", settings.home / "backups-spool")
    return [FilesPart(f"files:{one.name}", one.path, tuple(one.exclude), own) for one in settings.files]


def occupied(target: Target) -> str | None:
    """What stands in the folder, in words. What an interrupted restore left counts too: others may have written there since, and who
    called for it knows. Raises StorageError."""
    path = _folder(target)
    try:
        if not path.exists():
            return None
        if target.only:
            there = [name for name in target.only if os.path.lexists(path / name)]
            return f"{', '.join(there)} in {path}" if there else None
        names = [one for one in path.iterdir() if one.name != MARK]
    except OSError as error:
        raise StorageError(f"the folder {path} cannot be looked into: {error.strerror or error}") from error
    return f"{len(names)} name{'' if len(names) == 1 else 's'} in {path}" if names else None


def restore(source: Source, target: Target) -> dict[str, Any]:
    """Bring the files back below `target.path`; `only` takes folders, files and patterns.

    Nothing outside of the folder is ever touched, and what the backup does not have stays. Each file takes its name when it is whole.
    Killed, the next call for the same backup goes on. Raises ConflictError (without force), NotFoundError (nothing fits `only`),
    ArtifactError, StorageError.
    """
    path = _folder(target)
    fits = selected(target.only)
    untree = Untree(path, source.record, target)
    begun_before = untree.begun_before()
    if not begun_before and not target.force:
        if not target.only and (standing := occupied(target)):
            raise ConflictError(
                f"{standing}: nothing was restored; name an empty folder, or replace what is there with --force"
            )
        untree.refuse_what_stands(source, fits)
    try:
        found = untree.run(source, fits)
    except OSError as error:
        raise StorageError(
            f"{source.record.name} could not be restored below {path}: {error}; repeat the command"
        ) from error
    if target.only and not found["names"]:
        raise NotFoundError(f"{', '.join(target.only)}: nothing in {source.record.name} of this backup fits")
    if not target.only and found["tree_sha256"] != source.record.facts["tree_sha256"]:
        raise ArtifactError(
            f"what was restored below {path} is not the tree that the manifest of {source.record.name} describes"
        )
    return found


def verify(source: Source, folder: Path) -> Compared:
    """Bring them back into a private folder, and compare every name, content, mode, time and link with the index."""
    path = folder / "files"
    try:
        done = restore(source, Target(path=path))
        differences = list(_compare(source, path))
    except (ArtifactError, RefusedError, ConflictError) as error:
        return Compared((str(error),))
    finally:
        _open_up(path)
    facts = source.record.facts
    if done["counts"] != {kind: count for kind, count in facts["counts"].items() if kind != "left out"}:
        differences.append(f"restored were {done['counts']}, the manifest says {facts['counts']}")
    return Compared(tuple(differences[:_NAMED]), {"names": done["names"], "bytes": facts["bytes"], **done["counts"]})


def _open_up(root: Path) -> None:
    """Let the owner of a private copy take it away again: nobody but root removes what lies in a read-only folder."""
    if os.geteuid() != 0:
        for folder, names, _ in os.walk(root):
            for name in names:
                if not (one := Path(folder, name)).is_symlink():
                    one.chmod(0o700)


def _compare(source: Source, root: Path) -> Iterator[str]:
    """What the restored tree has other than the index says, read from the disk anew."""
    names = 0
    for entry in source.entries():
        if entry.kind == "pack":
            continue
        names += 1
        path, facts = root / entry.name, entry.facts
        try:
            status = os.lstat(path)
        except OSError as error:
            yield f"{shown(entry.name)} is not there: {error.strerror or error}"
            continue
        if entry.kind == "hardlink":
            if not os.path.samestat(status, os.lstat(root / facts["to"])):
                yield f"{shown(entry.name)} is no hard link to {shown(facts['to'])}"
            continue
        if entry.kind == "link":
            if not stat.S_ISLNK(status.st_mode) or os.readlink(path) != facts["to"]:  # noqa: PTH115 (a Path would tidy it up)
                yield f"{shown(entry.name)} is no link to {shown(facts['to'])}"
        elif entry.kind == "file":
            yield from _compare_file(path, entry, status)
        if entry.kind != "link" and stat.S_IMODE(status.st_mode) != facts["mode"]:
            yield f"{shown(entry.name)} has mode {stat.S_IMODE(status.st_mode):o}, not {facts['mode']:o}"
        if status.st_mtime_ns != facts["mtime_ns"]:
            yield f"{shown(entry.name)} has another time of change"
        if os.getuid() == 0 and (status.st_uid, status.st_gid) != (facts["uid"], facts["gid"]):
            yield f"{shown(entry.name)} belongs to {status.st_uid}:{status.st_gid}, not {facts['uid']}:{facts['gid']}"
    there = sum(1 for _ in tree.walk(root, lambda name: False, lambda name, error: None))
    if there != names:
        yield f"the restored folder has {there} names, the index {names}"


def _compare_file(path: Path, entry: Entry, status: os.stat_result) -> Iterator[str]:
    facts = entry.facts
    if not stat.S_ISREG(status.st_mode) or status.st_size != facts["size"]:
        yield f"{shown(entry.name)} is no file of {facts['size']} bytes"
        return
    extents = [(int(start), int(length)) for start, length in facts.get("extents", [[0, facts["size"]]])]
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        reading = tree.Reading(handle, extents, lambda size: None)
        for _ in reading:
            pass
        if reading.digest.hexdigest() != facts["sha256"]:
            yield f"{shown(entry.name)} has other bytes"
        if "extents" in facts and status.st_blocks * 512 > status.st_size:
            yield f"{shown(entry.name)} lost its holes"
    finally:
        os.close(handle)


def _folder(target: Target) -> Path:
    if target.path is None:
        raise UsageError("files are restored into a folder: its path is missing")
    return target.path


def shown(name: str) -> str:
    """A name for people: bytes that are no UTF-8 as \\xNN, line ends as \\n."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").replace("\n", "\\n")


def _special(mode: int) -> str:
    kinds = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFBLK: "device", stat.S_IFCHR: "device"}
    return kinds.get(stat.S_IFMT(mode), "thing of an unknown kind")
