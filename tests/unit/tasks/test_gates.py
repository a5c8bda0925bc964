"""The checks that a policy asks for, each on figures made for it: tags, hardware profile, tolerances, metric."""

from __future__ import annotations

from typing import Any

import pytest

from registry.policy import PromotionPolicy
from registry.settings import load_settings
from tasks.facts import Budget, CheckResult, Facts, Subject
from tasks.gates import budget_of, check_accuracy, check_metric, check_profile, check_tags, check_tolerances
from tasks.probe import Figures, GoldenFigures

MB = 2**20


def golden(
    scores: list[float | None] | None = None, deviations: dict[str, dict[str, Any]] | None = None
) -> GoldenFigures:
    cases = len(scores) if scores is not None else 10
    return GoldenFigures(cases, None, None, [1] * cases, 0, None, 0, None, scores, deviations or {})


def asked(
    check: Any,
    *,
    policy: dict[str, Any] | None = None,
    mine: Figures | None = None,
    stable: Figures | None = None,
    subject: Subject | None = None,
    metric: str | None = None,
) -> CheckResult | None:
    facts = Facts(
        mine or Figures(True), stable, 10, PromotionPolicy(**(policy or {})), subject or Subject(), metric
    )  # fmt: skip
    found: CheckResult | None = check(facts)
    return found


def sure(result: CheckResult | None) -> CheckResult:
    assert result is not None
    return result


# --- tags


@pytest.mark.parametrize(
    ("wanted", "tags", "passes"),
    [
        (["reviewed"], {"reviewed": "yes"}, True),
        (["reviewed"], {}, False),
        (["team=risk"], {"team": "risk"}, True),
        (["team=risk"], {"team": "ads"}, False),
        (["team=risk", "reviewed"], {"team": "risk"}, False),
        (["url=a=b"], {"url": "a=b"}, True),
    ],
)
def test_a_version_without_a_tag_that_the_policy_asks_for_is_refused(
    wanted: list[str], tags: dict[str, str], passes: bool
) -> None:
    check = sure(asked(check_tags, policy={"required_tags": wanted}, subject=Subject(tags)))
    assert check.passed is passes and check.severity == "error"
    if not passes:
        assert "modelkeep models tag" in check.text


def test_without_required_tags_nobody_asks() -> None:
    assert asked(check_tags, subject=Subject({"a": "b"})) is None


# --- the hardware profile


def beside(
    mine: int | None, theirs: int | None, *, budget: int | None = 100, together: bool = True, fits: bool = True
) -> CheckResult:
    size = None if budget is None else budget * MB
    return sure(
        asked(
            check_profile,
            policy={"fits_profile": fits},
            mine=Figures(True, memory_bytes=None if mine is None else mine * MB),
            stable=None if theirs is None else Figures(True, memory_bytes=theirs * MB),
            subject=Subject({}, Budget("cpu", size, "the device does not answer"), together),
        )
    )


def test_two_versions_that_fit_together_pass_with_the_figures() -> None:
    check = beside(40, 50)
    assert check.passed
    assert check.text == "40.0 MB and the stable version's 50.0 MB of 100.0 MB (profile cpu)"


def test_a_version_that_does_not_fit_alone_is_refused_whatever_the_policy_says() -> None:
    for check in (beside(101, None), beside(101, 1, fits=False), beside(101, 1, together=False)):
        assert not check.passed and check.severity == "error"
        assert "101.0 MB alone" in check.text


def test_two_versions_that_do_not_fit_together_are_refused_with_the_way_out() -> None:
    check = beside(60, 50)
    assert not check.passed and check.severity == "error"
    assert "--strategy replay" in check.text
    assert beside(60, 50, together=False).passed
    noted = beside(60, 50, fits=False)
    assert not noted.passed and noted.severity == "warning"


def test_a_budget_or_a_memory_that_is_not_known_is_not_judged_and_says_so() -> None:
    for check in (beside(60, 50, budget=None), beside(None, 50)):
        assert not check.passed and check.severity == "warning"
        assert "not judged" in check.text
    assert asked(check_profile) is None


def test_the_budget_comes_from_the_settings(tmp_path: Any) -> None:
    environ = {"MODELKEEP_HOME": str(tmp_path), "MODELKEEP_PROFILE": "cpu", "MODELKEEP_GPU__MAX_MEMORY_MB": "512"}
    assert budget_of(load_settings(environ=environ, cwd=tmp_path)) == Budget("cpu", 512 * MB)


# --- tolerances


def deviation(beyond: int, worst: float | None, problem: str | None = None) -> dict[str, Any]:
    return {"tolerance": 0.1, "cases": 10, "beyond": beyond, "worst": worst, "worst_case": 3, "problem": problem}


def test_an_output_within_its_tolerance_passes_and_one_beyond_it_is_refused() -> None:
    near = Figures(True, golden=golden(deviations={"y": deviation(0, 0.05)}))
    check = sure(asked(check_tolerances, policy={"tolerances": {"y": 0.1}}, mine=near))
    assert check.passed and "0.05 at most in 10 cases, 0.1 may be" in check.text
    far = Figures(True, golden=golden(deviations={"y": deviation(2, 0.4)}))
    check = sure(asked(check_tolerances, policy={"tolerances": {"y": 0.1}}, mine=far))
    assert not check.passed and "2 of 10 cases are beyond 0.1, by 0.4 in case 3" in check.text


def test_a_tolerance_that_cannot_be_checked_refuses() -> None:
    check = sure(asked(check_tolerances, policy={"tolerances": {"z": 0.1}}, mine=Figures(True, golden=golden())))
    assert not check.passed and "no 'output.z'" in check.text
    check = sure(asked(check_tolerances, policy={"tolerances": {"z": 0.1}}))
    assert not check.passed and "there are no golden cases" in check.text


# --- the metric


def compared(mine: list[float | None], theirs: list[float | None] | None, *, margin: float = 0.02) -> CheckResult:
    return sure(
        asked(
            check_metric,
            policy={"accuracy_margin": margin},
            mine=Figures(True, golden=golden(mine)),
            stable=None if theirs is None else Figures(True, golden=golden(theirs)),
            metric="mean_absolute_error",
        )
    )


NOISE = [0.01 * (-1) ** i for i in range(40)]


def test_a_greater_error_than_the_margin_is_refused_with_its_interval() -> None:
    check = compared([1.0 + n for n in NOISE], [0.5 - n for n in NOISE])
    assert not check.passed and check.severity == "error"
    assert "1 against the stable version's 0.5 on the same 40 cases: +0.5 (95 %:" in check.text
    assert check.data is not None and check.data["low"] < 0.5 < check.data["high"]
    assert compared([1.0 + n for n in NOISE], [0.5 - n for n in NOISE], margin=0.6).severity == "warning"


def test_a_lesser_error_passes_and_a_certain_loss_within_the_margin_is_noted() -> None:
    assert compared([0.4 + n for n in NOISE], [0.5 - n for n in NOISE]).passed
    noted = compared([0.51] * 40, [0.5] * 40)
    assert not noted.passed and noted.severity == "warning" and "certain" in noted.text


def test_a_metric_that_could_not_be_measured_is_no_number() -> None:
    nothing = compared([None] * 5, [0.5] * 5)
    assert not nothing.passed and nothing.severity == "error" and "could not be measured" in nothing.text
    part = compared([0.5, None, 0.5], [0.5, 0.5, 0.5])
    assert not part.passed and "1 of 3 cases have a score with the stable version and none" in part.text
    assert "nothing to compare with" in compared([0.5, 0.7], None).text


def test_exact_match_is_compared_as_a_share_in_pairs() -> None:
    mine, theirs = golden([1.0] * 6 + [0.0] * 4), golden([1.0] * 10)
    check = sure(
        asked(check_metric, mine=Figures(True, golden=mine), stable=Figures(True, golden=theirs), metric="exact_match")
    )
    assert check.name == "exact_match" and not check.passed
    assert "60.0% against the stable version's 100.0% on the same 10 cases: -40.0 points" in check.text


def test_another_metric_stands_for_accuracy_and_accuracy_for_no_other() -> None:
    mine = Figures(True, golden=golden([0.5] * 10))
    assert asked(check_accuracy, mine=mine, metric="mean_absolute_error") is None
    assert asked(check_metric, mine=mine, metric="accuracy") is None
    assert sure(asked(check_accuracy, mine=mine, metric="accuracy")).name == "expected outputs"
