"""The tables of the registry. Names and columns only; what may be done with them lives in the modules named after them."""

from __future__ import annotations

import datetime as dt
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Float, Index, Integer, MetaData, String, Text, TypeDecorator
from sqlalchemy.dialects.mysql import DOUBLE, LONGTEXT
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION = "0004"
"""The Alembic revision that this code works with."""

NAME = 128
DIGEST = 64
SUBJECT = 320
"""Room for a kind, an environment or model, and a version."""


class UtcDateTime(TypeDecorator[dt.datetime]):
    """A timezone-aware UTC time, stored without its zone (SQLite and MariaDB keep none) to the microsecond."""

    impl = DateTime
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        if dialect.name in ("mysql", "mariadb"):
            from sqlalchemy.dialects.mysql import DATETIME

            return dialect.type_descriptor(DATETIME(fsp=6))
        return dialect.type_descriptor(DateTime())

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone: give an aware UTC time")
        return value.astimezone(dt.UTC).replace(tzinfo=None)

    def process_result_value(self, value: dt.datetime | None, dialect: Dialect) -> dt.datetime | None:
        return None if value is None else value.replace(tzinfo=dt.UTC)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        dict[str, Any]: JSON,
        list[Any]: JSON,
        dt.datetime: UtcDateTime,
        float: Float().with_variant(
            DOUBLE(asdecimal=False), "mysql", "mariadb"
        ),  # MySQL's own FLOAT keeps seven digits
    }


class Model(Base):
    __tablename__ = "models"

    name: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    description: Mapped[str] = mapped_column(Text, default="")
    kind: Mapped[str | None] = mapped_column(String(16))
    """classifier | predictor | extractor | router, where someone said so."""
    created_at: Mapped[dt.datetime]


class Version(Base):
    """An immutable version of a model: its artifact, what was read from the file, and its state."""

    __tablename__ = "versions"

    model: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    version: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    ordinal: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(DIGEST))
    format: Mapped[str] = mapped_column(String(16))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    files: Mapped[list[Any]]
    """[{"name", "digest", "size_bytes"}], the file to load first."""
    signature: Mapped[dict[str, Any] | None]
    facts: Mapped[dict[str, Any]]
    """What was read from the file or given beside it (opset, producer, author …)."""
    tags: Mapped[dict[str, Any]]
    golden_digest: Mapped[str | None] = mapped_column(String(DIGEST))
    rows_independent: Mapped[bool | None]
    """Measured by the validation: a batch answers as its rows alone do. None: not measured, so never batched."""
    validation: Mapped[dict[str, Any] | None]
    created_at: Mapped[dt.datetime]
    created_by: Mapped[str] = mapped_column(String(NAME))
    benchmark: Mapped[dict[str, Any] | None]
    """Figures of the last benchmark, with when and on what it ran."""
    deleted_at: Mapped[dt.datetime | None]
    """Its bytes were deleted then; the record stays."""

    __table_args__ = (Index(None, "model", "ordinal", unique=True), Index(None, "created_at"))


class Environment(Base):
    """One row an environment: its epoch (a random id, new after each restore) and its generation counter."""

    __tablename__ = "environments"

    name: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32))
    generation: Mapped[int]


class Placement(Base):
    """Where a version stands in one environment (staging, production, …)."""

    __tablename__ = "placements"

    model: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    version: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    environment: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    status: Mapped[str] = mapped_column(String(16))
    since: Mapped[dt.datetime]


class Route(Base):
    """The desired state of one model in one environment. `generation` is that of its last change."""

    __tablename__ = "routes"

    environment: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    model: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    stable: Mapped[str | None] = mapped_column(String(NAME))
    candidate: Mapped[str | None] = mapped_column(String(NAME))
    weight: Mapped[float]
    shadow: Mapped[bool]
    watch: Mapped[bool]
    """A canary, shadow or soak runs: the replicas count, and report their counts."""
    slow_threshold_seconds: Mapped[float | None]
    shadow_share: Mapped[float | None]
    """Share of the requests that a shadow sees copies of; None: all."""
    generation: Mapped[int]
    promotion: Mapped[str | None] = mapped_column(String(32))


class RouteChange(Base):
    """What was live when: one row for every change of a route."""

    __tablename__ = "route_changes"

    environment: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32), primary_key=True)
    model: Mapped[str] = mapped_column(String(NAME), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    """first | baseline | shadow | canary | promote | settled | withdraw | rollback | unfit"""
    stable: Mapped[str | None] = mapped_column(String(NAME))
    candidate: Mapped[str | None] = mapped_column(String(NAME))
    weight: Mapped[float]
    shadow: Mapped[bool]
    at: Mapped[dt.datetime]
    actor: Mapped[str] = mapped_column(String(NAME))
    reason: Mapped[str] = mapped_column(Text)
    promotion: Mapped[str | None] = mapped_column(String(32))
    """The promotion whose change it is, also where it is the one that ended it."""
    flow_run_id: Mapped[str | None] = mapped_column(String(64))


class Promotion(Base):
    """One attempt to bring a version up: its policy, how far it is, and how it ended."""

    __tablename__ = "promotions"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    environment: Mapped[str] = mapped_column(String(NAME))
    model: Mapped[str] = mapped_column(String(NAME))
    version: Mapped[str] = mapped_column(String(NAME))
    from_version: Mapped[str | None] = mapped_column(String(NAME))
    strategy: Mapped[str] = mapped_column(String(16))
    policy: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16))
    step: Mapped[str] = mapped_column(String(32))
    progress: Mapped[dict[str, Any]]
    """What a restarted flow needs: the windows so far (epoch, generation, weight), the frozen threshold."""
    reason: Mapped[str] = mapped_column(Text, default="")
    actor: Mapped[str] = mapped_column(String(NAME))
    flow_run_id: Mapped[str | None] = mapped_column(String(64), index=True)
    created_at: Mapped[dt.datetime]
    finished_at: Mapped[dt.datetime | None]
    asked: Mapped[dict[str, Any] | None]
    """What an approval is asked for: the fingerprint of artifact, route and policy. An approval of another one is stale."""
    approve_by: Mapped[dt.datetime | None]
    """The deadline of the approval, by the database's clock."""

    __table_args__ = (Index(None, "environment", "model", "created_at"),)


class PromotionStep(Base):
    """The story of a promotion, a row a decision, with the figures that it rests on."""

    __tablename__ = "promotion_steps"

    promotion: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[dt.datetime]
    step: Mapped[str] = mapped_column(String(32))
    title: Mapped[str] = mapped_column(String(255))
    detail: Mapped[str] = mapped_column(Text)
    figures: Mapped[dict[str, Any]]


class PromotionCommand(Base):
    """What a person told a running promotion: pause, resume, advance, stop. Taken by whoever carries it."""

    __tablename__ = "promotion_commands"

    promotion: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    command: Mapped[str] = mapped_column(String(16))
    actor: Mapped[str] = mapped_column(String(NAME))
    reason: Mapped[str] = mapped_column(Text)
    at: Mapped[dt.datetime]
    taken_at: Mapped[dt.datetime | None]


class Approval(Base):
    """One answer to a promotion that asked for approval, and whether it counts."""

    __tablename__ = "approvals"

    promotion: Mapped[str] = mapped_column(String(32), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    verdict: Mapped[str] = mapped_column(String(16))
    """approve | reject"""
    actor: Mapped[str] = mapped_column(String(NAME))
    key_id: Mapped[str | None] = mapped_column(String(32))
    """The key that the answer was authenticated with; None for the system's user and for a form."""
    via: Mapped[str] = mapped_column(String(16))
    """command | api | form"""
    claimed: Mapped[str | None] = mapped_column(String(NAME))
    """A name typed into a form: a claim."""
    note: Mapped[str] = mapped_column(Text)
    fingerprint: Mapped[str] = mapped_column(String(DIGEST))
    counts: Mapped[bool]
    why_not: Mapped[str] = mapped_column(Text)
    at: Mapped[dt.datetime]


class ApiKey(Base):
    """A key to the server and to approvals. Only its hash is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME))
    role: Mapped[str] = mapped_column(String(16))
    """view | infer | operate"""
    hash: Mapped[str] = mapped_column(String(DIGEST))
    created_at: Mapped[dt.datetime]
    created_by: Mapped[str] = mapped_column(String(NAME))
    expires_at: Mapped[dt.datetime | None]
    revoked_at: Mapped[dt.datetime | None]
    revoked_by: Mapped[str | None] = mapped_column(String(NAME))
    rate: Mapped[str | None] = mapped_column(String(24))
    """As registry.rates writes it; absent: the server's setting."""


class Counter(Base):
    """Numbers that only rise, by which servers see that a list of theirs is old ("keys")."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    value: Mapped[int]


class RollbackPoint(Base):
    """A state that a model can go back to, kept at each change of its stable version. Its artifacts stay until it is gone."""

    __tablename__ = "rollback_points"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    environment: Mapped[str] = mapped_column(String(NAME))
    model: Mapped[str] = mapped_column(String(NAME))
    version: Mapped[str] = mapped_column(String(NAME))
    epoch: Mapped[str] = mapped_column(String(32))
    generation: Mapped[int]
    """Of the change by which `version` became stable."""
    route: Mapped[dict[str, Any]]
    digests: Mapped[dict[str, Any]]
    """{"artifact": digest, "golden": digest | None, "files": [{"name", "digest", "size_bytes"}]}"""
    policy: Mapped[dict[str, Any] | None]
    settings: Mapped[dict[str, Any]]
    """What the settings said of serving then (profile, batch size, limits), without secrets."""
    created_at: Mapped[dt.datetime]
    gone_at: Mapped[dt.datetime | None]

    __table_args__ = (Index(None, "environment", "model", "created_at"), Index(None, "environment", "gone_at"))


class Reach(Base):
    """When a replica reached a generation. One that reached a later one has passed those before."""

    __tablename__ = "reaches"

    environment: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    replica: Mapped[str] = mapped_column(String(64), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    at: Mapped[dt.datetime]
    """By the wall clock of the replica, right after it switched its routes."""
    behind: Mapped[list[Any] | None]
    """Models whose route it could not serve as it was wanted then (a version that did not load)."""
    until: Mapped[dt.datetime | None]
    """The last report of this boot, once another boot of the replica has reported."""

    __table_args__ = (Index(None, "environment", "replica", "at"),)


class Feedback(Base):
    """A verdict on one answered request, posted back with its id; an id counts once."""

    __tablename__ = "feedback"

    request_id: Mapped[str] = mapped_column(String(160), primary_key=True)
    model: Mapped[str] = mapped_column(String(NAME))
    version: Mapped[str] = mapped_column(String(NAME))
    epoch: Mapped[str] = mapped_column(String(32))
    generation: Mapped[int]
    verdict: Mapped[str] = mapped_column(String(8))
    """good | bad"""
    reason: Mapped[str | None] = mapped_column(Text)
    key_id: Mapped[str | None] = mapped_column(String(32))
    at: Mapped[dt.datetime]

    __table_args__ = (Index(None, "model", "epoch", "generation"),)


class Lease(Base):
    """One operation per subject at a time. `heartbeat` is a counter; nobody compares wall clocks."""

    __tablename__ = "leases"

    subject: Mapped[str] = mapped_column(String(SUBJECT), primary_key=True)
    environment: Mapped[str] = mapped_column(String(NAME), index=True)
    state: Mapped[str] = mapped_column(String(20))
    token: Mapped[str] = mapped_column(String(64))
    counter: Mapped[int]
    heartbeat: Mapped[int]
    ttl_seconds: Mapped[float]
    holder: Mapped[str] = mapped_column(String(512))
    promotion: Mapped[str | None] = mapped_column(String(32))
    since: Mapped[dt.datetime]


class Replica(Base):
    """What one server process reports: where it answers, what it serves, which generation it has reached."""

    __tablename__ = "replicas"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    environment: Mapped[str] = mapped_column(String(NAME), index=True)
    address: Mapped[str] = mapped_column(String(255))
    boot_id: Mapped[str] = mapped_column(String(32))
    heartbeat: Mapped[int]
    epoch: Mapped[str] = mapped_column(String(32))
    generation: Mapped[int]
    serving: Mapped[dict[str, Any]]
    started_at: Mapped[dt.datetime]
    reached_at: Mapped[dt.datetime]
    reported_at: Mapped[dt.datetime]


class ReplicaCount(Base):
    """Cumulative counts of one boot of one replica, for one version under one generation of its route."""

    __tablename__ = "replica_counts"

    replica: Mapped[str] = mapped_column(String(64), primary_key=True)
    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    epoch: Mapped[str] = mapped_column(String(32), primary_key=True)
    generation: Mapped[int] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    version: Mapped[str] = mapped_column(String(NAME), primary_key=True)
    counts: Mapped[dict[str, Any]]

    __table_args__ = (Index(None, "model", "epoch", "generation"),)


class AuditEvent(Base):
    """One change, chained to the one before it: hash = SHA-256(previous hash, newline, text)."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    at: Mapped[str] = mapped_column(String(32), index=True)
    actor: Mapped[str] = mapped_column(String(NAME))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(SUBJECT), index=True)
    text: Mapped[str] = mapped_column(Text().with_variant(LONGTEXT(), "mysql", "mariadb"))
    """The canonical JSON that is hashed; the columns above are copies to search by, and verified against it."""
    hash: Mapped[str] = mapped_column(String(DIGEST))


class AuditHead(Base):
    """The newest event; the last row that a transaction locks."""

    __tablename__ = "audit_head"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seq: Mapped[int]
    hash: Mapped[str] = mapped_column(String(DIGEST))
