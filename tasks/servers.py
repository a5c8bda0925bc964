"""The servers of an environment, over HTTP: who is alive, who has followed the registry, and a word to hurry."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from registry import keys, replicas
from registry.client_tls import verify
from registry.database import Database

log = logging.getLogger("modelkeep.servers")

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


@dataclass(frozen=True, slots=True)
class Access:
    """How this process shows servers that it may ask them: by what it reads in the registry, else by a key that it was given.

    The first opens reading, inference and the nudge; it is made for one address each, so that whoever answers at an old address of
    a server learns nothing that another would take.
    """

    secret: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)

    def headers(self, address: str) -> dict[str, str]:
        """For a request to this address. Empty where no server asks for keys."""
        if self.key is not None:
            return {"Authorization": f"Bearer {self.key}"}
        if self.secret is None:
            return {}
        return {"Authorization": f"Bearer {keys.internal_text(self.secret, address)}"}

    def reaching(self, address: str) -> dict[str, Any]:
        """What every request of httpx to this address has: how we show ourselves, and by what we know the server."""
        return {"headers": self.headers(address), "verify": verify(address)}


NOBODY = Access()


def access(database: Database) -> Access:
    """What this process may show to servers, by the registry."""
    with database.read() as session:
        return Access(secret=keys.internal_secret(session))


def alive(database: Database, environment: str, *, timeout_seconds: float = _ANSWER_SECONDS) -> dict[str, str]:
    """Replicas of an environment that answer: {id: address}. A row whose server is gone, or another's by now, is left out.

    One that refuses this process lives all the same: nobody shall take the environment for empty because of a key.
    """
    with database.read() as session:
        rows = replicas.listed(session, environment)
        shown = Access(secret=keys.internal_secret(session))
    found: dict[str, str] = {}
    for row in rows:
        info, refused = _look(row["address"], shown, timeout_seconds)
        named = info is not None and info.get("replica") == row["id"]
        if named or (refused and _boot(row["address"]) == row["boot_id"]):
            found[row["id"]] = row["address"]
    return found


def model_info(
    address: str, *, access: Access = NOBODY, timeout_seconds: float = _ANSWER_SECONDS
) -> dict[str, Any] | None:
    """What a server says of itself; None where it does not answer, refuses, or is none of ours.

    Who refuses the connection is gone. Who breaks it off has been killed in the middle, and its parent starts it again: it is asked
    again until the time is up.
    """
    return _look(address, access, timeout_seconds)[0]


def _look(address: str, access: Access, timeout_seconds: float) -> tuple[dict[str, Any] | None, bool]:
    """(what a server says of itself, whether it refuses to say it)"""
    deadline = time.monotonic() + timeout_seconds
    url, shown = f"{address}/api/v2/model-info", access.headers(address)
    while True:
        try:
            left, trusted = max(_AGAIN_SECONDS, deadline - time.monotonic()), verify(address)
            answer = httpx.get(url, headers=shown, timeout=left, verify=trusted)
            if answer.status_code == 401 and shown:
                # It may not know our key yet, and ask nobody for one.
                answer = httpx.get(url, timeout=max(_AGAIN_SECONDS, deadline - time.monotonic()), verify=trusted)
            if answer.status_code in (401, 403):
                log.warning("the server at %s answers, and refuses this process: %.300s", address, answer.text)
                return None, True
            document = answer.json() if answer.status_code == 200 else None
            return (document if isinstance(document, dict) else None), False
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                log.warning("the server at %s cannot be trusted: %s; see client.ca and server.address", address, error)
                return None, True
            return None, False
        except (httpx.UnsupportedProtocol, httpx.InvalidURL, ValueError):
            return None, False
        except httpx.HTTPError:
            if time.monotonic() >= deadline:
                return None, False
            time.sleep(_AGAIN_SECONDS)


def _boot(address: str) -> str | None:
    """Which boot of which server answers there, as it tells everybody."""
    try:
        found = httpx.get(f"{address}/health", timeout=_ANSWER_SECONDS, verify=verify(address)).json()
    except (httpx.HTTPError, ValueError):
        return None
    return found.get("boot_id") if isinstance(found, dict) else None


def nudge(addresses: list[str], *, access: Access = NOBODY, timeout_seconds: float = _NUDGE_SECONDS) -> None:
    """Tell servers to look at the registry now. Only a courtesy: a server that does not hear it polls soon."""
    for address in addresses:
        try:
            httpx.post(f"{address}/api/v2/update-models", timeout=timeout_seconds, **access.reaching(address))
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
        shown = access(database)
        nudge(fresh, access=shown)
        nudged.update(fresh)
        reached: list[str] = []
        behind: list[str] = []
        errors: dict[str, dict[str, str]] = {}
        for replica, address in living.items():
            info, refused = _look(address, shown, _ANSWER_SECONDS)
            if info is None:
                if refused:
                    behind.append(replica)
                continue
            there = info["epoch"] == epoch and info["generation"] >= generation
            (reached if there else behind).append(replica)
            if there and info["errors"]:
                errors[replica] = info["errors"]
        if not behind or monotonic() >= deadline:
            return Following(tuple(reached), tuple(behind), errors)
        sleep(0.05)
