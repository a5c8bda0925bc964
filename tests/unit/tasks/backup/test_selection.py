"""What is brought back of a backup, as it is typed, and where it goes."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from registry import clock
from registry.errors import SettingsError, StorageError, UsageError
from registry.settings import Settings, build_settings
from tasks.backup import targets
from tasks.backup.journal import open_journal
from tasks.backup.manifest import COMPLETE, FAILED, Component, Manifest
from tasks.backup.selection import Chosen, choose

T = "2026-11-21T02:00:00.000000Z"


def component(name: str, kind: str, state: str = COMPLETE, **more: object) -> Component:
    return Component(name, kind, state, T, T, **more)  # type: ignore[arg-type]


PARTS = (
    component("registry", "registry"),
    component("models", "models"),
    component("database:app", "mariadb"),
    component("database:stats", "sqlite"),
    component("vectors", "vectors", FAILED, error="the server does not answer"),
    component("files:uploads", "files"),
)
BACKUP = Manifest("20261121T020000Z-abcdef", "0" * 64, "partial", T, T, ("all",), PARTS)


def chosen(*asked: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(one.component.name, one.only) for one in choose(BACKUP, asked)]


def test_everything_is_what_the_backup_has_without_what_failed_then() -> None:
    names = ["registry", "models", "database:app", "database:stats", "files:uploads"]
    assert [name for name, _ in chosen()] == names
    assert [name for name, _ in chosen("all")] == names


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (("registry",), [("registry", ())]),
        (("database",), [("database:app", ()), ("database:stats", ())]),
        (("database:app",), [("database:app", ())]),
        (("database:app.users",), [("database:app", ("users",))]),
        (("database:app.users,database:app.orders",), [("database:app", ("users", "orders"))]),
        (("database:app.users", "database:app"), [("database:app", ())]),
        (("models:digits@2",), [("models", ("digits@2",))]),
        (("models:digits@2", "models"), [("models", ())]),
        (("files:uploads",), [("files:uploads", ())]),
        (("files:uploads/2026/11",), [("files:uploads", ("2026/11",))]),
        ((" registry , models ",), [("registry", ()), ("models", ())]),
    ],
)
def test_a_component_or_a_part_of_it_can_be_named(
    asked: tuple[str, ...], found: list[tuple[str, tuple[str, ...]]]
) -> None:
    assert chosen(*asked) == found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("tables:app", "names no component"),
        ("queues", "holds no queues: it holds registry, models"),
        ("database:shop", "holds database:app, database:stats"),
        ("vectors", r"it failed then \(the server does not answer\)"),
        ("vectors:docs", "it failed then"),
        ("registry:routes", "comes back as a whole"),
    ],
)
def test_what_the_backup_does_not_hold_is_named_with_what_it_holds(asked: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        choose(BACKUP, [asked])


def settings(tmp_path: Path, text: str = "") -> Settings:
    return build_settings(
        tmp_path / "modelkeep.toml",
        text,
        environ={"MODELKEEP_HOME": str(tmp_path / "home"), "MODELKEEP_PROFILE": "cpu"},
        cwd=tmp_path,
    )


def of(name: str) -> Chosen:
    return Chosen(next(one for one in PARTS if one.name == name))


def test_each_component_goes_where_the_settings_say(tmp_path: Path) -> None:
    text = """
        [[databases]]
        name = "app"
        url = "mysql+pymysql://app@db/app"
        password = "s3cret"
        [[files]]
        name = "uploads"
        path = "/srv/uploads"
    """
    known = settings(tmp_path, text)
    place = {name: targets.live(of(name), known, force=False, backup_id="b") for name in ("registry", "models", "database:app", "files:uploads")}  # fmt: skip
    assert place["registry"].url == known.database_url
    assert place["models"].path == Path(known.artifacts)
    assert place["database:app"].url == "mysql+pymysql://app:s3cret@db/app"
    assert place["files:uploads"].path == Path("/srv/uploads")


def test_a_component_without_a_place_says_which_setting_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r'\[\[databases\]\] with name = "app"'):
        targets.live(of("database:app"), settings(tmp_path), force=False, backup_id="b")


def test_beside_what_is_live_everything_has_a_place_of_its_own(tmp_path: Path) -> None:
    def aside(name: str) -> targets.Target | None:
        return targets.into(of(name), str(tmp_path), backup_id="b", environment="production")

    registry, stats, uploads = aside("registry"), aside("database:stats"), aside("files:uploads")
    assert registry is not None and registry.url == f"sqlite:///{tmp_path}/registry.db"
    assert stats is not None and stats.url == f"sqlite:///{tmp_path}/databases/stats.db"
    assert uploads is not None and uploads.path == tmp_path / "files" / "uploads"
    assert aside("database:app") is None, "a dump of MariaDB needs a server: its content is written as files"


def test_a_url_takes_only_what_belongs_to_such_a_server() -> None:
    target = targets.into(of("database:app"), "mysql+pymysql://root@db/look", backup_id="b", environment="production")
    assert target is not None and target.url == "mysql+pymysql://root@db/look"
    with pytest.raises(UsageError, match="database:stats is of kind sqlite, which does not go there"):
        targets.into(of("database:stats"), "mysql+pymysql://root@db/look", backup_id="b", environment="production")


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("mysql+pymysql://app@db/look", "mysql+pymysql://app:s%233cret@db/look"),
        ("mariadb://app@DB:3306/look", "mariadb://app:s%233cret@DB:3306/look"),
        ("mysql+pymysql://app:other@db/look", "mysql+pymysql://app:other@db/look"),
        ("mysql+pymysql://app@db:3307/look", "mysql+pymysql://app@db:3307/look"),
        ("mysql+pymysql://app@db:33o6/look", "mysql+pymysql://app@db:33o6/look"),
        ("mysql+pymysql://root@db/look", "mysql+pymysql://root@db/look"),
        ("mysql+pymysql://app@elsewhere/look", "mysql+pymysql://app@elsewhere/look"),
        ("postgresql+psycopg://app@db/look", "postgresql+psycopg://app@db/look"),
        ("sqlite:///look.db", "sqlite:///look.db"),
        ("/srv/look", "/srv/look"),
    ],
)
def test_a_place_beside_what_is_live_gets_the_password_of_that_user_of_that_server_and_no_other(
    place: str, found: str, tmp_path: Path
) -> None:
    text = """
        [[databases]]
        name = "other"
        url = "sqlite:////srv/other.db"
        [[databases]]
        name = "app"
        url = "mysql+pymysql://app@db/app"
        password = "s#3cret"
    """
    assert targets.with_known_password(place, settings(tmp_path, text)) == found


def test_a_journal_knows_what_an_earlier_run_has_done_until_its_recovery_has_ended(tmp_path: Path) -> None:
    steps = [("registry", "here"), ("models", "there")]
    first = open_journal(tmp_path, "b1", steps)
    assert not first.resumed
    first.begin("models")
    first.finish("models", {"files": 3})
    first.begin("registry")

    second = open_journal(tmp_path, "b1", list(reversed(steps)))
    assert second.resumed
    assert second.done("models") == {"files": 3}
    assert second.ours("registry", "9 tables") and second.done("registry") is None
    assert not open_journal(tmp_path, "b2", steps).resumed, "another backup is another recovery"

    second.finish("registry", {})
    second.end("recovered")
    assert not open_journal(tmp_path, "b1", steps).resumed


def test_a_journal_takes_for_ours_only_what_a_failure_left_and_for_a_day_what_a_kill_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path, "b1", [("models", "there")])
    assert not journal.ours("models", "2 files")
    journal.begin("models")
    assert journal.ours("models", "2 files"), "killed: what it had written is not known"
    journal.fail("models", "2 files")
    assert journal.ours("models", "2 files") and not journal.ours("models", "3 files")
    now = clock.now()
    monkeypatch.setattr(clock, "now", lambda: now + dt.timedelta(hours=23))
    assert journal.ours("models", "2 files")
    monkeypatch.setattr(clock, "now", lambda: now + dt.timedelta(hours=25))
    assert not journal.ours("models", "2 files")
    journal.touch("models")
    assert journal.ours("models", "2 files")
    journal.fail("models", None)
    assert not open_journal(tmp_path, "b1", [("models", "there")]).ours("models", "2 files")


def test_a_journal_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    journal = open_journal(tmp_path, "b1", [("models", "there")])
    journal.begin("models")
    journal.path.write_text("{")
    with pytest.raises(StorageError, match="cannot be read"):
        open_journal(tmp_path, "b1", [("models", "there")])
