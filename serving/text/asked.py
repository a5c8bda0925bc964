"""What clients ask for: the bodies of /v1/generate and /v1/completions, checked, and turned into one form."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import UsageError
from serving.text.sampling import Sampling
from serving.text.sequences import Wanted

STOPS, STOP_LENGTH, LOGPROBS = 16, 256, 20
"""Most stop strings, characters of one, and alternatives told of each token."""
DEFAULT_TOKENS = 128
PROMPT_ITEMS = 1 << 20
"""Of a prompt that comes as a list: more are no prompt of any model."""
_TOLD = 4
"""Of what is wrong with a body, at most: it may be wrong in a million places."""
_TOLD_LENGTH = 100
COMPLETION_TOKENS = 16
"""What /v1/completions generates where max_tokens is not given: the interface that it follows has that default."""

B = TypeVar("B", bound=BaseModel)
_Stop = Annotated[str, Field(min_length=1, max_length=STOP_LENGTH)]
_Stops = Annotated[list[_Stop], Field(max_length=STOPS)]
_Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
_Finite = Field(allow_inf_nan=False)
_Name = Annotated[str, Field(max_length=256)]
_Few = Field(max_length=PROMPT_ITEMS, fail_fast=True)
# The first wrong item is enough: an error for each would take more memory than there is.
_Texts = Annotated[list[str], _Few]
_Tokens = Annotated[list[int], _Few]
_TokenLists = Annotated[list[_Tokens], _Few]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: _Name
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=100), _Finite] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1), _Finite] | None = 1.0
    top_k: Annotated[int, Field(ge=0)] | None = 0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100), _Finite] | None = 1.0
    stop: _Stop | _Stops | None = None
    seed: _Seed | None = None
    logprobs: Annotated[int, Field(ge=0, le=LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class GenerateBody(_Body):
    """The body of /v1/generate."""

    prompt: str
    version: _Name | None = None
    ignore_eos: bool = False
    timeout: Annotated[float, Field(gt=0), _Finite] | None = None


class KeptBody(_Body):
    """A text as it is kept for a replay: all that decides what it says, the seed too."""

    prompt: str | _Tokens
    ignore_eos: bool = False


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False


class CompletionBody(_Body):
    """The body of /v1/completions: what it can be told elsewhere and not here has to be at its default."""

    prompt: str | _Texts | _Tokens | _TokenLists
    n: Literal[1] | None = 1
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    suffix: None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    logit_bias: dict[str, Any] | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One text that a client wants. `prompt` is a text, or tokens; `timeout_seconds` None: as long as the server allows.

    `or_fewer`: the client has not said how many tokens, so `max_tokens` gives way to what there is room for.
    """

    model: str
    version: str | None
    prompt: str | tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    stream: bool
    ignore_end: bool = False
    timeout_seconds: float | None = None
    include_usage: bool = False
    or_fewer: bool = False


def generate(body: bytes) -> Asked:
    """The body of /v1/generate. Raises UsageError that names the field."""
    said = _parsed(GenerateBody, body)
    return Asked(
        said.model,
        said.version,
        said.prompt,
        said.max_tokens or DEFAULT_TOKENS,
        _sampling(said),
        _stops(said),
        bool(said.stream),
        said.ignore_eos,
        said.timeout,
        or_fewer=said.max_tokens is None,
    )


def keep(asked: Asked, wanted: Wanted) -> bytes:
    """What `kept` reads: `wanted` is what became of it at a version, which is where a seed and a length were decided."""
    how = wanted.sampling
    document = {
        "model": asked.model,
        "prompt": asked.prompt,
        "max_tokens": wanted.max_tokens,
        "temperature": how.temperature,
        "top_k": how.top_k,
        "top_p": how.top_p,
        "repetition_penalty": how.repetition_penalty,
        "seed": how.seed,
        "stop": list(wanted.stops) or None,
        "ignore_eos": wanted.ignore_end,
    }
    return orjson.dumps(document)


def kept(body: bytes) -> Asked:
    """Raises UsageError that names the field."""
    said = _parsed(KeptBody, body)
    prompt = said.prompt if isinstance(said.prompt, str) else tuple(said.prompt)
    most = said.max_tokens or DEFAULT_TOKENS
    return Asked(said.model, None, prompt, most, _sampling(said), _stops(said), False, said.ignore_eos)


def completion(body: bytes) -> Asked:
    """The body of /v1/completions. Raises UsageError that names the field."""
    said = _parsed(CompletionBody, body)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(said, name):
            raise UsageError(f"{name}: is not supported here, leave it out; repetition_penalty is")
    if said.logit_bias:
        raise UsageError("logit_bias: is not supported here, leave it out")
    options = said.stream_options or StreamOptions()
    return Asked(
        said.model,
        None,
        _one_prompt(said.prompt),
        said.max_tokens or COMPLETION_TOKENS,
        _sampling(said),
        _stops(said),
        bool(said.stream),
        include_usage=options.include_usage,
        or_fewer=said.max_tokens is None,
    )


def _parsed(kind: type[B], body: bytes) -> B:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise UsageError(f"the request is not valid JSON: {error}") from error
    if not isinstance(document, dict):
        raise UsageError("the request must be a JSON object")
    _check_names(kind, document, "")
    if isinstance(options := document.get("stream_options"), dict):
        _check_names(StreamOptions, options, "stream_options.")
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        said = dict.fromkeys(f"{problem['loc'][0]}: {problem['msg'][:_TOLD_LENGTH]}" for problem in problems)
        raise UsageError("; ".join(list(said)[:_TOLD])) from None


def _check_names(kind: type[BaseModel], document: dict[str, Any], before: str) -> None:
    for name in document:
        if name not in kind.model_fields:
            known = ", ".join(kind.model_fields)
            raise UsageError(f"{before}{name[:_TOLD_LENGTH]}: is not known here; known are {known}")


def _one_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> str | tuple[int, ...]:
    if isinstance(prompt, str):
        return prompt
    first = prompt[0] if prompt else None
    if isinstance(first, int):
        return tuple(token for token in prompt if isinstance(token, int))
    if len(prompt) != 1 or first is None:
        raise UsageError(f"prompt: {len(prompt)} prompts; send one in a request")
    return first if isinstance(first, str) else tuple(first)


def _sampling(said: _Body) -> Sampling:
    """What is null is as if it were left out."""
    return Sampling(
        temperature=1.0 if said.temperature is None else said.temperature,
        top_k=said.top_k or 0,
        top_p=1.0 if said.top_p is None else said.top_p,
        repetition_penalty=1.0 if said.repetition_penalty is None else said.repetition_penalty,
        seed=secrets.randbits(63) if said.seed is None else said.seed,
        logprobs=said.logprobs,
    )


def _stops(said: _Body) -> tuple[str, ...]:
    if said.stop is None:
        return ()
    return (said.stop,) if isinstance(said.stop, str) else tuple(said.stop)
