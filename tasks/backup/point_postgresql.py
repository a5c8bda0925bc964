"""A PostgreSQL database as it was at a moment: the whole cluster in a private server, which applies its log up to that moment."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from registry import clock
from registry.errors import ArtifactError, NotFoundError, StorageError
from tasks.backup import postgresql, throwaway
from tasks.backup.chain import find, until
from tasks.backup.components import Source
from tasks.backup.logs import BASE, Shelf, Shipped
from tasks.backup.manifest import Component
from tasks.backup.point import Point
from tasks.backup.point_source import PointSource, captured, room
from tasks.backup.repository import Repository

SECONDS = 6 * 3600.0
_SHORT = "recovery ended before configured recovery target was reached"
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def plan(repository: Repository, component: Component, moment: dt.datetime) -> Point:
    """As `point.plan`: the newest base backup of the cluster before the moment, and the segments that follow it."""
    name = component.name.partition(":")[2]
    shelf = Shelf(repository, name)
    names = shelf.names()
    for series, log in reversed(names):
        if not log.endswith(BASE):
            continue
        base = shelf.read(series, log)
        if dt.datetime.fromisoformat(base.covers_until) <= moment:
            return _from(repository, shelf, component, base, names, moment)
    raise NotFoundError(f"no base backup of its cluster is from before {clock.text(moment)} ([backup] logs)")


def _from(
    repository: Repository,
    shelf: Shelf,
    component: Component,
    base: Shipped,
    names: list[tuple[int, str]],
    moment: dt.datetime,
) -> Point:
    chain, ends, due, short = [base], base.covers_until, None, None
    segments = [
        log for series, log in names if series == base.series and not log.endswith(BASE) and log >= base.ends_with
    ]
    for log in segments:
        one = shelf.read(base.series, log)
        if (log != base.ends_with) if due is None else (one.begins_with != due):
            short = f"a log before {log} is missing in {', '.join(repository.shown)}"
            break
        chain.append(one)
        due, ends = one.ends_with, one.covers_until
        if dt.datetime.fromisoformat(ends) >= moment:
            break
    if due is None:
        raise NotFoundError(f"the log {base.ends_with}, with which its base backup begins, is missing")
    head = shelf.head()
    if head is not None and head.series == base.series and head.log == due:
        ends = max(ends, head.covers_until)
    reaches = clock.text(moment)
    if dt.datetime.fromisoformat(ends) < moment:
        reaches = ends
        after = [series for series, _ in names if series > base.series]
        if short is None and after:
            short = str(shelf.begins(after[0]).get("why", "the logs after it do not follow"))
        short = short or f"nothing was shipped since {ends}"
    return Point(component.name, moment, reaches, {"file": base.log}, tuple(chain), short)


@contextlib.contextmanager
def source(
    repository: Repository, backup: Source, where: Point, folder: Path, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[PointSource, dict[str, Any]]]:
    """As `point.source`."""
    shelf = Shelf(repository, where.component.partition(":")[2])
    database = str(backup.record.facts["database"]["name"])
    base, *segments = where.logs
    with contextlib.ExitStack() as stack:
        place, runtime = stack.enter_context(throwaway.room_of_account(folder))
        for one in (base, *segments):
            _fetch(shelf, one, place)
        _prepare(place, base)
        superuser = str((base.begins or {}).get("superuser"))
        say(f"{where.component}: its cluster is in a private server; {len(segments)} logs follow")
        stack.enter_context(_recovered(place, runtime, where.moment, superuser, database))
        url = f"postgresql+psycopg://{quote(superuser, safe='')}@/{quote(database, safe='')}?host={quote(str(runtime), safe='/')}"
        part = postgresql.Part(where.component, url)
        copy = stack.enter_context(room(folder))
        yield captured(copy, backup, part, "roles"), where.as_dict()


def _fetch(shelf: Shelf, one: Shipped, place: Path) -> None:
    path = place / ("base.tar" if one.log.endswith(BASE) else f"wal/{one.log}")
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            for piece in shelf.open(one):
                file.write(piece)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def _prepare(place: Path, base: Shipped) -> None:
    """The cluster as it was backed up, with a configuration of our own: that of the server names its files and its archive."""
    account = throwaway.account()
    data = place / "data"
    try:
        with tarfile.open(place / "base.tar") as archive:
            archive.extractall(data, filter="data")
        (place / "base.tar").unlink()
        (place / "conf").write_text("")
        (place / "hba").write_text("local all all trust\n")
        (data / "postgresql.auto.conf").write_text("")
        (data / "recovery.signal").touch()
        if account.pw_uid != os.getuid():
            for path in (place, *place.rglob("*")):
                os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)
        data.chmod(0o700)
    except (OSError, tarfile.TarError) as error:
        raise StorageError(f"the base backup {base.log} could not be unpacked in {place}: {error}") from error


@contextlib.contextmanager
def _recovered(place: Path, runtime: Path, moment: dt.datetime, superuser: str, database: str) -> Iterator[None]:
    """The cluster, having applied its log up to the moment, or, where the log ends before, to its end. Raises ArtifactError."""
    text = moment.astimezone(dt.UTC).isoformat(sep=" ")
    target = [f"recovery_target_time={text}", "recovery_target_inclusive=off", "recovery_target_action=promote"]
    with contextlib.ExitStack() as stack:
        for settings in (target, []):
            process = stack.enter_context(_served(place, runtime, settings))
            if until(partial(_ready, process, runtime, superuser, database), SECONDS, 0.05) and process.poll() is None:
                yield
                return
            said = throwaway.log(place)
            # Its log ends before the moment, of which nothing tells the server but the end: then all of it is applied.
            if process.poll() is None or not settings or _SHORT not in said:
                raise ArtifactError(f"the shipped logs could not be applied: {' '.join(said.split())[-600:]}")


def _served(
    place: Path, runtime: Path, settings: list[str]
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    account = throwaway.account()
    words = [
        f"config_file={place / 'conf'}", f"hba_file={place / 'hba'}", f"ident_file={place / 'conf'}", "listen_addresses=",
        f"unix_socket_directories={runtime}", "port=5432", "hot_standby=off", "fsync=off", "archive_mode=off", "jit=off",
        f"restore_command=cp \"{place / 'wal'}/%f\" \"%p\"", "autovacuum=off", "max_wal_size=4GB", *settings,
    ]  # fmt: skip
    command: list[str | Path] = [
        find("postgres", also=_FOLDERS), "-D", place / "data", *(word for one in words for word in ("-c", one)),
    ]  # fmt: skip
    return throwaway.served(place, command, lambda: True, user=(account.pw_uid, account.pw_gid), with_us=signal.SIGQUIT)


def _ready(process: subprocess.Popen[bytes], runtime: Path, superuser: str, database: str) -> bool:
    """Whether there is no more to wait for: it answers as a primary, or it has ended."""
    import psycopg

    if process.poll() is not None:
        return True
    try:
        # Both are named, or PGPORT and PGHOSTADDR of whoever runs this have their say.
        with psycopg.connect(
            host=str(runtime), hostaddr="", port=5432, user=superuser, dbname=database, connect_timeout=5
        ) as connection:
            return connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
    except psycopg.OperationalError:
        return False
