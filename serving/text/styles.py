"""How texts are answered: our own form (/v1/generate) and the one that the `openai` client reads (/v1/completions)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from registry.errors import ModelkeepError
from serving.statuses import OPENAI_PATHS, error_body, status_of
from serving.text.asked import Asked
from serving.text.sequences import Piece, Told
from serving.text.words import Words

DONE = b"data: [DONE]\n\n"


@dataclass(slots=True)
class About:
    """What answers tell of a text beside it."""

    asked: Asked
    request_id: str
    version: str
    words: Words
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    first_token_seconds: float | None = None
    queue_seconds: float | None = None
    seconds: float = 0.0

    @property
    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Style(Protocol):
    """One way to answer. Documents are JSON-able."""

    done: bytes
    """What a stream ends with that came to its end."""

    def whole(self, about: About, text: str, told: Sequence[Told], reason: str) -> dict[str, Any]: ...

    def piece(self, about: About, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece; none where it tells nothing."""
        ...

    def error(self, error: ModelkeepError) -> dict[str, Any]:
        """The body of an answer with an error's status."""
        ...

    def last_words(self, error: ModelkeepError) -> dict[str, Any]:
        """The last event of a stream that fails after its status was sent."""
        ...


class Plain:
    """/v1/generate."""

    done = b""

    def whole(self, about: About, text: str, told: Sequence[Told], reason: str) -> dict[str, Any]:
        return {
            "id": about.request_id,
            "model": about.asked.model,
            "version": about.version,
            "text": text,
            **self._logprobs(about, told),
            **self._end(about, reason),
        }

    def piece(self, about: About, piece: Piece) -> list[dict[str, Any]]:
        event = {"text": piece.text, **self._logprobs(about, piece.told)}
        if piece.reason is not None:
            return [{**event, "id": about.request_id, "version": about.version, **self._end(about, piece.reason)}]
        return [event] if piece.text or piece.told else []

    def error(self, error: ModelkeepError) -> dict[str, Any]:
        return {"error": str(error)}

    def last_words(self, error: ModelkeepError) -> dict[str, Any]:
        return {"error": str(error), "status": status_of(error)}

    def _end(self, about: About, reason: str) -> dict[str, Any]:
        first = about.first_token_seconds
        return {
            "finish_reason": reason,
            "usage": about.usage,
            "seed": about.asked.sampling.seed,
            "queue_seconds": None if about.queue_seconds is None else round(about.queue_seconds, 6),
            "first_token_seconds": None if first is None else round(first, 6),
            "seconds": round(about.seconds, 6),
        }

    def _logprobs(self, about: About, told: Sequence[Told]) -> dict[str, Any]:
        if about.asked.sampling.logprobs is None:
            return {}
        name = about.words.name
        return {
            "logprobs": [
                {
                    "token": name(one.token),
                    "id": one.token,
                    "logprob": one.logprob,
                    "top": [{"token": name(token), "id": token, "logprob": value} for token, value in one.top],
                }
                for one in told
            ]
        }


class Completions:
    """/v1/completions, as the `openai` client reads it."""

    done = DONE

    def whole(self, about: About, text: str, told: Sequence[Told], reason: str) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": self._logprobs(about, told), "finish_reason": reason}
        return {**self._head(about), "choices": [choice], "usage": about.usage}

    def piece(self, about: About, piece: Piece) -> list[dict[str, Any]]:
        events = []
        if piece.text or piece.told or piece.reason is not None:
            told = self._logprobs(about, piece.told)
            choice = {"index": 0, "text": piece.text, "logprobs": told, "finish_reason": piece.reason}
            events.append({**self._head(about), "choices": [choice]})
        if about.asked.include_usage:
            for event in events:
                event["usage"] = None
            if piece.reason is not None:
                events.append({**self._head(about), "choices": [], "usage": about.usage})
        return events

    def error(self, error: ModelkeepError) -> dict[str, Any]:
        return error_body(OPENAI_PATHS[0], status_of(error), str(error))

    def last_words(self, error: ModelkeepError) -> dict[str, Any]:
        return self.error(error)

    def _head(self, about: About) -> dict[str, Any]:
        return {
            "id": about.request_id,
            "object": "text_completion",
            "created": about.created,
            "model": about.asked.model,
            "system_fingerprint": about.version,
        }

    def _logprobs(self, about: About, told: Sequence[Told]) -> dict[str, Any] | None:
        if about.asked.sampling.logprobs is None:
            return None
        name = about.words.name
        return {
            "tokens": [name(one.token) for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [{name(token): value for token, value in one.top} for one in told],
            "text_offset": [one.offset for one in told],
        }
