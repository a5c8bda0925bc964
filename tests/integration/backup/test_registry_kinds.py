"""The registry is backed up from a database of any kind, and comes back into one of any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from registry import restoring
from registry.database import Database
from registry.errors import ConflictError, UnavailableError
from registry.schema import Base
from registry.settings import Settings
from tasks.backup import registry_part
from tasks.backup.components import Target
from tasks.backup.registry_part import RegistryPart
from tests.registry_servers import Server
from tests.unit.registry import kit
from tests.unit.tasks.backup.shelf import taken

CHANGED = ("environments", "audit", "audit_head")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str, str], tuple[str, Path]]:
    """`place("mariadb", "back")` is an empty database of a kind, and a home."""

    def make(kind: str, name: str) -> tuple[str, Path]:
        home = tmp_path / name
        home.mkdir()
        if kind == "sqlite":
            return f"sqlite:///{home / 'registry.db'}", home
        server: Server = request.getfixturevalue(kind)
        return server.create(options="CHARACTER SET utf8mb4" if kind == "mariadb" else ""), home

    return make


def contents(database: Database) -> dict[str, list[tuple[object, ...]]]:
    with database.read() as session:
        return {
            table.name: [tuple(row) for row in session.execute(select(table).order_by(*table.primary_key.columns))]
            for table in Base.metadata.sorted_tables
            if table.name not in CHANGED
        }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("mariadb", "postgresql"),
        pytest.param("sqlite", "mariadb", marks=pytest.mark.long),
        pytest.param("postgresql", "sqlite", marks=pytest.mark.long),
    ],
)
def test_a_registry_moves_from_kind_to_kind_through_a_backup(
    first: str, second: str, place: Callable[[str, str], tuple[str, Path]], tmp_path: Path
) -> None:
    url, home = place(first, "live")
    live = Database(url, anchors=home / "audit.anchors")
    live.prepare()
    for version in ("1", "2"):
        kit.add_version(live, version)
    kit.stable_by(live, "1", "2")
    with live.write(actor="ann") as transaction:
        transaction.record("note", "registry", after={"text": "Überprüft ✓ 🜂"}, reason="zwei\nZeilen")
    before, events = contents(live), kit.last_event(live)
    shelf = taken(RegistryPart(Settings(home=home, database_url=url)))
    assert registry_part.verify(shelf, tmp_path).differences == ()

    back, other = place(second, "back")
    target = Target(back, other, options={"backup_id": "20261121T020000Z-0a1b2c"})
    assert registry_part.occupied(target) is None
    done = registry_part.restore(shelf, target)
    database = Database(back, anchors=other / "audit.anchors")
    assert contents(database) == before
    verdict = kit.verdict(database)
    assert (verdict.faults, verdict.events) == ([], events + 1)
    assert kit.actions(database, events) == [restoring.RESTORED]
    assert "hunter2" not in str(shelf.record) + str(done)

    kit.add_version(database, "since")
    with pytest.raises(ConflictError) as caught:
        registry_part.restore(shelf, target)
    assert "hunter2" not in str(caught.value)
    registry_part.restore(shelf, Target(back, other, force=True, options=target.options))
    assert contents(database) == before
    assert kit.verdict(database).holds
    live.dispose()
    database.dispose()


def test_a_server_that_is_gone_fails_the_component(
    place: Callable[[str, str], tuple[str, Path]], tmp_path: Path
) -> None:
    url = "mysql+pymysql://keeper:hunter2@127.0.0.1:1/registry"
    with pytest.raises(UnavailableError) as caught:
        taken(RegistryPart(Settings(home=tmp_path, database_url=url)))
    assert "hunter2" not in str(caught.value)
    with pytest.raises(UnavailableError):
        registry_part.occupied(Target(url))
