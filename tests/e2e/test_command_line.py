"""The commands that need no Prefect, as programs call them: one JSON document on standard output, exit codes, errors on standard error only."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import MODEL, POLICY, Box, box, build, go, wait_for, write_golden


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Box]:
    """A box with digits 1, registered from the command line and made stable."""
    with box(tmp_path_factory.mktemp("box")) as made:
        path = build(made.folder / "v1.onnx", seed=1)
        golden = write_golden(made.folder / "golden.npz", path)
        done = made.modelkeep("register", str(path), "--name", MODEL, "--golden", str(golden), "--tag", "by=test")
        assert done.returncode == 0, done.stderr
        made.models["1"] = path
        made.settle_by_hand("1")
        yield made


def document(done: subprocess.CompletedProcess[str], code: int = 0) -> Any:
    """The one JSON document of a command; nothing else may be on standard output."""
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


def problem(done: subprocess.CompletedProcess[str], code: int) -> str:
    """What a command said was wrong: on standard error, no stack trace, nothing on standard output."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    return done.stderr


# register, models


def test_register_answers_with_model_version_digest_and_state(found: Box) -> None:
    path = build(found.folder / "v2.onnx", seed=2)
    first = document(found.modelkeep("register", str(path), "--name", MODEL, "--version", "2", "--json"))
    assert {"model", "version", "digest", "state", "created"} <= set(first)
    assert (first["model"], first["version"], first["state"], first["created"]) == (MODEL, "2", "registered", True)
    assert re.fullmatch(r"[0-9a-f]{64}", first["digest"])
    again = document(found.modelkeep("register", str(path), "--name", MODEL, "--version", "2", "--json"))
    assert (again["digest"], again["created"]) == (first["digest"], False)


def test_a_version_with_other_bytes_is_refused(found: Box) -> None:
    path = build(found.folder / "other.onnx", seed=77)
    said = problem(found.modelkeep("register", str(path), "--name", MODEL, "--version", "1", "--json"), 1)
    assert "digits 1" in said


@pytest.mark.parametrize(
    ("what", "code", "said"),
    [
        ("missing", 1, "does not exist"),
        ("empty", 1, "empty"),
        ("folder", 1, "a directory without a model"),
        ("pickle", 1, "pickle"),
        ("truncated", 1, "truncated.onnx"),
    ],
)
def test_a_file_that_is_no_model_is_refused_and_nothing_is_stored(
    found: Box, tmp_path: Path, what: str, code: int, said: str
) -> None:
    path = tmp_path / f"{what}.onnx"
    if what == "folder":
        path.mkdir()
    elif what == "pickle":
        path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.")
    elif what == "truncated":
        whole = build(tmp_path / "whole.onnx", seed=5).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif what == "empty":
        path.write_bytes(b"")
    before = sorted(found.home.joinpath("artifacts").rglob("*"))
    text = problem(found.modelkeep("register", str(path), "--name", "refused", "--json"), code)
    assert said in text.lower(), text
    assert sorted(found.home.joinpath("artifacts").rglob("*")) == before
    assert "refused" not in {row["model"] for row in document(found.modelkeep("models", "--json"))["versions"]}


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", "../../etc"])
def test_a_name_that_is_not_allowed_is_bad_usage(found: Box, name: str) -> None:
    problem(found.modelkeep("register", str(found.models["1"]), "--name", name), 2)


def test_models_lists_every_version_with_its_digest_and_place(found: Box) -> None:
    listed = document(found.modelkeep("models", "--json"))
    assert (listed["total"], listed["next"]) == (len(listed["versions"]), None)
    row = next(row for row in listed["versions"] if (row["model"], row["version"]) == (MODEL, "1"))
    assert re.fullmatch(r"[0-9a-f]{64}", row["digest"])
    assert (row["state"], row["environments"]) == ("validated", {"production": "stable"})
    shown = document(found.modelkeep("models", "show", MODEL, "--json"))
    assert (shown["model"], shown["routes"]["production"]["stable"]) == (MODEL, "1")
    assert shown["total"] == len(shown["versions"])
    assert "nothing-here" in problem(found.modelkeep("models", "show", "nothing-here", "--json"), 1)
    assert MODEL in found.modelkeep("models").stdout


def test_one_version_is_shown_with_its_figures_and_how_it_came_there(found: Box) -> None:
    full = document(found.modelkeep("models", "show", MODEL, "1", "--json"))
    assert full["lineage"]["promotions"][0]["state"] == "promoted"
    assert full["lineage"]["stable"][0]["until"] is None
    assert full["benchmark"] is None
    said = found.modelkeep("models", "show", MODEL, "1").stdout
    assert "last benchmark: not measured" in said and "stable in production from" in said


def test_the_history_and_a_moment_of_it_name_who_and_why(found: Box) -> None:
    history = document(found.modelkeep("models", "history", MODEL, "--json"))
    assert history["total"] == len(history["changes"])
    first = history["changes"][-1]
    assert (first["kind"], first["stable"], bool(first["promotion"]), bool(first["who"])) == ("first", "1", True, True)
    moment = document(found.modelkeep("models", "at", first["since"], "--json"))
    assert moment["models"][0]["answers"] == {"1": 1.0}
    assert document(found.modelkeep("models", "at", "2001-01-01", "--json"))["models"] == []
    assert "version 1" in found.modelkeep("models", "at", "now", "--model", MODEL).stdout


def test_a_folder_is_discovered_and_what_is_wrong_is_listed(found: Box, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    (folder / "seen").mkdir(parents=True)
    build(folder / "seen" / "1.onnx", seed=31)
    (folder / "bad.onnx").write_bytes(b"no model at all")
    told = document(found.modelkeep("models", "discover", str(folder), "--interval", "0.2", "--json"), 3)
    assert [(row["model"], row["version"]) for row in told["registered"]] == [("seen", "1")]
    assert [row["path"] for row in told["wrong"]] == ["bad.onnx"]
    (folder / "bad.onnx").unlink()
    again = document(found.modelkeep("models", "discover", str(folder), "--interval", "0.2", "--json"))
    assert ([row["version"] for row in again["known"]], again["registered"]) == (["1"], [])
    problem(found.modelkeep("models", "discover", str(tmp_path / "nowhere")), 2)


# status, promotions, audit


def test_status_says_what_is_served_by_whom(found: Box) -> None:
    without = document(found.modelkeep("status", "--json"))
    assert set(without) == {"environment", "generation", "models", "servers", "promotions_running", "backups"}
    assert without["models"][0] == {
        "model": MODEL, "stable": "1", "candidate": None, "weight": 0.0, "shadow": False,
        "generation": without["models"][0]["generation"],
    }  # fmt: skip
    server = found.serve()
    (row,) = document(found.modelkeep("status", "--json"))["servers"]
    assert (row["address"], row["answers"], row["errors"]) == (found.url, True, {})
    server.terminate()
    server.wait(timeout=20)
    (row,) = document(found.modelkeep("status", "--json"))["servers"]
    assert row["answers"] is False
    assert found.url in found.modelkeep("status").stdout


def test_promotions_are_listed_and_shown_step_by_step(found: Box) -> None:
    rows = document(found.modelkeep("promotions", "--json"))
    assert document(found.modelkeep("promotions", "list", "--json")) == rows
    identity = rows[-1]["id"]
    shown = document(found.modelkeep("promotions", "show", identity, "--json"))
    assert (shown["id"], shown["state"]) == (identity, "promoted")
    assert [step["step"] for step in shown["story"]][-1] == "promoted"
    assert "'nope'" in problem(found.modelkeep("promotions", "show", "nope", "--json"), 1)


def test_audit_verifies_lists_and_exports(found: Box) -> None:
    verdict = document(found.modelkeep("audit", "verify", "--json"))
    assert verdict["holds"] is True and verdict["faults"] == []
    assert re.fullmatch(r"[0-9a-f]{64}", verdict["head"]["hash"])
    events = document(found.modelkeep("audit", "list", "--json", "--limit", "3"))
    assert [event["seq"] for event in events] == sorted((event["seq"] for event in events), reverse=True)
    exported = found.modelkeep("audit", "export")
    lines = [json.loads(line) for line in exported.stdout.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, verdict["events"] + 1))
    rest = found.modelkeep("audit", "export", "--after", "4").stdout.splitlines()
    assert json.loads(rest[0])["seq"] == 5 and len(rest) == len(lines) - 4
    about = document(found.modelkeep("audit", "list", "--subject", MODEL, "--since", "2d", "--json"))
    assert {event["subject"].partition(":")[0] for event in about} >= {"version", "route", "promotion"}
    assert document(found.modelkeep("audit", "list", "--action", "no.such", "--json")) == []


def test_a_changed_event_is_found_and_named_with_exit_code_1(tmp_path: Path) -> None:
    from sqlalchemy import text

    with box(tmp_path) as one:
        one.first("1")
        with one.database.engine.begin() as connection:
            connection.execute(text("UPDATE audit SET actor = 'somebody else' WHERE seq = 3"))
        verdict = document(one.modelkeep("audit", "verify", "--json"), 1)
        assert verdict["holds"] is False
        assert len(verdict["faults"]) == 1 and verdict["faults"][0].startswith("event 3 ")
        said = problem(one.modelkeep("audit", "verify"), 1)
        assert "event 3" in said


# locked


def test_what_another_run_holds_ends_with_exit_code_4(tmp_path: Path) -> None:
    """An emergency is not kept waiting. (promote and an ordinary rollback run as flows: tests/integration/flows.)"""
    with box(tmp_path, policy={**POLICY, "dwell_seconds": 60.0}) as one:
        one.first("1")
        one.add("2")
        one.add("3")
        one.serve()
        one.start_traffic(rate=60)
        running = one.promote("2", "--unvalidated")
        go(running)
        wait_for("a canary", lambda: one.weighs("2"))
        second = one.promote("3", "--unvalidated")
        go(second)
        assert second.wait(timeout=30) == 4
        done = one.modelkeep("rollback", MODEL, "--strategy", "emergency", "--reason", "it looks bad", "--json")
        assert document(done)["to"] == "1"
        # The run that was pre-empted finds itself fenced off, and says how its promotion ended without it.
        assert running.wait(timeout=30) == 1
        assert "ended withdrawn: Emergency rollback" in one.log("promote-2").read_text()
        row = one.promotion("2")
        assert row is not None and (row["state"], row["reason"]) == ("withdrawn", "Emergency rollback")
        assert one.held_leases() == [] and one.audit_faults() == []


# usage, settings, doctor


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-command",),
        ("register",),
        ("promote", MODEL),
        ("promote", MODEL, "1", "--strategy", "hope"),
        ("promote", MODEL, "1", "--force"),
        ("rollback", MODEL, "--strategy", "hope"),
        ("status", "--no-such-option"),
        ("audit", "list", "--limit", "none"),
        ("audit", "list", "--since", "03:12"),
        ("models", "at", "10/11/2025"),
        ("models", "--state", "new"),
        ("models", "archive", MODEL, "1"),
        ("models", "tag", MODEL, "1", "novalue"),
        ("register", "x.onnx", "--name", "x", "--tag", "novalue"),
    ],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(found: Box, arguments: tuple[str, ...]) -> None:
    problem(found.modelkeep(*arguments), 2)


def test_an_unknown_version_is_said_before_prefect_is_started(found: Box) -> None:
    assert "99" in problem(found.modelkeep("promote", MODEL, "99", timeout=20), 1)
    assert "nobody" in problem(found.modelkeep("promote", "nobody", "1", timeout=20), 1)
    assert "nobody" in problem(found.modelkeep("rollback", "nobody", timeout=20), 1)


@pytest.mark.parametrize("command", ["status", "serve", "config validate", "models"])
def test_a_wrong_key_in_the_settings_names_the_nearest_right_one(found: Box, tmp_path: Path, command: str) -> None:
    config = tmp_path / "modelkeep.toml"
    config.write_text("[server]\nprot = 8000\n")
    said = problem(found.modelkeep(*command.split(), MODELKEEP_CONFIG=str(config)), 2)
    assert "did you mean 'server.port'" in said and str(config) in said


def test_a_wrong_variable_in_the_environment_names_the_nearest_right_one(found: Box) -> None:
    said = problem(found.modelkeep("status", MODELKEEP_LEASE_SECOND="3"), 2)
    assert "MODELKEEP_LEASE_SECONDS" in said or "lease_seconds" in said


def test_config_shows_each_value_with_its_source(found: Box) -> None:
    shown = document(found.modelkeep("config", "show", "--json"))
    values = {row["key"]: row for row in shown["settings"]}
    assert (values["server.port"]["value"], values["server.port"]["source"]) == (
        found.port, "environment MODELKEEP_SERVER__PORT",
    )  # fmt: skip
    assert values["server.host"]["source"] == "default"


def test_doctor_names_what_is_missing_and_how_to_get_it(found: Box) -> None:
    findings = document(found.modelkeep("doctor", "--json", MODELKEEP_PREFECT__API_URL="http://127.0.0.1:9/api"))
    levels = {row["what"]: row["level"] for row in findings}
    assert levels["registry"] == "ok" and levels["home"] == "ok"
    assert levels["prefect"] == "warning"
    assert "modelkeep up" in next(row["text"] for row in findings if row["what"] == "prefect")


def test_a_registry_that_is_none_is_an_error_of_doctor_and_of_commands(tmp_path: Path) -> None:
    with box(tmp_path) as one:
        (one.home / "registry.db").write_bytes(b"this is no database, it is a text\n" * 200)
        findings = document(one.modelkeep("doctor", "--json"), 1)
        assert any(row["what"] == "registry" and row["level"] == "error" for row in findings)
        assert "registry.db" in problem(one.modelkeep("status", "--json"), 1)
