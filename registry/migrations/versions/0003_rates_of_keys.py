"""Keys may have a rate of their own. Only adds."""

from __future__ import annotations

import sqlalchemy as sa

from registry import ddl

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    ddl.add_column("api_keys", sa.Column("rate", sa.String(24), nullable=True))


def downgrade() -> None:
    ddl.drop_columns("api_keys", "rate")
