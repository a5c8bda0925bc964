"""Private servers to restore into and look at: a socket or a free port of loopback, a folder of their own, gone with us."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

from registry.errors import NotFoundError, StorageError, UnavailableError
from tasks.backup.chain import Program, find, run, version

START_SECONDS = 60.0
PORT_TRIES = 5
SOCKET_FOLDER_LETTERS = 80
PREFIX = "modelkeep-throwaway-"
_NOT_THE_CONTENT = (
    "No space left",
    "ERROR 1021",
    "ERROR 1114",
    "ERROR 2006",
    "ERROR 2013",
    "could not extend file",
    "stood still",
)
MARIADB_USER, POSTGRESQL_USER = "root", "keeper"
_POSTGRESQL = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers. `url` is for SQLAlchemy (databases; of the administrator), redis-py, or Chroma's client."""

    url: str
    folder: Path
    version: str
    process: subprocess.Popen[bytes]
    socket: Path | None = None
    port: int | None = None

    def database_url(self, name: str) -> str:
        """The URL of one of its databases."""
        head, mark, query = self.url.partition("?")
        return f"{head.rpartition('/')[0]}/{quote(name, safe='')}{mark}{query}"

    def blames_the_content(self, said: str) -> bool:
        """Whether a failed restore into this server is the backup's fault: not where the server died, or its disk is full."""
        return self.process.poll() is None and not any(word in said for word in _NOT_THE_CONTENT)

    def log(self) -> str:
        return _log(self.folder)


@contextlib.contextmanager
def mariadb(folder: Path, *, options: Sequence[str] = ()) -> Iterator[Running]:
    """An empty MariaDB, on a socket only. Raises NotFoundError where it is not installed, UnavailableError where it does not start."""
    program, installer = find("mariadbd", "mysqld"), find("mariadb-install-db", "mysql_install_db")
    said = version(program)
    if "mariadb" not in said.lower():
        raise NotFoundError(f"{program} is no MariaDB ({said}): install mariadb-server")
    with _room(folder, None) as (place, runtime):
        data, path, name = place / "data", runtime / "db", pwd.getpwuid(os.getuid()).pw_name
        run(
            Program(
                [
                    installer, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
                    "--skip-test-db", "--force", f"--user={name}",
                ],
                silent_seconds=START_SECONDS,
            )
        )  # fmt: skip
        command: list[str | Path] = [
            program, "--no-defaults", f"--user={name}", f"--datadir={data}", f"--socket={path}", "--skip-networking",
            "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync",
            "--innodb-doublewrite=0", "--innodb-buffer-pool-size=128M", "--max-allowed-packet=1G", "--skip-log-bin",
            "--event-scheduler=OFF", "--character-set-server=utf8mb4", "--loose-innodb-log-file-size=256M",
            f"--pid-file={place / 'pid'}", *options,
        ]  # fmt: skip
        with _served(place, command, lambda: _mariadb_answers(path)) as process:
            url = f"mysql+pymysql://{MARIADB_USER}@localhost/mysql?unix_socket={quote(str(path), safe='/')}&charset=utf8mb4"
            yield Running(url, place, said, process, socket=path)


@contextlib.contextmanager
def postgresql(folder: Path, *, options: Sequence[str] = ()) -> Iterator[Running]:
    """An empty PostgreSQL cluster, on a socket only, whose administrator is `keeper`; `options` are "name=value".

    As another user where we are root, since the program refuses root. Raises as `mariadb` does.
    """
    program = find("postgres", also=_POSTGRESQL)
    said = version(program)
    account = _account()
    with _room(folder, account) as (place, runtime):
        data = place / "data"
        user = (account.pw_uid, account.pw_gid)
        beside = (folder / "initdb" for folder in (program.resolve().parent, program.parent))
        initdb = next((one for one in beside if one.exists()), None) or find("initdb", also=_POSTGRESQL)
        run(
            Program(
                [
                    initdb, f"--pgdata={data}", f"--username={POSTGRESQL_USER}", "--auth=trust", "--no-sync",
                    "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions",
                ],
                silent_seconds=START_SECONDS, user=user, folder=place,
            )
        )  # fmt: skip
        settings = (
            "listen_addresses=", f"unix_socket_directories={runtime}", "port=5432", "fsync=off", "full_page_writes=off",
            "autovacuum=off", "jit=off", "max_connections=20", "archive_mode=off", "max_wal_size=4GB", *options,
        )  # fmt: skip
        command: list[str | Path] = [program, "-D", data, *(word for setting in settings for word in ("-c", setting))]
        with _served(
            place, command, lambda: _postgresql_answers(runtime), user=user, with_us=signal.SIGQUIT
        ) as process:
            url = f"postgresql+psycopg://{POSTGRESQL_USER}@/postgres?host={quote(str(runtime), safe='/')}"
            yield Running(url, place, said, process, socket=runtime / ".s.PGSQL.5432")


@contextlib.contextmanager
def redis(
    folder: Path, *, options: Sequence[str] = (), prepare: Callable[[Path], None] | None = None
) -> Iterator[Running]:
    """A Redis on a socket only, which writes nothing to disk unless `options` say so.

    `prepare` is called with its empty data folder before it starts, to put a dump there.
    """
    program = find("redis-server")
    said = version(program)
    with _room(folder, None) as (place, runtime):
        data, path = place / "data", runtime / "redis"
        data.mkdir()
        if prepare is not None:
            prepare(data)
        command: list[str | Path] = [
            program, "--port", "0", "--unixsocket", path, "--unixsocketperm", "700", "--dir", data, "--save", "",
            "--appendonly", "no", *options,
        ]  # fmt: skip
        with _served(place, command, lambda: _redis_answers(path)) as process:
            yield Running(f"unix://{path}", place, said, process, socket=path)


@contextlib.contextmanager
def chroma(folder: Path, *, data: Path | None = None) -> Iterator[Running]:
    """A Chroma server on a free port of loopback, over `data` or an empty folder."""
    program = find("chroma", also=(Path(sys.executable).parent,))
    from importlib import metadata

    with _room(folder, None) as (place, _):
        store = data or place / "data"
        store.mkdir(exist_ok=True)
        for last in (number == PORT_TRIES - 1 for number in range(PORT_TRIES)):
            port = _free_port()
            command: list[str | Path] = [program, "run", "--host", "127.0.0.1", "--port", str(port), "--path", store]
            with contextlib.ExitStack() as stack:
                try:
                    process = stack.enter_context(
                        _served(place, command, partial(_chroma_answers, port), environment={"HOME": str(place)})
                    )
                except UnavailableError as error:  # somebody else took the port
                    if last or "in use" not in str(error).lower():
                        raise
                    continue
                yield Running(f"http://127.0.0.1:{port}", place, metadata.version("chromadb"), process, port=port)
                return


@contextlib.contextmanager
def _served(
    place: Path,
    command: Sequence[str | Path],
    answers: Callable[[], bool],
    *,
    user: tuple[int, int] | None = None,
    with_us: int = signal.SIGKILL,
    environment: dict[str, str] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    program = Program(command, user=user, environment=environment or {})
    with (place / "log").open("ab") as log:
        process = subprocess.Popen(
            program.launched(with_us=with_us), cwd=place, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=program.surroundings(), start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers():
            if process.poll() is not None or time.monotonic() > deadline:
                how = "does not answer" if process.poll() is None else f"ended with {process.returncode}"
                raise UnavailableError(f"a private {program.name} {how}: {' '.join(_log(place).split())}")
            time.sleep(0.02)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(with_us)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait(START_SECONDS)


@contextlib.contextmanager
def _room(folder: Path, account: pwd.struct_passwd | None) -> Iterator[tuple[Path, Path]]:
    """A folder below `folder` for the server's data, and a short one for its socket, whose path has 107 letters at most.

    Where the server runs as somebody else, who may not look into `folder`, both are in a temporary folder of the system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: tuple[Path, ...] = (folder, Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"))
    _sweep(*places)
    if account is not None and account.pw_uid != os.getuid():
        places = tuple(one for one in places if one.is_dir() and _open_to_all(one))
        if not places:
            raise UnavailableError(
                f"{account.pw_name}, who runs PostgreSQL, may look into no temporary folder: set TMPDIR to one"
            )
    made: list[Path] = []
    try:
        made.append(Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=places[0])))
        if len(str(made[0])) > SOCKET_FOLDER_LETTERS:
            short = min(places, key=lambda one: len(str(one)))
            made.append(Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=short)))
        if account is not None:
            for one in made:
                os.chown(one, account.pw_uid, account.pw_gid)
        yield made[0], made[-1]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StorageError(f"{places[0]} has no room for a private server: free some, or set TMPDIR") from error
    finally:
        for one in made:
            shutil.rmtree(one, ignore_errors=True)


def _sweep(*parents: Path) -> None:
    """Folders of processes that were killed: their servers died with them, the files stayed."""
    for parent in set(parents):
        for found in parent.glob(f"{PREFIX}*"):
            owner = found.name.removeprefix(PREFIX).split("-")[0]
            if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
                shutil.rmtree(found, ignore_errors=True)


def _open_to_all(folder: Path) -> bool:
    return all(one.stat().st_mode & 0o001 for one in (folder, *folder.resolve().parents))


def _account() -> pwd.struct_passwd:
    """Who runs PostgreSQL: we, but it refuses root, and packages bring a user for it."""
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise UnavailableError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def _log(place: Path) -> str:
    path = place / "log"
    return path.read_text(errors="replace")[-2000:] if path.exists() else "it wrote nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _mariadb_answers(path: Path) -> bool:
    """Its greeting, which it sends when it is ready. Not by the driver: that one loses its socket where nobody listens."""
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            return connection.recv(5)[4:] == b"\x0a"
    except OSError:
        return False


def _postgresql_answers(folder: Path) -> bool:
    import psycopg

    try:
        # Both are named, or PGPORT and PGHOSTADDR of whoever runs this have their say.
        psycopg.connect(
            host=str(folder), hostaddr="", port=5432, user=POSTGRESQL_USER, dbname="postgres", connect_timeout=5
        ).close()
    except psycopg.OperationalError:
        return False
    return True


def _redis_answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False


def _chroma_answers(port: int) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/v2/heartbeat")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# for a cluster that is there already: tasks/backup/point_postgresql.py

served, account, log = _served, _account, _log


def room_of_account(folder: Path) -> contextlib.AbstractContextManager[tuple[Path, Path]]:
    """(a folder for the data, a short one for the socket), both of the user that runs PostgreSQL; gone afterwards."""
    return _room(folder, _account())
