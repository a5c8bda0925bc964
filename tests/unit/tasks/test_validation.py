"""The decision of the validation: each check on figures made for it, and the report that a person reads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from registry.policy import PromotionPolicy
from registry.signature import Signature, TensorSpec
from tasks.gates import check_metric, check_profile, check_tags, check_tolerances
from tasks.paired import compare_losses, compare_pairs, student_quantile, wilson
from tasks.probe import Figures, GoldenFigures, Latency, ProbeResult
from tasks.validation import CHECKS, CheckResult, ValidationReport, decide, signature_changes

POLICY = PromotionPolicy()
UNASKED = (check_tags, check_metric, check_tolerances, check_profile)
"""Checks that have no say where the policy, the golden file and the settings do not ask for them."""
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 8, 8)),), (TensorSpec("y", "FP32", (-1, 10)),))


def golden(right: int, cases: int = 500, *, failures: int = 0, non_finite: int = 0) -> GoldenFigures:
    labels = [1] * right + [0] * (cases - right)
    return GoldenFigures(
        cases,
        labels,
        labels,
        None,
        failures,
        "case 3: Fail: index out of range" if failures else None,
        non_finite,
        "case 5: output 'y'" if non_finite else None,
    )


def figures(right: int = 480, **changes: object) -> Figures:
    made = Figures(
        loaded=True,
        load_seconds=0.02,
        memory_bytes=40 * 2**20,
        signature=SIGNATURE,
        golden=golden(right),
        latency=Latency(0.001, 0.002, 300),
        rows_independent=True,
        rows_how="a batch of 8 golden rows equals 8 singles",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def decided(candidate: Figures, stable: Figures | None = None, policy: PromotionPolicy = POLICY) -> ValidationReport:
    cases = candidate.golden.cases if candidate.golden else None
    result = ProbeResult("done", None, "timing", candidate, stable, cases, "golden", 1.5)
    return decide(result, policy, has_stable=stable is not None)


def named(report: ValidationReport, name: str) -> CheckResult:
    return next(check for check in report.checks if check.name == name)


def test_a_better_candidate_passes_every_check() -> None:
    report = decided(figures(490), figures(480))
    assert report.passed
    assert not report.warnings
    assert report.rows_independent
    assert len(report.checks) == len(CHECKS) + 2 - len(UNASKED)


def test_the_first_version_passes_without_a_comparison_and_the_report_says_so() -> None:
    report = decided(figures())
    assert report.passed
    assert "nothing to compare it with" in report.summary
    assert "This is the first version" in report.as_markdown()
    assert not any(check.name == "signature" for check in report.checks)


def test_no_golden_file_is_a_warning_and_not_a_pass_in_silence() -> None:
    report = decided(figures(golden=None), figures(golden=None))
    assert report.passed
    assert named(report, "golden cases") in report.warnings
    assert "register with --golden" in report.as_markdown()


def test_a_candidate_that_does_not_load_is_refused_and_nothing_else_is_claimed() -> None:
    report = decided(Figures(loaded=False, error="m.onnx: ONNX Runtime cannot load it: truncated"), figures())
    assert not report.passed
    assert [check.name for check in report.checks] == ["probe", "loads"]
    assert "truncated" in report.summary


def test_a_stable_version_that_cannot_be_measured_refuses_rather_than_passes() -> None:
    report = decided(figures(), Figures(loaded=False, error="gone"))
    assert not report.passed
    assert "cannot be compared with: gone" in named(report, "stable version").text
    missing = ProbeResult("done", candidate=figures(), golden_cases=500, seconds=1.0)
    assert not decide(missing, POLICY, has_stable=True).passed


@pytest.mark.parametrize("outcome", ["timeout", "crashed", "refused"])
def test_a_probe_that_did_not_end_well_refuses_with_its_reason(outcome: str) -> None:
    result = ProbeResult(outcome, "the probe was ended by SIGSEGV while loading the candidate", "loading")  # type: ignore[arg-type]
    report = decide(result, POLICY, has_stable=True)
    assert not report.passed
    assert report.summary == "refused: probe: the probe was ended by SIGSEGV while loading the candidate"


def test_a_loss_of_accuracy_above_the_margin_is_refused_with_both_figures() -> None:
    report = decided(figures(460), figures(480))
    check = named(report, "accuracy")
    assert not check.passed and check.severity == "error"
    assert "92.0% against the stable version's 96.0% on the same 500 cases: -4.0 points" in check.text
    assert check.data is not None
    assert check.data["difference"] == pytest.approx(-0.04)


def test_a_loss_of_exactly_the_margin_is_allowed_where_it_is_not_certain() -> None:
    def flips(theirs: int, mine: int, cases: int = 100) -> tuple[Figures, Figures]:
        rest = [1] * (cases - theirs - mine)
        candidate, stable = [0] * theirs + [1] * mine + rest, [1] * theirs + [0] * mine + rest
        make = [GoldenFigures(cases, v, v, None, 0, None, 0, None) for v in (candidate, stable)]
        return figures(golden=make[0]), figures(golden=make[1])

    assert named(decided(*flips(4, 2)), "accuracy").passed  # -2 points of 100 cases
    assert not named(decided(*flips(5, 2)), "accuracy").passed
    assert named(decided(*flips(40, 30, 1000)), "accuracy").passed  # -1 point, p = 0.14
    certain = named(decided(*flips(12, 0, 1000)), "accuracy")  # -1.2 points, p = 0.0002
    assert not certain.passed
    assert "a small loss, but a certain one" in certain.text


def test_expected_outputs_are_compared_where_there_are_no_labels() -> None:
    def matching(right: int) -> GoldenFigures:
        return replace(golden(right), labels=None, outputs=[1] * right + [0] * (500 - right))

    report = decided(figures(golden=matching(400)), figures(golden=matching(500)))
    assert not named(report, "expected outputs").passed


def test_failures_on_golden_cases_are_refused_unless_the_stable_version_fails_as_often() -> None:
    failing = figures(golden=golden(480, failures=3))
    assert named(decided(failing, figures()), "golden cases").severity == "error"
    assert "index out of range" in named(decided(failing, figures()), "golden cases").text
    assert not decided(failing).passed
    both = named(decided(failing, failing), "golden cases")
    assert not both.passed and both.severity == "warning"


def test_cases_that_there_was_no_time_for_are_named() -> None:
    result = ProbeResult("done", None, None, figures(), figures(), 900, "golden", 9.0)
    check = named(decide(result, POLICY, has_stable=True), "golden cases")
    assert not check.passed and check.severity == "warning"
    assert "500 of 900 cases" in check.text


def test_outputs_that_are_not_finite_are_refused_unless_the_stable_version_has_them_too() -> None:
    wild = figures(golden=golden(480, non_finite=2))
    assert not decided(wild, figures()).passed
    assert not decided(wild).passed
    assert named(decided(wild, wild), "finite outputs").severity == "warning"


def test_latency_is_refused_on_the_median_and_noted_on_the_tail() -> None:
    slow = figures(latency=Latency(0.0025, 0.003, 300))
    check = named(decided(slow, figures()), "latency")
    assert not check.passed and check.severity == "error"
    assert "2.50 and 1.50 times; 2 times may be" in check.text
    tail = named(decided(figures(latency=Latency(0.0011, 0.009, 300)), figures()), "latency")
    assert not tail.passed and tail.severity == "warning"
    unknown = named(decided(figures(latency=None), figures()), "latency")
    assert not unknown.passed and unknown.severity == "warning"


def test_memory_is_refused_above_the_ratio_unless_it_is_next_to_nothing() -> None:
    stable = figures(memory_bytes=100 * 2**20)
    assert not decided(figures(memory_bytes=401 * 2**20), stable).passed
    assert decided(figures(memory_bytes=399 * 2**20), stable).passed
    assert decided(figures(memory_bytes=30 * 2**20), figures(memory_bytes=2**20)).passed


def test_rows_that_depend_on_each_other_are_a_warning_and_stop_the_batching() -> None:
    report = decided(figures(rows_independent=False, rows_how="output 'y' differs"), figures())
    assert report.passed
    assert not report.rows_independent
    assert "never be batched" in named(report, "rows independent").text
    assert not decided(figures(rows_independent=None), figures()).rows_independent


@pytest.mark.parametrize(
    ("inputs", "outputs", "wrong"),
    [
        ((), SIGNATURE.outputs, "input 'x' is gone"),
        ((TensorSpec("image", "FP32", (-1, 8, 8)),), SIGNATURE.outputs, "input 'x' is gone"),
        ((TensorSpec("x", "UINT8", (-1, 8, 8)),), SIGNATURE.outputs, "input 'x' is UINT8, was FP32"),
        ((TensorSpec("x", "FP32", (-1, 16, 16)),), SIGNATURE.outputs, "has shape [-1, 16, 16], had [-1, 8, 8]"),
        ((TensorSpec("x", "FP32", (1, 8, 8)),), SIGNATURE.outputs, "has shape [1, 8, 8]"),
        ((TensorSpec("x", "FP32", (-1, 64)),), SIGNATURE.outputs, "has shape [-1, 64]"),
        ((*SIGNATURE.inputs, TensorSpec("mask", "BOOL", (-1,))), SIGNATURE.outputs, "input 'mask' is new"),
        (SIGNATURE.inputs, (TensorSpec("logits", "FP32", (-1, 10)),), "output 'y' is gone (there are logits)"),
        (SIGNATURE.inputs, (TensorSpec("y", "FP32", (-1, 12)),), "output 'y' has shape [-1, 12]"),
    ],
)
def test_a_signature_that_breaks_clients_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], wrong: str
) -> None:
    errors, _ = signature_changes(SIGNATURE, Signature(inputs, outputs))
    assert any(wrong in error for error in errors), errors
    assert not decided(figures(signature=Signature(inputs, outputs)), figures()).passed


def test_a_signature_that_accepts_or_gives_more_is_compatible_and_named() -> None:
    new = Signature(
        (TensorSpec("x", "FP32", (-1, -1, -1)),),
        (TensorSpec("y", "FP32", (-1, -1)), TensorSpec("confidence", "FP32", (-1,))),
    )
    errors, notes = signature_changes(SIGNATURE, new)
    assert errors == []
    assert any("'confidence' is new" in note for note in notes)
    assert named(decided(figures(signature=new), figures()), "signature").passed


def test_an_input_that_may_be_left_out_may_come_and_may_not_go_or_become_needed() -> None:
    factor = TensorSpec("factor", "FP32", (1,), optional=True)
    more = Signature((*SIGNATURE.inputs, factor), SIGNATURE.outputs)
    errors, notes = signature_changes(SIGNATURE, more)
    assert errors == [] and notes == ["input 'factor' is new, and need not be sent"]
    assert named(decided(figures(signature=more), figures()), "signature").passed
    assert signature_changes(more, SIGNATURE)[0] == ["input 'factor' is gone (there are x)"]
    needed = Signature((*SIGNATURE.inputs, replace(factor, optional=False)), SIGNATURE.outputs)
    assert signature_changes(more, needed)[0] == ["input 'factor' must be sent now, and clients may leave it out"]
    assert signature_changes(needed, more) == ([], [])


def test_paired_figures_agree_with_newcombes_method_and_the_exact_test() -> None:
    candidate = [1] * 20 + [1] * 12 + [0] * 2 + [0] * 16
    stable = [1] * 20 + [0] * 12 + [1] * 2 + [0] * 16
    paired = compare_pairs(candidate, stable)
    assert paired.difference == pytest.approx(0.2)
    assert (paired.low, paired.high) == pytest.approx((0.0562, 0.3292), abs=1e-4)
    assert (paired.only_candidate, paired.only_stable) == (12, 2)
    worse = compare_pairs(stable, candidate)
    assert worse.p_value == pytest.approx(sum([1, 14, 91]) / 2**14)
    assert (worse.low, worse.high) == pytest.approx((-paired.high, -paired.low))


def test_equal_versions_have_an_interval_around_zero_and_no_evidence() -> None:
    same = compare_pairs([1] * 95 + [0] * 5, [1] * 95 + [0] * 5)
    assert same.low < 0 < same.high
    assert same.p_value == 1.0
    perfect = compare_pairs([1, 1], [1, 1])
    assert -1 <= perfect.low <= 0 <= perfect.high <= 1


def test_wilsons_interval_is_the_textbooks() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 10), (95, 100), (7, 9)):
        interval = scipy_stats.binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right, n) == pytest.approx((interval.low, interval.high), abs=1e-6)


def test_the_interval_of_paired_losses_is_the_textbooks() -> None:
    assert student_quantile(0.975, 9) == pytest.approx(2.262157, abs=1e-6)  # the tables of Student's t
    assert student_quantile(0.975, 1) == pytest.approx(12.7062047, abs=1e-6)
    assert student_quantile(0.95, 100_000) == pytest.approx(1.644869, abs=1e-4)
    stable = [0.0] * 10
    # Student's own data: hours of sleep gained by ten patients, Biometrika 6 (1908), 20.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    losses = compare_losses(gained, stable)
    assert losses.difference == pytest.approx(1.58)
    assert (losses.low, losses.high) == pytest.approx((0.7001, 2.4599), abs=1e-4)
    with pytest.raises(ValueError, match="two cases at least"):
        compare_losses([1.0], [1.0])


def test_the_report_can_be_written_as_json_and_as_a_table() -> None:
    report = decided(figures(460), figures(480))
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert document["passed"] is False
    assert {check["name"] for check in document["checks"]} >= {"signature", "accuracy", "latency", "memory"}
    markdown = report.as_markdown()
    assert markdown.startswith("**Validation refused the candidate.**")
    assert "| accuracy | **refused** | 92.0% against" in markdown
    assert all(line.count("|") == 4 for line in markdown.splitlines() if line.startswith("| "))
