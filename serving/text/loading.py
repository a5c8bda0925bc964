"""Which engine a loaded graph gets: the usual one, or, with a tokenizer beside it, the one that generates text."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from registry import textmodels
from registry.sections import TextSection
from serving.compute.engine import LoadedVersion
from serving.compute.runtimes import Runtime, resident_bytes
from serving.text.caches import Caches


def engine_of(path: Path, runtime: Runtime, settings: TextSection, caches: Caches) -> Callable[..., LoadedVersion]:
    """What makes the version object of a runtime that was loaded from `path`. A text model has generated some tokens by then.

    `caches` is what all versions that generate text share.

    Raises RefusedError for a text model that cannot.
    """
    text = textmodels.beside(path, runtime.signature)
    if text is None:
        return LoadedVersion
    from serving.text.trial import try_out
    from serving.text.version import TextVersion
    from serving.text.words import Words

    before = resident_bytes()
    words = Words.read(text.tokenizer)
    runtime.memory_bytes += max(0, resident_bytes() - before)
    return partial(
        TextVersion,
        text=text,
        words=words,
        trial=try_out(runtime, text, words),
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        max_cache_bytes=settings.max_cache_mb << 20,
        caches=caches,
    )
