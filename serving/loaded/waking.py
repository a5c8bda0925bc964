"""Loads the models that sleep and are asked for, one after the other; and what is to be loaded ahead, while there is room."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING

from registry.errors import ModelkeepError
from serving.loaded.laststate import Wanted
from serving.loaded.loader import StillLoadingError
from serving.loaded.swap import serves

if TYPE_CHECKING:
    from serving.follow.reconcile import Reconciler

log = logging.getLogger("modelkeep.residency")

_AFTER_A_FAULT_SECONDS = 1.0


class Waker:
    """One a process, owned by the reconciler."""

    def __init__(self, reconciler: Reconciler) -> None:
        self._reconciler = reconciler
        self._task: asyncio.Task[None] | None = None
        self._fetching: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        self._reconciler.residency.started()
        self._task = asyncio.create_task(self._run())

    def stop(self) -> None:
        for task in (self._task, *self._fetching.values()):
            if task is not None:
                task.cancel()

    async def _run(self) -> None:
        """Until cancelled. A fault of our own shall not leave the others asleep for ever."""
        while True:
            try:
                await self._turns()
            except Exception:
                log.exception("models that sleep could not be looked after; trying again in a moment")
                await asyncio.sleep(_AFTER_A_FAULT_SECONDS)

    async def _turns(self) -> None:
        residency = self._reconciler.residency
        while True:
            residency.rung.clear()
            model = residency.next()
            if model is None:
                await residency.rung.wait()
                continue
            if model in residency.queue and (pause := residency.pause_before(model)) > 0:
                # Not only slept: a place may come free meanwhile.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await residency.rung.wait()
                continue
            await self._wake(model)

    async def _wake(self, model: str) -> None:
        """Bring it here, whatever goes for it. A load that fails is kept for the next who ask."""
        reconciler, residency = self._reconciler, self._reconciler.residency
        residency.begin(model)
        try:
            state = residency.state()
            stable = set() if state is None else {(r.model, r.stable) for r in state.routes if r.model == model}
            for version in [] if state is None else state.versions:
                # Before anybody goes for it: what is missing or rotten shall cost the others nothing.
                if (version.model, version.version) in stable:
                    try:
                        await reconciler.loader.fetch(version, patient=False)
                    except StillLoadingError:
                        self._wait_for_files(model, version)
                        return
            await reconciler.again()
            if model in residency.sleeping and model not in residency.failed:
                residency.did_not_wake(model, "what is served changed meanwhile")
        except ModelkeepError as error:
            residency.did_not_wake(model, str(error))
        except Exception as error:
            log.exception("%s could not be loaded", model)
            residency.did_not_wake(model, f"{type(error).__name__}: {error}")
        finally:
            residency.waking = None
            if serves(reconciler.serving, model):
                residency.failed.pop(model, None)
            if model not in residency.fetching:
                reconciler.serving.gate.look_again([model])

    def _wait_for_files(self, model: str, version: Wanted) -> None:
        """Its files take long to come: others wake meanwhile, its requests wait on."""
        residency = self._reconciler.residency

        async def fetch() -> None:
            try:
                await self._reconciler.loader.fetch(version)
            except Exception as error:
                residency.did_not_wake(model, str(error))
            else:
                residency.ask(model)
            finally:
                residency.fetching.discard(model)
                self._fetching.pop(model, None)
            self._reconciler.serving.gate.look_again([model])

        residency.fetching.add(model)
        self._fetching[model] = asyncio.create_task(fetch())
