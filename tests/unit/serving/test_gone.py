"""What a server keeps of versions that are gone: nothing that grows with their number."""

from __future__ import annotations

import asyncio
import fnmatch
import gc
import hashlib
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from registry import points, versions
from registry.database import Database
from registry.schema import Version
from registry.store import DirectoryStore
from serving import state
from serving.device.loads import weights_bytes
from serving.follow.reconcile import Reconciler
from serving.loaded import lifecycle
from serving.process.rings import Ring
from tests.unit.registry import kit
from tests.unit.registry.kit import MODEL
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import following, three_versions

KEPT_OF_THE_GONE = 8
WARM_UP, WINDOW, WINDOWS = 16, 8, 3
ALLOWED_BYTES_A_SWAP = 250
OURS = re.compile(r"(?<!/unit)/serving/[a-z_]+\.py$|/re/[a-z_]+\.py$|/(fnmatch|pathlib)\.py$")
"""What the server makes, and what the library makes for it. The registry changes in this process too, which wavers by far more."""


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "template").mkdir()
    made = kit.prepared(tmp_path, three_versions(tmp_path / "template", "1"))
    yield made
    made.dispose()


class Line:
    """Versions that come and go, one after the other; each is there once."""

    def __init__(self, database: Database, reconciler: Reconciler, folder: Path) -> None:
        self._database, self._reconciler, self._folder = database, reconciler, folder
        self._number = 100

    async def swap(self) -> None:
        self._number += 1
        name, reconciler = str(self._number), self._reconciler
        path = kit.onnx_file(self._folder / "next.onnx", scale=float(self._number))
        store = DirectoryStore(self._folder / "template" / "artifacts")
        versions.register(self._database, store, path, name=MODEL, version=name, max_bytes=1 << 20)
        with self._database.write(actor="test") as transaction:
            transaction.session.get_one(Version, (MODEL, name)).state = "validated"
            transaction.record("version.validated", f"version:{MODEL}/{name}")
        operation = kit.begin(self._database, name, strategy="forced", force_reason="test")
        kit.promote(self._database, operation, watch=False)
        kit.end(self._database, operation, "promoted")
        await reconciler.once()
        [(key, loaded)] = reconciler.serving.loaded.items()
        assert key == (MODEL, name)
        work = loaded.submit({"x": np.ones((1, 4), dtype=np.float32)}, None, reconciler.serving.routes[MODEL])
        await work.future
        assert work.failure is None and work.answer["y"][0, 0] == 4 * self._number
        await reconciler._leaving.wait()

    async def swaps(self, count: int) -> int:
        """How many bytes more are held after so many swaps."""
        before = await self._held()
        for _ in range(count):
            await self.swap()
        return await self._held() - before

    async def _held(self) -> int:
        """While nothing is done in the background."""
        await until(lambda: self._reconciler.backstop._task is None)
        return _held()


def _held() -> int:
    gc.collect()
    by_file = tracemalloc.take_snapshot().statistics("filename")
    return sum(found.size for found in by_file if OURS.search(found.traceback[0].filename))


def test_a_hundred_versions_that_came_and_went_leave_nothing_that_grows_with_them(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is kept of the last ones that went is bounded: less of it is full sooner.
    monkeypatch.setattr(state, "_TELEMETRY_KEPT", KEPT_OF_THE_GONE)
    monkeypatch.setattr(lifecycle, "_GONE_KEPT", KEPT_OF_THE_GONE)

    async def run() -> list[int]:
        async with following(database, tmp_path / "home", tmp_path / "template" / "registry.db") as reconciler:
            reconciler.reporter._monotonic = iter(range(0, 10**9, 1000)).__next__  # counts are forgotten after a minute
            line = Line(database, reconciler, tmp_path)
            for _ in range(WARM_UP // 2):
                await line.swap()
            tracemalloc.start()  # not before: all that is imported would be traced with it
            await line.swaps(WARM_UP // 2)
            grown = [await line.swaps(WINDOW) for _ in range(WINDOWS)]
            memory, room = reconciler.memory, reconciler.room
            known = points.KEPT + 4  # what could be wanted again, as it was seen in the background a little earlier
            assert max(len(room._measured), len(memory.limits)) <= known
            assert not reconciler.loading._slots and not reconciler.loader.attempts
            return grown

    try:
        grown = asyncio.run(run())
    finally:
        tracemalloc.stop()
    # Something that is made once now and then (a table that doubles) is in one window; what each swap leaves is in all.
    assert min(grown) < ALLOWED_BYTES_A_SWAP * WINDOW, grown


def test_the_weights_beside_a_model_are_counted_without_a_pattern_that_stays(tmp_path: Path) -> None:
    name = hashlib.sha256(b"x").hexdigest() + "[1].onnx"
    for file, size in ((name, 3), (f"{name}.data", 5), (f"{name}_data", 7), (f"{name}data", 100), ("o" + name, 100)):
        (tmp_path / file).write_bytes(bytes(size))
    compiled = fnmatch._compile_pattern.cache_info().currsize  # type: ignore[attr-defined]
    before = len(re._cache)  # type: ignore[attr-defined]
    assert weights_bytes(tmp_path / name) == 15
    assert (fnmatch._compile_pattern.cache_info().currsize, len(re._cache)) == (compiled, before)  # type: ignore[attr-defined]


def test_a_ring_has_the_newest_rows_and_what_was_none_in_them() -> None:
    ring = Ring(3, 2, tuple)
    assert not len(ring) and ring.last(2) == [] == list(ring)
    with pytest.raises(ValueError, match="a row of 1 numbers, not 2"):
        ring.append([1.0])
    for number in range(5):
        ring.append((number, None if number == 4 else -number))
    assert len(ring) == 3 and list(ring) == [(2.0, -2.0), (3.0, -3.0), (4.0, None)]
    assert ring.last(1) == [(4.0, None)] and ring.last(9) == list(ring)


def test_what_a_server_keeps_of_its_figures_takes_its_memory_at_once() -> None:
    ring = Ring(720, 12, tuple)
    row = [float(number) for number in range(12)]
    ring.append(row)
    tracemalloc.start()
    try:
        for _ in range(1000):
            ring.append(row)
        gc.collect()
        assert _held() < 1000
    finally:
        tracemalloc.stop()
