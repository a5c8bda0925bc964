"""An installation with everything that a backup can hold, on private servers; it is written to, lost, and brought back."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import MODEL, ROOT, Box, build, wait_for, write_golden
from tests.fake_s3 import Server as Store
from tests.redis_server import RedisServer
from tests.registry_servers import PASSWORD, USER, Server

BUCKET = "s3://bucket/modelkeep"
ORDERS = 500
KEYS = ("jobs*", "critical:*")
OTHER_MODEL = "letters"
ASKED = (0, 7, 42)

TOML = """
profile = "cpu"
backups = ["{bucket}"]
backup_key_file = "{folder}/backup.key"

[server]
port = {port}

[[databases]]
name = "shop"
url = "mysql+pymysql://{user}@127.0.0.1:{mariadb}/shop"
[[databases]]
name = "ledger"
url = "postgresql+psycopg://{user}@127.0.0.1:{postgresql}/ledger"
[[databases]]
name = "notes"
url = "sqlite:///{folder}/app/notes.db"

[vectors]
url = "{vectors}"
[queues]
url = "redis://:{password}@127.0.0.1:{redis}/0"
names = ["jobs*"]
critical = ["critical:*"]

[[files]]
name = "uploads"
path = "{folder}/app/uploads"
"""

OPEN = """
import json, sys, chromadb
from chromadb.config import Settings
where, off = sys.argv[1], Settings(anonymized_telemetry=False)
if "://" in where:
    host, _, port = where.partition("://")[2].partition(":")
    client = chromadb.HttpClient(host=host, port=int(port), settings=off)
else:
    client = chromadb.PersistentClient(path=where, settings=off)
"""
# A process of its own, which says so when it has written its records; with one more argument it goes on writing.
CHROMA = """
one = client.get_or_create_collection("prices", metadata={"team": "a"}, embedding_function=None)
first = one.count()
numbers = range(first, first + 300)
one.add(
    ids=[f"p{number}" for number in numbers], embeddings=[[number % 17, number % 5, 1.0] for number in numbers],
    documents=[f"text {number}" for number in numbers], metadatas=[{"n": number} for number in numbers],
)
print("filled", flush=True)
number = numbers[-1]
while len(sys.argv) > 2:
    number += 1
    one.add(ids=[f"p{number}"], embeddings=[[number % 17, number % 5, 1.0]], documents=["late"], metadatas=[{"n": number}])
    print(number, flush=True)
"""
DOCUMENTS = """
found = client.get_collection("prices", embedding_function=None).get(include=["documents", "metadatas", "embeddings"])
json.dump({one: [text, meta, [round(float(value), 4) for value in vector]] for one, text, meta, vector in zip(
    found["ids"], found["documents"], found["metadatas"], found["embeddings"])}, sys.stdout)
"""


@dataclass
class Servers:
    """Private servers, shared by all these tests."""

    store: Store
    mariadb: Server
    postgresql: Server
    redis: RedisServer
    chroma: str

    @property
    def ports(self) -> list[int]:
        """Of those that a recovery may reach."""
        ends = [self.store.url, self.chroma]
        return [
            *(int(one.rpartition(":")[2]) for one in ends),
            self.mariadb.port,
            self.postgresql.port,
            self.redis.port,
        ]


@dataclass
class Installation:
    """A home, its servers and what the application keeps beside it."""

    box: Box
    servers: Servers
    vectors: str

    @property
    def folder(self) -> Path:
        return self.box.folder

    @property
    def app(self) -> Path:
        return self.folder / "app"

    @property
    def key(self) -> Path:
        return self.folder / "backup.key"

    @property
    def secrets(self) -> dict[str, str]:
        """The credentials, which are in no backup."""
        redis = f"redis://:{PASSWORD}@127.0.0.1:{self.servers.redis.port}/0"
        return {
            "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "qX7marked-s3-secret", "AWS_EC2_METADATA_DISABLED": "true",
            "MODELKEEP_S3_ENDPOINT_URL": self.servers.store.url, "MODELKEEP_BACKUP_KEY_FILE": str(self.key),
            "MODELKEEP_DATABASES__SHOP__PASSWORD": PASSWORD, "MODELKEEP_DATABASES__LEDGER__PASSWORD": PASSWORD,
            "MODELKEEP_QUEUES__URL": redis,
        }  # fmt: skip

    @property
    def bare(self) -> dict[str, str]:
        """The whole environment of a machine that has nothing but the program, an empty home and the credentials."""
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
            "MODELKEEP_HOME": str(self.box.home),
            **self.secrets,
        }

    # its life

    def make(self) -> None:
        """Everything in place: databases with rows, queues, vectors, files, two models that are served."""
        self.box.extra = dict(self.secrets)
        self.app.mkdir()
        for name in ("tagged", "empty", "deep/er"):
            (self.app / "uploads" / name).mkdir(parents=True)
        (self.app / "uploads" / "tagged" / "ä b.bin").write_bytes(bytes(range(256)) * 500)
        (self.app / "uploads" / "link").symlink_to("tagged/ä b.bin")
        (self.box.home / "modelkeep.toml").write_text(
            TOML.format(
                bucket=BUCKET, folder=self.folder, port=self.box.port, user=USER, mariadb=self.servers.mariadb.port,
                postgresql=self.servers.postgresql.port, vectors=self.vectors, redis=self.servers.redis.port, password=PASSWORD,
            )
        )  # fmt: skip
        self._empty_servers()
        self._fill_databases()
        self.redis("RPUSH", "jobs", *(f"job {number}" for number in range(200)))
        self.redis("HSET", "jobs:state", "a", "1", "b", "2")
        self.redis("SET", "critical:plan", "gold")
        self.redis("SET", "cache:page", "no backup needs it")
        self.servers.store.store.buckets = {"bucket": {}}
        _ended(self.fill_vectors(more=False))
        done = self.box.modelkeep("backups", "new-key", str(self.key))
        assert done.returncode == 0, done.stderr
        self.models()

    def models(self) -> None:
        for number in (1, 2):
            path = build(self.folder / f"v{number}.onnx", seed=number)
            self.box.register(str(number), path, golden=write_golden(self.folder / "golden.npz", path))
            self.box.settle_by_hand(str(number))
        path = build(self.folder / "letters.onnx", seed=11, ballast_mb=2)
        self.box.register("7", path, model=OTHER_MODEL, golden=write_golden(self.folder / "golden.npz", path))
        self.box.settle_by_hand("7", model=OTHER_MODEL)

    def fill_vectors(self, *, more: bool) -> subprocess.Popen[str]:
        """Write records; with `more` go on writing until it is ended."""
        process = subprocess.Popen(
            [sys.executable, "-c", OPEN + CHROMA, self.vectors, *(["more"] if more else [])], stdout=subprocess.PIPE, text=True,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        return process

    def _fill_databases(self) -> None:
        self.servers.mariadb.execute(
            "CREATE DATABASE shop CHARACTER SET utf8mb4",
            "CREATE TABLE shop.orders (id INT AUTO_INCREMENT PRIMARY KEY, text VARCHAR(80), loud VARCHAR(80) AS (upper(text)) VIRTUAL)",
            "CREATE TABLE shop.debit (id INT PRIMARY KEY)", "CREATE TABLE shop.credit (id INT PRIMARY KEY)",
            f"INSERT INTO shop.orders (text) SELECT concat('öl 🐘 ', seq) FROM shop.seq_1_to_{ORDERS}",
            "CREATE VIEW shop.loudly AS SELECT loud FROM shop.orders",
            "CREATE TRIGGER shop.trimmed BEFORE INSERT ON shop.orders FOR EACH ROW SET NEW.text = trim(NEW.text)",
            "CREATE ROLE teller", "GRANT SELECT ON shop.* TO teller",
            "CREATE USER 'reader'@'%' IDENTIFIED BY 'r3ader'", "GRANT SELECT, INSERT ON shop.orders TO 'reader'@'%'",
            "GRANT teller TO 'reader'@'%'",
        )  # fmt: skip
        self.servers.postgresql.execute("CREATE DATABASE ledger")
        self.postgresql(
            "CREATE TABLE orders (id serial PRIMARY KEY, text text NOT NULL)", "CREATE TABLE debit (id int PRIMARY KEY)",
            "CREATE TABLE credit (id int PRIMARY KEY)",
            f"INSERT INTO orders (text) SELECT 'öl 🐘 ' || n FROM generate_series(1, {ORDERS}) n",
            "CREATE VIEW loudly AS SELECT upper(text) AS loud FROM orders",
            "CREATE ROLE teller", "CREATE ROLE reader LOGIN PASSWORD 'r3ader' IN ROLE teller", "GRANT SELECT ON orders TO teller",
            "CREATE EXTENSION IF NOT EXISTS plpgsql",
        )  # fmt: skip
        with contextlib.closing(sqlite3.connect(self.app / "notes.db")) as notes:
            notes.execute("PRAGMA journal_mode = WAL")
            notes.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, text TEXT)")
            notes.execute("CREATE TABLE debit (id INTEGER PRIMARY KEY)")
            notes.execute("CREATE TABLE credit (id INTEGER PRIMARY KEY)")
            notes.executemany("INSERT INTO orders (text) VALUES (?)", [(f"öl 🐘 {n}",) for n in range(ORDERS)])
            notes.commit()

    @contextlib.contextmanager
    def written_to(self) -> Iterator[None]:
        """Writers at the databases, the queues and the vectors, which move two tables or keys in step; all have written by then."""
        stop = threading.Event()
        counts = dict.fromkeys(("mariadb", "postgresql", "notes", "queues"), 0)
        failures: list[BaseException] = []

        def writer(name: str, write: Callable[[int], None]) -> Callable[[], None]:
            def run() -> None:
                try:
                    while not stop.is_set():
                        write(counts[name])
                        counts[name] += 1
                        stop.wait(0.005)  # more would only take the processor from what is tested
                except BaseException as error:
                    failures.append(error)

            return run

        vectors = self.fill_vectors(more=True)
        with contextlib.ExitStack() as stack:
            writes = {
                "mariadb": stack.enter_context(self._in_step(self._mariadb("shop"))),
                "postgresql": stack.enter_context(self._in_step(self._postgresql("ledger"))),
                "notes": stack.enter_context(
                    self._in_step(sqlite3.connect(self.app / "notes.db", timeout=60, check_same_thread=False))
                ),
                "queues": self._push,
            }
            threads = [threading.Thread(target=writer(name, write)) for name, write in writes.items()]
            for one in threads:
                one.start()
            try:
                wait_for("the writers", lambda: failures or min(counts.values()) > 3)
                yield
            finally:
                stop.set()
                for one in threads:
                    one.join(60)
                vectors.kill()
                assert _ended(vectors), "the vectors were not written to"
            assert not failures, failures

    def _push(self, number: int) -> None:
        import redis

        with (
            redis.Redis.from_url(self.secrets["MODELKEEP_QUEUES__URL"]) as client,
            client.pipeline(transaction=True) as moved,
        ):
            moved.rpush("jobs:debit", number)
            moved.rpush("jobs:credit", number)
            moved.execute()

    @contextlib.contextmanager
    def _in_step(self, connection: Any) -> Iterator[Callable[[int], None]]:
        def write(number: int) -> None:
            cursor = connection.cursor()
            cursor.execute(f"INSERT INTO debit VALUES ({number})")
            cursor.execute(f"INSERT INTO credit VALUES ({number})")
            connection.commit()
            cursor.close()

        try:
            yield write
        finally:
            connection.close()

    def _answers(self, model: str) -> bool:
        return self.box.infer(model=model).status_code == 200

    def golden(self) -> dict[str, Any]:
        """The answers of both models to some images, and the versions that gave them."""
        found: dict[str, Any] = {}
        for model in (MODEL, OTHER_MODEL):
            wait_for(f"{model} is served", partial(self._answers, model))
            for image in ASKED:
                answer = self.box.infer(model=model, image=image)
                assert answer.status_code == 200, answer.text
                found[f"{model} {image}"] = (answer.headers["x-model-version"], answer.json()["outputs"])
        return found

    def lose(self) -> None:
        """Everything but the bucket, the key file and the program."""
        self.box.stop()
        self.box._processes.clear()
        self.box._database = None
        shutil.rmtree(self.box.home)
        shutil.rmtree(self.app)
        self.box.home.mkdir()
        self._empty_servers()
        if "://" in self.vectors:
            base = f"{self.vectors}/api/v2/tenants/default_tenant/databases/default_database/collections"
            assert httpx.delete(f"{base}/prices", timeout=30).status_code == 200
            assert httpx.get(base, timeout=30).json() == []

    def _empty_servers(self) -> None:
        self.servers.mariadb.execute(
            "DROP DATABASE IF EXISTS shop", "DROP USER IF EXISTS 'reader'@'%'", "DROP ROLE IF EXISTS teller"
        )
        self.servers.postgresql.execute(
            "DROP DATABASE IF EXISTS ledger WITH (FORCE)", "DROP ROLE IF EXISTS reader", "DROP ROLE IF EXISTS teller"
        )
        self.redis("FLUSHALL")

    # what is there

    def modelkeep(
        self, *arguments: str, code: int = 0, before: Sequence[str] = (), timeout: float = 300, **environment: str
    ) -> Any:
        """A command's JSON, with what a bare machine has."""
        done = subprocess.run(
            [*before, sys.executable, "-P", "-m", "modelkeep", *arguments, "--json"], cwd=self.folder,
            env={**self.bare, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        print(f"$ modelkeep {' '.join(arguments)}\n{done.stderr}")  # shown where the test fails
        assert done.returncode == code, (
            f"{arguments} ended with {done.returncode}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        )
        for secret in (PASSWORD, self.secrets["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in done.stdout + done.stderr
        return json.loads(done.stdout)

    def redis(self, *words: str) -> Any:
        import redis

        with redis.Redis.from_url(self.secrets["MODELKEEP_QUEUES__URL"], decode_responses=True) as client:
            return client.execute_command(*words)

    def _mariadb(self, database: str) -> Any:
        import pymysql

        return pymysql.connect(
            host="127.0.0.1",
            port=self.servers.mariadb.port,
            user=USER,
            password=PASSWORD,
            database=database,
            charset="utf8mb4",
        )

    def _postgresql(self, database: str, user: str = USER, password: str = PASSWORD) -> Any:
        import psycopg

        return psycopg.connect(
            host="127.0.0.1", port=self.servers.postgresql.port, user=user, password=password, dbname=database
        )

    def postgresql(self, *statements: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(self._postgresql("ledger")) as connection:
            cursor = connection.cursor()
            for statement in statements:
                cursor.execute(statement)
            connection.commit()
            return list(cursor.fetchall()) if cursor.description else []

    def rows(self) -> dict[str, dict[str, list[tuple[Any, ...]]]]:
        """Every row of the databases, by component and table."""
        connections = {
            "database:shop": self._mariadb("shop"),
            "database:ledger": self._postgresql("ledger"),
            "database:notes": sqlite3.connect(self.app / "notes.db"),
        }
        found: dict[str, dict[str, list[tuple[Any, ...]]]] = {}
        for name, connection in connections.items():
            with contextlib.closing(connection):
                cursor = connection.cursor()
                for table in ("orders", "debit", "credit"):
                    cursor.execute(f"SELECT * FROM {table} ORDER BY id")
                    found.setdefault(name, {})[table] = list(cursor.fetchall())
        return found

    def accounts(self) -> dict[str, Any]:
        """What the users of the databases may do, as the servers and they themselves say it."""
        import pymysql

        reader = pymysql.connect(
            host="127.0.0.1",
            port=self.servers.mariadb.port,
            user="reader",
            password="r3ader",
            database="shop",
            charset="utf8mb4",
        )
        with contextlib.closing(reader), reader.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM orders")
            seen = cursor.fetchall()
            cursor.execute("SHOW GRANTS")
            grants = sorted(one[0] for one in cursor.fetchall())
        with contextlib.closing(self._postgresql("ledger", "reader", "r3ader")) as connection:
            counted = connection.execute("SELECT count(*) FROM orders").fetchall()
        return {"mariadb": grants, "mariadb sees": list(seen), "postgresql sees": list(counted)}

    def queues(self) -> dict[str, Any]:
        names = sorted({name for pattern in KEYS for name in self.redis("KEYS", pattern)})
        lists = [name for name in names if self.redis("TYPE", name) == "list"]
        return {
            "names": names, **{name: self.redis("LRANGE", name, "0", "-1") for name in lists},
            "state": self.redis("HGETALL", "jobs:state"), "plan": self.redis("GET", "critical:plan"),
        }  # fmt: skip

    def documents(self) -> dict[str, Any]:
        """Every record of the vector store, as a process of its own reads it."""
        done = subprocess.run(
            [sys.executable, "-c", OPEN + DOCUMENTS, self.vectors], capture_output=True, text=True, check=True, timeout=120,
            env={"PATH": os.environ["PATH"], "HOME": str(self.folder)},
        )  # fmt: skip
        return dict(json.loads(done.stdout))

    def uploads(self) -> dict[str, Any]:
        top = self.app / "uploads"
        return {
            str(path.relative_to(top)): str(path.readlink())
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
            for path in top.rglob("*")
        }

    def head(self) -> int:
        """The number of events in the audit chain, which `audit verify` must find whole."""
        found = self.modelkeep("audit", "verify")
        assert found["holds"] and found["faults"] == [], found
        return int(found["head"]["seq"])


def _ended(process: subprocess.Popen[str]) -> str:
    """What a process printed until it ended."""
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def counted(rows: Mapping[str, Mapping[str, list[Any]]]) -> dict[str, dict[str, int]]:
    return {name: {table: len(found) for table, found in tables.items()} for name, tables in rows.items()}


def of_manifest(manifest: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The rows by component and table that a manifest tells of; that of SQLite has nothing more to tell of a table."""
    return {
        one["name"]: {
            table.rpartition(".")[2].strip('"'): told if isinstance(told, int) else told["rows"]
            for table, told in one["facts"]["tables"].items()
        }
        for one in manifest["components"]
        if one["name"].startswith("database:")
    }
