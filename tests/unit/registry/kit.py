"""What tests of the registry need again and again: a prepared database, versions in it, small real model files."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Table, event, func, select

from registry import audit, clock, promotions, routes
from registry.database import Database
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from registry.routes import Desired
from registry.schema import AuditEvent, Base, Model, Placement, Route, Version

ENVIRONMENT = "production"
MODEL = "digits"
POLICY = PromotionPolicy()


def prepared(folder: Path, template: Path | None = None) -> Database:
    """A registry in a folder, with its anchors beside it; copied from a template where there is one, which is faster."""
    if template is not None:
        shutil.copyfile(template, folder / "registry.db")
    database = Database(f"sqlite:///{folder / 'registry.db'}", anchors=folder / "audit.anchors")
    # No power fails in these tests, and waiting for a busy disk is most of their time.
    event.listen(database.engine, "connect", lambda raw, _: raw.execute("PRAGMA synchronous=OFF"))
    if template is None:
        database.prepare()
    return database


def add_version(database: Database, version: str, *, model: str = MODEL, state: str = "validated") -> None:
    """A version of record without a file."""
    with database.write(actor="test") as transaction:
        session = transaction.session
        if session.get(Model, model) is None:
            session.add(Model(name=model, created_at=clock.now()))
        ordinal = (session.scalar(select(func.max(Version.ordinal)).where(Version.model == model)) or 0) + 1
        session.add(
            Version(
                model=model, version=version, ordinal=ordinal, state=state, digest="0" * 64, format="onnx", size_bytes=1,
                files=[], facts={}, tags={}, created_at=clock.now(), created_by="test",
            )
        )  # fmt: skip
        transaction.record("version.registered", f"version:{model}/{version}")


def begin(database: Database, version: str, *, flow_run_id: str | None = None, **changes: Any) -> Operation:
    asked: dict[str, Any] = {
        "environment": ENVIRONMENT, "model": MODEL, "policy": POLICY, "strategy": "canary", "ttl_seconds": 30.0,
    }  # fmt: skip
    return promotions.begin(database, version=version, flow_run_id=flow_run_id, **(asked | changes))


def shadow(database: Database, operation: Operation) -> tuple[str, int]:
    return promotions.stage(
        database,
        operation,
        Desired(stable=operation.stable, candidate=operation.version, shadow=True, watch=True),
        step="shadow", kind="shadow", title="copies", detail="", placements=[(promotions.STAGING, "testing")],
        window={"stage": "shadow", "weight": 0.0},
    )  # fmt: skip


def weigh(database: Database, operation: Operation, weight: float = 0.05) -> tuple[str, int]:
    """From the shadow to a share of the requests."""
    return promotions.stage(
        database,
        operation,
        Desired(stable=operation.stable, candidate=operation.version, weight=weight, watch=True),
        step="canary", kind="canary", title=f"{weight:.0%}", detail="",
        placements=[(promotions.STAGING, "passed"), (operation.environment, "candidate")],
        window={"stage": f"canary at {weight:.0%}", "weight": weight},
    )  # fmt: skip


def canary(database: Database, operation: Operation, weight: float = 0.05) -> tuple[str, int]:
    """Into the canary from the start, or to another share."""
    if operation.step not in ("shadow", "canary"):
        shadow(database, operation)
    return weigh(database, operation, weight)


def promote(database: Database, operation: Operation, *, watch: bool = True) -> int:
    window = {"stage": "soak", "weight": 1.0}
    return promotions.promote(database, operation, title="promoted", detail="", watch=watch, window=window)


def end(database: Database, operation: Operation, outcome: promotions.Outcome) -> None:
    promotions.end(database, operation, outcome, title=outcome, detail=f"it is {outcome}")


def stable_by(database: Database, *versions: str) -> None:
    """Promote versions one after the other, each through canary and soak; the first takes all at once."""
    for version in versions:
        operation = begin(database, version)
        if operation.stable is not None:
            canary(database, operation)
        promote(database, operation)
        end(database, operation, "promoted")


def new_epoch(database: Database) -> str:
    """What a restore does to an environment: another epoch, the rows as they were."""
    with database.write(actor="test") as transaction:
        row = routes.lock_environment(transaction, ENVIRONMENT)
        row.epoch = routes.new_epoch()
        transaction.record("environment.restored", f"environment:{ENVIRONMENT}", after={"epoch": row.epoch})
        return row.epoch


def reset(database: Database, template: Path) -> None:
    """The registry is that of a template (an SQLite file), and there are no anchors."""
    if not database.sqlite:
        assert database.anchors is not None
        shutil.rmtree(database.anchors.parent)
        database.anchors.parent.mkdir()
        with database.engine.begin() as connection:
            for table in reversed(Base.metadata.sorted_tables):
                connection.execute(table.delete())
            for table, rows in _rows(template):
                connection.execute(table.insert(), rows)
        return
    database.dispose()  # who holds a connection holds the file of before
    folder = Path(str(database.url.database)).parent
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.copyfile(template, folder / "registry.db")


@functools.cache
def _rows(template: Path) -> list[tuple[Table, list[dict[str, Any]]]]:
    """What a template holds, table by table."""
    source = Database(f"sqlite:///{template}")
    with source.read() as session:
        found = [
            (table, [dict(row) for row in session.execute(table.select()).mappings()])
            for table in Base.metadata.sorted_tables
        ]
    source.dispose()
    return [(table, rows) for table, rows in found if rows]


def route(database: Database, model: str = MODEL, environment: str = ENVIRONMENT) -> Route:
    with database.read() as session:
        found = routes.read(session, environment, model)
        assert found is not None
        return found


def places(database: Database, environment: str = ENVIRONMENT, model: str = MODEL) -> dict[str, str]:
    with database.read() as session:
        rows = session.scalars(
            select(Placement).where(Placement.environment == environment, Placement.model == model)
        ).all()
    return {row.version: row.status for row in rows}


def actions(database: Database, after: int = 0) -> list[str]:
    """The actions of the audit trail behind an event, in order."""
    with database.read() as session:
        return list(session.scalars(select(AuditEvent.action).where(AuditEvent.seq > after).order_by(AuditEvent.seq)))


def last_event(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.max(AuditEvent.seq))) or 0


def verdict(database: Database) -> audit.Verdict:
    with database.read() as session:
        return audit.verify(session, database.anchors)


@contextlib.contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The SQL that is sent inside the block, in order."""
    sent: list[str] = []

    def listen(*call: Any) -> None:
        sent.append(str(call[2]))

    event.listen(database.engine, "before_cursor_execute", listen)
    try:
        yield sent
    finally:
        event.remove(database.engine, "before_cursor_execute", listen)


@dataclass
class Clock:
    """A monotonic clock that goes when it is told to."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def onnx_file(path: Path, scale: float = 1.0, *, external: str | None = None) -> Path:
    """y = x · w with four inputs and two outputs; `external` is where its weights go, from its folder."""
    from onnx import TensorProto, helper, numpy_helper

    weights = numpy_helper.from_array(np.full((4, 2), scale, dtype=np.float32), "w")
    path.parent.mkdir(parents=True, exist_ok=True)
    if external is not None:
        data = path.parent / external
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_bytes(weights.raw_data)
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=external)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])],
        [weights],
    )
    model = helper.make_model(graph, producer_name="tests", opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def golden_file(path: Path, rows: int = 3, **arrays: Any) -> Path:
    np.savez(path, **({"input.x": np.zeros((rows, 4), dtype=np.float32)} | arrays))
    return path


def stored(folder: Path) -> list[Path]:
    """Every file of a store, those on the way in as well."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
