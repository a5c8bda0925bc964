"""The drill: everything back in a private place, served, compared; and each known damage found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from registry import ledger
from registry.errors import NotFoundError, StorageError
from serving.views.backup_metrics import BackupMetrics
from tasks.backup import damage, drill, drill_page, drill_server, notifying
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository, open_repository
from tests.integration.backup.machine import Machine


def test_a_drill_restores_serves_and_measures_everything_and_leaves_nothing_behind(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    backup_id = machine.back_up()
    live = machine.head()
    found = drill.run(machine.settings)
    assert found.failed == () and found.backup_id == backup_id
    assert [one.component for one in found.components] == ["models", "database:app", "files:uploads", "registry"]
    assert all(one.rto_seconds is not None and one.rpo_seconds > 0 for one in found.components)
    assert found.served.seconds is not None
    assert [(one.model, one.version, one.outcome) for one in found.served.models] == [
        ("digits", "2", drill_server.ALONE)
    ]
    assert found.negative.told and found.negative.way == next(iter(damage.WAYS))
    assert machine.head() == live, "what is live was not touched"
    assert not list((machine.home / "drills").iterdir())
    history = drill.history(machine.home)
    assert [one["drill_id"] for one in history] == [found.drill_id]
    known = ledger.read(machine.home)
    assert known is not None and known["drill"]["state"] == "passed"
    told = {one.name: one.samples for one in BackupMetrics(machine.home).collect()}
    assert [one.value for one in told["modelkeep_drill_passed"]] == [1.0]
    assert {one.labels["component"] for one in told["modelkeep_drill_rto_seconds"]} == set(known["drill"]["components"])
    page = drill_page.render(history)
    assert "Everything came back" in page and "database:app" in page


def test_a_drill_against_a_damaged_location_fails_loudly(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.back_up()
    repository = open_repository(machine.settings)
    manifest = repository.manifests()[0]
    one = damage._two(repository, manifest)[0]
    path = tmp_path / "backups" / damage._object(one)
    path.chmod(0o644)
    path.write_bytes(damage._flipped(path.read_bytes()))
    found = drill.run(machine.settings)
    assert not found.passed
    [broken] = [part for part in found.components if part.failed is not None]
    assert one.object in str(broken.failed)
    assert f"{broken.component}: {broken.failed}" in found.failed, (
        "by the component itself, whatever the negative drill says"
    )
    assert drill.history(machine.home)[0]["state"] == "failed"
    assert "The drill failed" in drill_page.render(drill.history(machine.home))


def test_without_a_backup_a_drill_says_that_there_is_nothing_to_come_back_from(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no backup to hold a drill with"):
        drill.run(Machine(tmp_path).settings)


def test_a_drill_that_breaks_by_an_error_of_our_own_wakes_somebody_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    machine.back_up("files")
    told: list[str] = []
    monkeypatch.setattr(notifying, "notify", lambda settings, what, text: told.append(text))

    def breaks(*_: object) -> None:
        raise KeyError("a mistake")

    monkeypatch.setattr(drill, "_restored", breaks)
    with pytest.raises(KeyError):
        drill.held(machine.settings)
    assert told == ["KeyError: 'a mistake'"]


def test_every_known_damage_is_told_and_the_backup_itself_is_untouched(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.back_up()
    repository = open_repository(machine.settings)
    manifest = repository.manifests()[0]
    before = {path: path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file()}
    for way in damage.WAYS:
        told = damage.look(repository, manifest, way)
        assert told.told, told
    assert {path: path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file()} == before
    assert repository.check(manifest).good


def test_each_damage_is_told_where_the_nearest_place_has_nothing_of_it_and_where_two_have_all(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.back_up()
    whole = open_repository(machine.settings)
    manifest = whole.manifests()[0]
    shutil.copytree(tmp_path / "backups", tmp_path / "second")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "second"):
        repository = Repository([DirectoryPlace(tmp_path / name), *whole.places], whole.keyring)
        for way in damage.WAYS:
            told = damage.look(repository, manifest, way)
            assert told.told, (name, told)


def test_another_trouble_of_the_place_is_not_taken_for_the_damage_being_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path)
    machine.back_up()
    repository = open_repository(machine.settings)
    manifest = repository.manifests()[0]

    def gone(self: object, prefix: str = "") -> object:
        raise StorageError("the store does not answer")

    monkeypatch.setattr(damage.DamagedPlace, "list", gone)
    told = damage.look(repository, manifest, "flipped-bit")
    assert not told.told and "something else was told: the store does not answer" in told.words


def test_a_damage_that_nobody_notices_fails_the_drill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path)
    machine.back_up()
    monkeypatch.setattr(damage, "_flipped", lambda data: data)
    found = drill.run(machine.settings)
    assert any("nobody noticed" in why for why in found.failed)


def test_the_page_of_many_drills_has_a_dot_for_each_and_escapes_what_comes_from_outside(tmp_path: Path) -> None:
    def one(number: int, state: str) -> dict[str, object]:
        return {
            "drill_id": str(number), "backup_id": "b", "began_at": f"2026-11-{number:02}T05:00:00.000000Z", "state": state,
            "failed": ["<script>alert(1)</script>"] if state == "failed" else [], "rto_seconds": 40.0 + number, "rpo_seconds": 9e4,
            "components": [
                {"component": "models", "kind": "models", "size_bytes": 5, "rpo_seconds": 1.0, "rto_seconds": None,
                 "failed": None, "unverifiable": "no binaries"},
            ],
            "served": {"seconds": None, "models": [], "why": None},
            "negative": {"way": "flipped-bit", "what": "one bit", "told": True, "words": "it is damaged"}, "seconds": 50.0,
        }  # fmt: skip

    drills = [one(number, "failed" if number == 3 else "passed") for number in range(1, 4)]
    page = drill_page.render(drills)
    assert page.count("<circle") == 6 and page.count("dot failed") == 2 + 0
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "Nothing is known" in drill_page.render([])
    drill_page.write(tmp_path / "drill.html", json.loads(json.dumps(drills)))
    assert (tmp_path / "drill.html").read_text() == page
