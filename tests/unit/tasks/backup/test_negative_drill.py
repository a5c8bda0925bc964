"""A negative drill: damage is told by who found it, and a place that did not answer has told nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.errors import StorageError
from tasks.backup import damage
from tasks.backup.places import DirectoryPlace, Stat
from tasks.backup.repository import Repository
from tests.backup_content import FIRST, back_up, content


class SilentPlace(DirectoryPlace):
    """From `silent` on it answers to one call no more, in the words of a bucket: with the name that it was asked for."""

    silent = ""

    def _away(self, call: str, name: str) -> None:
        if self.silent == call:
            raise StorageError(f"{name} could not be read from {self.shown} in 5 attempts: the store answers 503")

    def get(self, name: str) -> bytes:
        self._away("get", name)
        return super().get(name)

    def stat(self, name: str) -> Stat | None:
        self._away("stat", name)
        return super().stat(name)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        self._away("list", prefix)
        yield from super().list(prefix)


@pytest.mark.parametrize("call", ["get", "list"])
@pytest.mark.parametrize("way", damage.WAYS)
def test_a_place_that_does_not_answer_has_told_of_no_damage(
    way: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SilentPlace(tmp_path)
    repository = Repository([place])
    record = back_up(repository, FIRST, content())
    told = damage.look(repository, record, way)
    assert told.told, told
    changed = damage._changes

    def then_silent(*asked: object) -> object:
        found = changed(*asked)  # type: ignore[arg-type]
        place.silent = call
        return found

    monkeypatch.setattr(damage, "_changes", then_silent)
    told = damage.look(repository, record, way)
    reaches = call == "get" or way not in ("cut-manifest", "edited-manifest")  # a manifest is read without a list
    assert told.told is not reaches
    assert told.words.startswith("a place did not answer: ") is reaches, told


def test_a_place_that_is_silent_beside_one_that_tells_leaves_it_open(tmp_path: Path) -> None:
    places = [DirectoryPlace(tmp_path / "one"), SilentPlace(tmp_path / "two")]
    repository = Repository(places)
    record = back_up(repository, FIRST, content())
    assert damage.look(repository, record, "cut-object").told
    places[1].silent = "get"  # type: ignore[attr-defined]
    told = damage.look(repository, record, "cut-object")
    assert not told.told and "503" in told.words


def test_a_damaged_place_remembers_what_the_real_one_did_not_answer_first(tmp_path: Path) -> None:
    real = SilentPlace(tmp_path)
    place = damage.DamagedPlace(real, {"gone": None})
    place.stat("something")
    assert list(place.list()) == [] and place.silent is None
    real.silent = "stat"
    with pytest.raises(StorageError):
        place.stat("something")
    real.silent = "list"
    with pytest.raises(StorageError):
        list(place.list("below/"))
    assert place.silent is not None and place.silent.startswith("something could not be read")
