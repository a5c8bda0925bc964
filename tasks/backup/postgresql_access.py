"""How a PostgreSQL is reached: connections of our own, and the environment of its programs. No password in any argument."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import UnavailableError
from registry.redaction import HIDDEN
from tasks.backup.chain import Program, clean, find, private_file

if TYPE_CHECKING:
    from psycopg import Connection

CONNECT_SECONDS = 15
LOCK_SECONDS = 10
SILENT_SECONDS = 3600.0
_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
_ENVIRONMENT = {
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "options": "PGOPTIONS",
    "channel_binding": "PGCHANNELBINDING",
}


@dataclass(frozen=True, slots=True)
class Access:
    """A database of a cluster, and who asks. Made of a SQLAlchemy URL of psycopg; `host` may be the folder of a socket."""

    user: str
    password: str
    host: str
    port: int
    database: str
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        return f"{self.user}@{self.host}:{self.port}/{self.database}"

    def at(self, database: str) -> Access:
        return replace(self, database=database)

    def connect(self) -> Connection[Any]:
        """In autocommit. Raises UnavailableError: it does not answer, or takes neither user nor password."""
        import psycopg

        # An empty hostaddr is none; without it PGHOSTADDR of whoever runs this would name another server.
        options: dict[str, Any] = {"connect_timeout": str(CONNECT_SECONDS), "hostaddr": "", **self.options}
        try:
            connection = psycopg.connect(
                host=self.host, port=self.port, user=self.user, password=self.password or None, dbname=self.database,
                autocommit=True, **options,
            )  # fmt: skip
        except psycopg.OperationalError as error:
            raise self.failed(error, "cannot be reached") from error
        connection.execute(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        connection.execute("SET row_security = off")
        for name in ("statement_timeout", "idle_in_transaction_session_timeout"):  # a count may take its time
            connection.execute(f"SET {name} = 0")
        for name, value in _TEXT_OF_ROWS.items():
            connection.execute(f"SET {name} = '{value}'")
        return connection

    def failed(self, error: BaseException, how: str) -> UnavailableError:
        said = clean(" ".join(str(error).split()), (self.password,))
        return UnavailableError(f"the database {self.shown} {how}: {quiet(said)}")

    @contextlib.contextmanager
    def translated(self, how: str) -> Iterator[None]:
        """Errors of the driver in the words of registry.errors."""
        import psycopg

        try:
            yield
        except psycopg.Error as error:
            raise self.failed(error, how) from error

    @contextlib.contextmanager
    def environment(self) -> Iterator[dict[str, str]]:
        """What its programs read: the address in variables, the password in a private file."""
        escaped = re.sub(r"([:\\])", r"\\\1", self.password)
        with private_file("pgpass", f"*:*:*:*:{escaped}\n" if self.password else "") as path:
            given = {_ENVIRONMENT[name]: value for name, value in self.options.items() if name in _ENVIRONMENT}
            yield {
                "PGHOST": self.host, "PGPORT": str(self.port), "PGUSER": self.user, "PGDATABASE": self.database,
                "PGPASSFILE": str(path), "PGCONNECT_TIMEOUT": str(CONNECT_SECONDS), "PGCLIENTENCODING": "UTF8",
                "HOME": str(path.parent), "LC_ALL": "C.UTF-8", **given,
            }  # fmt: skip

    def program(self, name: str, environment: Mapping[str, str], *arguments: str) -> Program:
        return Program(
            [program(name), *arguments],
            environment=environment, secrets=(self.password,), silent_seconds=SILENT_SECONDS, quiet=quiet,
        )  # fmt: skip


_TEXT_OF_ROWS = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "bytea_output": "hex",
    "client_encoding": "UTF8",
    "lc_monetary": "C",
}
"""So that a row has the same text on every server: digests are made of it."""


def access(url: str) -> Access:
    from sqlalchemy import make_url

    parts = make_url(url)
    query = {name: value if isinstance(value, str) else value[-1] for name, value in parts.query.items()}
    host = query.pop("host", None) or parts.host or "localhost"
    port = int(query.pop("port", None) or parts.port or 5432)
    return Access(parts.username or "", str(parts.password or ""), host, port, parts.database or "", query)


def program(name: str) -> Path:
    """The newest that is installed: Debian's own names are scripts that may pick the one of another cluster."""
    for folder in _FOLDERS:
        if (folder / name).exists():
            return folder / name
    return find(name)


def quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


_LINES = re.compile(r"(?m)^[^\n]*(?:DETAIL|CONTEXT|LINE \d+|QUERY|STATEMENT|HINT): .*(?:\n(?![\w/-]+: ).*)*")
_VALUES = re.compile(r'((?:type [\w ]+|near|value|for enum \w+): )".*?"(?=\n|$| )', re.DOTALL)


def quiet(said: str) -> str:
    """What PostgreSQL's programs say, without the rows and values that they quote."""
    return _VALUES.sub(rf'\1"{HIDDEN}"', _LINES.sub("", said))
