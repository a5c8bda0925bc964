"""How a MariaDB or MySQL is reached: connections of our own, and the option file that its programs read. No password in any argument."""

from __future__ import annotations

import contextlib
import re
import socket as sockets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import NotFoundError, UnavailableError, UsageError
from registry.redaction import HIDDEN
from tasks.backup.chain import Program, clean, find, private_file, version

if TYPE_CHECKING:
    from pymysql.connections import Connection

CONNECT_SECONDS = 15
ANSWER_SECONDS = 3600
LOCK_SECONDS = 5
PACKET = "1G"
MARIADB, MYSQL = "mariadb", "mysql"


@dataclass(frozen=True, slots=True)
class Access:
    """A database of a server, and who asks. Made of a SQLAlchemy URL of PyMySQL."""

    user: str
    password: str
    host: str
    port: int
    database: str
    socket: str | None = None
    tls: tuple[tuple[str, str], ...] = ()
    """Options of the URL's query that begin with `ssl_`."""

    @property
    def shown(self) -> str:
        return f"{self.user}@{self.socket or f'{self.host}:{self.port}'}/{self.database}"

    def at(self, database: str) -> Access:
        return replace(self, database=database)

    def connect(self, *, database: bool = True, answer_seconds: int = ANSWER_SECONDS) -> Connection[Any]:
        """Raises UnavailableError: it does not answer, or takes neither user nor password."""
        import pymysql

        options = dict(self.tls)
        given: dict[str, Any] = {
            name: options[name] for name in ("ssl_ca", "ssl_cert", "ssl_key", "ssl_key_password") if name in options
        }
        for name in ("ssl_disabled", "ssl_verify_cert", "ssl_verify_identity"):
            if name in options:
                given[name] = options[name].lower() in ("1", "true", "yes", "on")
        if self.socket is not None:
            given = {"ssl_disabled": True}  # nobody listens on the way; a TLS context costs 50 ms
        try:
            connection = pymysql.connect(
                host=self.host, port=self.port, user=self.user, password=self.password.encode(), unix_socket=self.socket,
                database=self.database if database else None, charset="utf8mb4", autocommit=True,
                connect_timeout=CONNECT_SECONDS, read_timeout=answer_seconds, write_timeout=answer_seconds,
                defer_connect=True, **given,
            )  # fmt: skip
            connection.connect(self._dialled())
        except (pymysql.err.OperationalError, pymysql.err.InternalError, OSError) as error:
            raise self.failed(error, "cannot be reached") from error
        with connection.cursor() as cursor:
            # A count may take longer than servers allow a statement; what is in the comment is MariaDB's own.
            cursor.execute(
                "SET SESSION time_zone = '+00:00', sql_mode = '' /*M!100300 , max_statement_time = 0, idle_transaction_timeout = 0 */"
            )
            cursor.execute(f"SET SESSION lock_wait_timeout = {LOCK_SECONDS}, innodb_lock_wait_timeout = {LOCK_SECONDS}")
        return connection

    def _dialled(self) -> sockets.socket | None:
        """The server's socket, where it has one. By ourselves: the driver loses its own where nobody listens."""
        if self.socket is None:
            return None
        dialled = sockets.socket(sockets.AF_UNIX)
        try:
            dialled.settimeout(CONNECT_SECONDS)
            dialled.connect(self.socket)
        except OSError:
            dialled.close()
            raise
        return dialled

    def failed(self, error: BaseException, how: str) -> UnavailableError:
        said = clean(" ".join(str(part) for part in getattr(error, "args", ()) or (error,)), (self.password,))
        return UnavailableError(f"the database {self.shown} {how}: {quiet(said)}")

    @contextlib.contextmanager
    def translated(self, how: str) -> Iterator[None]:
        """Errors of the driver in the words of registry.errors."""
        import pymysql

        try:
            yield
        except pymysql.err.MySQLError as error:
            raise self.failed(error, how) from error

    @contextlib.contextmanager
    def option_file(self) -> Iterator[Path]:
        """A private file that the programs of the server read, and nothing else: user, password, address, TLS."""
        options = dict(self.tls)
        lines = ["[client]", f"user={_value(self.user)}", f"password={_value(self.password)}"]
        lines += (
            [f"socket={_value(self.socket)}"]
            if self.socket
            else [f"host={_value(self.host)}", f"port={self.port}", "protocol=tcp"]
        )
        lines += [
            f"{name.replace('_', '-')}={_value(options[name])}"
            for name in ("ssl_ca", "ssl_cert", "ssl_key")
            if name in options
        ]
        if options.get("ssl_verify_identity", "").lower() in ("1", "true", "yes", "on"):
            lines.append("ssl-verify-server-cert")
        with private_file("client.cnf", "\n".join(lines) + "\n") as path:
            yield path

    def program(self, path: Path, options: Path, *arguments: str, silent_seconds: float = ANSWER_SECONDS) -> Program:
        """One of the server's programs: `--defaults-file` keeps it from the options of whoever runs us."""
        return Program(
            [path, f"--defaults-file={options}", *arguments],
            secrets=(self.password,), silent_seconds=silent_seconds, quiet=quiet,
        )  # fmt: skip


def access(url: str) -> Access:
    """Raises UsageError for a query of the URL that we do not know how to hand to the programs."""
    from sqlalchemy import make_url

    parts = make_url(url)
    query = {name: value if isinstance(value, str) else value[-1] for name, value in parts.query.items()}
    socket = query.pop("unix_socket", None)
    query.pop("charset", None)
    tls = tuple(sorted((name, value) for name, value in query.items() if name.startswith("ssl_")))
    if unknown := sorted(
        set(query) - {name for name, _ in tls} - {"local_infile", "connect_timeout", "read_timeout", "write_timeout"}
    ):
        raise UsageError(
            f"the URL of {parts.render_as_string(hide_password=True)} has {', '.join(unknown)}: unknown to backups"
        )
    return Access(
        parts.username or "", str(parts.password or ""), parts.host or "localhost", parts.port or 3306, parts.database or "", socket, tls
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says that it is."""

    flavour: str
    version: str

    @property
    def number(self) -> tuple[int, ...]:
        """(10, 11): major and minor."""
        found = re.search(r"(\d+)\.(\d+)", self.version)
        return () if found is None else (int(found.group(1)), int(found.group(2)))


def server(connection: Connection[Any]) -> Server:
    (said, comment) = rows(connection, "SELECT VERSION(), @@version_comment")[0]
    flavour = MARIADB if "mariadb" in f"{said} {comment}".lower() else MYSQL
    return Server(flavour, str(said))


def identity(connection: Connection[Any]) -> str:
    """Which server it is: its unique id where it has one, with the id that its logs carry."""
    known = {str(name): str(value) for name, value in rows(connection, "SHOW GLOBAL VARIABLES LIKE 'server\\_%id'")}
    return f"{known.get('server_id', '')}:{known.get('server_uid') or known.get('server_uuid') or ''}"


def rows(connection: Connection[Any], statement: str, values: Sequence[Any] | None = None) -> list[tuple[Any, ...]]:
    with connection.cursor() as cursor:
        cursor.execute(statement, values)
        return list(cursor.fetchall())


def quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def dumper(flavour: str) -> Path:
    """The program that dumps. MySQL's own for a MySQL where there is one; MariaDB's else."""
    return _of_flavour(flavour, "mysqldump") or find("mariadb-dump", "mysqldump")


def client(flavour: str) -> Path:
    """Raises NotFoundError."""
    found = _of_flavour(flavour, "mysql")
    if found is None and flavour == MYSQL:
        raise NotFoundError("mysql, MySQL's own client, is not installed: MariaDB's does not restore a MySQL's dump")
    return found or find("mariadb", "mysql")


def _of_flavour(flavour: str, name: str) -> Path | None:
    if flavour != MYSQL:
        return None
    try:
        path = find(name)
    except NotFoundError:
        return None
    return None if "mariadb" in version(path).lower() else path


_WORDS = re.compile(r"^(?:ERROR\b|Error\b|Warning\b|(?:mariadb|mysql)[\w-]*: |\(|\d+ )")
_QUOTED = (
    re.compile(r"(near )'.*'(?= at line|$)"),
    re.compile(r"(?i)((?:entry|value:?|integer|string|time|date|double|decimal) )'.*?'(?= for | at |$)"),
)


def quiet(said: str) -> str:
    """What MariaDB's programs say, without the statement that failed, which they print whole, and the values that they quote."""
    lines = [line for line in said.splitlines() if _WORDS.match(line) and not re.match(r"(?i)\(.*\)[,;]?$", line)]
    text = "\n".join(lines)
    for pattern in _QUOTED:
        text = pattern.sub(rf"\1'{HIDDEN}'", text)
    return text


def hang_up(connection: Connection[Any]) -> None:
    """Ends a connection that another thread may be waiting at: closing alone would leave that one waiting."""
    with contextlib.suppress(OSError, AttributeError):
        connection._sock.shutdown(sockets.SHUT_RDWR)


def _value(text: str | None) -> str:
    """A value of an option file: in quotes, of which only the outer ones count, with backslashes doubled."""
    escaped = (text or "").replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
    return f'"{escaped}"'
