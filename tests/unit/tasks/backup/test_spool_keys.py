"""The folder for what no place takes has keys of its own: they follow a rotation, and do not outlive the settings that they are of."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelkeep.commands.prune import _shortened
from tasks.backup.keyring import BackupKeyError, key_ids, new_key, open_keyring, rotate, set_aside
from tasks.backup.places import DirectoryPlace


def test_keys_of_earlier_settings_are_put_aside_and_anything_else_stays(tmp_path: Path) -> None:
    spool = tmp_path / "backups-spool"
    old, new = new_key(tmp_path / "old"), new_key(tmp_path / "new")
    assert set_aside(spool, new) is None, "there is none"
    places = [DirectoryPlace(tmp_path / "first"), DirectoryPlace(spool)]
    open_keyring(places, old, create=True)
    assert set_aside(spool, old) is None, "it is the key in use"
    later = [DirectoryPlace(tmp_path / "second"), DirectoryPlace(spool)]
    with pytest.raises(BackupKeyError):
        open_keyring(later, new, create=True)
    kept = set_aside(spool, new)
    assert kept is not None and key_ids(DirectoryPlace(kept)) == [old.key_id]
    assert open_keyring(later, new, create=True) is not None
    DirectoryPlace(spool).put("objects/aa/x", b"x")
    assert set_aside(spool, old) is None, "there is a backup in it"


def test_a_rotation_with_the_spool_leaves_the_old_key_nowhere(tmp_path: Path) -> None:
    places = [DirectoryPlace(tmp_path / "first"), DirectoryPlace(tmp_path / "backups-spool")]
    old, new = new_key(tmp_path / "old"), new_key(tmp_path / "new")
    open_keyring(places, old, create=True)
    rotate(places, old, new)
    assert [key_ids(place) for place in places] == [[new.key_id], [new.key_id]]


def test_a_rule_that_holds_for_all_components_is_shown_once() -> None:
    rules = ["config: newest of day 1", "database:shop: newest of day 1", "config: number 1 of 2", "it is pinned"]
    assert _shortened(rules) == "newest of day 1; number 1 of 2 (config); it is pinned"
