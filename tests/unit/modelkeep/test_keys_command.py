"""`modelkeep keys create`: a key that was made is shown, whatever comes after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelkeep import cli
from modelkeep.commands import keys as command
from registry.database import Database
from registry.errors import UnavailableError
from registry.keys import listed


@pytest.mark.parametrize("ends", [UnavailableError("the registry went away"), KeyboardInterrupt()])
@pytest.mark.parametrize("as_json", [False, True])
def test_a_key_is_shown_though_what_follows_fails(
    ends: BaseException,
    as_json: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def fails(*_: object) -> None:
        raise ends

    monkeypatch.setattr(command, "_tell", fails)
    assert cli.main(["keys", "create", "anna", "--role", "view", *(["--json"] if as_json else [])]) != 0
    shown = capsys.readouterr().out
    text = json.loads(shown)["key"] if as_json else shown.strip()
    database = Database(f"sqlite:///{tmp_path / 'home' / 'registry.db'}", anchors=tmp_path / "home" / "audit.anchors")
    with database.read() as session:
        [kept] = [one for one in listed(session) if one.name == "anna"]
    database.dispose()
    assert text.startswith(f"mk_{kept.id}_")
