"""One request for a text, from its admission to the last byte of its answer, as an ASGI response: so that it sees its client leave."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from registry.errors import ModelkeepError, UnavailableError, UsageError
from serving.access.places import key_of
from serving.admission import admitted
from serving.http import request_ids
from serving.state import Serving
from serving.statuses import BusyError, ClientGoneError, DeadlineError, status_of
from serving.text.agreement import said
from serving.text.asked import Asked, keep
from serving.text.sequences import Piece, Told, Wanted
from serving.text.styles import About, Style
from serving.text.version import Generation, TextVersion
from serving.text.words import LONG
from serving.traffic.routing import Route

logger = logging.getLogger(__name__)

LONGEST_TOKEN = 128
"""A prompt with more characters a token of the context is refused before it is looked at."""
FIRST_NUMBER = 10**12
"""The ids of texts count from here, so that none is that of an inference."""
_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
)
_RETRY_AFTER = (b"retry-after", b"1")


class TextLimits(Protocol):
    """What is needed of the section `text` of the settings."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def timeout_seconds(self) -> float: ...


class Desk:
    """What all requests for texts share: one a server."""

    def __init__(self, serving: Serving, limits: TextLimits, *, wait_seconds: float) -> None:
        """`wait_seconds` is how long a request waits for a place, or for a model that is being exchanged or loaded."""
        self.serving, self.limits, self.wait_seconds = serving, limits, wait_seconds
        self.id_prefix = request_ids.prefix(serving.replica_id, serving.boot_id)
        self.numbers = itertools.count(FIRST_NUMBER)


class TextAnswer(Response):
    """Generates and answers when it is called; nothing is held before that."""

    def __init__(self, desk: Desk, asked: Asked, style: Style) -> None:
        super().__init__()
        self._desk, self._asked, self._style = desk, asked, style
        self._began = time.perf_counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        desk, serving = self._desk, self._desk.serving
        given = headers.get(b"x-request-id")
        if given is not None and not request_ids.is_plain(given):
            given = None
        named = [(b"x-request-id", given or desk.id_prefix + b"0.-.%d" % next(desk.numbers))]
        places, key, model = serving.places, key_of(scope), self._asked.model
        minutes = len(serving.routes) > 1  # a text may take them: where there are other models, places are left to them
        place = places.enter(key, model, for_long=minutes)
        if place is None:
            patience, patient = self._patience(), serving.catching_up
            try:
                place = await places.turn(key, model, patience, patient=patient, for_long=minutes, receive=receive)
            except ClientGoneError:
                serving.unrouted(499)
                return
        if place is None:
            serving.unrouted(429)
            await self._send_error(send, BusyError(places.words(key, model)), named)
            return
        version: TextVersion | None = None
        try:
            loaded, route, mark = await admitted(
                serving, model, self._asked.version, headers.get(b"x-route-key"), self._patience(), receive
            )
            try:
                if not isinstance(loaded, TextVersion):
                    raise UsageError(
                        f"model '{loaded.model}' generates no text: ask it by /v2/models/{loaded.model}/infer"
                    )
                version = loaded
                if serving.access is not None:
                    scope["state"]["asked"] = (loaded, None)
                named = self._named(named, given, version, route)
                await self._answer(version, route, mark, key, named, receive, send)
            finally:
                loaded.release()
        except ClientGoneError:
            self._count(version, 499)
        except ModelkeepError as error:
            self._count(version, status_of(error))
            await self._send_error(send, error, named)
        except Exception:
            self._count(version, 500)
            await self._send_error(send, _internal("a request for a text"), named)
        finally:
            places.leave(place)

    def _patience(self) -> float:
        """Seconds to wait for a place, or for the model: the client's time runs meanwhile."""
        most, own = self._desk.wait_seconds, self._asked.timeout_seconds
        return most if own is None else max(0.0, min(most, own - (time.perf_counter() - self._began)))

    async def _answer(
        self,
        version: TextVersion,
        route: Route | None,
        mark: int | None,
        key: str,
        named: list[tuple[bytes, bytes]],
        receive: Receive,
        send: Send,
    ) -> None:
        """Raises what the text fails with, as long as nothing was sent."""
        asked = self._asked
        wanted = await self._wanted(version)
        left = None
        if asked.timeout_seconds is not None:
            left = asked.timeout_seconds - (time.perf_counter() - self._began)
            if left <= 0:
                raise DeadlineError(f"the text's {asked.timeout_seconds:g} seconds were over before its turn came")
        generation = version.generate(wanted, route, mark, key)
        self._desk.serving.writing.add(version)
        request_id = named[0][1].decode("latin-1")
        about = About(asked, request_id, version.version, version.words, len(wanted.prompt))
        own = left is not None and left < self._desk.limits.timeout_seconds
        seconds = round(left, 2) if own and left is not None else self._desk.limits.timeout_seconds
        loop = asyncio.get_running_loop()
        deadline = loop.call_later(seconds, lambda: generation.expire(seconds, own=own))
        watcher = asyncio.create_task(_watch(receive, generation))
        try:
            if asked.stream:
                await self._stream(generation, about, named, send)
            else:
                await self._whole(generation, about, named, send)
        finally:
            deadline.cancel()
            watcher.cancel()
            generation.cancel()  # whatever ended this: nobody waits for the text any more
        if route is not None and version.version == route.stable and generation.reason is not None:
            try:
                await self._follow_up(version, route, generation)
            except Exception:  # the client has his answer
                logger.exception("what follows an answered text failed")

    async def _follow_up(self, version: TextVersion, route: Route, generation: Generation) -> None:
        """The client has his answer: keep the request for replays, and have the candidate of a shadow say the same."""
        asked, serving, wanted = self._asked, self._desk.serving, generation.text.wanted
        if serving.capture is not None and serving.capture.wants():
            serving.capture.offer(version.model, keep(asked, wanted), None, text=True)
        if not route.shadow or route.candidate is None:
            return
        candidate = serving.loaded.get((version.model, route.candidate))
        if not isinstance(candidate, TextVersion) or not (
            route.shadow_share >= 1 or serving.random() < route.shadow_share
        ):
            return
        tokens = said(generation.text.ids[len(wanted.prompt) :], generation.reason)
        prompt = wanted.prompt
        if isinstance(asked.prompt, str):  # its tokenizer may be another one
            try:
                prompt = tuple(await asyncio.to_thread(candidate.words.encode, asked.prompt))
            except (
                ModelkeepError
            ):  # it does not take what the stable version took: no prompt, which counts as its error
                prompt = ()
        wanted = replace(wanted, prompt=prompt, max_tokens=min(wanted.max_tokens, len(tokens)))
        candidate.copies.offer(route, version, wanted, tokens, self._desk.limits.timeout_seconds)

    async def _wanted(self, version: TextVersion) -> Wanted:
        """Raises UsageError for a prompt that the model cannot take."""
        asked, limits, model = self._asked, self._desk.limits, version.text
        if asked.max_tokens > limits.max_tokens and not asked.or_fewer:
            raise UsageError(
                f"max_tokens is {asked.max_tokens}: {limits.max_tokens} are allowed in one request (text.max_tokens)"
            )
        if isinstance(asked.prompt, str):
            if len(asked.prompt) > LONGEST_TOKEN * model.context_length:
                raise UsageError(
                    f"the prompt has {len(asked.prompt)} characters: the context length of model '{asked.model}' is "
                    f"{model.context_length} tokens"
                )
            if len(asked.prompt) >= LONG:  # the event loop has others to answer
                prompt = await asyncio.to_thread(version.words.encode, asked.prompt)
            else:
                prompt = version.words.encode(asked.prompt)
        else:
            prompt = list(asked.prompt)
            if not prompt or any(not 0 <= token < model.vocabulary for token in prompt):
                raise UsageError(f"prompt: tokens are numbers from 0 to {model.vocabulary - 1}, and one at least")
        most = asked.max_tokens
        if asked.or_fewer:  # where the prompt fills the context there is no room for one, and that is refused
            most = max(1, min(most, limits.max_tokens, model.context_length - len(prompt)))
        return Wanted(tuple(prompt), most, asked.sampling, asked.stops, asked.ignore_end)

    async def _whole(self, generation: Generation, about: About, named: list[tuple[bytes, bytes]], send: Send) -> None:
        parts: list[str] = []
        told: list[Told] = []
        reason = ""
        async for piece in generation.pieces():
            parts.append(piece.text)
            told += piece.told
            reason = piece.reason or reason
        _note(about, generation)
        body = orjson.dumps(self._style.whole(about, "".join(parts), told, reason))
        self._count(generation.version, 200)
        await _send(send, 200, body, [*named, _JSON])

    async def _stream(self, generation: Generation, about: About, named: list[tuple[bytes, bytes]], send: Send) -> None:
        """Server-sent events. Nothing is sent before the first token is there: until then an error has its status."""
        counts, began, open_ = generation.version.text_counts, time.perf_counter(), False
        counts.streams_open += 1
        try:
            async for piece in generation.pieces():
                if not open_:
                    await send({"type": "http.response.start", "status": 200, "headers": [*named, *_EVENTS]})
                    open_ = True
                _note(about, generation)
                if events := self._events(about, piece):
                    await send({"type": "http.response.body", "body": events, "more_body": True})
        except Exception as error:
            if not open_ or isinstance(error, ClientGoneError):
                raise
            # The status is sent: the stream's last event says what happened.
            told = error if isinstance(error, ModelkeepError) else _internal("a stream of a text")
            self._count(generation.version, status_of(told))
            event = b"data: " + orjson.dumps(self._style.last_words(told)) + b"\n\n"
            await send({"type": "http.response.body", "body": event})
            return
        finally:
            counts.stream_closed(time.perf_counter() - began, generation.tokens)
        self._count(generation.version, 200)
        await send({"type": "http.response.body", "body": self._style.done})

    def _events(self, about: About, piece: Piece) -> bytes:
        return b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in self._style.piece(about, piece))

    def _named(
        self, named: list[tuple[bytes, bytes]], given: bytes | None, version: TextVersion, route: Route | None
    ) -> list[tuple[bytes, bytes]]:
        """The request's id says who answered, as that of an inference does."""
        serving, model = self._desk.serving, version.model
        if route is not None and given is None:
            answered = b"%d.%s.%d" % (route.generation, request_ids.quoted(version.version), next(self._desk.numbers))
            named = [(b"x-request-id", self._desk.id_prefix + answered)]
        elif route is not None and route.watch and given is not None:
            serving.remembered.add(given, model, version.version, serving.epoch, route.generation)
        return [*named, (b"x-model-version", version.version_header)]

    def _count(self, version: TextVersion | None, status: int) -> None:
        if version is None:
            self._desk.serving.unrouted(status)
        else:
            version.telemetry.answered(status)

    async def _send_error(self, send: Send, error: ModelkeepError, named: list[tuple[bytes, bytes]]) -> None:
        status = status_of(error)
        headers = [*named, _JSON, *([_RETRY_AFTER] if status in (429, 503) else [])]
        await _send(send, status, orjson.dumps(self._style.error(error)), headers)


def end_texts(serving: Serving) -> None:
    """The server stops: every open text is ended now, so that its stream gets its last event in time."""
    error = UnavailableError("the server is stopping: send the request again, another process takes it")
    loaded = {version for version in serving.loaded.values() if isinstance(version, TextVersion)}
    for version in loaded.union(serving.writing):
        version.end_texts(error)


async def _watch(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


def _internal(what: str) -> ModelkeepError:
    """A fault of this server, which is being handled: the client learns no more than that, the log has it all."""
    logger.exception("%s failed inside the server", what)
    return ModelkeepError("internal error of the server; see its log")


def _note(about: About, generation: Generation) -> None:
    text = generation.text
    about.completion_tokens = generation.tokens
    about.seconds = time.perf_counter() - text.submitted
    if text.started is not None:
        about.queue_seconds = text.started - text.submitted
    if text.first_at is not None:
        about.first_token_seconds = text.first_at - text.submitted


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    with suppress(OSError):  # the client went in this moment
        headers = [*headers, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
