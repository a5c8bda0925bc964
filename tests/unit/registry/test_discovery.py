"""Models found in a folder: what is new is registered once, what is wrong is told once, what is being written is left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from registry import catalogue, versions
from registry.database import Database
from registry.discovery import Discovery, Look, scan, state_of, writer_of
from registry.errors import StorageError, UnavailableError, UsageError
from registry.schema import AuditEvent, Version
from registry.store import DirectoryStore
from tests.unit.registry import kit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models"
    made.mkdir()
    return made


@pytest.fixture
def discovery(database: Database, store: DirectoryStore, folder: Path) -> Discovery:
    return Discovery(database, store, folder, max_bytes=1 << 20)


def model(path: Path, scale: float = 1.0) -> Path:
    return kit.onnx_file(path, scale)


def looked(discovery: Discovery) -> Look:
    """What two looks bring."""
    discovery.look()
    return discovery.look()


def named(rows: list[dict[str, Any]]) -> list[tuple[str, str, str | None]]:
    return [(row["path"], row["model"], row["version"]) for row in rows]


def all_versions(database: Database) -> list[str]:
    with database.read() as session:
        return sorted(f"{row.model}/{row.version}" for row in session.scalars(select(Version)))


def test_name_and_version_come_from_the_path(discovery: Discovery, database: Database, folder: Path) -> None:
    model(folder / "alone.onnx", 1)
    model(folder / "digits" / "1.onnx", 2)
    model(folder / "digits" / "2.0.onnx", 3)
    model(folder / "letters" / "v7" / "anything.onnx", 4)
    model(folder / "whole" / "model.onnx", 5)
    (folder / "whole" / "model.toml").write_text('author = "ann"\n')
    found = looked(discovery)
    assert found.wrong == []
    assert named(found.registered) == [
        ("alone.onnx", "alone", "1"), ("digits/1.onnx", "digits", "1"), ("digits/2.0.onnx", "digits", "2.0"),
        ("letters/v7", "letters", "v7"), ("whole", "whole", "1"),
    ]  # fmt: skip
    assert all_versions(database) == ["alone/1", "digits/1", "digits/2.0", "letters/v7", "whole/1"]


def test_nothing_is_registered_twice_in_whatever_process(
    discovery: Discovery, database: Database, store: DirectoryStore, folder: Path
) -> None:
    model(folder / "digits.onnx")
    model(folder / "digits" / "first.onnx", 2)
    assert len(looked(discovery).registered) == 2
    for _ in range(3):
        assert not any(discovery.look().as_dict().values())
    again = looked(Discovery(database, store, folder, max_bytes=1 << 20))
    assert (again.registered, len(again.known)) == ([], 2)
    shutil.copy(folder / "digits.onnx", folder / "other.onnx")
    (folder / "digits.onnx").touch()
    found = looked(discovery)
    assert named(found.registered) == [("other.onnx", "other", "1")], (
        "the same bytes under another name are another model"
    )
    assert named(found.known) == [("digits.onnx", "digits", "1")]
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(Version)) == 3


def test_other_bytes_under_a_name_without_a_version_are_the_next_version(
    discovery: Discovery, database: Database, folder: Path
) -> None:
    model(folder / "digits.onnx", 1)
    looked(discovery)
    model(folder / "digits.onnx", 2)
    assert named(looked(discovery).registered) == [("digits.onnx", "digits", "2")]
    assert all_versions(database) == ["digits/1", "digits/2"]


def test_golden_cases_that_lie_beside_are_taken_along(discovery: Discovery, database: Database, folder: Path) -> None:
    model(folder / "a.onnx", 1)
    kit.golden_file(folder / "a.golden.npz")
    model(folder / "b" / "1.onnx", 2)
    model(folder / "b" / "2.onnx", 3)
    kit.golden_file(folder / "b" / "2.golden.npz", rows=5)
    kit.golden_file(folder / "b" / "golden.npz", rows=4)
    model(folder / "c" / "1" / "m.onnx", 4)
    kit.golden_file(folder / "c" / "1" / "golden.npz", rows=6)
    model(folder / "d.onnx", 5)
    found = looked(discovery)
    assert (len(found.registered), found.wrong) == (5, [])
    with database.read() as session:
        cases = {
            event.subject: event.text.partition('"golden_cases":')[2].partition(",")[0]
            for event in session.scalars(select(AuditEvent).where(AuditEvent.action == "version.registered"))
        }
    assert cases == {
        "version:a/1": "3", "version:b/1": "4", "version:b/2": "5", "version:c/1": "6", "version:d/1": "null",
    }  # fmt: skip


def test_what_is_no_model_or_under_way_is_not_even_looked_at(discovery: Discovery, folder: Path) -> None:
    for name in ("README.md", "notes.txt", ".hidden.onnx", "a.onnx.tmp", "b.onnx.part", "c.onnx~", "d.onnx.crdownload"):
        (folder / name).write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / "empty").mkdir()
    assert list(scan(folder)) == []
    assert not any(looked(discovery).as_dict().values())


def test_what_is_wrong_is_told_with_its_reason_once_until_it_changes(
    discovery: Discovery, database: Database, folder: Path
) -> None:
    (folder / "bad.onnx").write_bytes(b"this is no model")
    model(folder / "bad name.onnx")
    (folder / "digits" / "empty").mkdir(parents=True)
    (folder / "digits" / "empty" / "README.md").write_text("to come")
    model(folder / "digits" / "good.onnx", 9)
    found = looked(discovery)
    reasons = {row["path"]: row["reason"] for row in found.wrong}
    assert set(reasons) == {"bad.onnx", "bad name.onnx", "digits/empty"}
    assert "is not a model name" in reasons["bad name.onnx"]
    assert len(found.registered) == 1
    assert not any(discovery.look().as_dict().values())
    model(folder / "bad.onnx", 3)
    assert named(looked(discovery).registered) == [("bad.onnx", "bad", "1")]
    model(folder / "digits" / "good.onnx", 10)
    (wrong,) = looked(discovery).wrong
    assert "exists with other bytes" in wrong["reason"]
    assert all_versions(database) == ["bad/1", "digits/good"]


def test_weights_that_come_after_their_graph_make_a_wrong_one_right(discovery: Discovery, folder: Path) -> None:
    model_ = kit.onnx_file(folder / "m" / "1.onnx", external="weights.bin")
    kept = (folder / "m" / "weights.bin").read_bytes()
    (folder / "m" / "weights.bin").unlink()
    assert [row["path"] for row in looked(discovery).wrong] == ["m/1.onnx"]
    assert not any(discovery.look().as_dict().values())
    (folder / "m" / "weights.bin").write_bytes(kept)
    assert named(discovery.look().registered) == [("m/1.onnx", "m", "1")]
    assert model_.exists()


def test_a_file_that_grows_is_left_alone_until_two_looks_see_it_the_same(discovery: Discovery, folder: Path) -> None:
    whole = model(folder.parent / "whole.onnx").read_bytes()
    path = folder / "digits.onnx"
    for cut in range(10, len(whole), len(whole) // 6):
        path.write_bytes(whole[:cut])
        found = discovery.look()
        assert (found.registered, found.wrong) == ([], [])
        assert found.waiting[0]["path"] == "digits.onnx"
    path.write_bytes(whole)
    assert discovery.look().waiting
    assert named(discovery.look().registered) == [("digits.onnx", "digits", "1")]


def test_an_empty_file_is_waited_for(discovery: Discovery, folder: Path) -> None:
    (folder / "digits.onnx").touch()
    assert "empty so far" in looked(discovery).waiting[0]["reason"]
    model(folder / "digits.onnx")
    assert looked(discovery).registered


@pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="only Linux shows who has a file open")
def test_a_file_that_a_process_has_open_for_writing_is_left_alone(discovery: Discovery, folder: Path) -> None:
    path = model(folder / "digits.onnx")
    code = "import sys; f = open(sys.argv[1], 'r+b'); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        found = looked(discovery)
        assert found.registered == []
        assert found.waiting[0]["reason"] == f"process {process.pid} has it open for writing"
    assert discovery.look().registered


@pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="only Linux shows who has a file open")
def test_a_file_that_is_only_read_by_somebody_is_not_held_back(folder: Path) -> None:
    path = model(folder / "digits.onnx")
    (find,) = scan(folder)
    with path.open("rb"):
        assert writer_of(state_of(find)) is None
    with path.open("ab"):
        assert writer_of(state_of(find)) == os.getpid()


def test_what_a_person_archived_does_not_come_back(discovery: Discovery, database: Database, folder: Path) -> None:
    model(folder / "digits.onnx")
    looked(discovery)
    catalogue.archive(database, "digits", "1", reason="bad")
    (folder / "digits.onnx").touch()
    fresh = Discovery(database, discovery.store, folder, max_bytes=1 << 20)
    found = looked(fresh)
    assert (found.registered, found.known[0]["state"]) == ([], "archived")


@pytest.mark.parametrize("error", [UnavailableError("gone"), StorageError("full")])
def test_a_registry_that_is_away_ends_the_look_and_the_next_one_goes_on(
    discovery: Discovery, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model(folder / "a.onnx", 1)
    model(folder / "b.onnx", 2)
    discovery.look()
    calls: list[str] = []
    register = versions.register

    def away(*positional: Any, **named: Any) -> Any:
        calls.append(named["name"])
        if named["name"] == "b":
            raise error
        return register(*positional, **named)

    monkeypatch.setattr(versions, "register", away)
    found = discovery.look()
    assert (named(found.registered), found.failure) == ([("a.onnx", "a", "1")], error)
    monkeypatch.undo()
    found = discovery.look()
    assert (named(found.registered), found.failure) == ([("b.onnx", "b", "1")], None)


def test_a_file_that_vanishes_is_forgotten_and_its_return_is_news(discovery: Discovery, folder: Path) -> None:
    path = model(folder / "digits.onnx")
    looked(discovery)
    path.unlink()
    assert not any(discovery.look().as_dict().values())
    model(path)
    assert looked(discovery).known


def test_a_folder_that_is_none_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        next(scan(tmp_path / "nowhere"))


def test_golden_cases_that_are_broken_are_the_reason(discovery: Discovery, folder: Path) -> None:
    model(folder / "a.onnx")
    np.savez(folder / "a.golden.npz", wrong=np.zeros(3))
    assert "no array is named input" in looked(discovery).wrong[0]["reason"]
