"""The backups of this installation as metrics: what backups.json under home says, read again when it has changed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from registry import clock, ledger

MOST_COMPONENTS = 100
"""Labels are bounded: the first so many by name."""
_STATES = ("complete", "partial", "failed")
_Rows = Mapping[str, Mapping[str, Any]]
"""By the name of what they are about."""


class BackupMetrics:
    """`collect()` gives nothing where no backup was ever taken from this home."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._seen: tuple[int, int, int] | None = None
        self._document: dict[str, Any] | None = None

    def collect(self) -> Iterator[Metric]:
        document = self._read()
        if document is not None:
            yield from _families(document, clock.now())

    def _read(self) -> dict[str, Any] | None:
        try:
            found = ledger.path_of(self._home).stat()
        except OSError:
            self._seen = self._document = None
            return None
        mark = (found.st_mtime_ns, found.st_size, found.st_ino)
        if mark != self._seen:
            self._seen, self._document = mark, ledger.read(self._home)
        return self._document


def _families(document: Mapping[str, Any], now: dt.datetime) -> Iterator[Metric]:
    rows = _rows(document.get("components"))
    for name, what, value in (
        (
            "last_verified_age_seconds",
            "Age of the newest backup that was restored and compared.",
            lambda row: ledger.age(row.get("verified_as_of"), now),
        ),
        (
            "last_age_seconds",
            "Age of the newest complete backup.",
            lambda row: ledger.age(row.get("backed_up_at"), now),
        ),
        ("bytes", "Size of its content.", lambda row: _number(row.get("size_bytes"))),
        ("stored_bytes", "What it takes where it is stored.", lambda row: _number(row.get("stored_bytes"))),
    ):
        yield _gauge(f"modelkeep_backup_{name}", what, "component", rows, value)
    last = _mapping(document.get("last"))
    if last.get("state") in _STATES:
        states = {name: {"is": float(name == last["state"])} for name in _STATES}
        yield _gauge(
            "modelkeep_backup_last_state", "1 for how the last backup ended.", "state", states, lambda row: row["is"]
        )
    yield from _logs(_rows(document.get("logs")), now)
    yield from _drill(_mapping(document.get("drill")), now)


def _logs(logs: _Rows, now: dt.datetime) -> Iterator[Metric]:
    if not logs:
        return

    age = partial(ledger.logs_age, now=now)
    for name, what, value in (
        ("age_seconds", "Time since the moment up to which the database's logs are shipped.", age),
        (
            "gap",
            "1 where no backup can use the logs that are shipped now: something before them is lost.",
            lambda row: None if age(row) is None else float(bool(row.get("gap"))),
        ),
        ("failed", "1 where the last run shipped nothing of it.", lambda row: float(bool(row.get("failed")))),
    ):
        yield _gauge(f"modelkeep_backup_logs_{name}", what, "database", logs, value)


def _drill(drill: Mapping[str, Any], now: dt.datetime) -> Iterator[Metric]:
    if not isinstance(drill.get("passed"), bool):
        return
    yield GaugeMetricFamily("modelkeep_drill_passed", "1 where the last drill passed.", value=float(drill["passed"]))
    passed_at = ledger.age(drill.get("at"), now)
    if passed_at is not None:
        yield GaugeMetricFamily("modelkeep_drill_age_seconds", "Time since the last drill.", value=passed_at)
    rows = _rows(drill.get("components"))
    for name, what in (("rto_seconds", "How long recovery took in it."), ("rpo_seconds", "Age of what it recovered.")):
        yield _gauge(f"modelkeep_drill_{name}", what, "component", rows, partial(_at, name))


def _gauge(
    name: str, what: str, label: str, rows: _Rows, value: Callable[[Mapping[str, Any]], float | None]
) -> GaugeMetricFamily:
    """One figure of every row that has it."""
    family = GaugeMetricFamily(name, what, labels=[label])
    for of, row in rows.items():
        found = value(row)
        if found is not None:
            family.add_metric([of], found)
    return family


def _rows(found: Any) -> _Rows:
    return {name: _mapping(row) for name, row in sorted(_mapping(found).items())[:MOST_COMPONENTS]}


def _at(key: str, row: Mapping[str, Any]) -> float | None:
    return _number(row.get(key))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
