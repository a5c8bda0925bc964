"""Private MariaDB and PostgreSQL servers for tests: loopback, a temporary folder, gone with the process that started them."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import psutil
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from tasks.backup.chain import LAUNCH

Kind = Literal["mariadb", "postgresql"]
KINDS: tuple[Kind, ...] = ("mariadb", "postgresql")
PROGRAMS: dict[Kind, str] = {"mariadb": "mariadbd", "postgresql": "postgres"}
USER, PASSWORD = "keeper", "hunter2"
START_SECONDS = 60.0
FOLDER = "modelkeep-test-server-"


class Server:
    """One server with the user `keeper`, who may make databases. Start it, make databases, close it."""

    def __init__(self, kind: Kind, program: Path, options: Sequence[str] = ()) -> None:
        self.kind, self.program, self.options = kind, program, tuple(options)
        _sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-"))
        self.account = _account(kind)
        os.chown(self.folder, self.account.pw_uid, self.account.pw_gid)
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._made = 0
        try:
            self._install()
            self.start()
        except BaseException:
            self.close()
            raise

    def url(self, database: str) -> str:
        driver = {"mariadb": "mysql+pymysql", "postgresql": "postgresql+psycopg"}[self.kind]
        return f"{driver}://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def create(self, *, options: str = "") -> str:
        """The URL of a new, empty database."""
        self._made += 1
        name = f"registry{self._made}_{secrets.token_hex(2)}"
        self.execute(f"CREATE DATABASE {name} {options}")
        return self.url(name)

    def execute(self, *statements: str) -> None:
        """Statements of the administrator, outside of any registry."""
        engine = create_engine(
            self.url({"mariadb": "mysql", "postgresql": "postgres"}[self.kind]),
            poolclass=NullPool,
            isolation_level="AUTOCOMMIT",
        )
        with engine.connect() as connection:
            for statement in statements:
                connection.execute(text(statement))

    def start(self) -> None:
        """On the port that it had before, so that those who knew it find it again. Returns when it answers."""
        self.port = self.port or _free_port()
        self.process = self._launch(
            [self.program, *self._arguments()], signal.SIGKILL if self.kind == "mariadb" else signal.SIGQUIT
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.execute("SELECT 1")
                return
            except OperationalError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.kind} did not start: {error}\n{self.log()}") from error
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL of all its processes: PostgreSQL has one for each connection, which answers on for a while without its parent."""
        assert self.process is not None
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait(timeout=30)
        psutil.wait_procs(family, timeout=30)

    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text(errors="replace")[-4000:] if path.exists() else "(it wrote nothing)"

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL if self.kind == "mariadb" else signal.SIGQUIT)
            self.process.wait(timeout=30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _install(self) -> None:
        data = self.folder / "data"
        if self.kind == "mariadb":
            self._run(
                _beside(self.program, "mariadb-install-db"), "--no-defaults", f"--datadir={data}",
                "--auth-root-authentication-method=normal", "--skip-test-db", "--force", f"--user={self.account.pw_name}",
            )  # fmt: skip
            (self.folder / "init.sql").write_text(
                f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{PASSWORD}';\n"
                f"GRANT ALL ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
            )
            return
        (self.folder / "password").write_text(PASSWORD)
        os.chown(self.folder / "password", self.account.pw_uid, self.account.pw_gid)
        self._run(
            _beside(self.program, "initdb"), f"--pgdata={data}", f"--username={USER}", "--auth=password", "--no-sync",
            f"--pwfile={self.folder / 'password'}", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions",
        )  # fmt: skip

    def _arguments(self) -> list[str]:
        data, socket_ = self.folder / "data", self.folder / "socket"
        if self.kind == "mariadb":
            return [
                "--no-defaults", f"--user={self.account.pw_name}", f"--datadir={data}", f"--socket={socket_}",
                f"--port={self.port}", "--bind-address=127.0.0.1", "--skip-name-resolve", "--innodb-flush-log-at-trx-commit=2",
                "--innodb-buffer-pool-size=64M", "--innodb-flush-method=nosync", "--innodb-doublewrite=0", "--innodb-file-per-table=0",
                f"--init-file={self.folder / 'init.sql'}",
                f"--pid-file={self.folder / 'pid'}", *self.options,
            ]  # fmt: skip
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off",
            "full_page_writes": "off", "shared_buffers": "64MB", "max_connections": 100,
            "autovacuum": "off", "jit": "off",
        }  # fmt: skip
        return [
            "-D",
            str(data),
            *(word for name, value in settings.items() for word in ("-c", f"{name}={value}")),
            *self.options,
        ]

    def _launch(self, command: list[str | Path], with_us: int) -> subprocess.Popen[bytes]:
        account = self.account
        words = [str(word) for word in (os.getpid(), account.pw_uid, account.pw_gid, int(with_us), *command)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "MYSQL"))}
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCH, *words], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

    def _run(self, *command: str | Path) -> None:
        if self._launch(list(command), signal.SIGKILL).wait(timeout=START_SECONDS) != 0:
            raise RuntimeError(f"{command[0]} failed:\n{self.log()}")


def starter(kind: Kind, program: Callable[[str], Path], *options: str) -> Server:
    """A running server; skips the test where its program is not installed."""
    return Server(kind, program(PROGRAMS[kind]), options)


def _account(kind: Kind) -> pwd.struct_passwd:
    """Who runs the server: we, but PostgreSQL refuses root, and Debian brings a user for it."""
    if kind == "mariadb" or os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def _beside(program: Path, other: str) -> Path:
    """The program's companion: in its folder, where its link leads, or on the PATH."""
    for folder in (program.parent, program.resolve().parent):
        if (folder / other).exists():
            return folder / other
    found = shutil.which(other)
    if found is None:
        raise RuntimeError(f"{other} is not installed beside {program}")
    return Path(found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _sweep() -> None:
    """Folders of sessions that were killed: their servers died with them, the files stayed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}*"):
        owner = folder.name.removeprefix(FOLDER).split("-")[0]
        if owner.isdecimal() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)
