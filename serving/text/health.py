"""Whether a version that generates text really does: asked to go on with a few words, as clients ask it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from registry.errors import ModelkeepError
from serving.compute.engine import LoadedVersion
from serving.text.sampling import Sampling
from serving.text.sequences import Wanted
from serving.text.trial import PROMPT, TOKENS
from serving.text.version import TextVersion

PATIENCE_SECONDS = 10.0


async def generation(loaded: LoadedVersion, *, now: bool) -> dict[str, Any]:
    """What /api/v2/model-health says of a version's texts: {} where it generates none.

    `now`: a generation made for this, among those of the clients; else the one at its load.
    """
    if not isinstance(loaded, TextVersion):
        return {}
    return {"generation": await _generated(loaded) if now else loaded.trial}


async def _generated(version: TextVersion) -> dict[str, Any]:
    prompt = version.words.encode(PROMPT)
    most = min(TOKENS, version.text.context_length - len(prompt))
    began = time.perf_counter()
    said: dict[str, Any] = {"prompt": PROMPT, "max_tokens": most, "at": time.time()}
    version.acquire()
    try:
        text = version.generate(Wanted(tuple(prompt), most, Sampling(temperature=0.0)))
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                async for _ in text.pieces():
                    pass
        finally:
            text.cancel()
    except TimeoutError:
        return {**said, "error": f"no answer within {PATIENCE_SECONDS:g} s"}
    except ModelkeepError as error:
        return {**said, "error": str(error)}
    finally:
        version.release()
    return {**said, "seconds": round(time.perf_counter() - began, 6)}
