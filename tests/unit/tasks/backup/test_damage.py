"""Damaged backups: no damage to any file of a location gives other bytes, a state that was never noted, or a backup that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import ArtifactError, ModelkeepError, NotFoundError
from tasks.backup.codec import object_name
from tasks.backup.keyring import BackupKeyError, FileKey, open_keyring
from tasks.backup.manifest import Manifest, ManifestError
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import DAMAGED, Repository
from tests.backup_content import FIRST, NAME, SECOND, back_up, content, keyed, restored
from tests.unit.tasks.backup.damage_cases import CASES, Case


def opened(folders: list[Path], key: FileKey | None) -> Repository:
    places = [DirectoryPlace(folder) for folder in folders]
    return Repository(places, open_keyring(places, key))


def stored_file(folder: Path, record: Manifest, repository: Repository, thing: str) -> Path:
    """The file of a backup that a case damages."""
    component = record.component(NAME)
    assert component is not None and component.index is not None
    if thing == "index":
        return folder / object_name(component.index.chunks[0].object)
    if thing == "object":
        entry = next(repository.source(record, NAME).entries())
        assert entry.stream is not None
        return folder / object_name(entry.stream.chunks[0].object)
    if thing == "manifest":
        return folder / f"{record.backup_id}.manifest.json"
    if thing == "key":
        return next((folder / "keys").iterdir())
    return next((folder / "states" / record.backup_id).iterdir())


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.id, marks=() if number % 3 == 0 else pytest.mark.long)
        for number, case in enumerate(CASES)
    ],
)
def test_damage_is_told_and_another_place_makes_it_good(case: Case, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    places = [DirectoryPlace(folder) for folder in folders]
    key, keyring = keyed(places, tmp_path) if case.encrypted else (None, None)  # type: ignore[arg-type]
    repository = Repository(places, keyring)
    record = back_up(repository, FIRST, content(1))
    back_up(repository, SECOND, content(2))
    other = folders[0] / f"{SECOND}.manifest.json"
    if case.step != "key":
        other = stored_file(folders[0], repository.manifest(SECOND), repository, case.step)
    case.act(stored_file(folders[0], record, repository, case.step), other)

    # with the second place all is well
    both = opened(folders, key)
    assert restored(both, FIRST) == content(1)
    assert [note.state for note in both.states(FIRST)] == ["sampled"]

    alone = [folders[0]]
    if case.step == "key":
        if case.fault == "gone":
            assert opened(alone, None) is not None  # nothing says that it is encrypted but the manifests, and they do
            with pytest.raises(ManifestError, match="no key is set"):
                opened(alone, None).manifest(FIRST)
        else:
            with pytest.raises(BackupKeyError):
                opened(alone, key)
    elif case.step == "manifest":
        repository = opened(alone, key)
        with pytest.raises(NotFoundError if case.fault == "gone" else ManifestError):
            repository.manifest(FIRST)
        scan = repository.scan()
        assert [one.backup_id for one in scan.manifests] == [SECOND]
        assert list(scan.broken) == ([] if case.fault == "gone" else [FIRST])
    elif case.step == "state":
        expected = [] if case.fault == "gone" else [DAMAGED]
        assert [note.state for note in opened(alone, key).states(FIRST)] == expected
    else:
        repository = opened(alone, key)
        with pytest.raises(ArtifactError):
            restored(repository, FIRST)
        found = repository.check(repository.manifest(FIRST))
        assert not found.good
        beside = both.check(both.manifest(FIRST))
        assert beside.good and beside.elsewhere
        if case.step == "object":  # a backup of the same content makes it right again, for the old one too
            back_up(repository, "20261123T020000Z-0a1b2c", content(1))
            if case.fault in SEEN_BY_SIZE:
                assert restored(opened(alone, key), FIRST) == content(1)


SEEN_BY_SIZE = ("cut in half", "a byte missing", "a byte more", "empty", "gone")
"""A backup compares sizes only; that another bit is wrong, checks find (`verify-backups`)."""


def test_nothing_is_read_without_the_key_and_the_message_names_it(tmp_path: Path) -> None:
    places = [DirectoryPlace(tmp_path / "backups")]
    key, keyring = keyed(places, tmp_path)
    back_up(Repository(places, keyring), FIRST, content())
    with pytest.raises(BackupKeyError, match=key.key_id):
        open_keyring(places, None)
    (tmp_path / "other").mkdir()
    with pytest.raises(BackupKeyError, match=key.key_id):
        open_keyring(places, keyed([DirectoryPlace(tmp_path / "elsewhere")], tmp_path / "other")[0])
    with pytest.raises(ManifestError, match="no key is set"):
        Repository(places).manifest(FIRST)


def test_objects_cannot_be_exchanged_though_both_are_whole(tmp_path: Path) -> None:
    places = [DirectoryPlace(tmp_path / "backups")]
    _, keyring = keyed(places, tmp_path)
    repository = Repository(places, keyring)
    back_up(repository, FIRST, {"a": b"A" * 50, "b": b"B" * 50})
    objects = sorted((tmp_path / "backups" / "objects").rglob("*/*"))
    first, second = objects[0].read_bytes(), objects[1].read_bytes()
    for path, data in ((objects[0], second), (objects[1], first)):
        path.chmod(0o644)
        path.write_bytes(data)
    with pytest.raises(ModelkeepError):
        restored(repository, FIRST)


def test_a_location_that_lost_its_keys_is_not_read_as_one_without_while_a_key_is_set(tmp_path: Path) -> None:
    """Whoever may write there could else have a recovery bring back what he has made up."""
    place = DirectoryPlace(tmp_path / "backups")
    key, _ = keyed([place], tmp_path / "key")
    forged = Repository([DirectoryPlace(tmp_path / "forged")])
    record = Manifest(
        "20261121T020000Z-000001", "0" * 64, "complete", "2026-11-21T02:00:00Z", "2026-11-21T02:00:00Z", ("all",), ()
    )
    forged.write_manifest(record)
    for name in [one.name for one in place.list("keys/")]:
        place.delete(name)
    name = f"{record.backup_id}.manifest.json"
    place.put(name, forged.places[0].get(name))
    with pytest.raises(BackupKeyError, match="holds backups and no keys/"):
        open_keyring([place], key)
    assert open_keyring([place], None) is None, "without a key in the settings they are what they are"
