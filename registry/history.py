"""What was live when, in which share, and who put it there: read from the changes of routes and from what each replica reached.

Changes are ordered by epoch (each restore begins one) and generation, never by time: a wall clock may go back. Times are those
of the machine that made a change, and of the replica that reached it. Where a clock went back between two changes the times of
both overlap; then every change that may have been in force at the moment asked for is named, the newest first.
"""

from __future__ import annotations

import bisect
import datetime as dt
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from registry import clock
from registry.errors import NotFoundError, RefusedError
from registry.schema import Promotion, Reach, Replica, RouteChange

SILENT_AFTER_SECONDS = 30.0
"""A replica that lives reports every 10 s. What it did later than this after its last report is not on record."""

_LOOKED_BACK = 1000
_FAR = dt.datetime.max.replace(tzinfo=dt.UTC)

Key = tuple[int, int]
"""Where a change stands: number of the epoch in the order begun, generation."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """A change, as little of it as ordering needs."""

    key: Key
    at: dt.datetime
    epoch: str


@dataclass(frozen=True, slots=True)
class _Seen:
    """How far one replica was at the moment asked for, as it reported."""

    replica: str
    boot_id: str
    key: Key
    epoch: str
    generation: int
    at: dt.datetime
    behind: frozenset[str]
    heard: dt.datetime | None
    silent: bool


def epochs(session: Session, environment: str) -> dict[str, dt.datetime]:
    """The epochs of an environment in the order begun, each with the first time known of it."""
    began: dict[str, dt.datetime] = {}
    for table in (RouteChange, Reach):
        query = select(table.epoch, func.min(table.at)).where(table.environment == environment).group_by(table.epoch)
        for epoch, first in session.execute(query):
            began[epoch] = min(first, began.get(epoch, first))
    return dict(sorted(began.items(), key=lambda item: (item[1], item[0])))


def at(session: Session, environment: str, when: dt.datetime, model: str | None = None) -> dict[str, Any]:
    """What was live at `when`: for each model the change in force, and how far each replica had followed it by then.

    `answers` is the share of the requests by version. Where a replica had not reached the change (`settled` is False), it may
    have answered by one of `before` as well: then either is right. `or` are other changes that a clock that went back leaves
    possible. A replica that nothing was heard of at the time is `silent`, and says nothing about what it answered.
    """
    began = epochs(session, environment)
    order = {epoch: number for number, epoch in enumerate(began)}
    marks = _marks(session, environment, order, model)
    seen = _replicas_at(session, environment, when, order)
    chosen = {name: found for name, rows in marks.items() if (found := _in_force(rows, when))}
    possible = {
        name: {number for one in seen for number in _may_serve(session, environment, marks[name], found[0], one, name, order)}
        for name, found in chosen.items()
    }  # fmt: skip
    wanted = {marks[name][n].key: (name, n) for name, found in chosen.items() for n in {*found, *possible[name]}}
    rows = _rows(session, environment, order, set(wanted))
    promotions = _promotions(session, {row.promotion for row in rows.values() if row.promotion})
    models = []
    for name, found in sorted(chosen.items()):
        newest, *others = found
        mark = marks[name][newest]
        described = _described(rows[mark.key], promotions)
        before = [_described(rows[marks[name][n].key], promotions) for n in sorted(possible[name], reverse=True)]
        models.append(
            {
                **described,
                "settled": not before and not others,
                "before": before,
                "or": [_described(rows[marks[name][n].key], promotions) for n in others],
                "replicas": [_reached(one, mark, name) for one in seen],
            }
        )
    return {
        "environment": environment,
        "at": clock.text(when),
        "models": models,
        "notes": _notes(marks, began, when, chosen),
    }


def versions_at(found: dict[str, Any]) -> set[str]:
    """The versions that may have answered, of one of the `models` of `at`."""
    return {version for one in (found, *found["before"], *found["or"]) for version in one["answers"]}


def stable_at(session: Session, environment: str, model: str, when: dt.datetime) -> str:
    """The version that was stable at a time. Raises NotFoundError where there was none, RefusedError where a clock that went
    back leaves several possible."""
    models = at(session, environment, when, model)["models"]
    possible = list(dict.fromkeys(one["stable"] for found in models for one in (found, *found["or"]) if one["stable"]))
    if not possible:
        raise NotFoundError(f"{model} had no stable version in {environment} at {clock.text(when)}")
    if len(possible) > 1:
        raise RefusedError(
            f"at {clock.text(when)} {model} may have been on {' or '.join(possible)} in {environment}: a clock went back then; "
            "name the version with --to"
        )
    return str(possible[0])


def changes(
    session: Session,
    model: str,
    *,
    environment: str | None = None,
    since: dt.datetime | None = None,
    page: int = 1,
    limit: int = 50,
) -> dict[str, Any]:
    """The changes of a model's route, the newest first, with who made them and why, by which promotion and run."""
    where = [RouteChange.model == model]
    if environment is not None:
        where.append(RouteChange.environment == environment)
    if since is not None:
        where.append(RouteChange.at >= since)
    light = session.execute(
        select(RouteChange.environment, RouteChange.epoch, RouteChange.generation).where(*where)
    ).all()
    orders = {name: list(epochs(session, name)) for name in {row.environment for row in light}}
    keys = sorted(
        ((row.environment, orders[row.environment].index(row.epoch), row.generation) for row in light),
        key=lambda key: (key[1], key[2]),
        reverse=True,
    )
    keys.sort(key=lambda key: key[0])
    shown = keys[(page - 1) * limit : page * limit]
    rows: dict[tuple[str, int, int], RouteChange] = {}
    for name, epochs_of in orders.items():
        order = {epoch: number for number, epoch in enumerate(epochs_of)}
        found = _rows(session, name, order, {(key[1], key[2]) for key in shown if key[0] == name})
        rows.update({(name, *key): row for key, row in found.items()})
    promotions = _promotions(session, {row.promotion for row in rows.values() if row.promotion})
    return {
        "model": model,
        "total": len(keys),
        "page": page,
        "next": page + 1 if page * limit < len(keys) else None,
        "changes": [_described(rows[key], promotions) for key in shown],
    }


def _marks(session: Session, environment: str, order: dict[str, int], model: str | None) -> dict[str, list[_Mark]]:
    """Every change by model, in the order made."""
    query = select(RouteChange.model, RouteChange.epoch, RouteChange.generation, RouteChange.at).where(
        RouteChange.environment == environment
    )
    if model is not None:
        query = query.where(RouteChange.model == model)
    found: dict[str, list[_Mark]] = defaultdict(list)
    for name, epoch, generation, moment in session.execute(query.execution_options(yield_per=1000)):
        found[name].append(_Mark((order[epoch], generation), moment, epoch))
    for rows in found.values():
        rows.sort(key=lambda mark: mark.key)
    return dict(found)


def _in_force(rows: list[_Mark], when: dt.datetime) -> list[int]:
    """Which changes may have been in force, the newest first: one, or several where a clock went back; none before the first."""
    found = []
    for number, mark in enumerate(rows):
        until = rows[number + 1].at if number + 1 < len(rows) else _FAR
        if mark.at <= when < until or until <= when <= mark.at:
            found.append(number)
    return found[::-1]


def _replicas_at(session: Session, environment: str, when: dt.datetime, order: dict[str, int]) -> list[_Seen]:
    """What each replica had reached by then: of its last boot that had reported, the furthest that it had come."""
    found = []
    replica = session.scalar(select(func.min(Reach.replica)).where(Reach.environment == environment))
    while replica is not None:  # from one name to the next by the index: there are few, with many rows each
        here = (Reach.environment == environment, Reach.replica == replica, Reach.at <= when)
        last = session.scalars(select(Reach).where(*here).order_by(Reach.at.desc()).limit(1)).first()
        if last is not None:
            found.append(_seen(session, last, when, order))
        query = select(func.min(Reach.replica)).where(Reach.environment == environment, Reach.replica > replica)
        replica = session.scalar(query)
    return found


def _seen(session: Session, last: Reach, when: dt.datetime, order: dict[str, int]) -> _Seen:
    boot = (Reach.environment == last.environment, Reach.replica == last.replica, Reach.boot_id == last.boot_id)
    tops = session.execute(
        select(Reach.epoch, func.max(Reach.generation)).where(*boot, Reach.at <= when).group_by(Reach.epoch)
    ).all()
    epoch, generation = max(((row[0], int(row[1])) for row in tops), key=lambda row: (order[row[0]], row[1]))
    top = session.get_one(Reach, (last.environment, epoch, generation, last.replica, last.boot_id))
    heard = session.scalar(select(func.max(Reach.until)).where(*boot))
    if heard is None:
        row = session.get(Replica, last.replica)
        heard = row.reported_at if row is not None and row.boot_id == last.boot_id else None
    silent = heard is not None and when > heard + dt.timedelta(seconds=SILENT_AFTER_SECONDS)
    return _Seen(
        replica=last.replica,
        boot_id=last.boot_id,
        key=(order[epoch], generation),
        epoch=epoch,
        generation=generation,
        at=top.at,
        behind=frozenset(top.behind or ()),
        heard=heard,
        silent=silent,
    )


def _may_serve(
    session: Session,
    environment: str,
    rows: list[_Mark],
    number: int,
    one: _Seen,
    model: str,
    order: dict[str, int],
) -> set[int]:
    """The changes before `number` that a replica may still have answered by."""
    if one.silent or (one.key >= rows[number].key and model not in one.behind):
        return set()
    key = one.key
    if model in one.behind:
        # It stayed on what it had: that of the last state that it could serve whole.
        earlier = session.scalars(
            select(Reach)
            .where(Reach.environment == environment, Reach.replica == one.replica, Reach.at < one.at)
            .order_by(Reach.at.desc())
            .limit(_LOOKED_BACK)
        )
        whole = next((row for row in earlier if model not in (row.behind or ())), None)
        if whole is None:
            return set()
        key = (order[whole.epoch], whole.generation)
    first = bisect.bisect_right([mark.key for mark in rows], key) - 1
    # Those in between as well: it takes a moment to note that one has been reached.
    return set(range(max(first, 0), number))


def _reached(one: _Seen, mark: _Mark, model: str) -> dict[str, Any]:
    followed = one.key >= mark.key and model not in one.behind
    return {
        "replica": one.replica,
        "boot_id": one.boot_id,
        "reached": followed,
        "silent": one.silent and not followed,
        "epoch": one.epoch,
        "generation": one.generation,
        "reached_at": clock.text(one.at),
        "heard_at": clock.text(one.heard) if one.heard else None,
    }


def _rows(session: Session, environment: str, order: dict[str, int], keys: set[Key]) -> dict[Key, RouteChange]:
    """The whole rows of some changes."""
    names = list(order)
    wanted: dict[str, list[int]] = defaultdict(list)
    for number, generation in keys:
        wanted[names[number]].append(generation)
    found: dict[Key, RouteChange] = {}
    for epoch, generations in wanted.items():
        for start in range(0, len(generations), 500):
            query = select(RouteChange).where(
                RouteChange.environment == environment,
                RouteChange.epoch == epoch,
                RouteChange.generation.in_(generations[start : start + 500]),
            )
            found.update({(order[epoch], row.generation): row for row in session.scalars(query)})
    return found


def _promotions(session: Session, identities: set[str]) -> dict[str, Promotion]:
    found: dict[str, Promotion] = {}
    listed = sorted(identities)
    for start in range(0, len(listed), 500):
        query = select(Promotion).where(Promotion.id.in_(listed[start : start + 500]))
        found.update({row.id: row for row in session.scalars(query)})
    return found


def _described(row: RouteChange, promotions: dict[str, Promotion]) -> dict[str, Any]:
    promotion = promotions.get(row.promotion or "")
    return {
        "model": row.model,
        "environment": row.environment,
        "epoch": row.epoch,
        "generation": row.generation,
        "kind": row.kind,
        "stable": row.stable,
        "candidate": row.candidate,
        "weight": row.weight,
        "shadow": row.shadow,
        "answers": answers(row.stable, row.candidate, row.weight),
        "since": clock.text(row.at),
        "who": row.actor,
        "reason": row.reason,
        "promotion": row.promotion,
        "promotion_by": promotion.actor if promotion else None,
        "flow_run_id": row.flow_run_id or (promotion.flow_run_id if promotion else None),
    }


def answers(stable: str | None, candidate: str | None, weight: float) -> dict[str, float]:
    """The share of the requests by version, of those that get any."""
    shares = {candidate: weight, stable: 1 - weight if candidate else 1.0}
    return {version: share for version, share in shares.items() if version is not None and share > 0}


def _notes(
    marks: dict[str, list[_Mark]], began: dict[str, dt.datetime], when: dt.datetime, chosen: dict[str, list[int]]
) -> list[str]:
    notes = []
    named = list(began)
    last: dict[str, dt.datetime] = {}
    for rows in marks.values():
        for mark in rows:
            last[mark.epoch] = max(mark.at, last.get(mark.epoch, mark.at))
    for before, after in itertools.pairwise(named):
        if before in last and last[before] <= when < began[after]:
            notes.append(
                f"the registry was restored before {clock.text(began[after])} (epoch {after}): what changed after "
                f"{clock.text(last[before])} and before that may have been lost with it"
            )
    doubtful = sorted(name for name, found in chosen.items() if len(found) > 1)
    if doubtful:
        notes.append(f"a clock went back, so this moment came twice: see `or` of {', '.join(doubtful)}")
    return notes


def times_stable(session: Session, model: str, version: str) -> list[dict[str, Any]]:
    """When a version was the stable one, where, who made it so and what ended it; the oldest first."""
    rows = session.scalars(select(RouteChange).where(RouteChange.model == model)).all()
    found: list[dict[str, Any]] = []
    for environment in sorted({row.environment for row in rows}):
        order = {epoch: number for number, epoch in enumerate(epochs(session, environment))}
        here = sorted(
            (row for row in rows if row.environment == environment), key=lambda row: (order[row.epoch], row.generation)
        )
        current: dict[str, Any] | None = None
        for row in here:
            if current is None and row.stable == version:
                current = {
                    "environment": environment,
                    "since": clock.text(row.at),
                    "who": row.actor,
                    "kind": row.kind,
                    "promotion": row.promotion,
                    "until": None,
                    "ended_by": None,
                }
                found.append(current)
            elif current is not None and row.stable != version:
                current["until"], current["ended_by"] = clock.text(row.at), row.kind
                current = None
    return found
