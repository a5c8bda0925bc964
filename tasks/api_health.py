"""Is a server well, as its clients see it? Its pages are asked, and each loaded version by a real inference. Nothing is changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from tasks.answering import zeros
from tasks.servers import NOBODY, Access

Status = Literal["healthy", "degraded", "unhealthy"]

PAGES: tuple[tuple[str, frozenset[int]], ...] = (
    ("/", frozenset({200})),
    ("/health", frozenset({200})),
    ("/docs", frozenset({200})),
    # It takes POST: a GET that is refused shows that it is there, and generates nothing.
    ("/v1/generate", frozenset({405})),
)
"""What is asked by GET, and the statuses that are well."""

_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Look:
    """One thing that was asked. `status_code` and `seconds` are absent where there was no answer; `problem` is empty where it is well."""

    asked: str
    status_code: int | None
    seconds: float | None
    problem: str

    @property
    def well(self) -> bool:
        return not self.problem

    def as_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "status_code": self.status_code, "seconds": self.seconds, "problem": self.problem}


@dataclass(frozen=True, slots=True)
class Health:
    """`average_seconds` is of what answered; None where nothing did. Degraded: some of it is well. Unhealthy: nothing is."""

    address: str
    looks: tuple[Look, ...]

    @property
    def status(self) -> Status:
        well = sum(look.well for look in self.looks)
        return "healthy" if well == len(self.looks) else "degraded" if well else "unhealthy"

    @property
    def average_seconds(self) -> float | None:
        times = [look.seconds for look in self.looks if look.seconds is not None]
        return round(sum(times) / len(times), 6) if times else None

    def as_dict(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "status": self.status,
            "average_seconds": self.average_seconds,
            "looks": [look.as_dict() for look in self.looks],
        }


def check_api_health(
    address: str,
    *,
    access: Access = NOBODY,
    timeout_seconds: float = _TIMEOUT_SECONDS,
    monotonic: Callable[[], float] = time.monotonic,
) -> Health:
    """Ask each of PAGES once."""
    with _client(address, access, timeout_seconds) as client:
        looks = [_look(path, lambda path=path: client.get(path), right, monotonic)[0] for path, right in PAGES]  # type: ignore[misc]
    return Health(address, tuple(looks))


def check_model_health(
    address: str,
    *,
    access: Access = NOBODY,
    timeout_seconds: float = _TIMEOUT_SECONDS,
    monotonic: Callable[[], float] = time.monotonic,
) -> tuple[Health, list[dict[str, Any]]]:
    """One inference of every loaded version, by inputs of zeros, and what the server says of each (`/api/v2/model-health`).

    A version that refuses zeros (400) is well: it answers. A text model is asked for ten tokens.
    """
    said: list[dict[str, Any]] = []
    with _client(address, access, timeout_seconds) as client:
        listed, answer = _look("/api/v2/model-health", lambda: client.get("/api/v2/model-health"), {200}, monotonic)
        looks = [listed]
        if answer is not None and listed.well:
            said = list(answer.json()["models"])
            texts = _text_models(client)
            looks += [_infer(client, entry["model"], entry["version"], texts, monotonic) for entry in said]
    return Health(address, tuple(looks)), said


def _infer(client: httpx.Client, model: str, version: str, texts: set[str], monotonic: Callable[[], float]) -> Look:
    path = f"/v2/models/{model}/versions/{version}"
    described, answer = _look(path, lambda: client.get(path), {200}, monotonic)
    if answer is None or not described.well:
        return described
    if model in texts:
        asked = {"model": model, "version": version, "prompt": "Test prompt", "max_tokens": 10}
        return _look(f"{path} by /v1/generate", lambda: client.post("/v1/generate", json=asked), {200}, monotonic)[0]
    document = {"inputs": zeros(answer.json()), "parameters": {"binary_data_output": True}}
    return _look(f"{path}/infer", lambda: client.post(f"{path}/infer", json=document), {200, 400}, monotonic)[0]


def _text_models(client: httpx.Client) -> set[str]:
    """The models that generate text; none where the server does not tell."""
    try:
        answer = client.get("/v1/models")
    except httpx.HTTPError:
        return set()  # their inference will say what is wrong
    return {entry["id"] for entry in answer.json()["data"]} if answer.status_code == 200 else set()


def _client(address: str, access: Access, timeout_seconds: float) -> httpx.Client:
    return httpx.Client(base_url=address, timeout=timeout_seconds, **access.reaching(address))


def _look(
    asked: str, ask: Callable[[], httpx.Response], right: frozenset[int] | set[int], monotonic: Callable[[], float]
) -> tuple[Look, httpx.Response | None]:
    began = monotonic()
    try:
        answer = ask()
    except httpx.HTTPError as error:
        return Look(asked, None, None, f"no answer: {type(error).__name__} {error}".strip()), None
    seconds, code = round(monotonic() - began, 6), answer.status_code
    problem = (
        "" if code in right else f"answered {code}, not {' or '.join(map(str, sorted(right)))}: {answer.text[:200]}"
    )
    return Look(asked, code, seconds, problem), answer
