"""The commands about backups, in this process: what they print, and with which exit codes they end. No Prefect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modelkeep.cli import main
from registry.connect import open_database
from registry.errors import StorageError
from registry.schema import AuditEvent
from registry.settings import load_settings
from tasks.backup import ledger
from tasks.backup.places import DirectoryPlace
from tests.unit.tasks.backup.log_history import three_days

Run = Callable[..., Any]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "home"
    found.mkdir()
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "one").write_bytes(b"picture" * 1000)
    (found / "modelkeep.toml").write_text(f'[[files]]\nname = "uploads"\npath = "{tmp_path}/uploads"\n')
    monkeypatch.setenv("MODELKEEP_HOME", str(found))
    monkeypatch.setenv("MODELKEEP_PROFILE", "cpu")
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command and return what it prints with --json."""

    def one(*arguments: str, code: int = 0) -> Any:
        capsys.readouterr()
        found = main([*arguments, "--json"])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return json.loads(captured.out) if captured.out else captured.err

    return one


def _back_up(run: Run, *options: str, code: int = 0) -> Any:
    return run("backup", "--no-prefect", "--components", "files", *options, code=code)


def test_a_backup_is_listed_and_shown_with_what_it_holds(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    taken = _back_up(run, "--reason", "before the move")
    assert (taken["state"], [one["name"] for one in taken["components"]]) == ("complete", ["files:uploads"])
    [row] = run("backups", "list")
    assert (row["backup_id"], row["state"], row["size_bytes"]) == (taken["backup_id"], "complete", 7000)
    assert (len(row["places"]), row["pinned"], row["reason"]) == (1, False, "before the move")
    shown = run("backups", "show", taken["backup_id"])
    assert shown["manifest"]["format"] == "modelkeep-backup"
    assert [note["state"] for note in shown["notes"]] == ["running"]
    assert shown["missing_at"] == []
    assert main(["backups"]) == 0
    assert main(["backups", "show", taken["backup_id"]]) == 0
    printed = capsys.readouterr().out
    assert "files:uploads" in printed
    assert "not encrypted" in printed


def test_a_manifest_can_be_named_by_its_path_without_the_home_that_wrote_it(
    run: Run, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = _back_up(run)
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path / "other"))
    shown = run("backups", "show", f"{home}/backups/{taken['backup_id']}.manifest.json")
    assert shown["backup_id"] == taken["backup_id"]


def test_pins_and_dates_are_noted_shown_and_on_record(run: Run) -> None:
    backup_id = _back_up(run)["backup_id"]
    assert run("backups", "pin", backup_id, "--reason", "audit")["pinned"] is True
    kept = run("backups", "keep", backup_id, "--until", "2100-01-31")
    assert kept["keep_until"] == "2100-01-31T00:00:00.000000Z"
    assert run("backups", "keep", backup_id, "--until", "2050-01-31")["keep_until"] == kept["keep_until"]
    assert run("backups", "unpin", backup_id)["pinned"] is False
    [row] = run("backups", "list")
    assert (row["pinned"], row["keep_until"]) == (False, kept["keep_until"])
    database = open_database(load_settings())
    with database.read() as session:
        actions = [event.action for event in session.query(AuditEvent).order_by(AuditEvent.seq)]
    database.dispose()
    assert actions[-4:] == ["backup.pinned", "backup.kept", "backup.kept", "backup.unpinned"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("backups", "show", "20200101T000000Z-000000"), 1),
        (("backups", "show", "yesterday"), 2),
        (("backups", "verify", "20200101T000000Z-000000"), 1),
        (("backups", "verify", "--sample", "0.5"), 2),
        (("backups", "verify", "20200101T000000Z-000000", "--sample", "7"), 2),
        (("backups", "keep", "20200101T000000Z-000000", "--until", "soon"), 2),
        (("backup", "--components", "tapes"), 2),
        (("backup", "--components", "database"), 2),
        (("backups", "rotate-key", "new.key"), 1),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(run: Run, arguments: tuple[str, ...], code: int) -> None:
    said = run(*arguments, code=code)
    assert said.startswith("modelkeep: ")


def test_a_date_that_is_past_keeps_nothing(run: Run) -> None:
    backup_id = _back_up(run)["backup_id"]
    assert "past" in run("backups", "keep", backup_id, "--until", "2020-01-01", code=2)


def test_a_home_without_backups_says_so(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("backups", "list") == []
    assert main(["backups", "list"]) == 0
    assert "no backups yet" in capsys.readouterr().out
    assert run("status")["backups"] is None


def test_status_tells_the_age_of_the_last_backup_and_of_the_last_verified_one(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = _back_up(run)
    found = run("status")["backups"]
    assert found["last"]["backup_id"] == taken["backup_id"]
    row = found["components"]["files:uploads"]
    assert row["age_seconds"] >= 0
    assert row["verified_age_seconds"] is None
    assert main(["status"]) == 0
    assert "never" in capsys.readouterr().out


def test_a_sample_is_read_back_and_what_is_due_is_checked(run: Run) -> None:
    backup_id = _back_up(run)["backup_id"]
    [report] = run("backups", "verify", "--no-prefect")
    assert (report["backup_id"], report["state"], report["share"]) == (backup_id, "complete", 0.05)
    assert run("backups", "verify", "--no-prefect") == []


def test_with_a_key_backups_are_encrypted_and_another_key_can_take_its_place(
    run: Run, home: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "one.key", tmp_path / "two.key"
    made = run("backups", "new-key", str(first))
    assert made["path"] == str(first)
    run("backups", "new-key", str(first), code=1)
    run("backups", "new-key", str(second))
    config = home / "modelkeep.toml"
    plain = config.read_text()
    config.write_text(f'backup_key_file = "{first}"\n{plain}')
    backup_id = _back_up(run)["backup_id"]
    assert run("backups", "show", backup_id)["manifest"]["encryption"]["method"] == "aes-256-gcm"
    assert run("backups", "rotate-key", str(second))["from"] == made["key_id"]
    assert "key" in run("backups", "list", code=1)
    config.write_text(f'backup_key_file = "{second}"\n{plain}')
    assert [row["backup_id"] for row in run("backups", "list")] == [backup_id]
    config.write_text(plain)
    assert "encrypted" in run("backups", "list", code=1)
    config.write_text(f'backup_key_file = "{second}"\n{plain}')
    assert _back_up(run)["new_bytes"] == 0


def test_a_key_that_may_only_look_backs_up_nothing_and_pins_nothing(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_id = _back_up(run)["backup_id"]
    key = run("keys", "create", "viewer", "--role", "view")["key"]
    monkeypatch.setenv("MODELKEEP_API_KEY", key)
    assert "view" in _back_up(run, code=1)
    assert "view" in run("backups", "pin", backup_id, code=1)
    assert len(run("backups", "list")) == 1


def test_logs_that_no_backup_needs_are_shown_and_go_with_apply(
    run: Run, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = three_days()
    for name, data in history.places[0].names.items():
        DirectoryPlace(home / "backups").put(name, data)
    [shown] = run("backups", "prune")["logs"]["databases"]
    assert [one["log"] for one in shown["goes"]] == ["000001/binlog.000001", "000001/binlog.000002"]
    assert all(one["size_bytes"] > 0 for one in shown["goes"]) and shown["removed"] == []
    assert main(["backups", "prune"]) == 0
    assert "logs of app: 2 of 6 go (000001/binlog.000001 to 000001/binlog.000002)" in capsys.readouterr().out
    [done] = run("backups", "prune", "--apply")["logs"]["databases"]
    assert done["removed"] == ["000001/binlog.000001", "000001/binlog.000002"] and done["removed_bytes"] > 0
    assert sorted(path.name for path in (home / "backups/logs/app/000001").iterdir() if path.is_dir()) == [
        f"binlog.{number:06d}.pieces" for number in (3, 4, 5, 6)
    ]
    assert main(["backups", "prune"]) == 0
    assert "logs of app: 4 stay" in capsys.readouterr().out
    document = home / "backups/logs/app/000001/binlog.000003.json"
    document.write_bytes(document.read_bytes()[:-9])
    assert "cannot be told" in run("backups", "prune", code=3)["logs"]["databases"][0]["unreadable"]


def _three_days_in(home: Path) -> None:
    for name, data in three_days().places[0].names.items():
        DirectoryPlace(home / "backups").put(name, data)


@pytest.mark.parametrize("as_json", [True, False])
def test_what_a_prune_could_not_put_on_record_is_told_beside_its_result(
    as_json: bool, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _three_days_in(home)
    (home / "audit.anchors").write_text("there was a registry\n")
    assert main(["backups", "prune", "--apply", *(["--json"] if as_json else [])]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("is not in the audit chain: logs of app, 2 from 000001/binlog.000001 to") == 1
    assert "audit chain" not in captured.out
    if as_json:
        assert json.loads(captured.out)["logs"]["databases"][0]["removed_bytes"] > 0


@pytest.mark.parametrize(
    ("method", "part"), [("list", "logs/"), ("delete", "logs/"), ("get", "logs/app/000001/binlog.000003.json")]
)
def test_a_prune_tells_each_fault_once(
    method: str, part: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _three_days_in(home)
    works = getattr(DirectoryPlace, method)

    def fails(self: DirectoryPlace, name: str = "") -> Any:
        if name.startswith(part):
            raise StorageError("the disk has errors")
        return works(self, name)

    monkeypatch.setattr(DirectoryPlace, method, fails)
    assert main(["backups", "prune", "--apply"]) == 3
    captured = capsys.readouterr()
    assert captured.err.count("the disk has errors") == 1, captured.err
    assert "the disk has errors" not in captured.out


def test_status_tells_how_old_the_shipped_logs_are_and_warns(
    run: Run, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (home / "modelkeep.toml").open("a") as file:
        file.write('[[databases]]\nname = "app"\nurl = "mysql+pymysql://keeper@db/app"\n[backup]\nlogs = ["app"]\n')
    assert run("status")["backups"]["logs"]["app"]["late"] is True
    main(["status"])
    printed = capsys.readouterr().out
    assert "no backup was ever taken" in printed and "logs of app: none was shipped yet" in printed
    row = {"database": "app", "covers_until": "2026-11-01T00:00:00.000000Z", "gap": "purged", "failed": None}
    lost = {"why": "another timeline", "from": "then", "until": "later", "series": 2}
    ledger.note_shipped(home, {**row, "lost": lost}, ["app"])
    ledger.note_shipped(home, {**row, "failed": "it is away"}, ["app"])
    main(["status"])
    printed = " ".join(capsys.readouterr().out.split())
    for text in (
        "logs of app: shipped up to 2026-11-01T00:00:00.000000Z", "more than three runs ago", "not shipped: it is away",
        "purged", "between then and later it cannot be brought back to a moment: another timeline",
    ):  # fmt: skip
        assert text in printed
