"""A database server that dies, at rest and at the moment of a commit; and what it refuses. On the server of --registry-database."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from registry import clock
from registry.database import Database
from registry.errors import RefusedError, StorageError, UnavailableError
from registry.feedback import Verdict
from registry.schema import AuditEvent, Feedback, Model, PromotionStep, ReplicaCount
from serving.follow.reporting import Reporter, Said
from serving.state import Serving
from tests.integration.registry.test_at_once import add_models, count, url_of
from tests.registry_servers import PROGRAMS, Server, starter
from tests.unit.registry import kit

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def mortal(registry_server: Server | None, program: Callable[[str], Path]) -> Iterator[Server]:
    """A server of this test's own."""
    assert registry_server is not None
    server = starter(registry_server.kind, program)
    yield server
    server.close()


def test_a_server_that_dies_is_told_and_found_again_when_it_is_back(mortal: Server, tmp_path: Path) -> None:
    database = Database(mortal.create(), anchors=tmp_path / "audit.anchors", answer_seconds=3)
    database.prepare()
    add_models(database, "before")
    mortal.kill()
    for attempt in (lambda: add_models(database, "a"), lambda: count(database, Model), database.revision):
        with pytest.raises(UnavailableError, match="does not answer"):
            attempt()
    mortal.start()
    add_models(database, "after")
    assert (count(database, Model), kit.verdict(database).faults) == (2, [])

    def die(*_: object) -> None:
        mortal.kill()

    event.listen(database.engine, "commit", die)
    with pytest.raises(
        UnavailableError, match="went away while a change was committed: it is on record as a whole or not at all"
    ):
        add_models(database, "a", "b")
    event.remove(database.engine, "commit", die)
    mortal.start()
    assert count(database, Model) in (2, 4), "whole or not at all"
    assert kit.verdict(database).holds
    add_models(database, "c")
    database.dispose()


def test_kills_at_random_moments_of_twenty_streams_of_commits_leave_whole_transactions_only(
    mortal: Server, tmp_path: Path
) -> None:
    """What was answered is on record, what was refused is not, and what got no answer is whole or absent."""
    database = Database(mortal.create(), anchors=tmp_path / "audit.anchors", answer_seconds=3)
    database.prepare()
    moments, numbers = random.Random(20), iter(range(1_000_000))
    answered, unknown = set[int](), set[int]()
    for _ in range(20):
        begun = threading.Event()

        def write(begun: threading.Event = begun) -> None:
            while True:
                number = next(numbers)
                try:
                    add_models(database, f"{number}-a", f"{number}-b")
                except UnavailableError:
                    unknown.add(number)
                    return
                answered.add(number)
                begun.set()

        writer = threading.Thread(target=write)
        writer.start()
        assert begun.wait(30)
        time.sleep(moments.uniform(0.0, 0.05))
        mortal.kill()
        writer.join(60)
        assert not writer.is_alive()
        mortal.start()
    with database.read() as session:
        names = set(session.scalars(select(Model.name)))
        assert session.scalar(select(func.count()).select_from(AuditEvent)) == len(names)
    halves = [{int(name[:-2]) for name in names if name.endswith(end)} for end in ("-a", "-b")]
    assert halves[0] == halves[1], "pairs, never a half"
    assert answered <= halves[0] <= answered | unknown
    assert len(unknown) == 20
    assert kit.verdict(database).holds
    database.dispose()


def test_a_server_goes_with_the_process_that_started_it(
    registry_server: Server | None, program: Callable[[str], Path]
) -> None:
    assert registry_server is not None
    code = """
import os, sys
from pathlib import Path
from tests.registry_servers import Server
server = Server(sys.argv[1], Path(sys.argv[2]))
print(server.process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, registry_server.kind, str(program(PROGRAMS[registry_server.kind]))],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    while Path(f"/proc/{pid}/stat").exists():  # the test's timeout is its patience
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break


def test_a_wrong_password_and_a_missing_database_are_told(database: Database) -> None:
    for url in (url_of(database).replace("hunter2", "wrong"), f"{url_of(database)}_gone"):
        other = Database(url)
        with pytest.raises(
            UnavailableError, match=r"does not answer: .*(denied|failed|nknown database|does not exist)"
        ) as error:
            other.prepare()
        assert "hunter2" not in str(error.value)
        other.dispose()


def test_a_database_without_tables_says_what_to_do(blank: Callable[[], Database]) -> None:
    with pytest.raises(UnavailableError, match=r"lacks a table or column .*modelkeep db upgrade"):
        count(blank(), Model)


def test_what_does_not_fit_a_column_is_refused_and_nothing_is_cut(database: Database) -> None:
    with pytest.raises(RefusedError, match=r"does not take a value: .*; shorten it"):
        add_models(database, "x" * 129)
    assert (count(database, Model), kit.verdict(database).events) == (0, 0)


def test_what_a_server_cannot_be_told_as_a_whole_it_is_told_in_pieces(database: Database) -> None:
    """Names that are too long, a number out of range, and a text with a zero byte: the last only PostgreSQL refuses."""
    for version in ("1", "2"):
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    generation = kit.canary(database, kit.begin(database, "2"))[1]
    serving = Serving(environment=kit.ENVIRONMENT, replica_id="r1", boot_id="boot")
    serving.epoch, serving.generation = "e", generation
    counts = [
        {"model": kit.MODEL, "version": version, "generation": number, "epoch": "e", "requests": 1}
        for version, number in (("1", 1), ("x" * 129, 1), ("2", 1 << 40), ("2", 1))
    ]
    serving.watch_counts = lambda: counts  # type: ignore[method-assign]
    texts = ["good", "zero\0byte", "good"]
    serving.feedback.put([Verdict(str(n), "2", generation, bad=True, reason=text) for n, text in enumerate(texts)])
    reporter = Reporter(serving, database, monotonic=time.monotonic)

    async def in_thread(work: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(work)

    errors = {("digits", "x" * 400): "does not load", ("digits", "1"): "neither does this"}
    asyncio.run(reporter.report(in_thread, lambda: Said("http://127.0.0.1:1", clock.now(), {}, errors)))
    with database.read() as session:
        told = session.scalars(select(ReplicaCount.version).order_by(ReplicaCount.version)).all()
        verdicts = set(session.scalars(select(Feedback.request_id)))
        unloadable = session.scalars(select(AuditEvent.subject).where(AuditEvent.action == "version.unloadable")).all()
    assert list(told) == ["1", "2"]
    assert {"0", "2"} <= verdicts and len(serving.feedback) == 0
    assert list(unloadable) == ["version:digits/1"]
    assert {"report", "unloadable"} <= set(reporter.refused)


def test_a_number_that_is_none_is_absent_and_not_an_error(database: Database) -> None:
    figures = {"p95": float("nan"), "bounds": [1.5, float("inf")], "n": 3}
    with database.write(actor="test") as transaction:
        transaction.session.add(
            PromotionStep(promotion="p", number=1, at=clock.now(), step="s", title="t", detail="", figures=figures)
        )
    with database.read() as session:
        assert session.get_one(PromotionStep, ("p", 1)).figures == {"p95": None, "bounds": [1.5, None], "n": 3}


def test_times_keep_their_microseconds_and_names_their_case(database: Database) -> None:
    moment = clock.now().replace(microsecond=123456)
    with database.write(actor="test") as transaction:
        for name in ("digits", "Digits", "DIGITS"):
            transaction.session.add(Model(name=name, created_at=moment))
    with database.read() as session:
        assert session.get_one(Model, "Digits").created_at == moment
        assert session.scalars(select(Model.name).order_by(Model.name)).all() == ["DIGITS", "Digits", "digits"]
        assert session.scalar(select(func.count()).select_from(Model).where(Model.name == "dIGITS")) == 0


def test_a_server_that_takes_no_writes_is_told_as_that(mortal: Server) -> None:
    database = Database(mortal.create())
    database.prepare()
    if mortal.kind == "mariadb":
        mortal.execute("CREATE USER 'reader'@'127.0.0.1' IDENTIFIED BY 'hunter2'", "GRANT ALL ON *.* TO 'reader'@'127.0.0.1'",
                       "REVOKE SUPER, READ_ONLY ADMIN ON *.* FROM 'reader'@'127.0.0.1'", "SET GLOBAL read_only = 1")  # fmt: skip
        url = url_of(database).replace("keeper", "reader")
    else:
        mortal.execute(f"ALTER DATABASE {database.url.database} SET default_transaction_read_only = on")
        url = url_of(database)
    database.dispose()
    replica = Database(url)
    with pytest.raises(StorageError, match="point MODELKEEP_DATABASE_URL at the server that takes writes"):
        add_models(replica, "a")
    with replica.read() as session:
        assert session.execute(text("SELECT count(*) FROM models")).scalar() == 0
    replica.dispose()
