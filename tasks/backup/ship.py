"""Shipping of logs: for each database that [backup] logs names, what its server wrote since the last time. Every five minutes."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from registry.errors import ModelkeepError, RefusedError, SettingsError, StorageError
from registry.redaction import redact
from registry.settings import Settings
from tasks.backup import ledger, point, postgresql_access, ship_mariadb, ship_postgresql
from tasks.backup.hiding import hider
from tasks.backup.log_lock import shipping
from tasks.backup.logs import Head, Shelf
from tasks.backup.manifest import FAILED
from tasks.backup.mariadb_access import access
from tasks.backup.places import keep_until
from tasks.backup.repository import Repository, open_repository

WORK = "ship-logs-work"


@dataclass(frozen=True, slots=True)
class Shipment:
    """What came of one database. `gap`: since when, and why, it cannot be brought back to a point in time."""

    database: str
    logs: tuple[str, ...] = ()
    size_bytes: int = 0
    transactions: int = 0
    covers_until: str | None = None
    gap: str | None = None
    warnings: tuple[str, ...] = ()
    failed: str | None = None
    lost: dict[str, Any] | None = None
    """{"why", "from", "until", "series"}: of a PostgreSQL, between which moments nothing comes back, where that is since this run."""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def exit_code(found: list[Shipment]) -> int:
    """1 where a database's logs could not be shipped, 3 where they were, and no backup can use them yet."""
    if any(one.failed for one in found):
        return 1
    return 3 if any(one.gap for one in found) else 0


def ship(
    settings: Settings, names: Sequence[str] = (), *, tell: Callable[[str], None] = lambda _: None
) -> list[Shipment]:
    """Ship the logs of all that the settings name, or of these of them; one that fails keeps no other from it.

    Raises SettingsError where a name is none of [[databases]], LockedError where another run is at it, StorageError.
    """
    urls = {one.name: one for one in settings.databases}
    if missing := sorted(set(settings.backup.logs) - set(urls)):
        raise SettingsError(
            f"[backup] logs = {missing}: there is no [[databases]] of that name; there are {', '.join(urls) or 'none'}"
        )
    hide, found = hider(settings), []
    if not settings.backup.logs:
        ledger.forget_logs(settings.home)
        return []
    with _alone(settings.home) as scratch:
        try:
            repository = open_repository(settings, create=True)
        except ModelkeepError as error:
            why = hide(redact(str(error)))
            for name in names or settings.backup.logs:
                for text in _noted(settings, Shipment(name, failed=why)).warnings:
                    tell(f"{name}: {text}")
            raise
        for name in names or settings.backup.logs:
            try:
                one = _ship_one(repository, name, urls[name].connection_url(), scratch, keep_until(settings))
            except ModelkeepError as error:
                one = Shipment(name, failed=hide(redact(str(error))))
            found.append(one := _noted(settings, one))
            tell(summary(one))
            for text in one.warnings:
                tell(f"{name}: {text}")
    return found


def _noted(settings: Settings, one: Shipment) -> Shipment:
    """It, for `status`. Where that cannot be written it has a warning more: what became of the logs is the same."""
    try:
        ledger.note_shipped(settings.home, one.as_dict(), settings.backup.logs)
    except StorageError as error:
        return replace(one, warnings=(*one.warnings, f"`status` does not know of it: {error}"))
    return one


def summary(one: Shipment) -> str:
    if one.failed:
        return f"{one.database}: NOT SHIPPED: {one.failed}"
    what = "nothing new"
    if one.logs:
        what = f"{_counted(len(one.logs), 'log')} shipped"
        if one.transactions:  # of a PostgreSQL they are not counted
            what = f"{_counted(len(one.logs), 'log')} with {_counted(one.transactions, 'transaction')} shipped"
    return f"{one.database}: {what}, whole until {one.covers_until}" + (f"; {one.gap}" if one.gap else "")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _ship_one(repository: Repository, name: str, url: str, scratch: Path, locked_until: dt.datetime | None) -> Shipment:
    if not url.startswith(("mysql", "mariadb", "postgresql")):
        raise RefusedError(
            f"{name} is at {url.partition(':')[0]}://…: logs are shipped of MariaDB and PostgreSQL only; take it out of [backup] logs"
        )
    shelf = Shelf(repository, name, keep_until=locked_until)
    copied = shelf.copy_missing()
    before = shelf.head()
    gap: dict[str, Any] | None = None
    if url.startswith("postgresql"):  # its logs follow a base backup of their own
        found = ship_postgresql.ship(postgresql_access.access(url), shelf, scratch)
    else:
        starts = partial(backed_up, repository, name)
        found = ship_mariadb.ship(access(url), shelf, scratch, starts)
        gap = _gap(shelf, before, found.head, starts)
    shelf.put_head(replace(found.head, gap=gap))
    warnings = list(found.warnings)
    try:
        repository.keep_keys(locked_until if found.shipped or copied else None)
    except StorageError as error:  # they are shipped all the same
        warnings.append(
            f"their key could not be locked for as long as they are; it is tried again with the next log: {error}"
        )
    if copied:
        warnings.append(f"{copied} logs are now in places that lacked them")
    if shelf.damaged:
        warnings.append(f"{len(shelf.damaged)} logs are not in every place: {next(iter(shelf.damaged.values()))}")
    warnings += [
        f"{repository.all_places()[number].shown} did not take them: {why}" for number, why in repository.down.items()
    ]
    return Shipment(
        name,
        tuple(one.log for one in found.shipped),
        sum(one.size_bytes for one in found.shipped),
        sum(one.transactions for one in found.shipped),
        found.head.covers_until,
        None if gap is None else words(name, gap),
        tuple(warnings),
        lost=found.lost,
    )


def words(database: str, gap: dict[str, Any]) -> str:
    since = f"since {gap['since']} " if gap.get("since") else ""
    return (
        f"{since}it cannot be brought back to a point in time, because {gap['why']}: take a backup "
        f"(modelkeep backup --components database:{database})"
    )


def backed_up(repository: Repository, database: str) -> list[dict[str, Any]]:
    """Where in the server's logs the backups of the database stand."""
    positions = []
    for manifest in repository.manifests():
        component = manifest.component(f"database:{database}")
        if component is not None and component.state != FAILED and component.snapshot.get("binlog"):
            positions.append(dict(component.snapshot["binlog"]))
    return positions


def _gap(
    shelf: Shelf, before: Head | None, head: Head, starts: Callable[[], list[dict[str, Any]]]
) -> dict[str, Any] | None:
    """There is one from the beginning of a series until a backup stands in its logs. By the series, not by what this run did: the
    one that began it may have been killed before it could say so.
    """
    same = before is not None and before.series == head.series
    if before is not None and same and before.gap is None:
        return None
    if any(_reached(shelf, head, one) for one in starts()):
        return None
    if before is not None and same:
        return before.gap
    begins = shelf.begins(head.series)
    if begins.get("lost_from") is None:
        return {"why": "no backup was taken since its logs are shipped", "since": None}
    return {"why": begins["why"], "since": begins["lost_from"]}


def _reached(shelf: Shelf, head: Head, start: dict[str, Any]) -> bool:
    """Whether a backup stands in the logs of now: in one that is shipped, or in the one that is being written."""
    if start.get("server") != head.server:
        return False
    log = point.holding(shelf, start)
    if log is not None:
        return log.series == head.series
    return start.get("file") == head.position.get("file")


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[Path]:
    """A folder for what is on its way, ours alone. Raises LockedError, StorageError."""
    with shipping(home):
        folder = home / WORK
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(mode=0o700)
            yield folder
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
