"""The first schema: models, versions, routes, promotions, leases, replicas, audit."""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from registry import ddl
from registry.schema import UtcDateTime

revision = "0001"
down_revision = None


def upgrade() -> None:
    ddl.create_table(
        "audit",
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.String(length=32), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=320), nullable=False),
        sa.Column(
            "text",
            sa.Text().with_variant(mysql.LONGTEXT(), "mysql", "mariadb"),
            nullable=False,
        ),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    ddl.create_index("audit", ["at"])
    ddl.create_index("audit", ["subject"])
    ddl.create_table(
        "audit_head",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_head")),
    )
    ddl.create_table(
        "environments",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_environments")),
    )
    ddl.create_table(
        "leases",
        sa.Column("subject", sa.String(length=320), nullable=False),
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("token", sa.String(length=64), nullable=False),
        sa.Column("counter", sa.Integer(), nullable=False),
        sa.Column("heartbeat", sa.Integer(), nullable=False),
        sa.Column("ttl_seconds", ddl.FLOAT, nullable=False),
        sa.Column("holder", sa.String(length=512), nullable=False),
        sa.Column("promotion", sa.String(length=32), nullable=True),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("subject", name=op.f("pk_leases")),
    )
    ddl.create_index("leases", ["environment"])
    ddl.create_table(
        "models",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_models")),
    )
    ddl.create_table(
        "placements",
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=128), nullable=False),
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("since", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", "environment", name=op.f("pk_placements")),
    )
    ddl.create_table(
        "promotion_steps",
        sa.Column("promotion", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("title", sa.String(length=255), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("figures", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("promotion", "number", name=op.f("pk_promotion_steps")),
    )
    ddl.create_table(
        "promotions",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=128), nullable=False),
        sa.Column("from_version", sa.String(length=128), nullable=True),
        sa.Column("strategy", sa.String(length=16), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("step", sa.String(length=32), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("flow_run_id", sa.String(length=64), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    ddl.create_index("promotions", ["environment", "model", "created_at"])
    ddl.create_index("promotions", ["flow_run_id"])
    ddl.create_table(
        "replica_counts",
        sa.Column("replica", sa.String(length=64), nullable=False),
        sa.Column("boot_id", sa.String(length=32), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=128), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint(
            "replica", "boot_id", "epoch", "generation", "model", "version", name=op.f("pk_replica_counts")
        ),
    )
    ddl.create_index("replica_counts", ["model", "epoch", "generation"])
    ddl.create_table(
        "replicas",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("address", sa.String(length=255), nullable=False),
        sa.Column("boot_id", sa.String(length=32), nullable=False),
        sa.Column("heartbeat", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("serving", sa.JSON(), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("reached_at", UtcDateTime(), nullable=False),
        sa.Column("reported_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_replicas")),
    )
    ddl.create_index("replicas", ["environment"])
    ddl.create_table(
        "route_changes",
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("stable", sa.String(length=128), nullable=True),
        sa.Column("candidate", sa.String(length=128), nullable=True),
        sa.Column("weight", ddl.FLOAT, nullable=False),
        sa.Column("shadow", sa.Boolean(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("environment", "generation", "epoch", name=op.f("pk_route_changes")),
    )
    ddl.create_index("route_changes", ["model"])
    ddl.create_table(
        "routes",
        sa.Column("environment", sa.String(length=128), nullable=False),
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("stable", sa.String(length=128), nullable=True),
        sa.Column("candidate", sa.String(length=128), nullable=True),
        sa.Column("weight", ddl.FLOAT, nullable=False),
        sa.Column("shadow", sa.Boolean(), nullable=False),
        sa.Column("watch", sa.Boolean(), nullable=False),
        sa.Column("slow_threshold_seconds", ddl.FLOAT, nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("promotion", sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint("environment", "model", name=op.f("pk_routes")),
    )
    ddl.create_table(
        "versions",
        sa.Column("model", sa.String(length=128), nullable=False),
        sa.Column("version", sa.String(length=128), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("signature", sa.JSON(), nullable=True),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("golden_digest", sa.String(length=64), nullable=True),
        sa.Column("rows_independent", sa.Boolean(), nullable=True),
        sa.Column("validation", sa.JSON(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(length=128), nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name=op.f("pk_versions")),
    )
    ddl.create_index("versions", ["model", "ordinal"], unique=True)
    genesis = hashlib.sha256(b"modelkeep audit chain, version 1").hexdigest()
    connection = op.get_bind()
    if connection.execute(sa.text("SELECT count(*) FROM audit_head")).scalar() == 0:
        op.execute(sa.text("INSERT INTO audit_head (id, seq, hash) VALUES (1, 0, :hash)").bindparams(hash=genesis))


def downgrade() -> None:
    ddl.drop_tables(
        "versions",
        "routes",
        "route_changes",
        "replicas",
        "replica_counts",
        "promotions",
        "promotion_steps",
        "placements",
        "models",
        "leases",
        "environments",
        "audit_head",
        "audit",
    )
