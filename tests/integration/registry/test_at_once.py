"""Many at once on one registry, on every database: nothing is lost, nothing is torn, nobody waits for ever, the chain holds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from registry import clock, leases, promotions, replicas, routes
from registry.database import Database
from registry.errors import ConflictError, LockedError, UnavailableError
from registry.routes import Desired
from registry.schema import AuditEvent, Environment, Model, Promotion, Replica, ReplicaCount, RouteChange
from registry.store import DirectoryStore
from registry.versions import register
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL

SPAWN = multiprocessing.get_context("spawn")
ROOT = Path(__file__).resolve().parents[3]


def url_of(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


def add_models(database: Database, *names: str) -> None:
    with database.write(actor="test") as transaction:
        for name in names:
            transaction.session.add(Model(name=name, created_at=clock.now()))
            transaction.record("model.created", f"model:{name}")


def count(database: Database, table: Any) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def change_routes(url: str, anchors: str, number: int, start: Any) -> None:
    database = Database(url, anchors=Path(anchors))
    start.wait()
    for version in range(number):
        with database.write(actor=str(os.getpid())) as transaction:
            routes.change(transaction, ENVIRONMENT, MODEL, Desired(stable=str(version)), kind="promote", reason="")
    database.dispose()


def test_processes_that_write_at_once_lose_no_update(database: Database) -> None:
    start = SPAWN.Barrier(2)
    arguments = (url_of(database), str(database.anchors), 15, start)
    processes = [SPAWN.Process(target=change_routes, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    with database.read() as session:
        assert session.get_one(Environment, ENVIRONMENT).generation == 30
        generations = session.scalars(select(RouteChange.generation).order_by(RouteChange.generation)).all()
    assert list(generations) == list(range(1, 31))
    verdict = kit.verdict(database)
    assert verdict.faults == []
    assert verdict.events > 30


def test_five_promotions_of_different_models_at_once_while_twenty_servers_report(database: Database) -> None:
    models = [f"model{number}" for number in range(5)]
    for model in models:
        for version in ("1", "2"):
            kit.add_version(database, version, model=model)
    start, done = threading.Barrier(6), threading.Event()

    def promote(model: str) -> None:
        start.wait()
        for version in ("1", "2"):
            operation = kit.begin(database, version, model=model)
            leases.beat(database, operation.held)
            if operation.stable is not None:
                kit.canary(database, operation)
                leases.beat(database, operation.held)
            kit.promote(database, operation)
            kit.end(database, operation, "promoted")

    def report() -> int:
        start.wait()
        rounds, last = 0, False
        while not last:
            last = done.is_set()  # and then once more: who begins a promotion forgets the counts of those that ended
            with database.read() as session:
                pulse = replicas.pulse(session, ENVIRONMENT)
            if pulse is None:
                continue
            rounds += 1
            figures = {"model": models[0], "version": "1", "epoch": pulse.epoch, "generation": 1, "requests": rounds}
            for number in range(20):
                replicas.report(
                    database,
                    replicas.Report(
                        f"r{number}", ENVIRONMENT, "http://127.0.0.1:8000", "b1", pulse.epoch, pulse.generation, {},
                        clock.now(), counts=(figures,),
                    ),
                )  # fmt: skip
        return rounds

    with ThreadPoolExecutor(6) as pool:
        reporting = pool.submit(report)
        try:
            for finished in [pool.submit(promote, model) for model in models]:
                finished.result()
        finally:
            done.set()
        assert reporting.result() >= 1
    with database.read() as session:
        assert set(session.scalars(select(Promotion.state))) == {"promoted"}
        assert session.scalar(select(func.count()).select_from(Promotion)) == 10
    for model in models:
        assert kit.route(database, model).stable == "2"
    assert count(database, Replica) == 20
    assert count(database, ReplicaCount) == 20
    assert kit.verdict(database).holds


def test_of_two_promotions_of_one_model_at_once_one_begins_and_the_other_is_told_who_holds_it(
    database: Database,
) -> None:
    kit.add_version(database, "1")
    start = threading.Barrier(2)

    def begin() -> promotions.Operation | LockedError:
        start.wait()
        try:
            return kit.begin(database, "1")
        except LockedError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        found = [attempt.result() for attempt in [pool.submit(begin) for _ in range(2)]]
    (refused,) = [one for one in found if isinstance(one, LockedError)]
    assert "is locked by promotion of digits 1 by " in str(refused)
    assert " since 20" in str(refused)
    assert count(database, Promotion) == 1


def test_files_that_are_registered_at_once_get_numbers_of_their_own(database: Database, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "artifacts")
    files = [kit.onnx_file(tmp_path / str(number) / "m.onnx", number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda path: register(database, store, path, name="m", max_bytes=10**9), files))
    assert sorted(one.version for one in made) == ["1", "2", "3", "4"]
    assert kit.verdict(database).holds


def test_two_that_make_the_same_row_are_told_so(database: Database) -> None:
    add_models(database, "a")
    with pytest.raises(ConflictError, match=r"changed the same row .* repeat the command"):
        add_models(database, "b", "a")
    assert (count(database, Model), kit.verdict(database).events) == (1, 1)


def test_a_reader_sees_one_moment_in_all_its_statements(database: Database) -> None:
    add_models(database, "a")
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 1
        add_models(database, "b")
        assert session.scalar(select(func.count()).select_from(AuditEvent)) == 1
    assert count(database, AuditEvent) == 2


def test_a_writer_sees_all_that_was_committed_before_it_and_holds_up_the_next(database: Database) -> None:
    inside, order = threading.Event(), list[str]()

    def second() -> None:
        inside.wait()
        with database.write() as transaction:
            assert transaction.session.get(Model, "a") is not None, "it sees what the first committed"
            order.append("second begins")

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second)
        with database.write() as transaction:
            assert transaction.session.get(Model, "a") is None
            inside.set()
            with database.read() as session:
                assert session.get(Model, "a") is None, "readers are not held up"
            transaction.session.add(Model(name="a", created_at=clock.now()))
            transaction.session.flush()
            order.append("first ends")
        waiting.result()
    assert order == ["first ends", "second begins"]


def test_a_lock_that_is_never_given_back_is_an_error_and_not_a_wait_for_ever(database: Database) -> None:
    impatient = Database(url_of(database), answer_seconds=1)
    with database.write() as transaction:
        transaction.session.get(Model, "a")
        with pytest.raises(UnavailableError):
            add_models(impatient, "a")
    add_models(impatient, "a")
    impatient.dispose()
    assert count(database, Model) == 1


WRITER = """
import sys, time
from pathlib import Path
from registry import audit, clock
from registry.database import Database
from registry.schema import Model
from tests.integration.registry.test_at_once import add_models

database, what = Database(sys.argv[1], anchors=Path(sys.argv[2])), sys.argv[3]
if what == "inside":
    with database.write(actor="doomed") as transaction:
        session = transaction.session
        for number in range(200):
            session.add(Model(name=f"doomed{number}", description="x" * 2000, created_at=clock.now()))
            transaction.record("model.created", f"model:doomed{number}")
        session.flush()
        audit.append(session, transaction.events)
        print("ready", flush=True)
        time.sleep(600)
else:
    database.revision()
    print("ready", flush=True)
    for number in range(1_000_000):
        add_models(database, f"{what}-{number}-a", f"{what}-{number}-b")
"""


@contextlib.contextmanager
def writer(database: Database, what: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, url_of(database), str(database.anchors), what],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def test_a_writer_killed_in_the_middle_leaves_nothing_and_its_lock_goes_with_it(database: Database) -> None:
    add_models(database, "before")
    with writer(database, "inside") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    add_models(database, "after")
    verdict = kit.verdict(database)
    assert (count(database, Model), verdict.events, verdict.faults) == (2, 2, [])


def test_writers_killed_at_any_moment_leave_whole_transactions_only(database: Database) -> None:
    for number in range(2):
        with writer(database, str(number)) as process:
            time.sleep(0.05 + 0.1 * number)
            process.send_signal(signal.SIGKILL)
            process.wait()
        with database.write():  # a server may still be about to commit for the dead
            pass
        with database.read() as session:
            names = set(session.scalars(select(Model.name)))
            assert session.scalar(select(func.count()).select_from(AuditEvent)) == len(names)
        assert {name[:-1] + "a" for name in names} | {name[:-1] + "b" for name in names} == names, "pairs, never a half"
        assert kit.verdict(database).holds


@pytest.mark.server
def test_who_stands_still_inside_a_transaction_loses_it_and_the_others_go_on(blank: Callable[[], Database]) -> None:
    """A stopped process holds its locks for as long as the server lets it."""
    patient = blank()
    patient.prepare()
    hasty = Database(url_of(patient), answer_seconds=1)  # a second for a lock, four for standing still
    with pytest.raises(UnavailableError), hasty.write(actor="stopped") as stopped:
        stopped.session.add(Model(name="stopped", created_at=clock.now()))
        stopped.session.flush()
        add_models(patient, "a")  # waits until the server has ended the other
    hasty.dispose()
    with patient.read() as session:
        assert session.scalars(select(Model.name)).all() == ["a"]
