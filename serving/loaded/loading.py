"""Bring one version into memory: its files from the store, checked, its runtime, its worker. Runs on a thread of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from registry import labels, store
from registry.errors import ArtifactError
from registry.settings import Settings
from registry.signature import Signature
from serving.compute.engine import LoadedVersion
from serving.compute.runtimes import load_runtime
from serving.device.devices import place_of
from serving.device.memory import MemoryOptimizer
from serving.loaded.caretaker import Caretaker
from serving.loaded.keeping import Kept
from serving.loaded.laststate import Wanted
from serving.loaded.lifecycle import ModelState
from serving.loaded.swap import Room
from serving.process.crashmark import Slot
from serving.text.caches import Caches
from serving.text.loading import engine_of

log = logging.getLogger("modelkeep.reconcile")


class Loading:
    """One a process. `load` and `fetch` block; they may run on any thread but the event loop's."""

    def __init__(
        self,
        settings: Settings,
        cache: Path,
        *,
        caretaker: Caretaker,
        kept: Kept,
        room: Room,
        memory: MemoryOptimizer,
        monotonic: Callable[[], float],
    ) -> None:
        self._settings, self._cache, self._memory = settings, cache, memory
        self._place = place_of(settings, memory.device, room.budget_bytes)
        self._caches = Caches(room.budget_bytes)
        self._caretaker, self._kept, self._room, self._monotonic = caretaker, kept, room, monotonic
        self._slots: dict[tuple[str, str], Slot] = {}

    def fetch(self, version: Wanted) -> Path:
        """Have its files here, checked. Raises ArtifactError, StorageError, UnavailableError."""
        files = [store.StoredFile.from_dict(file) for file in version.files]
        return store.materialise(self._kept.store, files, self._cache)

    def load(self, version: Wanted) -> LoadedVersion:
        """Raises what `fetch` does, and whatever the runtime says of a model that it does not take."""
        key = version.model, version.version
        slot = self._slots[key] = self._caretaker.begin(version)
        try:
            return self._load(version, slot)
        except Exception as error:
            self._caretaker.failed(version, slot, str(error))
            raise
        finally:
            if self._slots.get(key) is slot:
                del self._slots[key]

    def forget_all_but(self, versions: Collection[Wanted]) -> None:
        """What was found out about versions that are not among these, and shall not come again as far as is known."""
        self._room.forget_all_but(versions)
        self._memory.limits.forget_all_but({version.digest for version in versions})

    def limit_seconds(self, version: Wanted) -> float:
        """How long it may take."""
        return self._settings.load_hang_seconds(sum(int(file["size_bytes"]) for file in version.files))

    def hangs(self, version: Wanted, why: str) -> None:
        """It does not come to its end. Should the process die, that is not laid at its door any more."""
        key = version.model, version.version
        if (slot := self._slots.get(key)) is not None:
            slot.mark(False)
        self._caretaker.lifecycle.move_if_legal(key, ModelState.ERROR, error=why)

    def _load(self, version: Wanted, slot: Slot) -> LoadedVersion:
        started, settings = self._monotonic(), self._settings
        path = self.fetch(version)
        artifact = path.parents[version.files[0]["name"].count("/")]
        signature = None if version.signature is None else Signature.from_dict(version.signature)
        self._caretaker.loading(version, slot)
        need = self._room.need(version)
        with self._caches.coming(need):
            self._memory.before_large_work(f"loading {version.model} {version.version}", need)
            runtime = load_runtime(
                path, version.format, signature=signature, place=self._place, golden=self._golden_cases(version)
            )
            max_batch = min(settings.performance.batch_size, version.max_batch or settings.performance.batch_size)
            try:
                loaded = engine_of(path, runtime, settings.text, self._caches)(
                    version.model,
                    version.version,
                    version.digest,
                    runtime,
                    rows_independent=version.rows_independent,
                    max_batch=max_batch,
                    queue_size=settings.performance.queue_size,
                    deterministic=version.deterministic,
                    labels=labels.resolved(version.labels or {}, artifact),
                    mark=slot.mark,
                    limit=self._memory.limits.of(version.digest, max_batch),
                    clean_up=self._memory.ran_out,
                )
            except BaseException:  # its worker, which would close it, has not begun
                runtime.close()
                raise
            self._caches.note(loaded)
        self._caretaker.keep(loaded, slot)
        self._room.note(loaded)
        loaded.load_seconds = self._monotonic() - started
        log.info("loaded %s %s in %.3f s", version.model, version.version, loaded.load_seconds)
        return loaded

    def _golden_cases(self, version: Wanted) -> Path | None:
        """Where half precision is to be decided by them."""
        if not self._place.fp16 or version.golden is None:
            return None
        try:
            return self._kept.store.path(version.golden)
        except ArtifactError as error:
            log.warning("%s %s: its golden cases are not to be had: %s", version.model, version.version, error)
            return None
