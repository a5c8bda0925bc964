"""The servers of an environment, over HTTP: who is alive, who has followed the registry, and a word to hurry."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from registry import replicas
from registry.database import Database

RESTART_SECONDS = 15.0
"""How long a server that is being started again may be away before it counts as gone."""
_ANSWER_SECONDS = 3.0
_NUDGE_SECONDS = 0.5
_AGAIN_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Following:
    """How far the servers are. `errors` are what a server could not load, by replica."""

    reached: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()
    errors: dict[str, dict[str, str]] = field(default_factory=dict)

    def errors_of(self, model: str, version: str) -> list[str]:
        return [
            f"{replica}: {text}"
            for replica, found in self.errors.items()
            for key, text in found.items()
            if key == f"{model}/{version}"
        ]


def alive(database: Database, environment: str, *, timeout_seconds: float = _ANSWER_SECONDS) -> dict[str, str]:
    """Replicas of an environment that answer: {id: address}. A row whose server is gone, or another's by now, is left out."""
    with database.read() as session:
        rows = replicas.listed(session, environment)
    found: dict[str, str] = {}
    for row in rows:
        info = model_info(row["address"], timeout_seconds=timeout_seconds)
        if info is not None and info.get("replica") == row["id"]:
            found[row["id"]] = row["address"]
    return found


def model_info(address: str, *, timeout_seconds: float = _ANSWER_SECONDS) -> dict[str, Any] | None:
    """What a server says of itself; None where it does not answer or is none of ours.

    Who refuses the connection is gone. Who breaks it off has been killed in the middle, and its parent starts it again: it is asked
    again until the time is up.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            left = max(_AGAIN_SECONDS, deadline - time.monotonic())
            answer = httpx.get(f"{address}/api/v2/model-info", timeout=left)
            document = answer.json() if answer.status_code == 200 else None
            return document if isinstance(document, dict) else None
        except (httpx.ConnectError, httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError):
            return None
        except httpx.HTTPError:
            if time.monotonic() >= deadline:
                return None
            time.sleep(_AGAIN_SECONDS)


def nudge(addresses: list[str], *, timeout_seconds: float = _NUDGE_SECONDS) -> None:
    """Tell servers to look at the registry now. Only a courtesy: a server that does not hear it polls soon."""
    for address in addresses:
        try:
            httpx.post(f"{address}/api/v2/update-models", timeout=timeout_seconds)
        except httpx.HTTPError:
            continue


def follow(
    database: Database,
    environment: str,
    *,
    epoch: str,
    generation: int,
    timeout_seconds: float,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Following:
    """Nudge the servers and wait until all that are alive have reached a generation, or until the time is up.

    A server that dies meanwhile is not waited for; it follows when it comes back.
    """
    deadline = monotonic() + timeout_seconds
    nudged: set[str] = set()
    while True:
        living = alive(database, environment)
        fresh = [address for address in living.values() if address not in nudged]
        nudge(fresh)
        nudged.update(fresh)
        reached: list[str] = []
        behind: list[str] = []
        errors: dict[str, dict[str, str]] = {}
        for replica, address in living.items():
            info = model_info(address)
            if info is None:
                continue
            there = info["epoch"] == epoch and info["generation"] >= generation
            (reached if there else behind).append(replica)
            if there and info["errors"]:
                errors[replica] = info["errors"]
        if not behind or monotonic() >= deadline:
            return Following(tuple(reached), tuple(behind), errors)
        sleep(0.05)
