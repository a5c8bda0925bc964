"""The watchman: carries on soaks whose process has gone, ends leases that stand still, and approvals that came too late. No Prefect.

`python -P -m tasks.watchman`, kept alive by `modelkeep serve` and so by `modelkeep up`. Several do no harm: a lease decides who carries.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from registry import approvals, client_tls, leases, promotions
from registry.database import Database
from registry.errors import ConflictError, FencedError, LockedError, ModelkeepError, UnavailableError
from registry.settings import Settings, load_settings
from tasks.lease import Keeper
from tasks.promoting import Promoting
from tasks.soak import Soak

log = logging.getLogger("modelkeep.watchman")

_IDLE_SECONDS = 1.0
_SECOND_TRY_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


@dataclass(slots=True)
class _Carried:
    soak: Soak
    beaten_at: float

    @property
    def held(self) -> leases.Held:
        return self.soak.work.operation.held


class Watchman:
    """One round after the other; `look` is a round. Nothing of it blocks for long, and nothing is kept that the registry lacks."""

    def __init__(
        self,
        database: Database,
        *,
        ttl_seconds: float,
        poll_seconds: float,
        name: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.database, self.ttl_seconds, self.poll_seconds = database, ttl_seconds, poll_seconds
        self.name = name or f"watchman:{socket.gethostname()}:{os.getpid()}"
        self._monotonic = monotonic
        self._observers: dict[str, leases.Observer] = {}
        self._carried: dict[str, _Carried] = {}
        self._not_before: dict[str, float] = {}

    @property
    def carries(self) -> list[str]:
        """The promotions whose soak this process carries."""
        return list(self._carried)

    def look(self) -> None:
        """One round. Raises UnavailableError where the registry does not answer; the next round goes on from there."""
        for carried in self._carried.values():
            self._beat(carried)
        self._end_stale_leases()
        for line in approvals.expire_due(self.database, observer=self.name):
            log.warning("%s", line)
        self._take_up()
        for identity, carried in list(self._carried.items()):
            self._tick(identity, carried)

    def rest_seconds(self) -> float:
        """How long to wait for the next round."""
        return min(self.poll_seconds, 1.0) if self._carried else max(self.poll_seconds, _IDLE_SECONDS)

    def let_go(self) -> None:
        """Leave what is carried to others at once, before this process ends. Without it they wait for the lease to run out."""
        for carried in self._carried.values():
            self._give_up(carried, "was told to end")
        self._carried.clear()

    def _end_stale_leases(self) -> None:
        with self.database.read() as session:
            seen = leases.beats_everywhere(session)
        for environment in seen.keys() | self._observers.keys():
            observer = self._observers.setdefault(environment, leases.Observer(self._monotonic))
            for beat in observer.stale(seen.get(environment, [])):
                ended = promotions.expire(self.database, environment, beat, observer=self.name)
                log.warning(
                    "the lease on %s stood still for %g s (promotion %s)", beat.subject, beat.ttl_seconds, ended
                )

    def _take_up(self) -> None:
        with self.database.read() as session:
            orphans = [
                identity
                for identity in promotions.orphans(session)
                if identity not in self._carried and self._not_before.get(identity, 0.0) <= self._monotonic()
            ]
        for identity in orphans:
            try:
                operation = promotions.carry_on(self.database, identity, ttl_seconds=self.ttl_seconds, holder=self.name)
            except (LockedError, ConflictError) as error:
                log.info("the soak of promotion %s is another's by now: %s", identity, error)
                continue
            except ValueError:  # a policy that this release does not read, say; the others are watched all the same
                log.exception("the soak of promotion %s cannot be taken up", identity)
                self._not_before[identity] = self._monotonic() + _SECOND_TRY_SECONDS
                continue
            log.warning("carries on the soak of %s %s (promotion %s)", operation.model, operation.version, identity)
            work = Promoting(
                self.database, None, Path(), operation, Keeper(operation.held), poll_seconds=self.poll_seconds,
                tell=log.info, monotonic=self._monotonic,
            )  # fmt: skip
            self._carried[identity] = _Carried(Soak(work), self._monotonic())

    def _beat(self, carried: _Carried) -> None:
        if self._monotonic() - carried.beaten_at < carried.held.ttl_seconds / 4:
            return
        try:
            leases.beat(self.database, carried.held)
            carried.beaten_at = self._monotonic()
        except FencedError as error:
            carried.soak.work.keeper.lost = str(error)

    def _tick(self, identity: str, carried: _Carried) -> None:
        try:
            if carried.soak.tick() is None:
                return
        except UnavailableError:
            raise
        except FencedError as error:
            log.warning("promotion %s is out of these hands: %s", identity, error)
        except Exception:
            # Of several soaks one that cannot be judged shall not keep the others waiting; it is tried again later.
            log.exception("the soak of promotion %s could not be judged", identity)
            self._not_before[identity] = self._monotonic() + _SECOND_TRY_SECONDS
            self._give_up(carried, "could not judge it")
        del self._carried[identity]

    def _give_up(self, carried: _Carried, why: str) -> None:
        try:
            promotions.let_go(self.database, carried.soak.work.operation, f"{self.name} {why}")
        except FencedError as error:
            log.warning("%s", error)


def run(watchman: Watchman, stopping: threading.Event, *, parent: int | None = None) -> None:
    """Round after round until told to stop, or until the parent is gone."""
    away = False
    while not stopping.is_set() and (parent is None or os.getppid() == parent):
        try:
            watchman.look()
            if away:
                log.warning("the registry answers again")
            away = False
        except UnavailableError as error:
            if not away:
                log.warning("%s; it is tried again", error)
            away = True
        except ModelkeepError as error:
            log.error("%s; it is tried again", error)
        stopping.wait(watchman.rest_seconds())
    try:
        watchman.let_go()
    except ModelkeepError as error:
        log.warning("what it carried waits for its lease to run out: %s", error)


def opened(settings: Settings, stopping: threading.Event) -> Database | None:
    """The registry at this release's schema, once it answers. One that is gone is not made anew here: who serves from it decides that."""
    from registry.connect import open_database

    database = open_database(settings)
    path = Path(database.url.database or "")
    while not stopping.is_set():
        if database.sqlite and not path.exists():
            stopping.wait(max(settings.poll_seconds, _IDLE_SECONDS))
            continue
        try:
            database.prepare()
            return database
        except UnavailableError as error:
            log.warning("%s; it is tried again", error)
            stopping.wait(max(settings.poll_seconds, _IDLE_SECONDS))
    return None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tasks.watchman", description=__doc__)
    parser.add_argument("--parent", type=int, help="process id; the watchman ends when that one is gone")
    options = parser.parse_args(arguments)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    if options.parent is not None:
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    settings = load_settings()
    client_tls.publish(settings.client)
    logging.basicConfig(
        stream=sys.stderr, level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        database = opened(settings, stopping)
    except ModelkeepError as error:  # say, a registry that is newer than this code
        log.error("%s", error)
        return 1
    if database is None:
        return 0
    try:
        watchman = Watchman(database, ttl_seconds=settings.lease_seconds, poll_seconds=settings.poll_seconds)
        run(watchman, stopping, parent=options.parent)
    finally:
        database.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
