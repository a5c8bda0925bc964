"""What was live when, against what the traffic saw: the record of changes and the answers of a real server, moment by moment."""

from __future__ import annotations

import bisect
import datetime as dt
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from modelkeep.demo.answers import Request
from registry import history, routes
from registry.routes import Desired
from registry.schema import Reach, RouteChange
from tests.e2e.harness import MODEL, Box, box, kill, wait_for

MOMENTS = 500
CHANGES = 36
RATE = 250.0
SEED = 20260310


@pytest.fixture
def found(tmp_path: Path) -> Iterator[Box]:
    with box(tmp_path) as made:
        made.first("1")
        for version in ("2", "3"):
            made.add(version)
        made.serve()
        wait_for("the server to follow", made.follows)
        yield made


def change(one: Box, number: int, choose: random.Random) -> None:
    """One of the changes that operations make: a canary at some share, copies, a promotion, a rollback, back to rest."""
    stable = one.stable()
    candidate = choose.choice([version for version in ("1", "2", "3") if version != stable])
    weight = choose.choice((0.1, 0.25, 0.5, 0.9, 1.0))
    desired, kind = choose.choice(
        [
            (Desired(stable=stable, candidate=candidate, weight=weight), "canary"),
            (Desired(stable=stable, candidate=candidate, shadow=True), "shadow"),
            (Desired(stable=candidate), "promote"),
            (Desired(stable=candidate), "rollback"),
            (Desired(stable=stable), "withdraw"),
        ]
    )
    with one.database.write(actor=f"operator {number % 3}") as transaction:
        routes.change(transaction, "production", MODEL, desired, kind=kind, reason=f"change {number}")


class Recorded:
    """The record, asked for moments of the traffic's clock."""

    def __init__(self, one: Box, offset: float) -> None:
        self._one, self._offset = one, offset
        with one.database.read() as session:
            moments = [*session.scalars(select(RouteChange.at)), *session.scalars(select(Reach.at))]
        self.moves = sorted(moment.timestamp() - offset for moment in moments)
        """When a change was made or reached: between two of them the answer is one."""
        self._known: dict[float, dict[str, Any]] = {}

    def at(self, monotonic: float) -> dict[str, Any]:
        if monotonic not in self._known:
            when = dt.datetime.fromtimestamp(monotonic + self._offset, dt.UTC)
            with self._one.database.read() as session:
                (self._known[monotonic],) = history.at(session, "production", when, MODEL)["models"]
        return self._known[monotonic]

    def within(self, begin: float, end: float) -> list[float]:
        """The moves between two moments."""
        return self.moves[bisect.bisect_left(self.moves, begin) : bisect.bisect_right(self.moves, end)]

    def possible(self, moment: float, request: Request) -> set[str]:
        """The versions that may have answered: the server drew one somewhere between the sending and the answer."""
        if not self.within(min(moment, request.sent), max(moment, request.finished)):
            return history.versions_at(self.at(moment))
        looked_at = (request.sent, *self.within(request.sent, request.finished), request.finished)
        return {version for one in looked_at for version in history.versions_at(self.at(one))}


def test_500_random_moments_of_a_recorded_history_are_what_the_traffic_saw(found: Box) -> None:
    choose = random.Random(SEED)
    offset = time.time() - time.monotonic()
    traffic = found.start_traffic(rate=RATE)
    begun = time.monotonic()
    for number in range(CHANGES):
        if (
            number == CHANGES // 2
        ):  # a restart in the midst of it: another boot, which takes the state from the registry
            before = found.child_pid()
            kill(before)
            wait_for("the next server", lambda: found.child_pid() != before and found.is_ready())  # noqa: B023
        change(found, number, choose)
        # Some changes come faster than the server looks, most are lived with for a while.
        pause = choose.choice((0.02, 0.15, 0.3, 0.4))
        passed = time.monotonic() + pause
        wait_for("some traffic", lambda: time.monotonic() >= passed)  # noqa: B023
    wait_for("the server to follow", found.follows)
    ended = time.monotonic()
    requests = sorted((r for r in traffic.stop() if r.error is None), key=lambda request: request.sent)
    sent = [request.sent for request in requests]
    assert abs((time.time() - time.monotonic()) - offset) < 0.002, "the clock of this machine was set meanwhile"

    recorded, wrong, settled = Recorded(found, offset), [], 0
    expected: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for _ in range(MOMENTS):
        moment = choose.uniform(begun, ended)
        row = recorded.at(moment)
        settled += row["settled"]
        for request in around(requests, sent, moment):
            possible = recorded.possible(moment, request)
            if request.version not in possible:
                wrong.append((moment - begun, request.version, sorted(possible), row["kind"], row["reason"]))
            if len(row["answers"]) == 2 and not recorded.within(request.sent, request.finished) and row["settled"]:
                expected[row["candidate"]] += row["weight"]  # type: ignore[assignment]
                seen[row["candidate"]] += request.version == row["candidate"]
    assert wrong == []
    assert settled > MOMENTS / 2, f"only {settled} moments have one answer: the others prove little"
    # The shares as well: five standard deviations of a draw with at most that many trials.
    for version, share in expected.items():
        assert abs(seen[version] - share) < 5 * max(share, 1) ** 0.5 + 5, (version, share, seen[version])
    said_by_commands(found, recorded, begun, ended, offset)


def around(requests: list[Request], sent: list[float], moment: float) -> list[Request]:
    """The requests under way at a moment, and the nearest before and after it."""
    place = bisect.bisect_right(sent, moment)
    near = requests[max(0, place - 20) : place + 1]
    under_way = [request for request in near if request.sent <= moment <= request.finished]
    last = [request for request in near if request.sent <= moment][-1:]
    return [*under_way, *last, *requests[place : place + 1]]


def said_by_commands(one: Box, recorded: Recorded, begun: float, ended: float, offset: float) -> None:
    """The commands say the same: `models at`, and the change with its author in `models history`."""
    moment = (begun + ended) / 2
    when = dt.datetime.fromtimestamp(moment + offset, dt.UTC).isoformat()
    done = one.modelkeep("models", "at", when, "--model", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["models"]
    direct = recorded.at(moment)
    assert {name: row[name] for name in ("generation", "answers", "who", "reason", "settled")} == {
        name: direct[name] for name in ("generation", "answers", "who", "reason", "settled")
    }
    assert row["who"].startswith("operator ")
    done = one.modelkeep("models", "history", MODEL, "--limit", "100", "--json")
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert listed["total"] >= CHANGES
    assert next(c for c in listed["changes"] if c["generation"] == row["generation"])["reason"] == row["reason"]
