"""A registry moves to another database: every row, the chain, a new epoch; what is interrupted looks like nothing whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import JSON, func, select, text, update

from registry import clock, copying, leases, migrate, replicas, routes
from registry.database import Database
from registry.errors import AuditError, ConflictError, FencedError, LockedError, UsageError
from registry.schema import REVISION, AuditEvent, AuditHead, Base, Environment, Model, Promotion, Version
from tests.unit.registry import kit

Blank = Callable[[], Database]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Database]:
    """`file("a")` is an SQLite registry without any tables, whatever --registry-database says."""

    def make(name: str) -> Database:
        (tmp_path / name).mkdir()
        return Database(f"sqlite:///{tmp_path / name / 'registry.db'}", anchors=tmp_path / name / "audit.anchors")

    return make


def lived_in(database: Database) -> Database:
    """A registry with models, promotions that ended in several ways, rollbacks, replicas and their counts."""
    database.prepare()
    for version in ("1", "2", "3"):
        kit.add_version(database, version)
    kit.add_version(database, "1", model="Digits")
    kit.stable_by(database, "1", "2")
    operation = kit.begin(database, "3")
    kit.canary(database, operation, 0.1 + 0.2)
    kit.end(database, operation, "withdrawn")
    with database.write(actor="ann") as transaction:
        row = transaction.session.get_one(Version, (kit.MODEL, "1"))
        row.tags, row.validation, row.facts = {"team": "sehr schön ✓", "n": [1, 2.5, None]}, JSON.NULL, {"a": {"b": []}}
        transaction.record("version.tagged", "version:digits/1", after=row.tags, reason="Überprüft\nzweimal")
    replicas.report(
        database,
        replicas.Report("r1", kit.ENVIRONMENT, "http://127.0.0.1:8000", "b1", "e", 3, {"models": {}}, clock.now()),
    )
    return database


def contents(database: Database, *left_out: str) -> dict[str, list[Any]]:
    with database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key.columns))]
            for table in Base.metadata.sorted_tables
            if table.name not in left_out
        }


def sql_nulls(database: Database) -> int:
    """How many versions have no validation at all, which is not the same as the JSON null."""
    with database.read() as session:
        return session.execute(text("SELECT count(*) FROM versions WHERE validation IS NULL")).scalar_one()


def check(source: Database, target: Database) -> copying.Copied:
    before = contents(source, "environments", "audit", "audit_head")
    done = copying.copy(source, target)
    assert contents(target, "environments", "audit", "audit_head") == before
    assert sum(done.rows.values()) == sum(map(len, before.values())) + 1 + 1 + done.events
    assert target.revision() == REVISION
    assert sql_nulls(target) == sql_nulls(source) == 3
    verdict = kit.verdict(target)
    assert (verdict.faults, verdict.events) == ([], done.events + 1)
    assert kit.actions(source)[-1] == "registry.copy-begun"
    assert kit.actions(target) == [*kit.actions(source), "registry.copied"]
    with source.read() as old, target.read() as new:
        generation = old.get_one(Environment, kit.ENVIRONMENT).generation
        there = new.get_one(Environment, kit.ENVIRONMENT)
        assert there.generation == generation
        assert there.epoch == done.epochs[kit.ENVIRONMENT] != old.get_one(Environment, kit.ENVIRONMENT).epoch
        assert routes.previous_stable(new, kit.ENVIRONMENT, kit.MODEL) == "1"
    operation = kit.begin(target, "3")
    kit.end(target, operation, "withdrawn")
    assert kit.verdict(target).holds
    return done


def test_a_file_moves_to_the_database_of_this_run(blank: Blank, file: Callable[[str], Database]) -> None:
    check(lived_in(file("source")), blank())


def test_the_database_of_this_run_moves_to_a_file(blank: Blank, file: Callable[[str], Database]) -> None:
    check(lived_in(blank()), file("target"))


def test_the_password_of_the_target_is_nowhere_on_record(blank: Blank, file: Callable[[str], Database]) -> None:
    source, target = lived_in(file("source")), blank()
    copying.copy(source, target)
    for database in (source, target):
        with database.read() as session:
            texts = "".join(session.scalars(select(AuditEvent.text)))
        assert "hunter2" not in texts
        assert target.shown in texts


def test_a_target_that_holds_something_is_refused_and_named(blank: Blank, file: Callable[[str], Database]) -> None:
    source = lived_in(file("source"))
    events = kit.last_event(source)
    target = lived_in(blank())
    with pytest.raises(
        ConflictError,
        match=r"is not empty, so nothing was copied: it holds \d+ rows in audit, .*2 rows in models",
    ):
        copying.copy(source, target)
    foreign = blank()
    foreign.make_folder()
    with foreign.engine.begin() as connection:
        connection.execute(text("CREATE TABLE customers (id INTEGER)"))
    with pytest.raises(
        ConflictError, match="it holds table customers, which is not of a registry; name an empty database"
    ):
        copying.copy(source, foreign)
    assert kit.last_event(source) == events


def test_an_empty_schema_is_an_empty_database(blank: Blank, file: Callable[[str], Database]) -> None:
    source, target = lived_in(file("source")), blank()
    target.prepare()
    assert copying.copy(source, target).rows["models"] == 2


def test_a_registry_is_not_copied_onto_itself(database: Database) -> None:
    again = Database(database.url.render_as_string(hide_password=False))
    with pytest.raises(UsageError, match="is the registry itself: name another database"):
        copying.copy(database, again)
    again.dispose()


def test_a_promotion_under_way_is_not_cut_off(blank: Blank, file: Callable[[str], Database]) -> None:
    source = lived_in(file("source"))
    operation = kit.begin(source, "3")
    target = blank()
    with pytest.raises(LockedError, match=r"is locked by promotion of digits 3 .* a copy would cut that off"):
        copying.copy(source, target)
    kit.end(source, operation, "withdrawn")
    copying.copy(source, target)


def test_a_token_of_the_source_is_dead_in_the_copy(blank: Blank, file: Callable[[str], Database]) -> None:
    source = lived_in(file("source"))
    with source.write() as transaction:
        held = leases.acquire(
            transaction, "model:production/x", kit.ENVIRONMENT, holder="ann", ttl_seconds=9, promotion=None
        )
        leases.wait_for_approval(transaction, held)
    target = blank()
    copying.copy(source, target)
    with source.write() as transaction:
        leases.check(transaction, held)
    with pytest.raises(FencedError), target.write() as transaction:
        leases.check(transaction, held)


def test_an_interrupted_copy_is_refused_by_all_and_filled_by_the_next(
    blank: Blank, file: Callable[[str], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = lived_in(file("source")), blank()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(copying, "new_epochs", interrupt)
        copying.copy(source, target)
    with pytest.raises(UsageError, match="is an unfinished copy: repeat modelkeep db copy-to from where it was copied"):
        target.prepare()
    with target.read() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 0
    check(source, target)


def test_what_arrives_otherwise_than_sent_is_not_kept(
    blank: Blank, file: Callable[[str], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = lived_in(file("source")), blank()
    fill = copying.fill

    def lose(*arguments: Any) -> dict[str, int]:
        rows = fill(*arguments)
        arguments[1].execute(text("DELETE FROM models WHERE name = 'Digits'"))
        return rows

    def change(*arguments: Any) -> dict[str, int]:
        rows = fill(*arguments)
        arguments[1].execute(update(AuditEvent).where(AuditEvent.seq == 2).values(actor="eve"))
        return rows

    for fault, words in ((lose, "1 rows arrived in models, 2 were sent"), (change, "does not verify .event 2 ")):
        monkeypatch.setattr(copying, "fill", fault)
        with pytest.raises(AuditError, match=words):
            copying.copy(source, target)
        assert target.revision() == migrate.COPYING
        with target.read() as session:
            assert session.scalar(select(func.count()).select_from(AuditEvent)) == 0


def test_a_chain_with_faults_keeps_them_and_they_are_told(blank: Blank, file: Callable[[str], Database]) -> None:
    source, target = lived_in(file("source")), blank()
    with source.engine.begin() as connection:
        connection.execute(text("UPDATE audit SET actor = 'eve' WHERE seq = 3"))
    done = copying.copy(source, target)
    assert [fault.split(" (")[0] for fault in done.faults] == ["event 3"]
    assert kit.verdict(target).faults == done.faults


def test_events_that_come_during_the_copy_are_counted_as_left_behind(
    blank: Blank, file: Callable[[str], Database]
) -> None:
    source, target = lived_in(blank()), file("target")
    late: list[str] = []

    def write(table: str, _: int) -> None:
        if not late:
            late.append(table)
            kit.add_version(source, "late")

    done = copying.copy(source, target, on_table=write)
    assert done.behind == 1
    with target.read() as session:
        assert session.get(Version, (kit.MODEL, "late")) is None
        assert session.get_one(AuditHead, 1).seq == done.events + 1
        assert session.scalar(select(func.count()).select_from(Promotion)) == 3
