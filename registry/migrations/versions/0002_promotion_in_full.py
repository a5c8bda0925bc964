"""Approvals, commands, keys, rollback points, feedback, and when each replica reached each generation. Only adds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from registry import ddl
from registry.schema import UtcDateTime

revision = "0002"
down_revision = "0001"


OLDER = (
    "audit", "audit_head", "environments", "leases", "models", "placements", "promotion_steps", "promotions", "replica_counts",
    "replicas", "route_changes", "routes", "versions",
)  # fmt: skip
FLOATS = (
    ("leases", "ttl_seconds", False),
    ("route_changes", "weight", False),
    ("routes", "weight", False),
    ("routes", "slow_threshold_seconds", True),
)


def _columns() -> list[tuple[str, sa.Column[object]]]:
    return [
        ("models", sa.Column("kind", sa.String(16), nullable=True)),
        ("versions", sa.Column("benchmark", sa.JSON(), nullable=True)),
        ("versions", sa.Column("deleted_at", UtcDateTime(), nullable=True)),
        ("routes", sa.Column("shadow_share", ddl.FLOAT, nullable=True)),
        ("route_changes", sa.Column("promotion", sa.String(32), nullable=True)),
        ("route_changes", sa.Column("flow_run_id", sa.String(64), nullable=True)),
        ("promotions", sa.Column("asked", sa.JSON(), nullable=True)),
        ("promotions", sa.Column("approve_by", UtcDateTime(), nullable=True)),
    ]


def upgrade() -> None:
    for table, column in _columns():
        ddl.add_column(table, column)
    ddl.create_table(
        "promotion_commands",
        sa.Column("promotion", sa.String(32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("command", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("taken_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("promotion", "number", name=op.f("pk_promotion_commands")),
    )
    ddl.create_table(
        "approvals",
        sa.Column("promotion", sa.String(32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=True),
        sa.Column("via", sa.String(16), nullable=False),
        sa.Column("claimed", sa.String(128), nullable=True),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("counts", sa.Boolean(), nullable=False),
        sa.Column("why_not", sa.Text(), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("promotion", "number", name=op.f("pk_approvals")),
    )
    ddl.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("created_by", sa.String(128), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_at", UtcDateTime(), nullable=True),
        sa.Column("revoked_by", sa.String(128), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    ddl.create_table(
        "counters",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("value", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_counters")),
    )
    ddl.create_table(
        "rollback_points",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("environment", sa.String(128), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("route", sa.JSON(), nullable=False),
        sa.Column("digests", sa.JSON(), nullable=False),
        sa.Column("policy", sa.JSON(), nullable=True),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("gone_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_rollback_points")),
    )
    ddl.create_index("rollback_points", ["environment", "model", "created_at"])
    ddl.create_table(
        "reaches",
        sa.Column("environment", sa.String(128), nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("replica", sa.String(64), nullable=False),
        sa.Column("boot_id", sa.String(32), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("behind", sa.JSON(), nullable=True),
        sa.Column("until", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("environment", "epoch", "generation", "replica", "boot_id", name=op.f("pk_reaches")),
    )
    ddl.create_index("reaches", ["environment", "replica", "at"])
    ddl.create_index("versions", ["created_at"])
    ddl.create_table(
        "feedback",
        sa.Column("request_id", sa.String(160), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("version", sa.String(128), nullable=False),
        sa.Column("epoch", sa.String(32), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("verdict", sa.String(8), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("key_id", sa.String(32), nullable=True),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_feedback")),
    )
    ddl.create_index("feedback", ["model", "epoch", "generation"])
    # What revision 0001 of an early 0.1 made on a server: names compared without case, floats of seven digits.
    ddl.compare_by_bytes(*OLDER)
    for table, name, nullable in FLOATS:
        ddl.keep_all_digits(table, name, nullable=nullable)


def downgrade() -> None:
    ddl.drop_tables("feedback", "reaches", "rollback_points", "counters", "api_keys", "approvals", "promotion_commands")
    ddl.drop_index("versions", ["created_at"])
    for table in dict.fromkeys(owner for owner, _ in _columns()):
        ddl.drop_columns(table, *(column.name for owner, column in _columns() if owner == table))
