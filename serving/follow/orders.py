"""Load and unload by the V2 protocol: local holds of this server alone, audited. The registry still says what a loaded model serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request

from registry.actor import Who
from registry.database import Database
from registry.errors import ModelkeepError, NotFoundError, UnavailableError
from serving.access.auth import who_of
from serving.follow.reconcile import Reconciler
from serving.follow.unloads import Order
from serving.wire.tensors import InputError, brief, json_type

log = logging.getLogger("modelkeep.unloads")

_TOLD_WITHIN_SECONDS = 1.0
_LONGEST_REASON = 2000


class Orders:
    """One a process. `quick` is the registry, opened so that it gives up soon."""

    def __init__(
        self,
        reconciler: Reconciler,
        quick: Database,
        *,
        timeout_seconds: float,
        registry_seconds: float = _TOLD_WITHIN_SECONDS,
    ) -> None:
        self._reconciler, self._quick = reconciler, quick
        self._timeout_seconds, self._registry_seconds = timeout_seconds, registry_seconds

    async def obey(self, action: str, model: str, body: bytes, scope: Mapping[str, Any]) -> dict[str, Any]:
        """`action` is load or unload. Raises InputError, NotFoundError, UnavailableError (it does not load)."""
        reason = _reason(body, action)
        who = who_of(Request(dict(scope)))
        if action == "unload":
            return await self.unload(model, who=who, reason=reason)
        return await self.load(model, who=who, reason=reason)

    async def unload(self, model: str, *, who: Who, reason: str) -> dict[str, Any]:
        """This server serves the model no more, and also not after a restart, until it is loaded again. Others are not concerned."""
        reconciler = self._reconciler
        self._check_known(model)
        if model in reconciler.unloads.by_model:
            return self._said(model)
        reconciler.unloads.put(Order.now("model.unloaded", model, who, reason))
        not_kept = await reconciler.unloads.save()
        reconciler.take_down(model)
        await self._tell()
        return {**self._said(model), "not_kept": not_kept}

    async def load(self, model: str, *, who: Who, reason: str) -> dict[str, Any]:
        """Release the unload, where there is one, and have the model in memory now."""
        reconciler, serving = self._reconciler, self._reconciler.serving
        self._check_known(model)
        not_kept = None
        if model in reconciler.unloads.by_model:
            reconciler.unloads.put(Order.now("model.loaded", model, who, reason))
            not_kept = await reconciler.unloads.save()
            reconciler.bring_up(model)
            await self._tell()
        if model in serving.gate.closed:
            reconciler.residency.forgive(model)
            await serving.gate.wait(model, self._timeout_seconds)
        if not any(key[0] == model for key in serving.loaded):
            why = "; ".join(sorted({error for key, error in reconciler.errors.items() if key[0] == model}))
            raise UnavailableError(f"model '{model}' is not loaded: {why or 'no version of it has traffic'}")
        return {**self._said(model), "not_kept": not_kept}

    def _check_known(self, model: str) -> None:
        serving = self._reconciler.serving
        if model not in serving.routes and model not in self._reconciler.unloads.by_model:
            raise NotFoundError(
                f"model '{model}' is not known: only models with a route on this server can be loaded and unloaded"
            )

    def _said(self, model: str) -> dict[str, Any]:
        reconciler = self._reconciler
        order = reconciler.unloads.by_model.get(model)
        return {
            "name": model,
            "state": "UNAVAILABLE" if order is not None else "READY",
            "reason": "" if order is None else f"unloaded on this server {order.why()}",
            "versions": sorted(version for name, version in reconciler.serving.loaded if name == model),
            "replica": reconciler.serving.replica_id,
            "recorded": not any(untold.model == model for untold in reconciler.unloads.untold),
        }

    async def _tell(self) -> None:
        """On record at once where the registry answers; else as soon as it does."""

        async def in_thread(work: Any) -> None:
            await asyncio.to_thread(work)

        if self._reconciler.registry_error is not None:
            return
        try:
            async with asyncio.timeout(self._registry_seconds):
                await self._reconciler.unloads.tell(self._quick, in_thread)
        except (TimeoutError, ModelkeepError) as error:
            log.warning("not on record yet: %s", error or "the registry did not answer in time")


def _reason(body: bytes, action: str) -> str:
    """What the body says. Raises InputError for what this server does not do."""
    if not body.strip():
        return ""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the request is not valid JSON: {error}") from error
    if document is None:
        return ""
    if type(document) is not dict:
        raise InputError(f"the request must be a JSON object, it is {json_type(document)}")
    parameters = document.get("parameters") or {}
    if type(parameters) is not dict:
        raise InputError(f"'parameters' must be an object, it is {json_type(parameters)}")
    for name, value in parameters.items():
        if name == "unload_dependents" and action == "unload":
            if type(value) is not bool:
                raise InputError(f"'unload_dependents' must be true or false, it is {brief(value)}")
            continue  # no model here depends on another
        if name == "reason":
            if type(value) is not str or len(value) > _LONGEST_REASON or not value.isprintable():
                raise InputError(f"'reason' must be a text of at most {_LONGEST_REASON} printable characters")
            continue
        if name == "config" or name.startswith("file:"):
            raise InputError(
                f"{brief(name)} is not taken: files and configuration of a model come from the registry; register and promote a version"
            )
        raise InputError(f"{brief(name)} is no parameter of {action}")
    return str(parameters.get("reason", ""))
