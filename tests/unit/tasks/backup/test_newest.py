"""Which backup a recovery takes where nobody named one."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import pytest

from registry.errors import NotFoundError
from tasks.backup.newest import SAFETY_COPY, newer, newest_before
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tests.backup_content import AT, back_up, content

LATER = dt.datetime.fromisoformat(AT) + dt.timedelta(days=1)


def take(
    repository: Repository, number: int, *names: str, reason: str = "", verified: bool = True, failed: bool = False
) -> str:
    """A backup whose components have these names, all with the content of one."""
    backup_id = f"202611{number:02}T020000Z-0a1b2c"
    aside = Repository([DirectoryPlace(Path(repository.shown[0] + "-aside"))])
    record = back_up(aside, backup_id, content())
    parts = tuple(dataclasses.replace(record.components[0], name=name) for name in names)
    repository.write_manifest(dataclasses.replace(record, components=parts, sequence=number, reason=reason))
    if verified or failed:
        outcome = "failed-verification" if failed else "verified"
        facts = {"components": {name: {"outcome": outcome, "why": "it differs"} for name in names}}
        repository.note_state(backup_id, outcome, facts)
    return backup_id


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository([DirectoryPlace(tmp_path / "backups")])


def test_one_of_everything_goes_before_a_newer_one_of_some_components_and_that_one_is_named(
    repository: Repository,
) -> None:
    whole = take(repository, 1, "registry", "files:uploads", "config")
    daily = take(repository, 2, "registry", "database:shop")
    taken = newest_before(repository, None)
    assert taken.backup_id == whole
    told = newer(repository, taken, None)
    assert (
        told is not None and f"registry, database:shop as of {AT}" in told and f"recover --from {daily} --force" in told
    )
    assert newest_before(repository, None, ["registry"]).backup_id == daily
    assert newest_before(repository, LATER).backup_id == whole


def test_where_no_backup_is_of_everything_the_newest_is_taken_and_nothing_newer_is_told(repository: Repository) -> None:
    take(repository, 1, "registry")
    last = take(repository, 2, "registry", "models")
    taken = newest_before(repository, None)
    assert (taken.backup_id, newer(repository, taken, None)) == (last, None)


def test_a_safety_copy_is_never_the_newest_unless_a_time_is_given(repository: Repository) -> None:
    before = take(repository, 1, "database:shop")
    copy = take(repository, 2, "database:shop", reason=SAFETY_COPY)
    taken = newest_before(repository, None, ["database:shop"])
    assert (taken.backup_id, newer(repository, taken, None)) == (before, None)
    assert newest_before(repository, LATER, ["database:shop"]).backup_id == copy


def test_a_verified_one_goes_before_a_newer_unverified_one_and_one_that_failed_is_not_taken(
    repository: Repository,
) -> None:
    verified = take(repository, 1, "config")
    take(repository, 2, "config", verified=False)
    take(repository, 3, "config", failed=True)
    assert newest_before(repository, None).backup_id == verified
    with pytest.raises(NotFoundError, match="no backup that was taken before"):
        newest_before(repository, dt.datetime.fromisoformat(AT) - dt.timedelta(seconds=1))
