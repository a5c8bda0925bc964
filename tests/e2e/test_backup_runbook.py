"""The runbooks about what is lost and comes back from a backup, run in the order of the page on a real installation, with what they print compared.

Backups go to a bucket with versions and object lock (tests/fake_s3.py). `PREPARED` brings the misfortune that a section is about;
everything else happens by the commands of the page. How a page writes commands and results: tests/printed.py. `/srv` of the page is
the folder of the test.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import clock
from tests import printed
from tests.e2e.harness import ROOT, Box, box, build, write_golden
from tests.fake_s3 import Server as Store
from tests.printed import Call

MODEL = "numbers"
RUNBOOKS = ROOT / "docs/RUNBOOKS.md"
SECTIONS = (
    "The database is gone",
    "Someone deleted a model",
    "Restore one table of last Tuesday",
    "The machine is gone",
    "Ransomware: the bucket's credentials were stolen",
    "The backup key is lost",
)
ROWS = 2000

TOML = """profile = "cpu"
backups = ["s3://vault/modelkeep"]
backup_key_file = "{folder}/backup.key"

[backup]
object_lock = "compliance"

[[databases]]
name = "shop"
url = "sqlite:///{folder}/app/shop.db"

[[files]]
name = "uploads"
path = "{folder}/app/uploads"
"""

BY_HAND = (
    "export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…",
    "export MODELKEEP_HOME=/srv/home MODELKEEP_BACKUP_KEY_FILE=/srv/backup.key",
)
"""What the page shows and no block runs: the environment of the test has these."""

IN_PASSING = {"backups pin", "backups prune", "deploy", "drill", "keys list", "serve"}
"""Commands that the text names and no block runs; tests of their own do."""


class Night:
    """The installation of the person who was woken, and what the page's `ID` and `TIME` stand for now."""

    def __init__(self, one: Box, store: Store) -> None:
        self.one, self.store = one, store
        self.identity, self.moment = "", ""
        self.said: list[str] = []

    @property
    def app(self) -> Path:
        return self.one.folder / "app"

    def run(self, call: Call) -> list[str]:
        """Run a command of the page, and what it printed."""
        known = {"ID": self.identity, "TIME": self.moment}
        words = [known.get(word, word.replace("/srv", str(self.one.folder))) for word in call.words]
        assert words[0] == "modelkeep"
        return self.modelkeep(*words[1:])

    def modelkeep(self, *arguments: str) -> list[str]:
        done = self.one.modelkeep(*arguments, timeout=180)
        stdout, stderr = (text.replace(str(self.one.folder), "/srv") for text in (done.stdout, done.stderr))
        said = printed.lines(stdout, stderr, done.returncode)
        if arguments[:1] == ("backup",):
            found = re.search(r"^backup (\S+) is complete$", done.stdout, flags=re.MULTILINE)
            assert found is not None, done.stdout + done.stderr
            self.identity = found[1]
        return said

    def rows(self, table: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(f"file:{self.app}/shop.db?mode=ro", uri=True)) as shop:
            return list(shop.execute(f"SELECT * FROM {table} ORDER BY id"))

    # what happens before a section

    def make(self) -> None:
        """A model with two versions, a database, a folder, and a backup of last night that is verified."""
        one = self.one
        self.app.mkdir()
        with contextlib.closing(sqlite3.connect(self.app / "shop.db")) as shop:
            for table in ("customers", "orders"):
                shop.execute(f"CREATE TABLE {table} (id INTEGER PRIMARY KEY, text TEXT, price INTEGER)")
                rows = [(f"{table} {number}", number) for number in range(ROWS)]
                shop.executemany(f"INSERT INTO {table} (text, price) VALUES (?, ?)", rows)
            shop.commit()
        (self.app / "uploads").mkdir()
        for number in range(20):
            (self.app / "uploads" / f"{number}.png").write_bytes(bytes([number]) * 5000)
        (one.home / "modelkeep.toml").write_text(TOML.format(folder=one.folder))
        for version in ("1", "2"):
            path = build(one.folder / f"v{version}.onnx", seed=int(version))
            one.register(version, path, model=MODEL, golden=write_golden(one.folder / "golden.npz", path))
        one.settle_by_hand("1", model=MODEL)
        assert self.modelkeep("backups", "new-key", str(one.folder / "backup.key"))
        self.modelkeep("backup", "--no-prefect", "--reason", "last night")
        self.modelkeep("backups", "verify", self.identity, "--no-prefect")
        self.moment = clock.text(clock.now())

    def no_database(self) -> None:
        (self.app / "shop.db").unlink()

    def a_deleted_version(self) -> None:
        assert len(self.rows("orders")) == ROWS
        for word in ("archive", "delete"):
            done = self.one.modelkeep("models", word, MODEL, "2", "--reason", "tidying up")
            assert done.returncode == 0, done.stderr

    def a_spoilt_table(self) -> None:
        with contextlib.closing(sqlite3.connect(self.app / "shop.db")) as shop:
            shop.execute("UPDATE orders SET price = 0")
            shop.execute("DELETE FROM orders WHERE id > 100")
            shop.execute("INSERT INTO customers (text) VALUES ('came this morning')")
            shop.commit()

    def copied_by_hand(self) -> None:
        """What the page's SQL does."""
        with contextlib.closing(sqlite3.connect(self.app / "shop.db")) as shop:
            shop.executescript("\n".join(by_hand("sql")).replace("/srv", str(self.one.folder)))
        assert [row[2] for row in self.rows("orders")] == list(range(ROWS))
        self.a_spoilt_table()

    def no_machine(self) -> None:
        assert [row[2] for row in self.rows("orders")] == list(range(ROWS)), "--force brought the table back"
        assert self.rows("customers")[-1][1] == "came this morning", "and no other"
        if self.one._database is not None:
            self.one._database.dispose()
        for folder in (self.one.home, self.app):
            shutil.rmtree(folder)
        self.one.home.mkdir()

    def served(self) -> None:
        folder = self.one.home / "serving" / f"production-{self.one.port}"
        folder.mkdir(parents=True)
        (folder / "replica-id").write_text("box-1")
        self.one.serve()
        assert self.one.infer(model=MODEL).status_code == 200

    def robbed(self) -> None:
        """Everything that the credentials can do: no version that is not locked stays, and what stays is deleted or overwritten."""
        self.moment = clock.text(clock.now())
        held = self.store.store.buckets["vault"]
        import boto3
        from botocore.exceptions import ClientError

        secrets = {"aws_access_key_id": "someone", "aws_secret_access_key": "else", "region_name": "us-east-1"}
        thief = boto3.client("s3", endpoint_url=self.store.url, **secrets)
        for number, (name, versions) in enumerate(sorted(held.items())):
            for one in list(versions):
                with contextlib.suppress(ClientError):
                    thief.delete_object(Bucket="vault", Key=name, VersionId=one.id)
            spoilt = number == 0 if name.endswith(".manifest.json") else "/objects/" in name and number % 2
            if not spoilt:
                thief.delete_object(Bucket="vault", Key=name)
            else:
                thief.put_object(Bucket="vault", Key=name, Body=b"pay")

    def with_the_new_key(self) -> None:
        self.one.extra["MODELKEEP_BACKUP_KEY_FILE"] = str(self.one.folder / "new.key")

    def no_key(self) -> None:
        del self.one.extra["MODELKEEP_BACKUP_KEY_FILE"]
        self.configured("backup_key_file", "")
        for path in self.one.folder.glob("*.key"):
            path.unlink()

    def elsewhere(self) -> None:
        self.configured("backups", 'backups = ["s3://vault/second"]\n')
        self.configured("backup_key_file", f'backup_key_file = "{self.one.folder}/second.key"\n')

    def configured(self, name: str, line: str) -> None:
        path = self.one.home / "modelkeep.toml"
        text = path.read_text()
        found = re.sub(rf"^{name} = .*\n", line, text, flags=re.MULTILINE)
        path.write_text(found if found != text or not line else line + text)


PREPARED: dict[str, Callable[[Night], None]] = {
    "The database is gone": Night.no_database,
    "Someone deleted a model": Night.a_deleted_version,
    "Restore one table of last Tuesday": Night.a_spoilt_table,
    "The machine is gone": Night.no_machine,
    "Ransomware: the bucket's credentials were stolen": Night.robbed,
    "The backup key is lost": Night.no_key,
}

AFTER: dict[str, Callable[[Night], None]] = {
    "modelkeep recover --at TIME --components database:shop.orders --into /srv/look": Night.copied_by_hand,
    "modelkeep recover --from s3://vault/modelkeep": Night.served,
    "modelkeep backups rotate-key /srv/new.key": Night.with_the_new_key,
    "modelkeep backups new-key /srv/second.key": Night.elsewhere,
}
"""What is done after a command, before the next one of its section."""


def page() -> str:
    """The sections of this test, with the numbers of their lines as in the whole page."""
    text = RUNBOOKS.read_text(encoding="utf-8")
    begin = text.index(f"## {SECTIONS[0]}\n")
    end = re.compile(r"^## ", flags=re.MULTILINE).search(text, text.index(f"## {SECTIONS[-1]}\n") + 3)
    return "\n" * text.count("\n", 0, begin) + text[begin : None if end is None else end.start()]


def by_hand(kind: str) -> list[str]:
    """The lines of the blocks of one kind."""
    return [
        line
        for block in re.findall(rf"^```{kind}\n(.*?)^```$", page(), flags=re.M | re.S)
        for line in block.splitlines()
    ]


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A folder whose path is about as long as those of the page: a table shortens longer ones."""
    with tempfile.TemporaryDirectory(prefix="mk-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def night(short_path: Path) -> Iterator[Night]:
    with Store() as store:
        store.store.buckets = {"vault": {}}
        store.store.locks = store.store.versions = True
        extra = {
            "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "else", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "MODELKEEP_S3_ENDPOINT_URL": store.url,
            "MODELKEEP_BACKUP_KEY_FILE": str(short_path / "backup.key"),
        }  # fmt: skip
        with box(short_path, extra=extra) as one:
            made = Night(one, store)
            made.make()
            yield made


def walk(night: Night) -> Iterator[tuple[Call, list[str]]]:
    """Each command of the page with what it printed."""
    section = ""
    for call in printed.calls(page()):
        if call.section != section:
            section = call.section
            if section in PREPARED:
                PREPARED[section](night)
        said = night.run(call)
        yield call, said
        night.said += said
        if call.command in AFTER:
            AFTER[call.command](night)


@pytest.mark.timeout(600)
def test_every_command_of_the_backup_runbooks_prints_what_the_page_says(night: Night) -> None:
    faults = list[str]()
    for call, said in walk(night):
        faults += printed.differences(call, said, earlier=night.said)
    assert not faults, "\n".join(faults)
    assert night.one.audit_faults() == []


def test_every_section_is_there_and_every_preparation_is_used() -> None:
    calls = printed.calls(page())
    assert list(dict.fromkeys(call.section for call in calls)) == list(SECTIONS) == list(PREPARED)
    assert set(AFTER) <= {call.command for call in calls}
    assert all(call.printed for call in calls)
    assert set(printed.others(page())) == {*by_hand("sql"), *BY_HAND}, "a block that nothing runs"


def test_the_text_of_the_backup_runbooks_names_no_command_that_no_test_runs() -> None:
    name = re.compile(
        r"modelkeep ([a-z]+(?: (?:verify|list|show|new-key|rotate-key|prune|pin|keep|undelete|archive|history))?)\b"
    )
    run = {found for call in printed.calls(page()) for found in name.findall(call.command)}
    named = {found for text in re.findall(r"`([^`\n]+)`", page()) for found in name.findall(text)}
    assert named - run == IN_PASSING
