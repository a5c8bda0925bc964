"""The emergency rollback of the command line: by the registry where it answers soon, else at each server's own API."""

from __future__ import annotations

import datetime as dt
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from registry import actor, client_tls, history, keys
from registry.attempts import Attempt
from registry.connect import open_database
from registry.database import Database
from registry.errors import StorageError, UnavailableError
from registry.rollbacks import Aim
from registry.settings import Settings
from registry.store import open_store
from tasks import emergency, rollback, servers
from tasks.rollback import RollbackResult

REGISTRY_SECONDS = 2.5
"""What the registry gets, all in all, before the servers are asked themselves."""
_ANSWER_SECONDS = 1.0
_FOLLOW_SECONDS = 5.0


def roll_back(
    settings: Settings, environment: str | None, model: str, to: str | None, when: dt.datetime | None, reason: str
) -> RollbackResult:
    """Go back at once. Raises what the registry refuses; where it does not answer, nothing: the result says who did what."""
    client_tls.publish(settings.client)
    began, where = time.monotonic(), environment or settings.environment
    call = _Call(settings, where, model, to, when, reason)
    try:
        database, aim, result = call.wait(REGISTRY_SECONDS)
    except (UnavailableError, StorageError) as error:
        # Where this has been decided it may still come to be on record: the servers are asked for the very same.
        decided = call.attempt.give_up()
        if decided is None and when is not None and to is None:
            raise UnavailableError(
                f"{error}. Without the registry nobody knows what was stable then: give --to VERSION"
            ) from error
        return _at_servers(settings, where, model, to, decided, reason, str(error), began)
    try:
        outcome = rollback.follow(
            database, result, artifacts=open_store(settings.artifacts), strategy="emergency", began=began,
            timeout_seconds=_FOLLOW_SECONDS,
        )  # fmt: skip
        living = servers.alive(database, where) if outcome.behind else {}
    except (UnavailableError, StorageError) as error:
        return _at_servers(settings, where, model, result["to"], aim, reason, str(error), began)
    finally:
        database.dispose()
    late = {address: replica for replica, address in living.items() if replica in outcome.behind}
    if not late:
        return outcome
    # The registry has it, and these servers do not follow: it may be gone for them alone.
    told = _ask(settings, list(late), where, model, result["to"], aim, reason, "", began)
    return replace(
        outcome,
        followed=(*outcome.followed, *(late[address] for address in told.followed)),
        behind={name: why for name, why in outcome.behind.items() if name not in {late[a] for a in told.followed}},
        seconds={**outcome.seconds, **{late[a]: seconds for a, seconds in told.seconds.items()}},
        notes={**outcome.notes, **{late[a]: note for a, note in told.notes.items() if a in late}},
        held=tuple(late[address] for address in told.held),
    )


def release(settings: Settings, environment: str | None, model: str, reason: str) -> dict[str, str]:
    """Take the holds of a model away, at every server that can be found."""
    client_tls.publish(settings.client)
    addresses = known_servers(settings, environment or settings.environment)
    return emergency.release_at(addresses, model=model, reason=reason, access=_access(settings))


def known_servers(settings: Settings, environment: str) -> list[str]:
    """Addresses of servers without the registry: setting `servers`, and those of this home that run.

    The default of the setting is only a guess: it is left out where a server of this home is found.
    """
    here = []
    for folder in sorted((settings.home / "serving").glob(f"{environment}-*")):
        port = folder.name.rpartition("-")[2]
        if port.isdigit() and _runs(folder / "supervisor.pid"):
            known = settings.server.address or ""
            if known.startswith("https://") and known.endswith(f":{port}"):
                here.append(known)  # its certificate may know that name alone
            else:
                here.append(f"{'http' if settings.server.tls_certificate is None else 'https'}://127.0.0.1:{port}")
    named = [] if here and settings.source("servers") == "default" else settings.servers
    same = {address.replace("localhost", "127.0.0.1") for address in here}
    return [*here, *(address for address in named if address.replace("localhost", "127.0.0.1") not in same)]


def _runs(path: Path) -> bool:
    import psutil

    try:
        return psutil.pid_exists(int(path.read_text()))
    except (OSError, ValueError):
        return False


def _at_servers(
    settings: Settings,
    environment: str,
    model: str,
    to: str | None,
    aim: Aim | None,
    reason: str,
    why: str,
    began: float,
) -> RollbackResult:
    return _ask(settings, known_servers(settings, environment), environment, model, to, aim, reason, why, began)


def _ask(
    settings: Settings,
    addresses: list[str],
    environment: str,
    model: str,
    to: str | None,
    aim: Aim | None,
    reason: str,
    why: str,
    began: float,
) -> RollbackResult:
    return emergency.at_servers(
        addresses, environment=environment, model=model, to=to if aim is None else aim.to,
        seen=None if aim is None else aim.seen, reason=reason, claimed=actor.user(), why=why,
        access=_access(settings), began=began, timeout_seconds=_FOLLOW_SECONDS,
    )  # fmt: skip


def _access(settings: Settings) -> servers.Access:
    return servers.Access(key=keys.presented(settings))


class _Call:
    """The rollback in the registry, on a thread that the command does not wait for longer than it may.

    One that is late is no harm: what it writes is what the servers were asked for.
    """

    def __init__(
        self, settings: Settings, environment: str, model: str, to: str | None, when: dt.datetime | None, reason: str
    ) -> None:
        self.attempt = Attempt()
        self._asked = (settings, environment, model, to, when, reason)
        self._done: tuple[Database, Aim, dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="registry", daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> tuple[Database, Aim, dict[str, Any]]:
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        if self._done is None:
            raise UnavailableError(f"the registry did not answer within {seconds:g} s")
        return self._done

    def _run(self) -> None:
        try:
            self._done = self._change()
        except BaseException as error:
            self._error = error

    def _change(self) -> tuple[Database, Aim, dict[str, Any]]:
        settings, environment, model, to, when, reason = self._asked
        database = open_database(settings, answer_seconds=_ANSWER_SECONDS, statement_seconds=_ANSWER_SECONDS)
        path = database.url.database
        if database.sqlite and path and not Path(path).exists():
            raise UnavailableError(f"the registry {path} is gone")
        if database.revision() is None:
            raise UnavailableError("the registry is empty: it is another one, or it was emptied")
        database.prepare()
        who = keys.of_command(database, settings)
        if when is not None:
            with database.read() as session:
                to = history.stable_at(session, environment, model, when)
        aim = self.attempt.decide(database, environment=environment, model=model, to=to, emergency=True)
        result = self.attempt.roll_back(
            database, environment=environment, model=model, to=to, reason=reason, ttl_seconds=settings.lease_seconds,
            emergency=True, who=who,
        )  # fmt: skip
        return database, aim, result
