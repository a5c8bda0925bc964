"""`modelkeep db`: the schema's upgrade and the way to another database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelkeep.commands.database import database_app
from registry.database import Database
from registry.errors import ConflictError, UsageError
from registry.schema import REVISION
from tests.unit.registry import kit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def invoke(*arguments: str, given: str | None = None) -> str:
    result = CliRunner().invoke(database_app, list(arguments), input=given)
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_an_upgrade_says_where_the_registry_is_and_what_it_was(home: Path) -> None:
    assert invoke("upgrade") == f"the registry is at schema revision {REVISION} (new)\n"
    assert invoke("upgrade") == f"the registry is at schema revision {REVISION}\n"
    document = json.loads(invoke("upgrade", "--json"))
    assert (document["before"], document["revision"]) == (REVISION, REVISION)


def test_a_registry_is_copied_to_a_url_given_as_argument_or_input(home: Path, tmp_path: Path) -> None:
    invoke("upgrade")
    source = Database(f"sqlite:///{home / 'registry.db'}", anchors=home / "audit.anchors")
    kit.add_version(source, "1")
    url = f"sqlite:///{tmp_path / 'new' / 'registry.db'}"
    document = json.loads(invoke("copy-to", url, "--json"))
    assert (document["rows"]["versions"], document["behind"], document["faults"]) == (1, 0, [])
    target = Database(url, anchors=home / "audit.anchors")
    assert kit.verdict(target).holds, "the anchors of the home are those of both"
    with pytest.raises(ConflictError, match="is not empty"):
        invoke("copy-to", url)
    said = invoke("copy-to", "-", given=f"sqlite:///{tmp_path / 'other' / 'registry.db'}\n")
    assert "counts and audit chain hold there" in said
    assert "MODELKEEP_DATABASE_URL" in said
    for database in (source, target):
        database.dispose()


def test_a_wrong_url_is_refused_with_the_right_ones(home: Path) -> None:
    with pytest.raises(UsageError, match="must begin with one of sqlite://"):
        invoke("copy-to", "oracle://app@db/app")
