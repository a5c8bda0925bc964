"""A database's life in a repository in memory: backups, shipped logs, gaps, other servers; what tests of the logs' retention prune."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from registry import clock
from registry.errors import ConflictError, NotFoundError, StorageError
from tasks.backup import log_plan, logs, point, prune_logs
from tasks.backup.logs import Head, Shelf, Shipped
from tasks.backup.manifest import COMPLETE, Component, Manifest
from tasks.backup.places import Stat
from tasks.backup.repository import Repository

BEGIN = dt.datetime(2026, 11, 1, tzinfo=dt.UTC)
SEGMENT = 1 << 24
DAY = dt.timedelta(days=1)


class Killed(BaseException):
    """What a test raises where a process would be killed: nothing catches it."""


class MemoryPlace:
    """A place of names and bytes. `before_delete` and `before_list` may raise."""

    def __init__(self, shown: str = "memory") -> None:
        self.shown, self.names = shown, dict[str, bytes]()
        self.kept: dict[str, dt.datetime | None] = {}
        self.before_delete: Callable[[str], None] = lambda _: None
        self.before_list: Callable[[str], None] = lambda _: None

    def put(self, name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        if only_new and self.names.get(name, data) != data:
            raise ConflictError(f"{name} is there")
        self.names[name], self.kept[name] = data, keep_until

    def get(self, name: str) -> bytes:
        if name not in self.names:
            raise NotFoundError(f"{name} is not in {self.shown}")
        return self.names[name]

    def stat(self, name: str) -> Stat | None:
        return Stat(name, len(self.names[name]), clock.now()) if name in self.names else None

    def list(self, prefix: str = "") -> Iterator[Stat]:
        self.before_list(prefix)
        for name in sorted(self.names):
            if name.startswith(prefix):
                yield Stat(name, len(self.names[name]), clock.now())

    def delete(self, name: str) -> bool:
        self.before_delete(name)
        return self.names.pop(name, None) is not None

    def flush(self) -> None:
        return

    def logs(self) -> Sequence[str]:
        """ "000001/binlog.000001" of each document."""
        found = [name.removesuffix(".json").removeprefix("logs/app/") for name in self.names if name.endswith(".json")]
        return sorted(name for name in found if "/" in name and not name.startswith(("keys/", "states/", "intents/")))

    def refuse(self, part: str, why: str = "it is locked") -> None:
        """Names with this in them are not let go."""

        def no(name: str) -> None:
            if part in name:
                raise StorageError(f"{name} could not be deleted: {why}")

        self.before_delete = no


class History:
    """Subclasses say what a server writes. Each step takes a minute."""

    kind = "mariadb"

    def __init__(self, places: int = 1, *, database: str = "app", beside: History | None = None) -> None:
        """`beside`: whose places it shares."""
        fresh = [MemoryPlace(f"memory {number}") for number in range(places)]
        self.places: list[MemoryPlace] = beside.places if beside else fresh
        self.repository: Repository = beside.repository if beside else Repository(list(self.places))
        self.database, self.shelf = database, Shelf(self.repository, database)
        self.now, self.series, self.count = BEGIN, 1, 0
        self.moments: list[dt.datetime] = []
        self.backups: list[Manifest] = []

    def tick(self) -> str:
        self.now += dt.timedelta(minutes=1)
        self.moments.append(self.now)
        return clock.text(self.now)

    def snapshot(self, at: str) -> dict[str, Any]:
        return {"began_at": at}

    def back_up(self) -> Manifest:
        at, self.count = self.tick(), self.count + 1
        component = Component(f"database:{self.database}", self.kind, COMPLETE, at, at, snapshot=self.snapshot(at))
        backup_id = f"2026{self.count:04}T020000Z-{sum(map(ord, self.database)):06x}"
        record = Manifest(backup_id, "0" * 64, COMPLETE, at, at, ("all",), (component,), sequence=self.count)
        self.repository.write_manifest(record)
        self.backups.append(record)
        return record

    def drop(self, record: Manifest) -> None:
        self.backups.remove(record)
        for place in self.places:
            place.delete(f"{record.backup_id}.manifest.json")

    def put(
        self, log: str, *, begins_with: str, ends_with: str, size: int, covers: str, begins: dict[str, Any] | None
    ) -> None:
        one = Shipped(
            self.database, self.kind, self.server, self.series, log, True, size, "0" * 64, begins_with, ends_with, 1, covers, covers, covers,
            covers, self.shelf.put_pieces(self.series, log, [f"{self.series} {log}".encode() * 9]), begins,
        )  # fmt: skip
        self.shelf.put(one)

    @property
    def server(self) -> str:
        raise NotImplementedError

    def write(self) -> None:
        raise NotImplementedError

    def ship(self) -> None:
        raise NotImplementedError

    def ways(self) -> dict[tuple[str, dt.datetime], object]:
        """For each backup that is there, and each moment after it, the way to it that a recovery would go."""
        found: dict[tuple[str, dt.datetime], object] = {}
        for manifest in self.backups:
            [component] = manifest.components
            for moment in self.moments:
                if dt.datetime.fromisoformat(manifest.began_at) > moment:
                    continue
                try:
                    found[manifest.backup_id, moment] = point.plan(self.repository, component, moment)
                except NotFoundError as error:
                    found[manifest.backup_id, moment] = str(error)
        return found


class MariaDB(History):
    def __init__(self, places: int = 1, *, database: str = "app", beside: History | None = None) -> None:
        super().__init__(places, database=database, beside=beside)
        self.uid, self.file, self.position, self.sequence, self.fresh = 1, 1, 4, 0, True
        self.file_began = ""

    @property
    def server(self) -> str:
        return f"7:{self.uid}"

    @property
    def gtid(self) -> str:
        return f"0-7-{self.sequence}" if self.sequence else ""

    @property
    def log(self) -> str:
        return f"binlog.{self.file:06d}"

    def snapshot(self, at: str) -> dict[str, Any]:
        where = {"file": self.log, "position": self.position, "gtid": self.gtid, "server": self.server}
        return {"began_at": at, "binlog": where}

    def write(self) -> None:
        self.tick()
        self.sequence, self.position = self.sequence + 1, self.position + 100

    def _next_file(self) -> None:
        self.file, self.position, self.file_began = self.file + 1, 4, self.gtid

    def ship(self) -> None:
        covers = self.tick()
        begins = {"why": "the first of its series", "lost_from": None} if self.fresh else None
        log, self.fresh = self.log, False
        self.put(
            log, begins_with=self.file_began, ends_with=self.gtid, size=self.position, covers=covers, begins=begins
        )
        self._next_file()
        position = {"gtid": self.gtid, "file": self.log}
        self.shelf.put_head(Head(self.database, "mariadb", self.server, self.series, log, covers, covers, position))

    def _begin_anew(self) -> None:
        if not self.fresh:
            self.series += 1
        self.fresh = True

    def lose(self) -> None:
        """The server purges a log that was not shipped."""
        self.write()
        self._next_file()
        self._begin_anew()

    def reset(self) -> None:
        self.tick()
        self.file, self.position, self.sequence, self.file_began = 1, 4, 0, ""
        self._begin_anew()

    def replace(self) -> None:
        self.uid += 1
        self.reset()


class PostgreSQL(History):
    kind = "postgresql"

    def __init__(self, places: int = 1, *, database: str = "app", beside: History | None = None) -> None:
        super().__init__(places, database=database, beside=beside)
        self.timeline, self.segment, self.fresh = 1, 1, True

    @property
    def server(self) -> str:
        return f"7000:{self.timeline:08X}"

    def _name(self, number: int) -> str:
        return f"{self.timeline:08X}{0:08X}{number:08X}"

    def base(self) -> None:
        covers, name = self.tick(), self._name(self.segment)
        begins: dict[str, Any] = {"superuser": "postgres"}
        if self.fresh:
            begins |= {"why": "the first of its series", "lost_from": None}
        self.fresh = False
        self.put(f"{name}{logs.BASE}", begins_with="", ends_with=name, size=9, covers=covers, begins=begins)

    def write(self) -> None:
        self.tick()

    def ship(self) -> None:
        if self.fresh:
            self.base()
        covers, name = self.tick(), self._name(self.segment)
        self.put(
            name, begins_with=self._name(self.segment - 1), ends_with=name, size=SEGMENT, covers=covers, begins=None
        )
        self.segment += 1
        self.shelf.put_head(Head(self.database, "postgresql", self.server, self.series, name, covers, covers))

    def lose(self) -> None:
        self.tick()
        self.segment += 1
        if not self.fresh:
            self.series += 1
        self.fresh = True

    def reset(self) -> None:
        """Another timeline, after a failover."""
        self.timeline += 1
        self.lose()

    replace = reset


def run(
    history: History,
    home: Path,
    *,
    days: float = 0,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = lambda _: None,
) -> log_plan.Logs:
    now = clock.now() + days * DAY
    return prune_logs.carry_out(
        history.repository, home, now=now, grace=DAY, wait_seconds=0, monotonic=monotonic, sleep=sleep
    )


def look(history: History) -> tuple[log_plan.OfDatabase, ...]:
    return log_plan.preview(history.repository, history.repository.manifests(), clock.now() - DAY).databases


def three_days(make: Callable[[int], History] = MariaDB, places: int = 1) -> History:
    """Three backups, with two logs that were shipped after each; the first backup is gone by now."""
    history = make(places)
    for _ in range(3):
        history.back_up()
        if isinstance(history, PostgreSQL):
            history.base()
        for _ in range(2):
            history.write()
            history.ship()
    history.drop(history.backups[0])
    return history
