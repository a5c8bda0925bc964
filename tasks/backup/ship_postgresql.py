"""The write-ahead log of a PostgreSQL cluster, brought to where its backups are, with a base backup of the cluster that it follows."""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import shutil
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ArtifactError, RefusedError, StorageError
from tasks.backup import logs
from tasks.backup.chain import ProgramError, run
from tasks.backup.logs import BASE, Head, Shelf, Shipped
from tasks.backup.postgresql_access import Access
from tasks.backup.ship_mariadb import Found

if TYPE_CHECKING:
    from psycopg import Connection

KIND = "postgresql"
BASE_DAYS = 7.0
"""A base backup is taken anew after so long: a recovery applies no more than that."""
_PIECE_BYTES = 1 << 20
_START = re.compile(r"^START WAL LOCATION: \S+ \(file ([0-9A-F]{24})\)", re.MULTILINE)
_REMOVED = "has already been removed"
_DENIED = "permission denied"


@dataclass(frozen=True, slots=True)
class Cluster:
    server: str
    segment_bytes: int
    superuser: str


def ship(where: Access, shelf: Shelf, scratch: Path) -> Found:
    """Ship what is new; a base backup first where there is none that it follows, or where that is old.

    Raises RefusedError where the server does not write or show what is needed, UnavailableError, ArtifactError, StorageError.
    """
    last, warnings, shipped = shelf.last(), [], []
    with contextlib.closing(where.connect()) as connection:
        cluster = _cluster(connection, where, shelf.database)
        broke = None
        if last is not None and last.server != cluster.server:
            broke = f"it is another cluster or timeline (it is {cluster.server}, and was {last.server})"
        base = None if last is None or broke else _newest(shelf, last.series, base=True)
        while True:
            anew = base is None or broke is not None
            series = 1 if last is None else last.series + (1 if anew else 0)
            begins = {
                "why": broke or "the first that was shipped",
                "lost_from": None if last is None else last.covers_until,
            }
            if anew or base is None or _age(base) > dt.timedelta(days=BASE_DAYS):
                base = _base(where, connection, shelf, cluster, series, begins if anew else {}, scratch)
                shipped.append(base)
            previous = None if anew or last is None else _newest(shelf, last.series, base=False)
            try:
                new, covers = _segments(where, connection, shelf, cluster, base, previous, scratch)
            except ProgramError as error:
                if _REMOVED not in error.said or anew:
                    raise
                broke = "the server removed what follows before it was shipped"
                continue
            break
    shipped += new
    if broke:
        warnings.append(
            f"between {begins['lost_from']} and {base.covers_until} it cannot be brought back to a moment: {broke}"
        )
    newest = new[-1] if new else previous or base
    head = Head(shelf.database, KIND, cluster.server, newest.series, newest.log, covers, clock.text(clock.now()), {})
    lost = None
    if broke:
        lost = {"why": broke, "from": begins["lost_from"], "until": base.covers_until, "series": base.series}
    return Found(tuple(shipped), head, tuple(warnings), broke, lost)


def _newest(shelf: Shelf, series: int, *, base: bool) -> Shipped | None:
    """The newest base backup of a series, or its newest segment."""
    names = [log for one, log in shelf.names() if one == series and log.endswith(BASE) is base]
    return shelf.read(series, names[-1]) if names else None


def _age(base: Shipped) -> dt.timedelta:
    return clock.now() - dt.datetime.fromisoformat(base.shipped_at)


def _cluster(connection: Connection[Any], where: Access, database: str) -> Cluster:
    import psycopg

    row = connection.execute("SELECT current_setting('wal_level'), (SELECT count(*) FROM pg_tablespace)").fetchone()
    assert row is not None
    if row[0] == "minimal":
        raise RefusedError(f"{where.shown} has wal_level=minimal: set wal_level=replica and start it again")
    if row[1] > 2:
        raise RefusedError(f"{where.shown} has tablespaces of its own: this release ships the logs of clusters without")
    slot = _slot(database)
    try:
        there = connection.execute("SELECT 1 FROM pg_replication_slots WHERE slot_name = %s", (slot,)).fetchone()
        if there is None:
            connection.execute("SELECT pg_create_physical_replication_slot(%s, true)", (slot,))
        found = connection.execute(
            "SELECT system_identifier, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8), "
            "(SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'), "
            "(SELECT rolname FROM pg_roles WHERE rolsuper ORDER BY oid LIMIT 1) FROM pg_control_system()"
        ).fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        raise RefusedError(
            f"{where.user} may not ship the log of {where.shown} ({error.sqlstate}): ALTER ROLE … REPLICATION"
        ) from error
    assert found is not None
    return Cluster(f"{found[0]}:{found[1]}", int(found[2]), str(found[3]))


def _slot(database: str) -> str:
    return "modelkeep_" + re.sub(r"[^a-z0-9_]", "_", database.lower())


def _now(connection: Connection[Any]) -> str:
    [now] = connection.execute("SELECT clock_timestamp()").fetchone() or (clock.now(),)
    return clock.text(now)


def _base(
    where: Access,
    connection: Connection[Any],
    shelf: Shelf,
    cluster: Cluster,
    series: int,
    begins: dict[str, Any],
    scratch: Path,
) -> Shipped:
    """A base backup of the cluster, verified by its own manifest, as one tar."""
    folder, path = scratch / "base", scratch / "base.tar"
    shutil.rmtree(folder, ignore_errors=True)
    with where.environment() as environment:
        run(
            where.program(
                "pg_basebackup", environment, f"--pgdata={folder}", "--format=plain", "--wal-method=none", "--checkpoint=fast",
                "--no-password", "--label=modelkeep", "--manifest-checksums=SHA256",
            )
        )  # fmt: skip
        run(where.program("pg_verifybackup", environment, "--no-parse-wal", "--quiet", str(folder)))
    covers = _now(connection)
    found = _START.search((folder / "backup_label").read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise ArtifactError(f"the base backup of {where.shown} has no start in its backup_label")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    name, size = found[1] + BASE, path.stat().st_size
    one = Shipped(
        database=shelf.database, kind=KIND, server=cluster.server, series=series, log=name, closed=True, size_bytes=size,
        sha256=logs.digest(_pieces(path)), begins_with="", ends_with=found[1], transactions=0, first_at=None, last_at=None,
        covers_until=covers, shipped_at=clock.text(clock.now()), pieces=shelf.put_pieces(series, name, _pieces(path)),
        begins={**begins, "superuser": cluster.superuser},
    )  # fmt: skip
    shelf.put(one)
    shutil.rmtree(folder, ignore_errors=True)
    path.unlink()
    return one


def _segments(
    where: Access,
    connection: Connection[Any],
    shelf: Shelf,
    cluster: Cluster,
    base: Shipped,
    previous: Shipped | None,
    scratch: Path,
) -> tuple[list[Shipped], str]:
    """The segments that are new, the one that was being written closed by us. (they, until when they cover)"""
    import psycopg

    covers = _now(connection)
    try:
        row = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
    except psycopg.errors.InsufficientPrivilege as error:
        raise RefusedError(
            f"{where.user} may not close the log of {where.shown}: GRANT EXECUTE ON FUNCTION pg_switch_wal() TO it"
        ) from error
    assert row is not None
    ended = str(row[0])
    before = _before(base.ends_with, cluster.segment_bytes) if previous is None else previous.log
    if logs.number(ended) <= logs.number(before):
        return [], covers
    folder = scratch / "wal"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with (folder / before).open("wb") as file:  # where pg_receivewal finds it, it goes on after it
        file.truncate(cluster.segment_bytes)
    with where.environment() as environment:
        run(
            where.program(
                "pg_receivewal", environment, f"--directory={folder}", f"--slot={_slot(shelf.database)}", "--no-loop", "--no-password",
                f"--endpos={_end(ended, cluster.segment_bytes)}",
            )
        )  # fmt: skip
    (folder / before).unlink()
    names = sorted(path.name for path in folder.iterdir() if not path.name.endswith(".partial"))
    shipped: list[Shipped] = []
    since = base.covers_until if previous is None else previous.covers_until
    due = before
    for name in names:
        due = _after(due, cluster.segment_bytes)
        if name != due:
            raise ArtifactError(f"{where.shown} sent {name} where {due} follows: ship again")
        if logs.number(name) > logs.number(ended):
            break
        path = folder / name
        _check(path, cluster)
        one = Shipped(
            database=shelf.database, kind=KIND, server=cluster.server, series=base.series, log=name, closed=True,
            size_bytes=path.stat().st_size, sha256=logs.digest(_pieces(path)), begins_with=_before(name, cluster.segment_bytes),
            ends_with=name, transactions=0, first_at=None, last_at=None, covers_until=covers if name == ended else since,
            shipped_at=clock.text(clock.now()), pieces=shelf.put_pieces(base.series, name, _pieces(path)),
        )  # fmt: skip
        shelf.put(one)
        shipped.append(one)
        path.unlink()
    if not shipped or shipped[-1].log != ended:
        raise StorageError(f"{where.shown} did not send {ended}: ship again")
    return shipped, covers


def _check(path: Path, cluster: Cluster) -> None:
    """That a segment is of this cluster and has the place that its name says. Raises ArtifactError."""
    with path.open("rb") as file:
        head = file.read(40)
    size = path.stat().st_size
    _, _, _, address, _, system = struct.unpack_from("<HHIQI4xQ", head) if len(head) == 40 else (0,) * 6
    due = _number(path.name, cluster.segment_bytes) * cluster.segment_bytes
    if size != cluster.segment_bytes or address != due or f"{system}" != cluster.server.partition(":")[0]:
        raise ArtifactError(
            f"{path.name} is not the segment of that name of cluster {cluster.server}: it is not shipped"
        )


def _number(name: str, segment_bytes: int) -> int:
    return int(name[8:16], 16) * ((1 << 32) // segment_bytes) + int(name[16:], 16)


def _named(timeline: str, number: int, segment_bytes: int) -> str:
    high, low = divmod(number, (1 << 32) // segment_bytes)
    return f"{timeline}{high:08X}{low:08X}"


def _before(name: str, segment_bytes: int) -> str:
    return _named(name[:8], _number(name, segment_bytes) - 1, segment_bytes)


def _after(name: str, segment_bytes: int) -> str:
    return _named(name[:8], _number(name, segment_bytes) + 1, segment_bytes)


def _end(name: str, segment_bytes: int) -> str:
    """The last byte of a segment as a place in the log: reached, it is whole."""
    place = (_number(name, segment_bytes) + 1) * segment_bytes - 1
    return f"{place >> 32:X}/{place & 0xFFFFFFFF:X}"


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece
