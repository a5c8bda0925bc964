"""Databases of three kinds in one backup, verified in processes of their own, with no password anywhere."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from pydantic import SecretStr

from registry.sections import Database
from registry.settings import Settings
from tasks.backup import states, verify
from tasks.backup.components import Target
from tasks.backup.kinds import kind
from tasks.backup.repository import open_repository
from tasks.backup.run import Request, back_up
from tests.integration.backup.test_mariadb import execute as mariadb_execute
from tests.integration.backup.test_postgresql import execute as postgresql_execute
from tests.registry_servers import PASSWORD, Server


def test_three_databases_are_backed_up_verified_and_brought_back(
    tmp_path: Path, mariadb: Server, postgresql: Server
) -> None:
    urls = {"shop": mariadb.create(), "ledger": postgresql.create(), "notes": f"sqlite:///{tmp_path / 'notes.db'}"}
    mariadb_execute(urls["shop"], "CREATE TABLE t (id INT)", "INSERT INTO t VALUES (1), (2)")
    postgresql_execute(urls["ledger"], "CREATE TABLE t (id INT)", "INSERT INTO t VALUES (1), (2)")
    with sqlite3.connect(tmp_path / "notes.db") as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS id")
    connection.close()
    settings = Settings(
        home=tmp_path / "home",
        backups=[str(tmp_path / "backups")],
        databases=[
            Database(
                name=name,
                url=url.replace(f":{PASSWORD}@", "@"),
                password=SecretStr(PASSWORD) if PASSWORD in url else None,
            )
            for name, url in urls.items()
        ],
    )
    manifest = back_up(settings, Request(("database",))).manifest
    assert manifest is not None and manifest.state == "complete"
    assert {one.name: one.kind for one in manifest.components} == {
        "database:shop": "mariadb", "database:ledger": "postgresql", "database:notes": "sqlite",
    }  # fmt: skip
    verify.verify(settings, manifest.backup_id)
    repository = open_repository(settings)
    assert states.derive(manifest, repository.states(manifest.backup_id)).state == "verified"

    for name, fresh in (("shop", mariadb.create()), ("ledger", postgresql.create())):
        component = manifest.component(f"database:{name}")
        assert component is not None
        found = kind(component.kind).restore(repository.source(manifest, component.name), Target(url=fresh))
        assert (found["tables"], found["rows"]) == (1, 2)
    for path in (tmp_path / "backups", tmp_path / "home"):
        for file in (one for one in path.rglob("*") if one.is_file()):
            assert PASSWORD.encode() not in file.read_bytes(), file
