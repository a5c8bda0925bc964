"""The commands about models, in this process: what they print and answer (a process each: tests/e2e/test_command_line.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from modelkeep import cli
from tests.unit.registry import kit


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELKEEP_PROFILE", "cpu")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Line:
    """The command line: a call, its exit code and what it printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str, code: int = 0) -> str:
        found = cli.main(list(arguments))
        out, err = self._capsys.readouterr()
        assert found == code, err
        assert code == 0 or (err.strip() and "Traceback" not in err)
        return out if code == 0 else err

    def document(self, *arguments: str) -> Any:
        return json.loads(self(*arguments))


@pytest.fixture
def line(home: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    made = Line(capsys)
    for version in ("8", "9"):
        path = kit.onnx_file(home / f"{version}.onnx", float(version))
        made("register", str(path), "--name", "shelf", "--version", version)
    return made


def test_tags_are_set_taken_away_and_found(line: Line) -> None:
    tagged = line.document("models", "tag", "shelf", "8", "team=vision", "run=7", "--json")
    assert tagged["tags"] == {"team": "vision", "run": "7"}
    assert line.document("models", "tag", "shelf", "8", "-run", "--json")["tags"] == {"team": "vision"}
    rows = line.document("models", "--tag", "team=vision", "--json")["versions"]
    assert [(row["model"], row["version"]) for row in rows] == [("shelf", "8")]
    assert "team=vision" in line("models")
    line("models", "tag", "shelf", "8", "novalue", code=2)


def test_two_versions_side_by_side(line: Line) -> None:
    line("models", "tag", "shelf", "8", "team=vision")
    found = line.document("models", "compare", "shelf", "8", "9", "--json")
    assert found["differences"]["tags.team"] == {"a": "vision", "b": None, "change": None}
    assert "tags.team" in line("models", "compare", "shelf", "8", "9")
    assert "has no version '7'" in line("models", "compare", "shelf", "8", "7", code=1)


def test_a_model_is_described(line: Line) -> None:
    assert line.document("models", "describe", "shelf", "--kind", "classifier", "--json")["kind"] == "classifier"
    assert "(classifier): of books" in line("models", "describe", "shelf", "--description", "of books")
    assert "shelf (classifier): of books" in line("models", "show", "shelf")


def test_a_version_is_archived_and_deleted_and_its_record_stays(line: Line) -> None:
    assert "only an archived version" in line("models", "delete", "shelf", "8", "--reason", "space", code=1)
    line("models", "archive", "shelf", "8", code=2)  # a reason is needed
    done = line.document("models", "archive", "shelf", "8", "--reason", "old", "--json")
    assert (done["state"], done["before"]) == ("archived", "registered")
    deleted = line.document("models", "delete", "shelf", "8", "--reason", "space", "--json")
    assert (deleted["files_removed"], deleted["again"]) == (1, False)
    assert "was deleted at" in line("models", "delete", "shelf", "8", "--reason", "space")
    assert line.document("models", "show", "shelf", "8", "--json")["deleted_at"]
    assert "deleted" in line("models", "--model", "shelf", "--state", "archived")
    events = line.document("audit", "list", "--subject", "shelf", "--action", "version", "--json")
    assert [event["action"] for event in events][:2] == ["version.deleted", "version.archived"]


def test_pages_say_where_the_next_one_is(line: Line) -> None:
    assert "2 versions; the next page: --page 2" in line("models", "--limit", "1")
    assert line.document("models", "--limit", "1", "--page", "2", "--json")["next"] is None
    assert line.document("models", "show", "shelf", "--limit", "1", "--json")["next"] == 2


def test_what_was_never_served_has_no_history(line: Line) -> None:
    assert "shelf was never served" in line("models", "history", "shelf")
    assert line.document("models", "history", "shelf", "--since", "2d", "--json")["total"] == 0
    assert "no model was served" in line("models", "at", "yesterday 03:12")
    assert "on which day" in line("models", "at", "03:12", code=2)
    assert "could be swapped" in line("audit", "list", "--since", "10/11/2025", code=2)
    assert "nothing-here" in line("models", "history", "nothing-here", code=1)


def test_audit_export_goes_on_from_a_number(line: Line) -> None:
    everything = [json.loads(one) for one in line("audit", "export").splitlines()]
    rest = [json.loads(one) for one in line("audit", "export", "--after", "2").splitlines()]
    assert rest == everything[2:]
    assert line("audit", "export", "--since", "now") == ""
