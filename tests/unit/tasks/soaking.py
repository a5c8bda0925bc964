"""A promotion in its soak, without a server: what a replica reports is written by hand, and time goes when it is told to."""

from __future__ import annotations

from pathlib import Path

from registry import clock, leases, promotions, replicas
from registry.database import Database
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from tasks.lease import Keeper
from tasks.promoting import Promoting
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, Clock

POLICY = PromotionPolicy(dwell_seconds=10, soak_seconds=60, minimum_requests=20)


def prepared(folder: Path, template: Path | None = None) -> Database:
    """Versions 1, 2 and 3; version 1 is stable."""
    folder.mkdir(exist_ok=True)
    database = kit.prepared(folder, template)
    if template is not None:
        return database
    for version in ("1", "2", "3"):
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    return database


def soaking(database: Database, *, policy: PromotionPolicy = POLICY, run: str | None = None) -> Operation:
    """Version 2 has passed its canary with the figures of version 1, and is promoted."""
    operation = kit.begin(database, "2", policy=policy, flow_run_id=run)
    kit.shadow(database, operation)
    generation = kit.weigh(database, operation, 0.5)[1]
    report(database, "1", generation, requests=400, errors=4)
    report(database, "2", generation, requests=400, errors=4)
    kit.promote(database, operation)
    return operation


def report(
    database: Database, version: str, generation: int, *, requests: int, errors: int, model: str = MODEL
) -> None:
    """Cumulative counts, as a replica reports them."""
    with database.read() as session:
        found = replicas.pulse(session, ENVIRONMENT)
    assert found is not None
    counts = {
        "model": model, "version": version, "generation": generation, "epoch": found.epoch, "requests": requests,
        "errors": errors, "slow": 0, "latency": {}, "shadow_requests": 0, "shadow_errors": 0, "shadow_slow": 0,
    }  # fmt: skip
    replicas.report(
        database,
        replicas.Report(
            f"r-{version}",
            ENVIRONMENT,
            "http://127.0.0.1:1",
            "boot",
            found.epoch,
            generation,
            {},
            clock.now(),
            (counts,),
        ),
    )


def at_work(database: Database, operation: Operation, monotonic: Clock, *, told: list[str] | None = None) -> Promoting:
    tell = (told if told is not None else []).append
    return Promoting(
        database, None, Path(), operation, Keeper(operation.held), tell=tell, monotonic=monotonic, sleep=lambda _: None
    )


def orphan(database: Database) -> None:
    """The process that carries it is gone, and its lease has run out."""
    with database.read() as session:
        (beat,) = leases.beats(session, ENVIRONMENT)
    assert promotions.expire(database, ENVIRONMENT, beat, observer="replica:r1") is not None


def record(database: Database, operation: Operation) -> promotions.Operation | dict[str, object]:
    with database.read() as session:
        return promotions.describe(promotions.get(session, operation.id))


def steps(database: Database, operation: Operation) -> list[str]:
    with database.read() as session:
        return [step["step"] for step in promotions.story(session, operation.id)]
