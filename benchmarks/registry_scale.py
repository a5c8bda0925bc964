"""What a server's poll and report, a promotion of record and a page of versions cost in a small and in a large registry.

Prints one JSON document. Run by `make bench`, or `python -m benchmarks.registry_scale [--server mariadb|postgresql | --url URL …]
[--events N] [--runs N]`: on a private server, on three empty databases, or on SQLite in a temporary folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import insert, update

from registry import audit, catalogue, clock, leases, promotions, replicas, routes
from registry.database import Database
from registry.policy import PromotionPolicy
from registry.routes import Desired
from registry.schema import AuditEvent, AuditHead, Model, Version
from tests import registry_servers
from tests.conftest import find_program

ENVIRONMENT = "production"
SERVERS = 20
PROMOTIONS = 8
BATCH = 5000


def fill(database: Database, *, models: int, versions: int, events: int) -> None:
    """A registry of that size, written past the registry's own functions: `versions` in all, every tenth of the first model."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    names = [f"m{number:04}" for number in range(models)]
    owners = [names[0] if number % 10 == 0 or models == 1 else names[number % models] for number in range(versions)]
    ordinals: dict[str, int] = {}
    rows = []
    for owner in owners:
        ordinals[owner] = ordinals.get(owner, 0) + 1
        rows.append(
            {
                "model": owner, "version": str(ordinals[owner]), "ordinal": ordinals[owner], "state": "validated", "digest": "0" * 64,
                "format": "onnx", "size_bytes": 1, "files": [], "signature": None, "facts": {}, "tags": {}, "golden_digest": None,
                "rows_independent": True, "validation": None, "created_at": moment, "created_by": "bench", "benchmark": None,
                "deleted_at": None,
            }
        )  # fmt: skip
    with database.engine.begin() as connection:
        connection.execute(
            insert(Model), [{"name": name, "description": "", "kind": None, "created_at": moment} for name in names]
        )
        for start in range(0, len(rows), BATCH):
            connection.execute(insert(Version), rows[start : start + BATCH])
    chain(database, events)
    with database.write(actor="bench") as transaction:
        for name in names:
            routes.change(transaction, ENVIRONMENT, name, Desired(stable="1"), kind="first", reason="")
    for number in range(SERVERS):
        report(database, number)


def chain(database: Database, events: int) -> None:
    head, at = audit.GENESIS, clock.text(clock.now())
    for start in range(1, events + 1, BATCH):
        rows = []
        for seq in range(start, min(start + BATCH, events + 1)):
            subject = f"model:production/m{seq % 1000:04}"
            fields = {
                "seq": seq, "at": at, "actor": "bench", "action": "thing.done", "subject": subject, "before": None,
                "after": {"n": seq}, "flow_run_id": None, "reason": "",
            }  # fmt: skip
            text = audit.canonical(fields)
            head = audit.link(head, text)
            rows.append(
                {
                    "seq": seq,
                    "at": at,
                    "actor": "bench",
                    "action": "thing.done",
                    "subject": subject,
                    "text": text,
                    "hash": head,
                }
            )
        with database.engine.begin() as connection:
            connection.execute(insert(AuditEvent), rows)
    with database.engine.begin() as connection:
        connection.execute(update(AuditHead).values(seq=events, hash=head))


def report(database: Database, number: int) -> None:
    what = replicas.Report(
        f"r{number}", ENVIRONMENT, "http://127.0.0.1:8000", "b1", "e", 1, {"models": {}}, clock.now()
    )
    replicas.report(database, what)


def poll(database: Database) -> None:
    with database.read() as session:
        if replicas.pulse(session, ENVIRONMENT) is None:
            raise SystemExit("the registry has no environment")


def wanted(database: Database) -> None:
    """What a server reads after a change."""
    with database.read() as session:
        replicas.desired(session, ENVIRONMENT)


def page(database: Database) -> None:
    with database.read() as session:
        catalogue.page(session, catalogue.Wanted())


def promotion(database: Database, version: str) -> None:
    """One promotion of record, from its beginning to its end: six transactions and two heartbeats."""
    model = "m0000"
    operation = promotions.begin(
        database, environment=ENVIRONMENT, model=model, version=version, policy=PromotionPolicy(), strategy="canary",
        ttl_seconds=30.0, flow_run_id=None,
    )  # fmt: skip
    promotions.stage(
        database, operation, Desired(stable=operation.stable, candidate=version, shadow=True, watch=True), step="shadow",
        kind="shadow", title="copies", detail="", placements=[("staging", "testing")], window={"stage": "shadow", "weight": 0.0},
    )  # fmt: skip
    leases.beat(database, operation.held)
    promotions.stage(
        database, operation, Desired(stable=operation.stable, candidate=version, weight=0.05, watch=True), step="canary",
        kind="canary", title="5%", detail="", placements=[("staging", "passed"), (ENVIRONMENT, "candidate")],
        window={"stage": "canary at 5%", "weight": 0.05},
    )  # fmt: skip
    leases.beat(database, operation.held)
    promotions.promote(
        database, operation, title="promoted", detail="", watch=True, window={"stage": "soak", "weight": 1.0}
    )
    promotions.end(database, operation, "promoted", title="promoted", detail="")


def acts(database: Database) -> dict[str, Callable[[], None]]:
    numbers = iter(range(2, 10_000))
    return {
        "poll_ms": lambda: poll(database),
        "report_ms": lambda: report(database, 0),
        "promotion_ms": lambda: promotion(database, str(next(numbers))),
        "page_of_versions_ms": lambda: page(database),
        "read_after_a_change_ms": lambda: wanted(database),
    }


def measure(databases: dict[str, Database], runs: int) -> dict[str, dict[str, float]]:
    """Medians by size. The sizes take turns, so that what else the machine does falls on all of them."""
    kinds = {name: acts(database) for name, database in databases.items()}
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in range(runs + 1):  # the first is for what each statement costs once
        for name in list(kinds) if run % 2 else list(reversed(kinds)):
            for figure, act in kinds[name].items():
                if figure == "promotion_ms" and run > PROMOTIONS:
                    continue
                started = time.perf_counter()
                act()
                if run:
                    seconds.setdefault((name, figure), []).append(time.perf_counter() - started)
    return {
        name: {figure: round(1000 * statistics.median(seconds[name, figure]), 2) for figure in found}
        for name, found in kinds.items()
    }


def _program(name: str) -> Path:
    if (found := find_program(name)) is None:
        raise SystemExit(f"{name} is not installed; `make test` installs it where it may")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--url", action="append", default=[], help="an empty database; once for each of the three sizes"
    )
    parser.add_argument(
        "--server", choices=["mariadb", "postgresql"], help="start a private server of this kind, for the databases"
    )
    parser.add_argument("--events", type=int, default=1_000_000, help="audit events of the large registry")
    parser.add_argument("--runs", type=int, default=60, help="measurements of each figure (of promotions at most 8)")
    arguments = parser.parse_args()
    sizes = {
        "small": {"models": 1, "versions": 10, "events": 100},
        "many_versions": {"models": 1000, "versions": 10_000, "events": 100},
        "many_versions_and_events": {"models": 1000, "versions": 10_000, "events": arguments.events},
    }
    if arguments.url and (arguments.server or len(arguments.url) != len(sizes)):
        parser.error(f"--url is given once for each of {', '.join(sizes)} and without --server, or not at all")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="modelkeep-bench-"))
        urls = arguments.url or [f"sqlite:///{Path(folder) / f'{name}.db'}" for name in sizes]
        if arguments.server:
            server = stack.enter_context(contextlib.closing(registry_servers.starter(arguments.server, _program)))
            urls = [server.create() for _ in sizes]
        databases = {name: Database(url, statement_seconds=600) for name, url in zip(sizes, urls, strict=True)}
        for name, database in databases.items():
            if database.revision() is not None:
                parser.error(f"{database.shown} is not empty: name an empty database")
            database.prepare()
            print(f"filling {name}: {sizes[name]}", file=sys.stderr, flush=True)
            fill(database, **sizes[name])
        figures = measure(databases, arguments.runs)
        kind = next(iter(databases.values())).engine.dialect.name
        for database in databases.values():
            database.dispose()
    document: dict[str, Any] = {
        "database": kind,
        "sizes": sizes,
        "servers": SERVERS,
        "figures": figures,
        "ratio_to_small": {
            name: {figure: round(value / figures["small"][figure], 2) for figure, value in found.items()}
            for name, found in figures.items()
            if name != "small"
        },
    }
    print(json.dumps(document, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
