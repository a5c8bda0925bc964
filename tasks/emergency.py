"""An emergency at the servers' own API: what is left where the registry does not answer. Each goes back to the same version."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import quote

import httpx

from registry.rollbacks import Seen
from tasks import answering, servers
from tasks.answering import Answer
from tasks.rollback import FOLLOW_SECONDS, RollbackResult, sorted_answers

_ASK_SECONDS = 4.0
_BETTER_SECONDS = 1.5
"""How long a server that still reaches the registry is waited for: a little longer than a server waits for the registry."""


class _Lost(str):
    """Why no answer came to a request that may have arrived."""


def at_servers(
    addresses: Sequence[str],
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    claimed: str | None,
    why: str,
    seen: Seen | None = None,
    access: servers.Access = servers.NOBODY,
    began: float,
    timeout_seconds: float = FOLLOW_SECONDS,
) -> RollbackResult:
    """An emergency at each server's own API, all at a time once the version is known: what is left when the registry does not answer.

    `why` it does not. `seen` is what `to` was decided over, where it was not a person who named it.
    """
    asked: dict[str, dict[str, Any] | str] = {}
    body: dict[str, Any] = {"model": model, "to": to, "strategy": "emergency", "reason": reason, "claimed": claimed}
    if seen is not None:
        body["seen"] = seen.as_dict()
    if to is None:
        # Servers may reach the registry where this process does not, and each would go one further back: one says to which
        # version, for all. To say so changes nothing, so an answer that is lost costs nothing.
        aims = _aims(addresses, model, access)
        aimed = max(
            (found for found in aims.values() if isinstance(found, dict)),
            key=lambda found: (found["by"] == "registry", found["seen"]["generation"]),
            default=None,
        )
        if aimed is None:
            asked = {address: str(aims[address]) for address in addresses}
        else:
            body |= {"to": str(aimed["to"]), "seen": aimed["seen"]}
    rest = [address for address in addresses if address not in asked]
    with ThreadPoolExecutor(max(1, len(rest)), thread_name_prefix="rollback") as pool:
        futures = {address: pool.submit(_ask, address, body, access) for address in rest}
        for address, future in futures.items():
            asked[address] = future.result()
    lost = {address for address, found in asked.items() if isinstance(found, _Lost)}
    done = {address: found for address, found in asked.items() if isinstance(found, dict)}
    behind = {a: str(found) for a, found in asked.items() if isinstance(found, str) and a not in lost}
    answers: dict[str, Answer] = {}
    deadline = time.monotonic() + timeout_seconds
    with ThreadPoolExecutor(max(1, len(done) + len(lost)), thread_name_prefix="answer") as pool:
        waiting = {
            address: pool.submit(
                answering.first_answer, address, model, done[address]["to"] if address in done else str(body["to"]),
                tensors=None, access=access, since=began, deadline=deadline,
            )
            for address in (*done, *sorted(lost))
        }  # fmt: skip
        answers = {address: future.result() for address, future in waiting.items()}
    followed, late, seconds, notes = sorted_answers(answers)
    targets = sorted({str(found["to"]) for found in done.values()})
    if len(targets) > 1:
        notes = {**notes, **{address: f"went back to {found['to']}" for address, found in done.items()}}
    for address, found in done.items():
        if found.get("not_kept"):
            notes[address] = f"a restart of this server would forget it: {found['not_kept']}"
    for address in lost.intersection(followed):
        notes[address] = f"{asked[address]}, but it has gone back"
    first = next(iter(done.values()), {})
    return RollbackResult(
        model,
        environment,
        first.get("from"),
        targets[0] if targets else str(body["to"]),
        None,
        followed,
        {**behind, **late},
        first.get("withdrawn"),
        strategy="emergency",
        seconds=seconds,
        notes=notes,
        registry=why,
        held=tuple(
            address
            for address in (*done, *sorted(lost.intersection(followed)))
            if (done[address]["by"] == "hold" if address in done else _holds(address, model, access))
        ),
    )


def release_at(
    addresses: Sequence[str], *, model: str, reason: str, access: servers.Access = servers.NOBODY
) -> dict[str, str]:
    """Let go of the holds of a model by hand: {address: what came of it}."""
    found = {}
    for address in addresses:
        try:
            answer = httpx.delete(
                f"{address}/api/v2/rollback/{quote(model, safe='')}", params={"reason": reason}, timeout=_ASK_SECONDS,
                **access.reaching(address),
            )  # fmt: skip
            found[address] = "released" if answer.status_code == 200 else f"{answer.status_code}: {_text(answer)}"
        except httpx.HTTPError as error:
            found[address] = f"does not answer: {error}"
    return found


def _aims(addresses: Sequence[str], model: str, access: servers.Access) -> dict[str, dict[str, Any] | str]:
    """Where each server would go back to, or why it does not say; who hangs is not waited for once one has said it.

    A server that reaches the registry knows best, and is waited for a little longer.
    """
    found: dict[str, dict[str, Any] | str] = {}
    pool = ThreadPoolExecutor(max(1, len(addresses)), thread_name_prefix="aim")
    asked = {pool.submit(_aim, address, model, access): address for address in addresses}
    waiting, deadline = set(asked), float("inf")
    while waiting and (left := deadline - time.monotonic()) > 0:
        done, waiting = wait(waiting, timeout=None if left == float("inf") else left, return_when=FIRST_COMPLETED)
        found |= {asked[future]: future.result() for future in done}
        aims = [aim for aim in found.values() if isinstance(aim, dict)]
        if any(aim["by"] == "registry" for aim in aims):
            break
        if aims:
            deadline = min(deadline, time.monotonic() + _BETTER_SECONDS)
    pool.shutdown(wait=False, cancel_futures=True)
    return found


def _aim(address: str, model: str, access: servers.Access) -> dict[str, Any] | str:
    try:
        answer = httpx.get(
            f"{address}/api/v2/rollback/{quote(model, safe='')}",
            timeout=_ASK_SECONDS,
            **access.reaching(address),
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"does not answer: {error}"
    return dict(answer.json()) if answer.status_code == 200 else f"refused ({answer.status_code}): {_text(answer)}"


def _ask(address: str, body: Mapping[str, Any], access: servers.Access) -> dict[str, Any] | str:
    try:
        answer = httpx.post(
            f"{address}/api/v2/rollback",
            json=body,
            timeout=_ASK_SECONDS,
            **access.reaching(address),
        )
    except (httpx.ReadTimeout, httpx.ReadError, httpx.RemoteProtocolError) as error:
        return _Lost(f"did not answer: {type(error).__name__} {error}".strip())
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"does not answer: {error}"
    if answer.status_code != 200:
        return f"refused ({answer.status_code}): {_text(answer)}"
    return dict(answer.json())


def _text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


def _holds(address: str, model: str, access: servers.Access) -> bool:
    """Whether a server whose answer was lost holds the model by itself. False where it does not say."""
    try:
        told = httpx.get(
            f"{address}/api/v2/model-info",
            timeout=_ASK_SECONDS,
            **access.reaching(address),
        )
        return told.status_code == 200 and any(hold["model"] == model for hold in told.json()["holds"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False
