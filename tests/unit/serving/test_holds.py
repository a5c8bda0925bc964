"""Local holds and what is kept for them on a replica's disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from registry.errors import ArtifactError
from registry.points import Step
from registry.rollbacks import Hold
from registry.store import DirectoryStore
from serving.follow.holds import Holds
from serving.loaded.keeping import Kept, NearStore
from serving.loaded.laststate import LastState, Wanted
from serving.traffic.routing import Route

HOLD = Hold("digits", "production", "1", "2", "e", 7, "key:ops", "k1", None, "bad", "2026-01-01T00:00:00.000000Z")


def wanted(version: str, digest: str = "a" * 64, model: str = "digits") -> Wanted:
    file = {"name": f"{version}.onnx", "digest": digest, "size_bytes": 3}
    return Wanted(model, version, digest, "onnx", (file,), None, True)


STATE = LastState(
    "e", 9, (Route("digits", 7, "2", "3", 0.5, watch=True), Route("other", 5, "1")),
    (wanted("2"), wanted("3"), wanted("1", model="other")),
)  # fmt: skip
STEPS = {"digits": [Step("1", "first", True), Step("2", "promote")]}


def test_a_hold_outlives_its_process_and_a_damaged_file_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "holds.json"
    holds = Holds(path)
    holds.put(HOLD)
    holds.save()
    again = Holds(path)
    again.recall()
    assert again.by_model == {"digits": HOLD}
    for damage in ("", "[]", '{"format": 2}', '{"format": 1, "holds": [{}]}'):
        path.write_text(damage)
        empty = Holds(path)
        empty.recall()
        assert empty.by_model == {}


def test_a_hold_takes_the_place_of_the_route_it_was_made_over_and_of_no_other(tmp_path: Path) -> None:
    holds = Holds(tmp_path / "holds.json")
    assert holds.over(STATE, lambda *_: None) is STATE
    holds.put(HOLD)
    over = holds.over(STATE, lambda model, version: wanted(version))
    assert over.routes == (Route("digits", 7, "1"), Route("other", 5, "1"))
    assert {(one.model, one.version) for one in over.versions} == {("digits", "1"), ("other", "1")}
    for changed in (
        LastState("f", 9, STATE.routes, STATE.versions),
        LastState("e", 10, (Route("digits", 10, "2"),), ()),
    ):
        assert holds.over(changed, lambda *_: None).routes == changed.routes


def test_a_newer_hold_is_not_dropped_in_place_of_the_one_that_is_over(tmp_path: Path) -> None:
    from dataclasses import replace

    holds = Holds(tmp_path / "holds.json")
    newer = replace(HOLD, to="0")
    holds.put(newer)
    holds.drop(HOLD)
    assert holds.by_model == {"digits": newer}


@pytest.fixture
def far(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "far")


def put(far: DirectoryStore, content: bytes) -> str:
    path = far.folder.parent / "file"
    path.write_bytes(content)
    return far.put(path).digest


def test_what_is_kept_is_there_when_the_store_is_gone_and_is_verified(tmp_path: Path, far: DirectoryStore) -> None:
    digest = put(far, b"weights")
    near = NearStore(far, tmp_path / "near")
    near.keep(digest)
    near.keep(digest)
    shutil.rmtree(far.folder)
    assert near.path(digest).read_bytes() == b"weights"
    place = near.path(digest)
    place.unlink()
    place.write_bytes(b"rotten")
    with pytest.raises(ArtifactError):
        near.path(digest)


def test_a_copy_is_kept_where_a_link_cannot_be(
    tmp_path: Path, far: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    digest = put(far, b"weights")
    near = NearStore(far, tmp_path / "near")
    near.keep(digest)
    assert near.path(digest).stat().st_nlink == 1
    assert [path.name for path in near.path(digest).parent.iterdir()] == [digest]


def test_points_are_remembered_and_lead_back_by_the_stack(tmp_path: Path, far: DirectoryStore) -> None:
    digests = [put(far, name) for name in (b"one", b"two")]
    kept = Kept(far, tmp_path / "artifacts", tmp_path / "points.json")
    kept.bring(STEPS, [wanted("1", digests[0]), wanted("2", digests[1])])
    again = Kept(far, tmp_path / "artifacts", tmp_path / "points.json")
    again.recall()
    assert again.below("digits", "2") == "1"
    assert again.below("digits", "1") is None
    assert again.below("nothing", "1") is None
    assert again.names("digits") == ["1", "2"]
    assert again.version("digits", "1") == wanted("1", digests[0])


def test_a_version_whose_files_cannot_be_had_is_not_promised(tmp_path: Path, far: DirectoryStore) -> None:
    kept = Kept(far, tmp_path / "artifacts", tmp_path / "points.json")
    kept.bring(STEPS, [wanted("1", "b" * 64), wanted("2", put(far, b"two"))])
    assert kept.names("digits") == ["2"]
    assert "is not in" in kept.errors["digits", "1"]


def test_what_neither_a_route_nor_a_point_needs_goes_but_not_what_came_just_now(
    tmp_path: Path, far: DirectoryStore
) -> None:
    stays, goes = put(far, b"one"), put(far, b"two")
    kept = Kept(far, tmp_path / "artifacts", tmp_path / "points.json")
    kept.bring(STEPS, [wanted("1", stays), wanted("2", goes)])
    folder = kept.cache / ("c" * 64)
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x")
    assert kept.clean({stays}, {stays}) == []
    with kept.store.path(goes).open("rb") as mapped:
        assert sorted(kept.clean({stays}, {stays}, grace_seconds=-1)) == sorted(["c" * 64, goes])
        assert mapped.read() == b"two"
    assert kept.store.near.has(stays) and not kept.store.near.has(goes) and not folder.exists()
    assert far.has(goes), "the store itself is none of ours to clean"
