"""The living rollback points are found without reading those that are gone. Only adds."""

from __future__ import annotations

from registry import ddl

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    ddl.create_index("rollback_points", ["environment", "gone_at"])


def downgrade() -> None:
    ddl.drop_index("rollback_points", ["environment", "gone_at"])
