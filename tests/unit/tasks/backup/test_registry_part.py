"""The registry comes back whole: every row, its audit chain longer by one event, a new epoch, nothing under way."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text

from registry import audit, clock, leases, replicas, restoring, routes
from registry.database import Database
from registry.errors import (
    ArtifactError,
    ConflictError,
    FencedError,
    ModelkeepError,
    StorageError,
    UnavailableError,
    UsageError,
)
from registry.schema import AuditEvent, Base, Environment, Lease, Promotion, Reach, Replica
from tasks.backup import registry_part
from tasks.backup.components import Target
from tasks.backup.registry_part import FILE, CapturedRegistry, RegistryPart
from tests.unit.registry import kit
from tests.unit.tasks.backup.household import House, house
from tests.unit.tasks.backup.shelf import Shelf, taken

CHANGED = ("environments", "audit", "audit_head", "replicas", "replica_counts", "reaches")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = house(tmp_path_factory.mktemp("template"))
    found.database.dispose()
    return found.home


@pytest.fixture
def lived_in(template: Path, tmp_path: Path) -> Iterator[House]:
    home = tmp_path / "home"
    shutil.copytree(template, home)
    from registry.connect import open_database
    from registry.settings import Settings
    from registry.store import DirectoryStore

    settings = Settings(home=home)
    found = House(home, settings, open_database(settings), DirectoryStore(Path(settings.artifacts)))
    yield found
    found.database.dispose()


def target(home: Path, **more: Any) -> Target:
    return Target(f"sqlite:///{home / 'registry.db'}", home, options={"backup_id": "20261121T020000Z-0a1b2c"}, **more)


def registry_at(home: Path) -> Database:
    return Database(f"sqlite:///{home / 'registry.db'}", anchors=home / "audit.anchors")


def rows(database: Database, *left_out: str) -> dict[str, list[Any]]:
    with database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key.columns))]
            for table in Base.metadata.sorted_tables
            if table.name not in left_out
        }


def test_an_empty_home_becomes_the_registry_of_then(lived_in: House, tmp_path: Path) -> None:
    before, events = rows(lived_in.database, *CHANGED), kit.last_event(lived_in.database)
    shelf = taken(RegistryPart(lived_in.settings))
    assert rows(lived_in.database, *CHANGED) == before and kit.last_event(lived_in.database) == events
    facts = shelf.record.facts
    assert facts["registry"]["audit_head"]["seq"] == events
    assert facts["routes"]["production"]["digits"]["stable"] == "2"
    assert facts["tables"]["versions"] == 5
    back = tmp_path / "back"
    done = registry_part.restore(shelf, target(back))
    database = registry_at(back)
    assert rows(database, *CHANGED) == before
    assert kit.actions(database, events) == [restoring.RESTORED]
    verdict = kit.verdict(database)
    assert (verdict.faults, verdict.events, done["events"]) == ([], events + 1, events + 1)
    with database.read() as session:
        event = json.loads(session.get_one(AuditEvent, events + 1).text)
        environment = session.get_one(Environment, kit.ENVIRONMENT)
        assert event["after"]["from"] == "20261121T020000Z-0a1b2c"
        assert event["after"]["hash"] == facts["registry"]["audit_head"]["hash"]
        then = facts["registry"]["environments"][kit.ENVIRONMENT]
        assert environment.epoch != then["epoch"]
        assert environment.generation == then["generation"]
        assert routes.previous_stable(session, kit.ENVIRONMENT, kit.MODEL) == "1"
    operation = kit.begin(database, "3")
    kit.end(database, operation, "withdrawn")
    assert kit.verdict(database).holds
    database.dispose()


def test_what_it_holds_is_verified_and_the_live_registry_stays_as_it_is(lived_in: House, tmp_path: Path) -> None:
    shelf = taken(RegistryPart(lived_in.settings))
    before = rows(lived_in.database)
    found = registry_part.verify(shelf, tmp_path)
    assert found.differences == ()
    assert found.checked["versions"] == 5
    assert rows(lived_in.database) == before
    assert [path.name for path in lived_in.home.glob(".backup*")] == []


def test_the_part_says_which_bytes_belong_to_it(lived_in: House) -> None:
    lived_in.delete("old")
    captured = taken(RegistryPart(lived_in.settings)).captured
    assert isinstance(captured, CapturedRegistry)
    names = {one.name: one.serves for one in captured.needs.versions}
    assert names["digits@2"] == ("production: stable",)
    assert "digits@old" not in names
    assert any("rollback point" in who for who in captured.needs.digests[_digest(lived_in, "1")])


def _digest(lived_in: House, version: str) -> str:
    from registry import versions

    with lived_in.database.read() as session:
        return versions.get(session, kit.MODEL, version).digest


def test_a_writer_is_not_held_up_and_the_snapshot_is_of_one_moment(
    lived_in: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = restoring.alone

    def late(path: Path) -> None:
        kit.add_version(lived_in.database, f"late-{kit.last_event(lived_in.database)}")
        real(path)

    monkeypatch.setattr(restoring, "alone", late)
    events = kit.last_event(lived_in.database)
    facts = taken(RegistryPart(lived_in.settings)).record.facts
    assert facts["registry"]["audit_head"]["seq"] == events < kit.last_event(lived_in.database)
    assert facts["tables"]["versions"] == 5


def test_a_registry_that_holds_something_is_refused_and_replaced_only_by_force(lived_in: House) -> None:
    shelf = taken(RegistryPart(lived_in.settings))
    kit.add_version(lived_in.database, "since")
    operation = kit.begin(lived_in.database, "since")
    before, head = rows(lived_in.database), kit.verdict(lived_in.database).head
    assert "6 rows in versions" in str(registry_part.occupied(target(lived_in.home)))
    with pytest.raises(ConflictError, match="is not empty, so nothing was restored"):
        registry_part.restore(shelf, target(lived_in.home))
    assert rows(lived_in.database) == before
    done = registry_part.restore(shelf, target(lived_in.home, force=True))
    verdict = kit.verdict(lived_in.database)
    assert verdict.faults == []
    assert verdict.events == shelf.record.facts["registry"]["audit_head"]["seq"] + 1
    kept = Path(done["anchors_kept"])
    assert f"{head.seq} {head.hash}" in kept.read_text(), "the anchors of what was replaced are evidence"
    assert str(head.hash) not in (lived_in.home / "audit.anchors").read_text()
    with lived_in.database.read() as session:
        event = json.loads(session.get_one(AuditEvent, verdict.events).text)
    assert event["before"] == {"events": head.seq, "hash": head.hash}
    with pytest.raises((FencedError, ConflictError)):
        kit.end(lived_in.database, operation, "withdrawn")


def test_a_second_call_for_the_same_finds_it_done(lived_in: House, tmp_path: Path) -> None:
    shelf, back = taken(RegistryPart(lived_in.settings)), tmp_path / "back"
    first = registry_part.restore(shelf, target(back))
    again = registry_part.restore(shelf, target(back))
    assert (first["again"], again["again"]) == (False, True)
    assert again["epochs"] == first["epochs"]
    assert again["events"] == first["events"]
    database = registry_at(back)
    kit.add_version(database, "since")
    with pytest.raises(ConflictError):
        registry_part.restore(shelf, target(back))
    database.dispose()


STEPS = ("fill", "checked", "new_epochs")


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("step", [*STEPS, "anchors"])
def test_killed_at_any_step_the_next_call_finishes_it(
    step: str, force: bool, lived_in: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = taken(RegistryPart(lived_in.settings))
    kit.add_version(lived_in.database, "since")
    back = lived_in.home if force else tmp_path / "back"
    before = rows(lived_in.database) if force else None

    def killed(*rest: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((restoring, "_follow") if step == "anchors" else (restoring.copying, step)), killed)
        with pytest.raises(KeyboardInterrupt):
            registry_part.restore(shelf, target(back, force=force))
    database = registry_at(back)
    if step != "anchors":
        if force:
            assert rows(database) == before
        else:
            with pytest.raises(UsageError, match="unfinished copy"):
                database.prepare()
            assert registry_part.occupied(target(back)) is None
    database.dispose()
    registry_part.restore(shelf, target(back, force=force))
    verdict = kit.verdict(database)
    assert (verdict.faults, verdict.events) == ([], shelf.record.facts["registry"]["audit_head"]["seq"] + 1)
    database.dispose()


def test_a_backup_that_was_taken_during_a_promotion_comes_back_without_it(lived_in: House, tmp_path: Path) -> None:
    operation = kit.begin(lived_in.database, "3")
    kit.canary(lived_in.database, operation, 0.25)
    shelf = taken(RegistryPart(lived_in.settings))
    assert shelf.record.facts["routes"]["production"]["digits"]["candidate"] == "3"
    registry_part.restore(shelf, target(tmp_path / "back"))
    database = registry_at(tmp_path / "back")
    with database.read() as session:
        route = routes.read(session, kit.ENVIRONMENT, kit.MODEL)
        assert route is not None and (route.stable, route.candidate, route.weight) == ("2", None, 0.0)
        assert {row.state for row in session.scalars(select(Lease))} == {leases.RELEASED}
        assert session.get_one(Promotion, operation.id).state == "withdrawn"
    assert kit.verdict(database).holds
    assert registry_part.restore(shelf, target(tmp_path / "back"))["again"]
    kit.end(database, kit.begin(database, "3"), "withdrawn")
    kit.canary(lived_in.database, operation, 0.5)  # the live one goes on
    database.dispose()


def test_a_soak_that_was_under_way_leaves_its_version_stable(lived_in: House, tmp_path: Path) -> None:
    operation = kit.begin(lived_in.database, "3")
    kit.canary(lived_in.database, operation)
    kit.promote(lived_in.database, operation)
    registry_part.restore(taken(RegistryPart(lived_in.settings)), target(tmp_path / "back"))
    database = registry_at(tmp_path / "back")
    route = kit.route(database)
    assert (route.stable, route.watch) == ("3", False)
    with database.read() as session:
        assert session.get_one(Promotion, operation.id).state == "promoted"
    database.dispose()


def test_servers_of_then_are_forgotten_and_follow_by_the_new_epoch(lived_in: House, tmp_path: Path) -> None:
    with lived_in.database.read() as session:
        environment = session.get_one(Environment, kit.ENVIRONMENT)
        then = replicas.Report(
            "r1",
            kit.ENVIRONMENT,
            "http://127.0.0.1:1",
            "boot",
            environment.epoch,
            environment.generation,
            {},
            clock.now(),
        )
    replicas.report(lived_in.database, then)
    registry_part.restore(taken(RegistryPart(lived_in.settings)), target(tmp_path / "back"))
    database = registry_at(tmp_path / "back")
    with database.read() as session:
        assert session.scalars(select(Replica)).all() == []
        reach = session.scalars(select(Reach)).one()
        assert reach.until is not None
        pulse = replicas.pulse(session, kit.ENVIRONMENT)
        assert pulse is not None and (pulse.epoch, pulse.generation) != (then.epoch, then.generation)
    replicas.report(database, replace(then, epoch=pulse.epoch, generation=pulse.generation))
    with database.read() as session:
        assert session.scalars(select(Replica)).one().epoch == pulse.epoch
    database.dispose()


def test_a_damaged_file_is_put_aside_with_its_log(lived_in: House) -> None:
    shelf = taken(RegistryPart(lived_in.settings))
    lived_in.database.dispose()
    path = lived_in.home / "registry.db"
    path.write_bytes(b"this is no database at all, and it is long enough to be one" * 200)
    (lived_in.home / "registry.db-wal").write_bytes(b"stale")
    with pytest.raises(StorageError, match="is damaged"):
        registry_part.restore(shelf, target(lived_in.home))
    done = registry_part.restore(shelf, target(lived_in.home, force=True))
    assert Path(done["damaged_kept"]).read_bytes().startswith(b"this is no database")
    assert kit.verdict(lived_in.database).holds


TAMPERED = {
    "an event was changed": "UPDATE audit SET actor = 'nobody' WHERE seq = 3",
    "an event was removed": "DELETE FROM audit WHERE seq = 4",
    "the tail was cut": "DELETE FROM audit WHERE seq > 10",
}


@pytest.mark.parametrize("how", TAMPERED)
def test_a_chain_that_was_tampered_with_is_backed_up_said_and_restored(
    how: str, lived_in: House, tmp_path: Path
) -> None:
    with lived_in.database.engine.begin() as connection:
        connection.execute(text(TAMPERED[how]))
    shelf = taken(RegistryPart(lived_in.settings))
    assert "the audit chain does not verify, here as in the live registry" in shelf.warnings[0]
    assert registry_part.verify(shelf, tmp_path).differences == ()
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / ".backup-registry-left").mkdir()
    assert registry_part.restore(shelf, target(tmp_path / "back"))["audit_faults"]
    assert not list((tmp_path / "back").glob(".backup-registry-*"))


def test_a_registry_that_is_gone_or_of_another_release_fails(lived_in: House) -> None:
    with lived_in.database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    with pytest.raises(UsageError, match="has schema revision 0001"):
        taken(RegistryPart(lived_in.settings))
    lived_in.database.dispose()
    for path in lived_in.home.glob("registry.db*"):
        path.unlink()
    with pytest.raises(UnavailableError, match="is not there"):
        taken(RegistryPart(lived_in.settings))
    assert not (lived_in.home / "registry.db").exists()


def _sql(statement: str) -> Callable[[Shelf], None]:
    def damage(shelf: Shelf) -> None:
        stream = shelf.entry(FILE).stream
        assert stream is not None
        connection = sqlite3.connect(":memory:")
        connection.deserialize(b"".join(shelf.open(stream)))
        connection.execute(statement)
        connection.commit()
        shelf.rewrite(FILE, connection.serialize())
        connection.close()

    return damage


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a flipped bit": lambda shelf: shelf.flip(FILE),
    "a missing object": lambda shelf: shelf.objects.clear(),
    "no file": lambda shelf: shelf.lines.clear(),
    "half a file": lambda shelf: shelf.rewrite(FILE, b"".join(shelf.open(shelf.entry(FILE).stream))[: 64 << 10]),  # type: ignore[arg-type]
    "an empty file": lambda shelf: shelf.rewrite(FILE, b""),
    "a row less": _sql("DELETE FROM versions WHERE version = '3'"),
    "a table less": _sql("DROP TABLE feedback"),
    "a cut tail of the audit chain": _sql("DELETE FROM audit WHERE seq = (SELECT max(seq) FROM audit)"),
    "a changed event": _sql("UPDATE audit SET text = replace(text, 'digits', 'd1gits') WHERE seq = 2"),
    "another head": _sql("UPDATE audit_head SET hash = 'f' || substr(hash, 2), seq = seq + 1"),
    "another revision": _sql("UPDATE alembic_version SET version_num = '0002'"),
    "another route": _sql("UPDATE routes SET stable = '1'"),
    "other bytes of a version": _sql("UPDATE versions SET deleted_at = created_at WHERE version = '3'"),
    "another generation": _sql("UPDATE environments SET generation = generation + 1"),
}


@pytest.fixture(scope="module")
def captured(template: Path) -> Shelf:
    from registry.settings import Settings

    return taken(RegistryPart(Settings(home=template)))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_never_called_verified(damage: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = Shelf()
    shelf.objects, shelf.lines, shelf.record = dict(captured.objects), list(captured.lines), captured.record
    DAMAGES[damage](shelf)
    assert registry_part.verify(shelf, tmp_path).differences


@pytest.mark.parametrize("damage", ["a flipped bit", "half a file", "a row less", "a changed event", "another head"])
def test_a_damaged_backup_changes_nothing_at_its_target(damage: str, captured: Shelf, lived_in: House) -> None:
    shelf = Shelf()
    shelf.objects, shelf.lines, shelf.record = dict(captured.objects), list(captured.lines), captured.record
    DAMAGES[damage](shelf)
    before = rows(lived_in.database)
    try:
        registry_part.restore(shelf, target(lived_in.home, force=True))
    except ModelkeepError:
        assert rows(lived_in.database) == before
    else:
        pytest.fail("it was restored")


def test_parts_of_a_registry_cannot_be_had(captured: Shelf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="comes back whole"):
        registry_part.restore(captured, target(tmp_path, only=("versions",)))
    with pytest.raises(ArtifactError, match="holds no"):
        registry_part.restore(Shelf(), target(tmp_path))


def test_what_an_anchor_of_the_backup_knew_still_counts(lived_in: House) -> None:
    """A chain that was rewritten before the backup does not become whole by the restore."""
    shelf = taken(RegistryPart(lived_in.settings))
    registry_part.restore(shelf, target(lived_in.home, force=True))
    marks = list(audit.read_anchors(lived_in.home / "audit.anchors"))
    assert len(marks) > 10
    assert marks[-1].seq == shelf.record.facts["registry"]["audit_head"]["seq"] + 1
