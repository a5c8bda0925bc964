"""`/api/cache`: what the cache holds and how often it answered, and how to empty it."""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from registry.errors import NotFoundError, UsageError
from serving.access.auth import who_of
from serving.caching.cache import ResponseCache
from serving.caching.cache_shared import REFRESH_SECONDS

log = logging.getLogger("modelkeep.cache")


def router(cache: ResponseCache | None) -> APIRouter:
    """Without a cache (`performance.enable_caching` is off) the first says so and the second has nothing to do."""
    found = APIRouter(prefix="/api/cache")

    @found.get("/stats", summary="Answers kept: hits, misses, sizes, what Redis does")
    async def cache_stats() -> dict[str, Any]:
        return {"enabled": False} if cache is None else {"enabled": True, **cache.stats()}

    @found.delete("", summary="Forget the answers of a model, of models by a pattern, or of all")
    async def cache_delete(
        request: Request,
        model: Annotated[str | None, Query(max_length=128)] = None,
        pattern: Annotated[str | None, Query(max_length=128)] = None,
    ) -> dict[str, Any]:
        if model is not None and pattern is not None:
            raise UsageError("give model or pattern, not both")
        if cache is None:
            return {"models": [], "dropped": 0, "servers": "this", "within_seconds": 0.0}
        models = cache.matching("*" if pattern is None else pattern)
        if model is not None:
            if model not in models:
                raise NotFoundError(f"no answers of a model '{model}' are kept here; kept are those of {models}")
            models = [model]
        dropped, told = await cache.invalidate(models)
        log.info("%s dropped %d answers of %s", who_of(request).actor, dropped, ", ".join(models) or "no model")
        if cache.shared is None:
            return {"models": models, "dropped": dropped, "servers": "this", "within_seconds": 0.0}
        # Redis out of reach: this server does not use it before the invalidation is written there.
        within = REFRESH_SECONDS if told else None
        return {"models": models, "dropped": dropped, "servers": "all", "within_seconds": within}

    return found
