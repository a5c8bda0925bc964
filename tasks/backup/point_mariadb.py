"""A MariaDB's database as it was at a moment: its backup in a private server, which applies the shipped logs itself, up to a position.

The server reads them as a replica reads what it relayed. So they are applied by what the statements truly touch, whatever database
was chosen when they were written, nothing but the one database is changed, and no live server sees any of it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, NotFoundError, StorageError, UnavailableError
from tasks.backup import binlog, mariadb, point, throwaway
from tasks.backup.chain import until
from tasks.backup.components import Source, Target
from tasks.backup.logs import Shelf, Shipped
from tasks.backup.mariadb_access import MARIADB, Server, access, quoted, rows, server
from tasks.backup.point import Point
from tasks.backup.point_source import PointSource, captured, room
from tasks.backup.repository import Repository

if TYPE_CHECKING:
    from pymysql.connections import Connection

SERVER_ID = 4_294_967_295
"""That of no server whose logs are replayed: a replica passes over what it takes for its own."""
_PIECE_BYTES = 1 << 20
STILL_SECONDS = 3600.0
"""A replay that has not moved for so long is given up."""


@contextlib.contextmanager
def source(
    repository: Repository, backup: Source, where: Point, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[PointSource, dict[str, Any]]]:
    """(the component at the moment, what was replayed). Raises ArtifactError where a log or the backup is not what it was,
    NotFoundError where no MariaDB is installed that can, StorageError, UnavailableError.
    """
    facts = backup.record.facts
    name, lower = str(facts["database"]), int(facts.get("lower_case_table_names", 0))
    shelf = Shelf(repository, where.component.partition(":")[2])
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(room(folder))
        fetched = [_fetch(shelf, one, place) for one in where.logs]
        stop, replayed = _stop(where, fetched)
        options = [
            f"--server-id={SERVER_ID}", f"--replicate-wild-do-table={_pattern(name)}.%", "--relay-log=relay", "--relay-log-purge=0",
            "--skip-slave-start", "--slave-sql-verify-checksum=1",
            *([f"--lower-case-table-names={lower}"] if lower else []),
        ]  # fmt: skip
        running = stack.enter_context(throwaway.mariadb(place, options=options))
        private = access(running.database_url(name))
        control = stack.enter_context(contextlib.closing(private.connect(database=False)))
        if Server(MARIADB, str(facts["server"])).number > (host := server(control)).number:
            raise NotFoundError(
                f"the backup is of MariaDB {facts['server']}, and the one here is older ({host.version}): install one that is not, "
                "or recover without --at from the backup alone"
            )
        mariadb.make_definers(control, facts)
        mariadb.restore(backup, Target(url=running.database_url(name)))
        say(f"{where.component}: the backup is in a private server; {replayed['transactions']} transactions follow")
        if stop is not None:
            _replay(control, running.folder / "data", fetched, int(where.start["position"]), stop)
            _enable_events(control, name)
        part = mariadb.Part(where.component, running.database_url(name))
        yield captured(place, backup, part, "accounts"), {**where.as_dict(), **replayed}


def _pattern(name: str) -> str:
    return "".join(f"\\{one}" if one in "_%\\" else one for one in name)


def _fetch(shelf: Shelf, one: Shipped, folder: Path) -> tuple[Shipped, Path]:
    path = folder / one.log
    try:
        with path.open("wb") as file:
            for piece in shelf.open(one):
                file.write(piece)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    return one, path


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _stop(where: Point, fetched: list[tuple[Shipped, Path]]) -> tuple[tuple[int, int] | None, dict[str, Any]]:
    """((which log, the position to stop at), facts of what is replayed); None where nothing is.

    The logs are read here: each event's checksum, that the backup's GTIDs are those at its position, that each log follows the one
    before it, and which transaction is the first that was committed in the second of the moment or later.
    """
    limit = point.until(where)
    stop: tuple[int, int] | None = None
    last: binlog.Transaction | None = None
    count, state = 0, binlog.state(str(where.start.get("gtid", "")))
    for place, (one, path) in enumerate(fetched):
        reader = binlog.Reader(_pieces(path), one.log)
        following = _after(reader, where, one, state) if place == 0 else reader.transactions()
        first = next(following, None)
        if place > 0 and reader.log.begins_with != state:
            raise ArtifactError(
                f"the shipped log {one.log} does not follow {fetched[place - 1][0].log}: what is between them is missing; recover to a "
                f"moment before {fetched[place - 1][0].covers_until}"
            )
        for transaction in itertools.chain([] if first is None else [first], following):
            if transaction.at >= limit:
                return stop, _facts(count, last, fetched, stop)
            count, last, stop = count + 1, transaction, (place, transaction.end)
        state = dict(reader.log.ends_with)
    return stop, _facts(count, last, fetched, stop)


def _after(reader: binlog.Reader, where: Point, one: Shipped, due: binlog.State) -> Iterator[binlog.Transaction]:
    """Those after the position of the backup. Raises ArtifactError where the log has other GTIDs there: it is of another server."""
    begin, state, reached = int(where.start["position"]), dict[int, str](), False
    for transaction in reader.transactions():
        state = state or dict(reader.log.begins_with)
        if transaction.end <= begin:
            state[int(transaction.gtid.partition("-")[0])] = transaction.gtid
            continue
        if not reached and (transaction.start < begin or state != due):
            raise _of_another(where, one)
        reached = True
        yield transaction
    if not reached and (state or reader.log.begins_with) != due:
        raise _of_another(where, one)


def _of_another(where: Point, one: Shipped) -> ArtifactError:
    return ArtifactError(
        f"the backup stands at {where.start['position']} of {one.log} with GTIDs {where.start.get('gtid')!r}, and the shipped log of "
        "that name has others there: it is of another server; recover from the backup alone (--from ID)"
    )


def _facts(
    count: int, last: binlog.Transaction | None, fetched: list[tuple[Shipped, Path]], stop: tuple[int, int] | None
) -> dict[str, Any]:
    at = None if last is None else binlog.moment(last.at)
    return {
        "transactions": count,
        "last_commit": None if at is None else clock.text(at),
        "stopped_at": None
        if stop is None or last is None
        else {"log": fetched[stop[0]][0].log, "position": stop[1], "gtid": last.gtid},
    }


def _replay(
    control: Connection[Any], data: Path, fetched: list[tuple[Shipped, Path]], begin: int, stop: tuple[int, int]
) -> None:
    """Raises ArtifactError where the server cannot apply an event, UnavailableError where it stands still."""
    names = [f"relay.{number:06d}" for number in range(1, len(fetched) + 1)]
    try:
        for name, (_, path) in zip(names, fetched, strict=True):
            path.rename(data / name)
        (data / "relay.index").write_text("".join(f"./{name}\n" for name in names))
    except OSError as error:
        raise StorageError(f"{data} cannot be written: {error.strerror or error}") from error
    goal = names[stop[0]], stop[1]
    rows(
        control,
        "CHANGE MASTER TO MASTER_HOST='none.invalid', MASTER_USER='nobody', MASTER_USE_GTID=no, "
        f"RELAY_LOG_FILE='{names[0]}', RELAY_LOG_POS={begin}",
    )
    rows(control, f"START SLAVE SQL_THREAD UNTIL RELAY_LOG_FILE='{goal[0]}', RELAY_LOG_POS={goal[1]}")
    status = _status(control)
    while not _over(status, goal):
        before = status
        if not until(partial(_moved, control, before), STILL_SECONDS, 0.05):
            raise UnavailableError(
                f"the replay stands still at {before['Relay_Log_Pos']} of {fetched[names.index(before['Relay_Log_File'])][0].log}: "
                "look at what the private server does, then recover again"
            )
        status = _status(control)
    if status["Last_SQL_Errno"] or (status["Relay_Log_File"], status["Relay_Log_Pos"]) != goal:
        log = fetched[names.index(status["Relay_Log_File"])][0].log
        raise ArtifactError(
            f"the log {log} does not apply at {status['Relay_Log_Pos']} (error {status['Last_SQL_Errno']}): the backup or the log is not "
            "what the server had; recover to a moment before, or from the backup alone (--from ID)"
        )
    rows(control, "STOP SLAVE")
    rows(control, "RESET SLAVE ALL")


def _status(control: Connection[Any]) -> dict[str, Any]:
    with control.cursor() as cursor:
        cursor.execute("SHOW SLAVE STATUS")
        row = cursor.fetchone()
        names = [one[0] for one in cursor.description or ()]
    found = dict(zip(names, row or (), strict=True))
    return {name: found[name] for name in ("Relay_Log_File", "Relay_Log_Pos", "Slave_SQL_Running", "Last_SQL_Errno")}


def _over(status: dict[str, Any], goal: tuple[str, int]) -> bool:
    # At the end of the last log the server waits for more: it has then done what it was to do, and does not stop by itself.
    return status["Slave_SQL_Running"] == "No" or (status["Relay_Log_File"], status["Relay_Log_Pos"]) == goal


def _moved(control: Connection[Any], before: dict[str, Any]) -> bool:
    return _status(control) != before


def _enable_events(control: Connection[Any], name: str) -> None:
    """A replica disables the events that it is told of. They shall be as they were on the server."""
    found = rows(
        control,
        "SELECT event_name, definer FROM information_schema.events WHERE event_schema = %s AND status = 'SLAVESIDE_DISABLED'",
        (name,),
    )
    for event, definer in found:
        user, _, host = str(definer).rpartition("@")
        rows(control, f"ALTER DEFINER={quoted(user)}@{quoted(host)} EVENT {quoted(name)}.{quoted(str(event))} ENABLE")
