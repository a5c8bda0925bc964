"""Folders are backed up whole or say that they are not, and come back as they were, never outside of their place."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.errors import ArtifactError, ConflictError, NotFoundError, RefusedError, StorageError, UsageError
from registry.sections import Files
from registry.settings import Settings
from tasks.backup import folders, tree, untree
from tasks.backup.components import Target
from tasks.backup.folders import FilesPart
from tasks.backup.manifest import Entry
from tests.unit.tasks.backup.shelf import Shelf, taken

STRANGE = os.fsdecode(b"caf\xe9 \xff")


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """A folder with what folders have."""
    root = tmp_path / "uploads"
    (root / "a" / "deep" / "er").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a" / "one.txt").write_bytes(b"one\n")
    (root / "a" / "deep" / "none").write_bytes(b"")
    (root / "a" / "deep" / "er" / "big.bin").write_bytes(os.urandom(300_000))
    (root / "a" / STRANGE).write_bytes(b"\xff\x00")
    (root / "with\nline end").write_bytes(b"x")
    (root / "a" / "link").symlink_to("../../outside")
    (root / "a" / "absolute").symlink_to("/etc/passwd")
    (root / "a" / "strange link").symlink_to(f".//{STRANGE}/../x/")
    (root / "folder link").symlink_to("a")
    os.link(root / "a" / "one.txt", root / "z twin")
    with (root / "sparse").open("wb") as file:
        file.seek(10 << 30)
        file.write(b"end")
        file.seek(1 << 20)
        file.write(b"start")
    (root / "only hole").touch()
    os.truncate(root / "only hole", 5 << 20)
    (root / "a" / "one.txt").chmod(0o640)
    (root / "empty").chmod(0o711)
    if os.geteuid() == 0:
        os.chown(root / "a" / "deep", 1234, 4321)
    for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18, 10**18 + 123_456_789 + number), follow_symlinks=False)
    return root


def part(root: Path, *exclude: str) -> FilesPart:
    return FilesPart("files:uploads", root, tuple(exclude))


def listing(root: Path) -> dict[bytes, Any]:
    """All that a folder is: kinds, modes, owners, times, contents, targets, and which names are one file."""
    found: dict[bytes, Any] = {}
    inodes: dict[int, bytes] = {}
    for name in sorted(os.fsencode(path) for path in root.rglob("*")):
        status = os.lstat(name)
        kind: Any = stat.S_IFMT(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            kind = os.readlink(name)  # noqa: PTH115 (bytes)
        elif stat.S_ISREG(status.st_mode):
            if status.st_size < 1 << 20:
                kind = Path(os.fsdecode(name)).read_bytes()
            kind = (kind, status.st_size, inodes.setdefault(status.st_ino, name)[len(os.fsencode(root)) :])
        found[name[len(os.fsencode(root)) :]] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, kind)
    return found


def test_a_folder_comes_back_as_it_was(uploads: Path, tmp_path: Path) -> None:
    before = listing(uploads)
    shelf = taken(part(uploads))
    assert shelf.warnings == []
    assert shelf.record.facts["counts"] == {"file": 7, "folder": 4, "hardlink": 1, "link": 4}
    assert sum(map(len, shelf.objects.values())) < 4 << 20, "holes are not read"
    done = folders.restore(shelf, Target(path=tmp_path / "back"))
    assert listing(tmp_path / "back") == before == listing(uploads)
    assert done["names"] == 16
    assert (tmp_path / "back" / "sparse").stat().st_blocks * 512 < 1 << 20
    assert (tmp_path / "back").stat().st_mode == uploads.stat().st_mode


def test_a_verified_folder_differs_in_nothing(uploads: Path, tmp_path: Path) -> None:
    found = folders.verify(taken(part(uploads)), tmp_path)
    assert found.differences == ()
    assert found.checked["names"] == 16


def test_small_files_share_their_objects_and_one_more_of_them_moves_no_other(tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(3000):
        (root / f"{number:05d}").write_bytes(b"%d" % number * 20)
    shelf = taken(part(root))
    assert shelf.streams < 40
    (root / "00000a").write_bytes(b"new")
    second = taken(part(root))
    assert len(_packs(second) - _packs(shelf)) == 1
    assert folders.verify(second, tmp_path / "look").differences == ()


def test_what_has_no_content_is_left_out_with_a_warning(tmp_path: Path) -> None:
    root = tmp_path / "odd"
    root.mkdir()
    os.mkfifo(root / "pipe")
    here = Path.cwd()
    os.chdir(root)  # the name of a socket may be no longer than a hundred bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket")
    finally:
        os.chdir(here)
    (root / "kept").write_bytes(b"1")
    shelf = taken(part(root))
    assert [warning.partition(",")[0] for warning in shelf.warnings] == ["pipe: is a pipe", "socket: is a socket"]
    assert shelf.record.facts["counts"] == {"file": 1, "left out": 2}
    assert folders.verify(shelf, tmp_path).differences == ()


def test_excluded_names_and_all_below_them_stay_away(uploads: Path) -> None:
    shelf = taken(part(uploads, "deep", "*.txt", "sparse"))
    names = {entry.name for entry in shelf.entries()}
    assert "a" in names
    assert not {name for name in names if "deep" in name or name.endswith(".txt") or name == "sparse"}
    assert shelf.record.facts["excluded"] == 3
    assert shelf.entry("z twin").kind == "file", "its other name is excluded, so it has the content"


def test_a_backup_is_not_of_itself(uploads: Path, tmp_path: Path) -> None:
    (uploads / "backups" / "objects").mkdir(parents=True)
    (tmp_path / "elsewhere").symlink_to(uploads)
    settings = Settings(
        home=tmp_path, backups=[str(tmp_path / "elsewhere" / "backups")], files=[Files(name="up", path=uploads)]
    )
    (found,) = folders.parts(settings)
    shelf = taken(found)
    assert shelf.warnings == ["backups is left out: backups are written there"]
    assert not any(entry.name.startswith("backups") for entry in shelf.entries())
    with pytest.raises(UsageError, match="is where backups are written"):
        taken(FilesPart("files:up", uploads / "backups", own=(uploads / "backups",)))


def test_a_folder_that_is_missing_or_is_none_fails(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"is not there: correct its path in \[\[files\]\]"):
        taken(part(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is no folder"):
        taken(part(tmp_path / "file"))


def test_what_cannot_be_read_fails_the_component_by_its_name(uploads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refused(path: Any, *rest: Any, **more: Any) -> int:
        if path in ("one.txt", STRANGE):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match=r"2 names below .* a/caf\\xe9 \\xff: Permission denied") as caught:
        taken(part(uploads))
    assert "a/one.txt: Permission denied" in str(caught.value)


class Meddler:
    """Does something to a file at a certain reading of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
        self.reads, real = 0, tree.Reading.__iter__

        def reading(one: tree.Reading) -> Any:
            self.reads += 1
            for number, piece in enumerate(real(one)):
                yield piece
                if number == 0:
                    act(self.reads)

        monkeypatch.setattr(tree.Reading, "__iter__", reading)


def _append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


CHANGES: dict[str, tuple[Callable[[Path, int], Any], str | None, int | None]] = {
    # what happens to the file at its nth reading; the warning, the size that is kept
    "grows": (lambda path, n: _append(path), "grew while it was read", 3 << 20),
    "is rewritten once": (lambda path, n: n > 1 or path.write_bytes(b"y" * (3 << 20)), None, 3 << 20),
    "is rewritten always": (
        lambda path, n: path.write_bytes(b"%d" % n * (3 << 20)),
        "changed each of the 3 times",
        3 << 20,
    ),
    "shrinks": (lambda path, n: n > 1 or os.truncate(path, 2 << 20), None, 2 << 20),
    "shrinks always": (
        lambda path, n: os.truncate(path, (3 << 20) - n * 1000),
        "changed each of the 3 times",
        (3 << 20) - 3000,
    ),
    "vanishes": (lambda path, n: path.unlink(), "vanished while the backup was taken", None),
}


@pytest.mark.parametrize("fault", CHANGES)
def test_a_file_that_changes_while_it_is_read(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act, warning, size = CHANGES[fault]
    root = tmp_path / "live"
    root.mkdir()
    path = root / "log"
    path.write_bytes(b"x" * (3 << 20))
    os.utime(path, ns=(1, 1))
    Meddler(monkeypatch, lambda n: act(path, n))
    shelf = taken(part(root))
    assert [entry.facts["size"] for entry in shelf.entries()] == ([] if size is None else [size])
    assert [bool(warning) and warning in one for one in shelf.warnings] == ([True] if warning else [])
    monkeypatch.undo()
    assert folders.verify(shelf, tmp_path).differences == ()


def test_a_file_that_vanishes_before_it_is_read_is_named_and_left_out(
    uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def gone(path: Any, *rest: Any, **more: Any) -> int:
        if path == "one.txt":
            raise FileNotFoundError(2, "No such file or directory")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", gone)
    shelf = taken(part(uploads))
    assert shelf.warnings == ["a/one.txt: vanished while the backup was taken, and is not in it"]
    assert shelf.entry("z twin").kind == "file"


def test_a_link_that_takes_the_place_of_a_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, secret = tmp_path / "root", tmp_path / "secret"
    root.mkdir()
    secret.write_bytes(b"secret")
    (root / "file").write_bytes(b"public")
    real = os.open

    def swapped(path: Any, *rest: Any, **more: Any) -> int:
        if path == "file":
            (root / "file").unlink()
            (root / "file").symlink_to(secret)
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", swapped)
    shelf = taken(part(root))
    assert b"secret" not in b"".join(shelf.objects.values())
    assert shelf.warnings == ["file: was replaced by something else while the backup was taken, and is not in it"]


def test_a_folder_that_holds_something_is_refused_without_force(uploads: Path, tmp_path: Path) -> None:
    shelf, back = taken(part(uploads)), tmp_path / "back"
    back.mkdir()
    (back / "mine").write_bytes(b"mine")
    assert folders.occupied(Target(path=back)) == f"1 name in {back}"
    with pytest.raises(ConflictError, match="nothing was restored"):
        folders.restore(shelf, Target(path=back))
    assert sorted(path.name for path in back.iterdir()) == ["mine"]
    folders.restore(shelf, Target(path=back, force=True))
    assert (back / "mine").read_bytes() == b"mine"
    assert (back / "a" / "one.txt").read_bytes() == b"one\n"


@pytest.mark.parametrize("only", ["a/one.txt", "a", "a/deep", "*.txt", "z twin", "sparse"])
def test_a_part_of_a_folder_comes_back_alone(uploads: Path, tmp_path: Path, only: str) -> None:
    shelf, back = taken(part(uploads)), tmp_path / "back"
    (back / "other").mkdir(parents=True)
    folders.restore(shelf, Target(path=back, only=(only,)))
    fits = untree.selected((only,))
    due = {str(path.relative_to(uploads)) for path in uploads.rglob("*") if fits(str(path.relative_to(uploads)))}
    found = {str(path.relative_to(back)) for path in back.rglob("*")} - {"other"}
    assert found - {"a"} == due - {"a"}
    if only == "z twin":
        assert (back / "z twin").read_bytes() == b"one\n"
    with pytest.raises(ConflictError, match=r"in .*back already, so nothing was restored"):
        folders.restore(shelf, Target(path=back, only=(only,)))
    with pytest.raises(NotFoundError, match="nothing in files:uploads of this backup fits"):
        folders.restore(shelf, Target(path=tmp_path / "none", only=("nobody",)))


def test_an_interrupted_restore_goes_on_and_no_other_takes_its_place(
    uploads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, shelf, back = listing(uploads), taken(part(uploads)), tmp_path / "back"
    (uploads / "later").touch()
    other = taken(part(uploads))
    real, left = untree.Untree._name, 0

    def killed(self: Any, *rest: Any) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        real(self, *rest)

    monkeypatch.setattr(untree.Untree, "_name", killed)
    for lives in range(5):
        left = lives
        with pytest.raises(KeyboardInterrupt):
            folders.restore(shelf, Target(path=back))
        count = sum(1 for one in back.iterdir() if one.name != untree.MARK)
        standing = folders.occupied(Target(path=back))
        assert (standing is None) == (count == 0), "it may be somebody else's by now: recover knows"
        with pytest.raises(StorageError, match="half restored"):
            taken(part(back))
        with pytest.raises(ConflictError):
            folders.restore(other, Target(path=back))
    left = 1000
    folders.restore(shelf, Target(path=back))
    assert listing(back) == before


ESCAPES = ["../outside", "/outside", "a/../../outside", "a//b", "./a", "a/.", ""]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    shelf = taken(part(_one(tmp_path)))
    facts = shelf.entry("file").facts
    stream = shelf.put(b"evil")  # whole by all that is said of it
    facts = {**facts, "size": 4, "sha256": stream.sha256}
    shelf.lines.append(Entry(name, "file", stream, facts).line())
    with pytest.raises(RefusedError, match="could lead out of the folder"):
        folders.restore(shelf, Target(path=tmp_path / "in" / "back"))
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_written_through_a_link_in_the_index(force: bool, tmp_path: Path) -> None:
    shelf, outside = taken(part(_one(tmp_path))), tmp_path / "outside"
    outside.mkdir()
    stream = shelf.put(b"evil")
    facts = {**shelf.entry("file").facts, "to": str(outside), "size": 4, "sha256": stream.sha256}
    shelf.lines.append(Entry("way", "link", None, facts).line())
    shelf.lines.append(Entry("way/evil", "file", stream, facts).line())
    with pytest.raises(RefusedError, match="stands in the way"):
        folders.restore(shelf, Target(path=tmp_path / "back", force=force))
    assert not list(outside.iterdir())


def test_nothing_is_written_through_a_link_that_stands_at_the_target(tmp_path: Path) -> None:
    root, outside, back = tmp_path / "root", tmp_path / "outside", tmp_path / "back"
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_bytes(b"1")
    outside.mkdir()
    back.mkdir()
    (back / "a").symlink_to(outside)
    shelf = taken(part(root))
    with pytest.raises(ConflictError):
        folders.restore(shelf, Target(path=back))
    folders.restore(shelf, Target(path=back, force=True))
    assert not list(outside.iterdir())
    assert (back / "a" / "file").read_bytes() == b"1"


def test_a_hard_link_to_outside_is_refused(tmp_path: Path) -> None:
    shelf = taken(part(_one(tmp_path)))
    (tmp_path / "secret").write_bytes(b"secret")
    shelf.lines.append(Entry("twin", "hardlink", None, {"to": "../secret"}).line())
    with pytest.raises(RefusedError, match="could lead out"):
        folders.restore(shelf, Target(path=tmp_path / "back"))


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a bit of a pack": lambda shelf: shelf.flip("packs/000001"),
    "a bit of a big file": lambda shelf: shelf.flip("a/deep/er/big.bin"),
    "another content of a big file": lambda shelf: shelf.rewrite("a/deep/er/big.bin", b"z" * 300_000),
    "another content of a pack": lambda shelf: shelf.rewrite("packs/000001", b"z" * 10_000),
    "a pack that is too short": lambda shelf: shelf.rewrite("packs/000001", b"o"),
    "a missing object": lambda shelf: shelf.objects.clear(),
    "a missing line": lambda shelf: shelf.lines.pop(0) and None,
    "a line twice": lambda shelf: shelf.lines.append(shelf.lines[0]),
    "another mode": lambda shelf: shelf.lines.__setitem__(0, shelf.lines[0].replace('"mode": ', '"mode": 1')),
    "another time": lambda shelf: shelf.lines.__setitem__(0, shelf.lines[0].replace('"mtime_ns": ', '"mtime_ns": 1')),
    "another hash of the tree": lambda shelf: shelf.change(tree_sha256="0" * 64),
    "a content that is longer than its size": lambda shelf: shelf.lines.__setitem__(
        -1, json.dumps({**json.loads(shelf.lines[-1]), "facts": {**json.loads(shelf.lines[-1])["facts"], "extents": [[0, 1]]}})
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_never_called_verified(damage: str, uploads: Path, tmp_path: Path) -> None:
    shelf = taken(part(uploads))
    DAMAGES[damage](shelf)
    assert folders.verify(shelf, tmp_path).differences
    with pytest.raises((ArtifactError, RefusedError)):
        folders.restore(shelf, Target(path=tmp_path / "back"))


def _packs(shelf: Shelf) -> set[str]:
    return {entry.stream.sha256 for entry in shelf.entries() if entry.kind == "pack" and entry.stream is not None}


def _one(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"good")
    return root
