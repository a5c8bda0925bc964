"""The policy of one promotion: the settings, what one model has other, and what one run changes; and where each field comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import SettingsError, UsageError
from registry.policy import PromotionPolicy, parsed, resolve, resolved
from registry.settings import Settings, load_settings

FILE = """
[promotion]
soak_seconds = 10
margin = 0.5

[policies.digits]
soak_seconds = 20
stages = [0.5, 1.0]

[policies."fraud-model"]
tolerances = {score = 0.01}
"""


def settings(folder: Path, text: str = FILE, **environ: str) -> Settings:
    path = folder / "modelkeep.toml"
    path.write_text(text)
    return load_settings(environ={"MODELKEEP_HOME": str(folder), "MODELKEEP_PROFILE": "cpu", **environ}, config=path)


def test_a_field_is_taken_from_the_run_else_from_the_model_else_from_the_settings(tmp_path: Path) -> None:
    found = settings(tmp_path)
    policy = resolve(found, "digits", {"margin": "0.1"})
    assert (policy.soak_seconds, policy.stages, policy.margin) == (20.0, [0.5, 1.0], 0.1)
    other = resolve(found, "numbers")
    assert (other.soak_seconds, other.stages, other.margin) == (10.0, PromotionPolicy().stages, 0.5)
    assert resolve(found, "fraud-model").tolerances == {"score": 0.01}


def test_each_field_that_is_not_the_default_says_where_it_comes_from(tmp_path: Path) -> None:
    _, sources = resolved(settings(tmp_path), "digits", {"approval": True})
    assert set(sources) == {"soak_seconds", "stages", "margin", "approval"}
    assert sources["approval"] == "this run"
    assert sources["margin"].startswith("modelkeep.toml")
    assert sources["soak_seconds"].startswith("policies.digits.soak_seconds: modelkeep.toml")


def test_a_variable_of_the_environment_refines_the_policy_of_a_model_whatever_its_dashes(tmp_path: Path) -> None:
    found = settings(
        tmp_path, MODELKEEP_POLICIES__DIGITS__SOAK_SECONDS="5", MODELKEEP_POLICIES__FRAUD_MODEL__STAGES="0.1,1.0"
    )
    assert resolve(found, "digits").soak_seconds == 5.0
    assert resolve(found, "digits").stages == [0.5, 1.0]
    assert resolve(found, "Fraud-Model").stages == [0.1, 1.0]
    _, sources = resolved(found, "digits")
    assert "environment MODELKEEP_POLICIES__DIGITS__SOAK_SECONDS" in sources["soak_seconds"]


def test_only_what_a_model_changes_is_shown_among_the_settings(tmp_path: Path) -> None:
    shown = {row["key"]: row["value"] for row in settings(tmp_path).describe() if row["key"].startswith("policies")}
    assert shown["policies.digits.soak_seconds"] == 20.0
    assert not any(key.endswith("dwell_seconds") for key in shown)


def test_a_policy_given_whole_stands_for_the_settings(tmp_path: Path) -> None:
    whole = PromotionPolicy(soak_seconds=1.0)
    policy, sources = resolved(settings(tmp_path), "digits", {"evidence": 50}, whole=whole)
    assert (policy.soak_seconds, policy.margin, policy.evidence) == (1.0, 0.25, 50.0)
    assert sources == {"soak_seconds": "this run", "evidence": "this run"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[policies.digits]\nsoak_second = 5\n", "did you mean 'policies.digits.soak_seconds'"),
        ("[policies.digits]\nmargin = -1\n", "policies.digits.margin = -1"),
        ("[policies.digits]\nstages = [0.5]\n", "the last stage must be 1.0"),
        ("[policies.digits]\nmetric = 'f1'\n", "known are accuracy, exact_match, mean_absolute_error"),
        ("[policies]\ndigits = 5\n", "has no 'model'"),
    ],
)
def test_a_wrong_field_of_a_models_policy_is_refused_when_the_settings_are_read(
    tmp_path: Path, text: str, wrong: str
) -> None:
    with pytest.raises(SettingsError, match=wrong.replace("[", r"\[").replace(".", r"\.")):
        settings(tmp_path, text)


def test_assignments_of_the_command_line_are_read_by_the_type_of_their_field() -> None:
    changes = parsed(["soak_seconds=60", "stages=0.5,1.0", 'tolerances={"y": 0.1}', "required_tags=team=risk,reviewed"])
    policy = resolve(Settings(), "digits", changes)
    assert policy.soak_seconds == 60.0 and policy.stages == [0.5, 1.0] and policy.tolerances == {"y": 0.1}
    assert policy.required_tags == ["team=risk", "reviewed"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("soak_seconds", "write FIELD=VALUE"),
        ("soak=5", "'soak' is no field of the policy"),
        ("dwell_second=5", "did you mean 'dwell_seconds'"),
        ("tolerances=5", "must be JSON"),
    ],
)
def test_an_assignment_that_cannot_be_is_refused(text: str, wrong: str) -> None:
    with pytest.raises(UsageError, match=wrong):
        parsed([text])


def test_a_value_that_is_not_allowed_is_named() -> None:
    with pytest.raises(UsageError, match=r"margin: .*greater than or equal to 0"):
        resolve(Settings(), "digits", {"margin": "-1"})
