"""Where tools that change schemas keep the revision of a database. The same words in every SQL."""

from __future__ import annotations

from collections.abc import Mapping

REVISIONS: Mapping[str, str] = {
    "alembic_version": "SELECT version_num FROM alembic_version ORDER BY version_num LIMIT 1",
    "flyway_schema_history": "SELECT version FROM flyway_schema_history WHERE success ORDER BY installed_rank DESC LIMIT 1",
    "django_migrations": "SELECT name FROM django_migrations ORDER BY id DESC LIMIT 1",
    "schema_migrations": "SELECT version FROM schema_migrations ORDER BY version DESC LIMIT 1",
}
"""Table: the statement that answers the newest revision, if the table is there."""
