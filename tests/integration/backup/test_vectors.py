"""A vector store comes back with every vector, from under its writers, from a folder and from a server."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.errors import ArtifactError, ConflictError, LockedError, ModelkeepError, NotFoundError, UnavailableError
from registry.settings import Settings
from tasks.backup import throwaway, vector_copy, vectors
from tasks.backup.components import Target
from tasks.backup.vectors import VectorsPart
from tests.unit.tasks.backup.shelf import Shelf, taken

FILL = """
import sys
import chromadb, numpy as np
from chromadb.config import Settings
path, count = sys.argv[1], int(sys.argv[2])
client = chromadb.PersistentClient(path=path, settings=Settings(anonymized_telemetry=False))
random = np.random.default_rng(7)
centres = random.normal(size=(12, 16))
one = client.create_collection("prices", metadata={"team": "a"}, configuration={"hnsw": {"space": "cosine", "ef_search": 200}}, embedding_function=None)
vectors = (centres[random.integers(0, 12, count)] + 0.05 * random.normal(size=(count, 16))).astype("f4")
one.add(ids=[f"p{n:05d}" for n in range(count)], embeddings=vectors, documents=[f"text {n}" for n in range(count)], metadatas=[{"n": n} for n in range(count)])
two = client.create_collection("odd names", embedding_function=None) if False else client.create_collection("odd-names", embedding_function=None)
two.add(ids=["ä", "b", "c"], embeddings=[[1, 0], [0, 1], [1, 1]], documents=[None, "x", None], metadatas=[None, {"b": True, "f": 1.5}, None])
client.create_collection("empty", embedding_function=None)
print("ready", flush=True)
number = count
while len(sys.argv) > 3:
    one.add(ids=[f"p{number:05d}"], embeddings=[centres[number % 12] + 0.01], documents=["late"], metadatas=[{"n": number}])
    number += 1
    if number % 5 == 0:
        print(number, flush=True)
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that lies still: 1,500 records in clusters, so that a part of them is in the index files and a part in the log."""
    path = tmp_path_factory.mktemp("store") / "chroma"
    subprocess.run([sys.executable, "-c", FILL, path, "1500"], check=True, stdout=subprocess.DEVNULL, timeout=120)
    return path


@pytest.fixture(scope="module")
def captured(filled: Path) -> Shelf:
    return taken(VectorsPart(str(filled)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, filled: Path) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    data = folder / "data"
    shutil.copytree(filled, data)
    with throwaway.chroma(folder, data=data) as running:
        yield running.url


def copied(shelf: Shelf) -> Shelf:
    found = Shelf()
    found.objects, found.lines, found.record = dict(shelf.objects), list(shelf.lines), shelf.record
    return found


@pytest.mark.long
def test_a_store_comes_back_by_its_cold_copy_and_by_its_records(captured: Shelf, filled: Path, tmp_path: Path) -> None:
    facts = captured.record.facts["collections"]
    assert {name: one["count"] for name, one in facts.items()} == {"empty": 0, "odd-names": 3, "prices": 1500}
    assert facts["prices"]["configuration"]["hnsw"]["space"] == "cosine"
    assert len(facts["prices"]["queries"]) == 5
    assert captured.captured.snapshot["consistent"] is True
    assert captured.warnings == []
    found = vectors.verify(captured, tmp_path)
    assert found.differences == ()
    assert found.checked == {"collections": 3, "records": 1503, "restored_by": ["ids", "cold copy"]}


def test_a_folder_takes_the_whole_store_at_once_and_keeps_what_stood_there(captured: Shelf, tmp_path: Path) -> None:
    path = tmp_path / "chroma"
    path.mkdir()
    done = vectors.restore(captured, Target(url=str(path)))
    assert (done["by"], done["records"], done["kept"]) == ("the cold copy", 1503, None)
    assert vectors.occupied(Target(url=str(path))) == "3 collections (empty, odd-names, prices)"
    with pytest.raises(ConflictError, match="nothing was restored"):
        vectors.restore(captured, Target(url=str(path)))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.long
def test_a_store_that_is_replaced_is_put_aside(captured: Shelf, filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "chroma"
    shutil.copytree(filled, path)
    done = vectors.restore(captured, Target(url=str(path), force=True))
    assert (Path(done["kept"]) / "chroma.sqlite3").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_server_is_read_by_ids_and_said_to_be_of_no_one_moment(server: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = taken(VectorsPart(server))
    assert shelf.captured.snapshot["consistent"] is False
    assert "no lock against writers" in shelf.captured.snapshot["why"]
    ids = {name: one["ids_sha256"] for name, one in shelf.record.facts["collections"].items()}
    assert ids == {name: one["ids_sha256"] for name, one in captured.record.facts["collections"].items()}


@pytest.mark.long
def test_a_backup_of_a_server_makes_a_folder(server: str, tmp_path: Path) -> None:
    done = vectors.restore(taken(VectorsPart(server)), Target(url=str(tmp_path / "chroma")))
    assert (done["by"], done["records"]) == ("ids", 1503)


@pytest.mark.long
def test_one_collection_goes_back_into_a_server(server: str, captured: Shelf) -> None:
    with pytest.raises(ConflictError, match="odd-names"):
        vectors.restore(captured, Target(url=server, only=("odd-names",)))
    done = vectors.restore(captured, Target(url=server, only=("odd-names",), force=True))
    assert (done["collections"], done["records"]) == (["odd-names"], 3)
    with pytest.raises(NotFoundError, match="nobody is not in this backup"):
        vectors.restore(captured, Target(url=server, only=("nobody",)))


def test_a_store_under_a_writer_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "live"
    with subprocess.Popen([sys.executable, "-c", FILL, path, "1500", "on"], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        try:
            assert writer.stdout.readline() == b"ready\n"
            before = int(writer.stdout.readline())
            shelf = taken(VectorsPart(str(path), ("prices",)))
            os.read(writer.stdout.fileno(), 1 << 16)
            assert writer.poll() is None, "the writer was held up for a moment and goes on"
        finally:
            writer.kill()
    assert f"process {writer.pid}" in shelf.warnings[0]
    assert shelf.record.facts["collections"]["prices"]["count"] >= before - 5
    found = vectors.verify(shelf, tmp_path)
    assert found.differences == ()


def test_a_writer_that_does_not_let_go_fails_the_component(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_copy, "LOCK_SECONDS", 0.1)
    connection = sqlite3.connect(filled / "chroma.sqlite3", isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(LockedError, match="did not let go"):
            taken(VectorsPart(str(filled)))
    finally:
        connection.close()


def test_index_files_that_change_during_every_copy_fail_the_component(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfile

    def late(source: Path, target: Path) -> Any:
        os.utime(source)
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", late)
    with pytest.raises(LockedError, match="change all the time"):
        taken(VectorsPart(str(filled)))


def test_a_store_that_has_lost_its_vectors_is_never_taken_for_a_backup(
    filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a copy of the SQLite file alone."""
    broken = tmp_path / "chroma"
    broken.mkdir()
    shutil.copyfile(filled / "chroma.sqlite3", broken / "chroma.sqlite3")
    monkeypatch.setattr(vectors, "COPIES", 1)
    with pytest.raises(ArtifactError, match="holds all of its vectors"):
        taken(VectorsPart(str(broken)))


def test_what_is_not_there_fails_the_component(tmp_path: Path, filled: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no Chroma store"):
        taken(VectorsPart(str(tmp_path)))
    with pytest.raises(NotFoundError, match="there is no collection nobody; there are empty, odd-names, prices"):
        taken(VectorsPart(str(filled), ("nobody",)))


@pytest.mark.long
def test_a_server_that_does_not_answer_fails_the_component() -> None:
    with pytest.raises(UnavailableError):
        taken(VectorsPart("http://127.0.0.1:1"))


def test_a_store_that_somebody_has_open_is_not_replaced(captured: Shelf, filled: Path, tmp_path: Path) -> None:
    path = tmp_path / "chroma"
    shutil.copytree(filled, path)
    holds = "import sys; kept = open(sys.argv[1]); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, path / "chroma.sqlite3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConflictError, match=f"process {other.pid}"):
            vectors.restore(captured, Target(url=str(path), force=True))
        other.kill()


def lines_of(shelf: Shelf, name: str) -> list[bytes]:
    stream = shelf.entry(f"collections/{name}").stream
    assert stream is not None
    return b"".join(shelf.open(stream)).splitlines(keepends=True)


def changed(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Callable[[Shelf], None]:
    return lambda shelf: shelf.rewrite(f"collections/{name}", b"".join(change(lines_of(shelf, name))))


def other_vector(lines: list[bytes]) -> list[bytes]:
    record = json.loads(lines[2])
    record["embedding"] = json.loads(lines[1])["embedding"]
    return [*lines[:2], json.dumps(record, sort_keys=True).encode() + b"\n", *lines[3:]]


DAMAGES: dict[str, Callable[[Shelf], None]] = {
    "a flipped bit of the records": lambda shelf: shelf.flip("collections/prices"),
    "a flipped bit of the copy": lambda shelf: shelf.flip("copy/chroma.sqlite3"),
    "a record less": changed("prices", lambda lines: lines[:-1]),
    "another vector": changed("odd-names", other_vector),
    "a collection less": lambda shelf: shelf.lines.pop(0) and None,
    "no index files": lambda shelf: setattr(
        shelf, "lines", [one for one in shelf.lines if "copy/" not in one or "sqlite3" in one]
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_never_called_verified(damage: str, captured: Shelf, tmp_path: Path) -> None:
    shelf = copied(captured)
    DAMAGES[damage](shelf)
    assert vectors.verify(shelf, tmp_path).differences


@pytest.mark.long
def test_a_killed_restore_leaves_nothing_under_the_name_of_the_store(
    captured: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*rest: Any) -> Any:
        raise KeyboardInterrupt

    path = tmp_path / "chroma"
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "_compare", killed)
        with pytest.raises(KeyboardInterrupt):
            vectors.restore(captured, Target(url=str(path)))
    assert vectors.occupied(Target(url=str(path))) is None
    assert vectors.restore(captured, Target(url=str(path)))["records"] == 1503


def test_the_store_is_where_the_settings_say(tmp_path: Path) -> None:
    assert vectors.parts(Settings()) == []
    (part,) = vectors.parts(Settings(home=tmp_path, chroma="store"))
    assert part == VectorsPart(str(tmp_path / "store"), (), tmp_path)
    with pytest.raises(ModelkeepError):
        vectors.restore(Shelf(), Target())
