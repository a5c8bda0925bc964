"""Versions that do not fit the memory side by side: the old one is drained and let go, then the new one comes, and its requests wait meanwhile.

Where both fit, nothing of this happens: the new version is loaded beside the old one and the route is flipped (serving.reconcile).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

from registry import budget
from registry.errors import UnavailableError
from registry.settings import Settings
from serving.caretaker import Caretaker
from serving.engine import LoadedVersion
from serving.laststate import Wanted
from serving.state import Serving

log = logging.getLogger("modelkeep.swap")
Key = tuple[str, str]

JOIN_SECONDS = 10.0
"""How long a version that was let go may take to end what it computes and give its memory back."""


class Room:
    """Who must go before others can come, by the memory that versions take here."""

    def __init__(self, budget_bytes: int | None) -> None:
        self.budget_bytes = budget_bytes
        """Memory for models (registry.budget); None: not known, so nobody ever has to go."""
        self._measured: dict[str, int] = {}
        self._failed: dict[Key, tuple[str, int, str]] = {}
        self._warned: set[str] = set()

    @classmethod
    def of_this_machine(cls, settings: Settings) -> Room:
        try:
            return cls(budget.of_this_machine(settings))
        except UnavailableError as error:
            log.warning("no budget of memory for models, so versions are always loaded side by side: %s", error)
            return cls(None)

    def note(self, loaded: LoadedVersion) -> None:
        """Remember what a version took."""
        self._measured[loaded.digest] = loaded.runtime.memory_bytes

    def failed(self, version: Wanted, generation: int, error: str) -> None:
        """Others had to go for it, and it did not load: they shall not have to go again for the same."""
        self._failed[version.model, version.version] = (version.digest, generation, error)

    def refuses(self, version: Wanted, generation: int) -> str | None:
        """Why this version is not tried again while its route stays as it is (`generation`); None where it may be."""
        digest, then, error = self._failed.get((version.model, version.version), ("", -1, ""))
        if (digest, then) != (version.digest, generation):
            return None
        return f"{error}; the version before had to go for that try, so there is no other until the route changes"

    def need(self, version: Wanted) -> int:
        """Bytes: as measured here, else by the validation's probe, else the size of its files."""
        files = sum(int(file["size_bytes"]) for file in version.files)
        return self._measured.get(version.digest) or max(version.memory_bytes or 0, files)

    def over(self, missing: Collection[Wanted], there: Iterable[LoadedVersion]) -> int:
        """By how many bytes the missing versions and those that are there are more than the budget; 0 or less where they fit."""
        if self.budget_bytes is None or not missing:
            return 0
        return sum(v.runtime.memory_bytes for v in there) + sum(map(self.need, missing)) - self.budget_bytes

    def leaving(
        self, missing: Collection[Wanted], loaded: Mapping[Key, LoadedVersion], wanted: Collection[Key]
    ) -> list[LoadedVersion]:
        """Which loaded versions go before the missing ones are loaded; none where all fit.

        Only what is not wanted any more goes: first of the models that get another version, then what was asked least recently.
        """
        over = self.over(missing, loaded.values())
        if over <= 0:
            return []
        models = {version.model for version in missing}
        needless = [version for key, version in loaded.items() if key not in wanted]
        needless.sort(key=lambda v: (v.model not in models, v.telemetry.last_inference_unix_seconds or 0.0))
        going = []
        for version in needless:
            if over <= 0:
                break
            going.append(version)
            over -= version.runtime.memory_bytes
        if over > 0:
            self._warn(missing, over)
        return going

    def _warn(self, missing: Collection[Wanted], over: int) -> None:
        """What is wanted is loaded all the same: whether it may be was decided by the gates of its promotion."""
        for version in missing:
            if version.digest not in self._warned:
                self._warned.add(version.digest)
                log.warning(
                    "with %s %s the models that are wanted here take %d MB more than the budget of %d MB (gpu.max_memory_mb, "
                    "gpu.memory_fraction); it is loaded all the same",
                    version.model, version.version, over >> 20, (self.budget_bytes or 0) >> 20,
                )  # fmt: skip


class Exchange:
    """One exchange of versions that do not fit side by side: closes the gate of their models, makes room, and opens it at the end."""

    def __init__(
        self,
        serving: Serving,
        caretaker: Caretaker,
        going: list[LoadedVersion],
        *,
        drain: Callable[[LoadedVersion], Awaitable[None]],
        load: Callable[[Wanted], Awaitable[LoadedVersion]],
    ) -> None:
        self._serving, self._caretaker, self._going = serving, caretaker, going
        self._drain, self._load = drain, load
        self._closed = {version.model for version in going} - serving.gate.closed.keys()

    @property
    def models(self) -> set[str]:
        """Whose versions had to go."""
        return {version.model for version in self._going}

    async def __aenter__(self) -> Exchange:
        """The versions that go finish what they have, and free their memory."""
        serving, names = self._serving, {(version.model, version.version) for version in self._going}
        serving.gate.close(self._closed)
        try:
            for version in self._going:
                log.info("%s %s goes before its successor comes: both do not fit", version.model, version.version)
                self._caretaker.leaving(version, replaced=False)
            if names:
                staying = {key: version for key, version in serving.loaded.items() if key not in names}
                serving.install(serving.routes, staying, serving.epoch, serving.generation)
                await asyncio.gather(*(self._let_go(version) for version in self._going))
        except BaseException:
            serving.gate.open(self._closed)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        gate = self._serving.gate
        gate.open(self._closed)
        if self._closed:
            log.info(
                "the requests of %s go on; held back until now: %s", ", ".join(sorted(self._closed)), gate.as_dict()
            )

    async def bring_back(self, failed: Collection[str], known: Iterable[Wanted]) -> dict[Key, str]:
        """Load again what had to go for a version of its model that does not load. Returns the errors of those that do not either."""
        errors, known = {}, list(known)
        for old in self._going:
            key = (old.model, old.version)
            if old.model not in failed:
                continue
            version = next((v for v in known if (v.model, v.version, v.digest) == (*key, old.digest)), None)
            try:
                if version is None:
                    raise UnavailableError("its files are not known here any more")
                again = await self._load(version)
            except Exception as error:
                log.exception("%s %s had to go for a version that does not load, and does not load again", *key)
                errors[key] = f"does not load again: {error}"
            else:
                serving = self._serving
                serving.install(serving.routes, {**serving.loaded, key: again}, serving.epoch, serving.generation)
        return errors

    async def _let_go(self, version: LoadedVersion) -> None:
        await self._drain(version)
        if not await asyncio.to_thread(version.join, JOIN_SECONDS):
            log.error("%s %s still computes: its memory is not free yet", version.model, version.version)
