"""Models are backed up by their digests, with the registry's snapshot as the list of what must be there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry import store as stores
from registry import versions
from registry.connect import open_database
from registry.errors import ArtifactError, NotFoundError, StorageError
from registry.schema import Version
from registry.settings import Settings
from registry.store import DirectoryStore
from tasks import probe
from tasks.backup import models, registry_part
from tasks.backup.components import Target
from tasks.backup.models import ModelsPart
from tasks.backup.registry_part import RegistryPart
from tests.unit.registry import kit
from tests.unit.tasks.backup.household import House, house
from tests.unit.tasks.backup.shelf import Shelf, taken


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = house(tmp_path_factory.mktemp("template"))
    found.database.dispose()
    return found.home


@pytest.fixture
def lived_in(template: Path, tmp_path: Path) -> Iterator[House]:
    home = tmp_path / "home"
    shutil.copytree(template, home)
    settings = Settings(home=home)
    found = House(home, settings, open_database(settings), DirectoryStore(Path(settings.artifacts)))
    yield found
    found.database.dispose()


@pytest.fixture(scope="module")
def captured(template: Path) -> Shelf:
    return taken(ModelsPart(Settings(home=template)))


def copied(shelf: Shelf) -> Shelf:
    found = Shelf()
    found.objects, found.lines, found.record = dict(shelf.objects), list(shelf.lines), shelf.record
    return found


def files_of(found: House, model: str, version: str) -> list[str]:
    with found.database.read() as session:
        row = versions.get(session, model, version)
        return [*(file.digest for file in versions.stored_files(row)), str(row.golden_digest)]


def after_registry(found: House) -> ModelsPart:
    """As in a whole backup: the registry was captured before."""
    part = ModelsPart(found.settings)
    part.follow({"registry": taken(RegistryPart(found.settings)).captured})
    return part


def test_every_artifact_that_a_version_needs_comes_back(captured: Shelf, template: Path, tmp_path: Path) -> None:
    assert captured.record.facts["versions"] == 5
    assert captured.record.facts["serves"] == {"digits@2": ["production: stable"]}
    assert captured.warnings == []
    done = models.restore(captured, Target(path=tmp_path))
    live = DirectoryStore(Path(Settings(home=template).artifacts))
    assert [path.name for path in kit.stored(tmp_path)] == [path.name for path in kit.stored(live.folder)]
    assert done["artifacts"] == len(kit.stored(tmp_path)) == 11
    again = models.restore(captured, Target(path=tmp_path))
    assert (again["artifacts"], again["already_there"]) == (0, 11)


def test_the_stable_version_of_each_route_answers_its_golden_cases_in_a_fresh_process(
    captured: Shelf, tmp_path: Path
) -> None:
    found = models.verify(captured, tmp_path)
    assert found.differences == ()
    assert found.checked["inferred"] == ["digits@2"]
    assert found.checked["golden_cases"] == 3


def test_a_second_backup_costs_what_is_new(lived_in: House) -> None:
    shelf = Shelf()
    taken(ModelsPart(lived_in.settings), shelf)
    lived_in.register("4", 44.0)
    second = Shelf()
    second.objects, second.new_bytes = dict(shelf.objects), 0
    taken(ModelsPart(lived_in.settings), second)
    new = sum(lived_in.store.path(digest).stat().st_size for digest in files_of(lived_in, kit.MODEL, "4"))
    assert second.new_bytes <= new + len("\n".join(second.lines)) + 200


@pytest.mark.parametrize("only", ["digits", "digits@2", "Weights@1"])
def test_single_models_and_versions_come_back_alone(only: str, captured: Shelf, template: Path, tmp_path: Path) -> None:
    done = models.restore(captured, Target(path=tmp_path, only=(only,)))
    assert len(done["versions"]) == (4 if only == "digits" else 1)
    assert len(kit.stored(tmp_path)) == {"digits": 8, "digits@2": 2, "Weights@1": 3}[only]
    with pytest.raises(NotFoundError, match="nobody@1 is not in the models of this backup"):
        models.restore(captured, Target(path=tmp_path, only=("nobody@1",)))


def lose(found: House, digest: str) -> None:
    found.store.remove(digest)


def flip(found: House, digest: str) -> None:
    path = found.store.place(digest)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(found: House, digest: str) -> None:
    path = found.store.place(digest)
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])


def folder_instead(found: House, digest: str) -> None:
    found.store.remove(digest)
    found.store.place(digest).mkdir()


FAULTS: dict[str, tuple[Callable[[House, str], None], str]] = {
    "missing": (lose, "is missing"),
    "flipped": (flip, "is corrupt"),
    "cut": (cut, "is corrupt"),
    "unreadable": (folder_instead, "cannot be read"),
}
PLACES = {"the model": 0, "the weights beside it": 1, "its golden cases": -1}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_artifact_that_is_not_there_as_it_should_fails_the_component_by_its_version(
    fault: str, place: str, lived_in: House
) -> None:
    damage, words = FAULTS[fault]
    part = after_registry(lived_in)
    damage(lived_in, files_of(lived_in, "Weights", "1")[PLACES[place]])
    shelf = Shelf()
    with pytest.raises(ArtifactError, match=f"Weights@1: .*{words}"):
        taken(part, shelf)
    assert len(list(shelf.entries())) == 10 + 5, "all others are stored, so that the next backup is quick"


def test_a_version_that_is_deleted_in_between_is_said_and_no_fault(lived_in: House, tmp_path: Path) -> None:
    part = after_registry(lived_in)
    gone = files_of(lived_in, kit.MODEL, "old")
    lived_in.delete("old")
    shelf = taken(part)
    assert len(shelf.warnings) == 2
    assert shelf.warnings[0].startswith("digits@old: ")
    assert "was deleted while the backup was taken" in shelf.warnings[0]
    assert set(shelf.record.facts["deleted_since"]) == set(gone)
    assert models.verify(shelf, tmp_path).differences == ()
    assert models.restore(shelf, Target(path=tmp_path / "back"))["deleted_since"] == ["digits@old"]
    with pytest.raises(ArtifactError, match="take an earlier one"):
        models.restore(shelf, Target(path=tmp_path / "back", only=("digits@old",)))


def test_a_file_that_is_missing_while_the_registry_does_not_answer_is_a_fault(lived_in: House) -> None:
    part = after_registry(lived_in)
    lived_in.delete("old")
    lived_in.database.dispose()
    (lived_in.home / "registry.db").unlink()
    (lived_in.home / "registry.db").mkdir()
    with pytest.raises((ArtifactError, StorageError)):
        taken(part)


def test_a_promotion_during_the_backup_changes_nothing_of_what_it_holds(lived_in: House) -> None:
    part = after_registry(lived_in)
    lived_in.register("5", 5.5)
    kit.stable_by(lived_in.database, "5")
    shelf = taken(part)
    assert shelf.record.facts["serves"] == {"digits@2": ["production: stable"]}
    assert not any("digits@5" in line for line in shelf.lines)


def test_after_a_promotion_during_the_backup_registry_and_artifacts_agree(lived_in: House, tmp_path: Path) -> None:
    registry = taken(RegistryPart(lived_in.settings))
    part = ModelsPart(lived_in.settings)
    part.follow({"registry": registry.captured})
    head = registry.record.facts["registry"]["audit_head"]
    lived_in.register("5", 5.5)
    operation = kit.begin(lived_in.database, "5")
    kit.canary(lived_in.database, operation, 0.5)
    artifacts = taken(part)
    kit.promote(lived_in.database, operation)
    assert artifacts.record.facts["artifacts"] == registry.record.facts["artifacts"]["count"]
    assert artifacts.record.facts["sha256"] == registry.record.facts["artifacts"]["sha256"]
    back = tmp_path / "back"
    url = f"sqlite:///{back / 'registry.db'}"
    registry_part.restore(registry, Target(url, back, options={"backup_id": "20261121T020000Z-0a1b2c"}))
    models.restore(artifacts, Target(path=back / "artifacts"))
    settings = Settings(home=back)
    database, store = open_database(settings), DirectoryStore(Path(settings.artifacts))
    verdict = kit.verdict(database)
    assert (verdict.faults, verdict.events) == ([], head["seq"] + 1)
    assert kit.route(database).stable == "2"
    with database.read() as session:
        for row in session.query(Version):
            for file in versions.stored_files(row):
                store.path(file.digest)
    database.dispose()


def test_a_corrupt_artifact_in_the_store_is_healed_by_a_restore(captured: Shelf, lived_in: House) -> None:
    for digest in files_of(lived_in, kit.MODEL, "2"):
        flip(lived_in, digest)
    done = models.restore(captured, Target(path=lived_in.store.folder))
    assert (done["artifacts"], done["already_there"]) == (2, 9)
    for digest in files_of(lived_in, kit.MODEL, "2"):
        lived_in.store.path(digest)


def test_an_interrupted_restore_goes_on(captured: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = stores._fsync_folder, 6

    def killed(folder: Path) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(stores, "_fsync_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        models.restore(captured, Target(path=tmp_path))
    done = models.restore(captured, Target(path=tmp_path))
    assert done["already_there"] == 3
    assert done["artifacts"] == 8


def test_a_deleted_version_lives_again_when_its_bytes_are_back(lived_in: House) -> None:
    shelf = taken(ModelsPart(lived_in.settings))
    lived_in.delete("old")
    options = {"registry_url": lived_in.settings.database_url, "home": lived_in.home, "backup_id": "b1"}
    wanted = ("digits@old", "digits@1")
    found = models.restore(shelf, Target(path=lived_in.store.folder, only=wanted, options=options))
    assert (found["revived"], found["there"], found["unknown"]) == (["digits@old"], ["digits@1"], [])
    with lived_in.database.read() as session:
        row = session.get_one(Version, (kit.MODEL, "old"))
        assert (row.deleted_at, row.state) == (None, "archived")
    assert kit.actions(lived_in.database)[-1] == "version.restored"
    assert kit.verdict(lived_in.database).holds


def test_single_models_come_back_where_there_is_no_registry_yet(captured: Shelf, tmp_path: Path) -> None:
    options = {"registry_url": f"sqlite:///{tmp_path / 'registry.db'}", "home": tmp_path}
    found = models.restore(captured, Target(path=tmp_path / "artifacts", only=("digits",), options=options))
    assert found["artifacts"] == 8 and "revived" not in found
    assert not (tmp_path / "registry.db").exists()


def first_artifact(shelf: Shelf) -> str:
    return next(entry.name for entry in shelf.entries() if entry.kind == "artifact")


def other_model(shelf: Shelf) -> None:
    """The bytes of another model, under the digest of the stable one."""
    served = next(entry for entry in shelf.entries() if entry.name == "versions/digits@2")
    digest = served.facts["files"][0]["digest"]
    other = next(entry for entry in shelf.entries() if entry.name == "versions/digits@3").facts["files"][0]["digest"]
    shelf.rewrite(f"artifacts/{digest}", b"".join(shelf.open(shelf.entry(f"artifacts/{other}").stream)))  # type: ignore[arg-type]


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a flipped bit": lambda shelf: shelf.flip(first_artifact(shelf)),
    "a missing object": lambda shelf: shelf.objects.clear(),
    "a missing artifact": lambda shelf: shelf.lines.remove(shelf.entry(first_artifact(shelf)).line()),
    "a missing version": lambda shelf: shelf.lines.pop() and None,
    "other bytes": lambda shelf: shelf.rewrite(first_artifact(shelf), b"z"),
    "the bytes of another model": other_model,
    "another count": lambda shelf: shelf.change(versions=6),
    "another list": lambda shelf: shelf.change(sha256="0" * 64),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_never_called_verified(damage: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = copied(captured)
    DAMAGES[damage](shelf)
    assert models.verify(shelf, tmp_path).differences


@pytest.mark.parametrize("damage", ["a flipped bit", "a missing object", "other bytes", "the bytes of another model"])
def test_a_damaged_artifact_is_not_put_into_a_store(damage: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = copied(captured)
    DAMAGES[damage](shelf)
    with pytest.raises(ArtifactError):
        models.restore(shelf, Target(path=tmp_path))
    for path in kit.stored(tmp_path):
        assert stores.file_digest(path)[0] == path.name


ANSWERS: dict[str, dict[str, Any]] = {
    "does not load": {"loaded": False, "error": "broken"},
    "fails": {"golden": {"failures": 2}},
    "answers otherwise": {"golden": {"outputs": [0, 0, 1]}},
}


@pytest.mark.parametrize("fault", ANSWERS)
def test_a_model_that_no_longer_answers_as_it_did_is_not_verified(
    fault: str, captured: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ANSWERS[fault]
    golden = {
        "cases": 3, "correct": None, "labels": None, "outputs": [1, 1, 1], "failures": 0, "first_failure": None,
        "non_finite": 0, "first_non_finite": None, **said.get("golden", {}),
    }  # fmt: skip
    figures = probe.Figures(said.get("loaded", True), said.get("error"), golden=probe.GoldenFigures(**golden))
    monkeypatch.setattr(probe, "run_probe", lambda *job, **limits: probe.ProbeResult("done", candidate=figures))
    assert "digits@2" in models.verify(captured, tmp_path).differences[0]


def test_a_probe_that_ends_without_a_result_verifies_nothing(
    captured: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "run_probe", lambda *job, **limits: probe.ProbeResult("timeout", "stopped after 300 s"))
    assert models.verify(captured, tmp_path).differences == ("digits@2 was not measured: stopped after 300 s",)
