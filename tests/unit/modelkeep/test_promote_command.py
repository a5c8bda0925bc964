"""What `modelkeep promote` asks the flow for, and what it refuses before there is a flow. The flow itself: tests/integration/flows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelkeep import cli
from modelkeep.commands import promotions
from tests.unit.registry import kit


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """A registry with a version, and what the flow was asked for (it answers that it is locked)."""
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MODELKEEP_PROFILE", "cpu")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["register", str(kit.onnx_file(tmp_path / "m.onnx", 1.0)), "--name", "shelf"]) == 0
    found: list[dict[str, Any]] = []

    def run(context: Any, request: dict[str, Any]) -> tuple[int, None, str]:
        found.append(request)
        return 4, None, "locked"

    monkeypatch.setattr(promotions, "_run_promotion", run)
    capsys.readouterr()
    return found


def test_the_options_reach_the_flow(asked: list[dict[str, Any]]) -> None:
    line = ["promote", "shelf", "1", "--environment", "lab", "--strategy", "replay", "--approval"]
    assert cli.main([*line, "--set", "soak_seconds=5", "--set", "stages=0.5,1.0"]) == 4
    (request,) = asked
    assert (request["strategy"], request["environment"], request["approval"]) == ("replay", "lab", True)
    assert request["changes"] == {"soak_seconds": "5", "stages": ["0.5", "1.0"]}
    from flows.promote import PromoteModel

    assert PromoteModel(**request).changes == request["changes"]


def test_no_canary_is_blue_green(asked: list[dict[str, Any]]) -> None:
    assert cli.main(["promote", "shelf", "1", "--no-canary"]) == 4
    assert asked[0]["strategy"] == "blue-green"


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (["--strategy", "hope"], "canary, blue-green, shadow, replay"),
        (["--strategy", "shadow", "--no-canary"], "leave one of them out"),
        (["--strategy", "shadow", "--force", "--reason", "x"], "leave one of them out"),
        (["--force"], "--force needs --reason"),
        (["--set", "dwell_second=5"], "did you mean 'dwell_seconds'"),
        (["--set", "margin=much"], "margin: "),
        (["--set", "stages=0.5"], "the last stage must be 1.0"),
        (["--set", "metric=f1"], "known are accuracy, exact_match, mean_absolute_error"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_flow(
    asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], options: list[str], wrong: str
) -> None:
    assert cli.main(["promote", "shelf", "1", *options]) == 2
    assert wrong in capsys.readouterr().err
    assert asked == []
