"""A MariaDB's database as it was at a moment: its backup in a private server, which applies the shipped logs itself, up to a position.

The server reads them as a replica reads what it relayed. So they are applied by what the statements truly touch, whatever database
was chosen when they were written, nothing but the one database is changed, and no live server sees any of it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import ArtifactError, NotFoundError, StorageError, UnavailableError
from tasks.backup import binlog, mariadb, point, throwaway
from tasks.backup.chain import until
from tasks.backup.components import Source, Target
from tasks.backup.logs import Shelf, Shipped
from tasks.backup.manifest import Component, Entry, Stream
from tasks.backup.mariadb_access import Access, access, quiet, rows
from tasks.backup.places import DirectoryPlace
from tasks.backup.point import Point
from tasks.backup.repository import Repository, new_backup_id

if TYPE_CHECKING:
    from pymysql.connections import Connection

SERVER_ID = 4_294_967_295
"""That of no server whose logs are replayed: a replica passes over what it takes for its own."""
STILL_SECONDS = 3600.0
"""A replay that has not moved for so long is given up."""


class PointSource:
    """A component as it was at the moment: its content from the private server, its accounts from the backup."""

    def __init__(self, record: Component, content: Source, backup: Source) -> None:
        self.record, self._content, self._backup = record, content, backup
        self._people = {id(stream) for stream in ()}
        self._of_backup: set[str] = set()

    def entries(self) -> Iterator[Entry]:
        yield from (one for one in self._content.entries() if one.kind != "accounts")
        for one in self._backup.entries():
            if one.kind == "accounts":
                if one.stream is not None:
                    self._of_backup.add(one.stream.sha256)
                yield one

    def open(self, stream: Stream) -> Iterator[bytes]:
        return (self._backup if stream.sha256 in self._of_backup else self._content).open(stream)


@contextlib.contextmanager
def source(
    repository: Repository, backup: Source, where: Point, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[PointSource, dict[str, Any]]]:
    """(the component at the moment, what was replayed). Raises ArtifactError where a log or the backup is not what it was,
    NotFoundError where no MariaDB is installed, StorageError, UnavailableError.
    """
    facts = backup.record.facts
    name = str(facts["database"])
    shelf = Shelf(repository, where.component.partition(":")[2])
    with contextlib.ExitStack() as stack:
        room = Path(stack.enter_context(_room(folder)))
        fetched = [_fetch(shelf, one, room) for one in where.logs]
        stop, replayed = _stop(where, fetched)
        lower = int(facts.get("lower_case_table_names", 0))
        running = stack.enter_context(
            throwaway.mariadb(
                room,
                options=[
                    f"--server-id={SERVER_ID}", f"--replicate-wild-do-table={_pattern(name)}.%", "--relay-log=relay",
                    "--relay-log-purge=0", "--skip-slave-start", "--slave-sql-verify-checksum=1", "--slave-exec-mode=STRICT",
                    *([f"--lower-case-table-names={lower}"] if lower else []),
                ],
            )
        )  # fmt: skip
        private = access(running.database_url(name))
        with mariadb.closing(private.connect(database=False)) as control:
            mariadb.make_definers(control, facts)
            mariadb.restore(backup, Target(url=running.database_url(name)))
            say(f"{where.component}: the backup is in a private server; {replayed['transactions']} transactions follow")
            if stop is not None:
                _replay(control, running.folder / "data", fetched, int(where.start["position"]), stop)
        keeper = Repository([DirectoryPlace(room / "copy")], scratch=room)
        record = _captured(keeper, backup.record, private)
        yield PointSource(record, keeper_source(keeper, record), backup), {**where.as_dict(), **replayed}


def keeper_source(keeper: Repository, record: Component) -> Source:
    from tasks.backup.source import ComponentSource

    return ComponentSource(keeper, record)


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="point-", dir=folder) as made:
            yield made
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error


def _pattern(name: str) -> str:
    return "".join(f"\\{one}" if one in "_%\\" else one for one in name)


def _fetch(shelf: Shelf, one: Shipped, room: Path) -> tuple[Shipped, Path]:
    path = room / one.log
    with path.open("wb") as file:
        for piece in shelf.open(one):
            file.write(piece)
    return one, path


def _stop(where: Point, fetched: list[tuple[Shipped, Path]]) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """((which log, the position to stop at) or None where nothing is to be replayed, facts of what is replayed).

    The logs are read whole: each event's checksum, that the backup's GTIDs are those at its position, that each log follows the one
    before it, and which transaction is the first that was committed at the moment or after it.
    """
    begin, limit = int(where.start["position"]), point.until(where)
    stop: tuple[int, int] | None = None
    count, last = 0, None
    state: binlog.State = {}
    for place, (one, path) in enumerate(fetched):
        reader = binlog.Reader(_pieces(path), one.log)
        ended = False
        for number, transaction in enumerate(reader.transactions()):
            if place == 0 and transaction.end <= begin:
                continue
            if place == 0 and transaction.start < begin:
                raise _of_another(where, one)
            if number == 0 or (place == 0 and stop is None and count == 0):
                _follows(where, one, place, reader, state)
            if transaction.at >= limit:
                ended = True
                break
            count, last, stop = count + 1, transaction, (place, transaction.end)
        if place == 0 and count == 0 and not ended:
            pass
        if ended:
            break
        state = dict(reader.log.ends_with)
    return stop, {
        "transactions": count,
        "last_commit": None if last is None else str(binlog.moment(last.at)),
        "stopped_at": None if stop is None else {"log": fetched[stop[0]][0].log, "position": stop[1], "gtid": last and last.gtid},
    }


def _follows(where: Point, one: Shipped, place: int, reader: binlog.Reader, state: binlog.State) -> None:
    raise NotImplementedError


def _of_another(where: Point, one: Shipped) -> ArtifactError:
    return ArtifactError(
        f"the backup stands at {where.start['position']} of {one.log} with GTIDs {where.start.get('gtid')}, and the shipped log of that "
        "name has others there: it is of another server; recover without --at from the backup alone"
    )
