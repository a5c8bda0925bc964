"""The decision on a candidate's figures (tasks.probe measures them), pure. A new check is one function in the tuple `CHECKS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from registry.policy import PromotionPolicy
from registry.signature import Signature, TensorSpec
from tasks.facts import CheckResult, Facts, Severity, Subject
from tasks.gates import check_accuracy, check_metric, check_profile, check_tags, check_tolerances
from tasks.probe import Figures, ProbeResult

NEGLIGIBLE_MEMORY_BYTES = 64 * 2**20
"""Growth below this is the runtime's own buffers as much as the model's, and no reason to refuse."""

# --- the decision -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """All checks. `passed` says that no check of severity "error" failed."""

    checks: tuple[CheckResult, ...]
    has_stable: bool
    candidate: Figures | None
    stable: Figures | None

    @property
    def passed(self) -> bool:
        return not self.errors

    @property
    def errors(self) -> tuple[CheckResult, ...]:
        return tuple(c for c in self.checks if not c.passed and c.severity == "error")

    @property
    def warnings(self) -> tuple[CheckResult, ...]:
        return tuple(c for c in self.checks if not c.passed and c.severity == "warning")

    @property
    def rows_independent(self) -> bool:
        """Whether the server may batch this model: only where that was found to be harmless."""
        return bool(self.candidate and self.candidate.rows_independent)

    @property
    def summary(self) -> str:
        """One sentence for the record and the log."""
        if not self.passed:
            return "refused: " + "; ".join(f"{c.name}: {c.text}" for c in self.errors)
        noted = f", {len(self.warnings)} to note" if self.warnings else ""
        first = "" if self.has_stable else "; the first version, there was nothing to compare it with"
        return f"passed {len(self.checks)} checks{noted}{first}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "summary": self.summary,
            "has_stable": self.has_stable,
            "rows_independent": self.rows_independent,
            "checks": [c.as_dict() for c in self.checks],
            "candidate": None if self.candidate is None else self.candidate.as_dict(),
            "stable": None if self.stable is None else self.stable.as_dict(),
        }

    def as_markdown(self) -> str:
        lines = [f"**Validation {'passed' if self.passed else 'refused the candidate'}.**", ""]
        if not self.has_stable:
            lines += ["This is the first version: there was no stable version to compare it with.", ""]
        lines += ["| check | verdict | figures |", "| --- | --- | --- |"]
        for check in self.checks:
            verdict = "passed" if check.passed else ("**refused**" if check.severity == "error" else "warning")
            text = check.text.replace("|", "\\|").replace("\n", " ")
            lines.append(f"| {check.name} | {verdict} | {text} |")
        return "\n".join(lines) + "\n"


def decide(
    result: ProbeResult, policy: PromotionPolicy, *, has_stable: bool, subject: Subject | None = None
) -> ValidationReport:
    """Judge the probe's figures by the policy. `has_stable`: whether there is a stable version."""
    candidate, stable = result.candidate, result.stable
    checks = [_probe_ended(result)]
    if candidate is not None:
        checks.append(_loads(candidate))
    if has_stable and candidate is not None and (stable is None or not stable.loaded):
        why = stable.error if stable is not None else "it was not given to the probe"
        checks.append(CheckResult("stable version", False, f"cannot be compared with: {why}"))
    if candidate is not None and candidate.loaded:
        compared = stable if stable is not None and stable.loaded else None
        facts = Facts(candidate, compared, result.golden_cases, policy, subject or Subject(), result.metric)
        checks += [done for check in CHECKS if (done := check(facts)) is not None]
    return ValidationReport(tuple(checks), has_stable, candidate, stable)


def _probe_ended(result: ProbeResult) -> CheckResult:
    if result.outcome == "done":
        return CheckResult("probe", True, f"measured in {result.seconds:.1f} s", data={"seconds": result.seconds})
    data = {"outcome": result.outcome, "phase": result.phase, "log_tail": result.log_tail}
    return CheckResult("probe", False, result.problem or result.outcome, data=data)


def _loads(candidate: Figures) -> CheckResult:
    if not candidate.loaded:
        return CheckResult("loads", False, candidate.error or "it does not load", data={"error": candidate.error})
    return CheckResult(
        "loads", True, f"in {candidate.load_seconds:.3f} s", data={"load_seconds": candidate.load_seconds}
    )


def check_signature(facts: Facts) -> CheckResult | None:
    """What clients of the stable version send and read must go on working: more outputs may come, nothing may go."""
    old, new = facts.stable and facts.stable.signature, facts.candidate.signature
    if not old or not new:
        return None
    errors, notes = signature_changes(old, new)
    data = {"incompatible": errors, "notes": notes, "stable": old.as_dict(), "candidate": new.as_dict()}
    if errors:
        return CheckResult("signature", False, "; ".join(errors), data=data)
    return CheckResult("signature", True, "; ".join(["compatible with the stable version's", *notes]), data=data)


def check_golden_failures(facts: Facts) -> CheckResult | None:
    """A model must answer its golden cases; where the stable version fails as often, that is only noted."""
    golden = facts.candidate.golden
    if facts.golden_cases is None or golden is None:
        return CheckResult(
            "golden cases",
            False,
            "there are none: neither correctness nor failures were checked (register with --golden)",
            "warning",
        )
    stable = facts.stable.golden if facts.stable else None
    before = stable.failures if stable else 0
    data = {
        "cases": golden.cases,
        "of": facts.golden_cases,
        "failures": golden.failures,
        "stable_failures": stable.failures if stable else None,
        "first_failure": golden.first_failure,
    }
    cut = golden.cases < facts.golden_cases
    ran = f"{golden.cases} of {facts.golden_cases} cases" if cut else f"{golden.cases} cases"
    if golden.failures == 0:
        text = f"{ran}, no failures" + (" (no time for the rest)" if cut else "")
        return CheckResult("golden cases", not cut, text, "warning" if cut else "error", data)
    severity: Severity = "error" if golden.failures > before else "warning"
    against = f" (the stable version: {stable.failures})" if stable else ""
    text = f"{golden.failures} of {ran} fail{against}; {golden.first_failure}"
    return CheckResult("golden cases", False, text, severity, data)


def check_finite(facts: Facts) -> CheckResult | None:
    """NaN and infinity do not fit into JSON and are hardly ever meant; refused where the stable version has fewer."""
    golden = facts.candidate.golden
    if golden is None:
        return None
    stable = facts.stable.golden if facts.stable else None
    before = stable.non_finite if stable else 0
    data = {"cases": golden.cases, "non_finite": golden.non_finite, "stable_non_finite": stable and stable.non_finite}
    if golden.non_finite == 0:
        return CheckResult("finite outputs", True, f"in all of {golden.cases - golden.failures} answers", data=data)
    against = f" (the stable version: {before})" if stable else ""
    text = f"{golden.non_finite} of {golden.cases} cases have NaN or infinity{against}; {golden.first_non_finite}"
    return CheckResult("finite outputs", False, text, "error" if golden.non_finite > before else "warning", data)


def check_latency(facts: Facts) -> CheckResult | None:
    """Medians of one interleaved run; the tail, which is noisier, is only noted."""
    mine, theirs = facts.candidate.latency, facts.stable.latency if facts.stable else None
    if mine is None:
        return CheckResult("latency", False, "could not be measured: no call to time succeeds", "warning")
    figures = f"median {_ms(mine.p50_seconds)}, p95 {_ms(mine.p95_seconds)}"
    data: dict[str, Any] = {"p50_seconds": mine.p50_seconds, "p95_seconds": mine.p95_seconds, "samples": mine.samples}
    if theirs is None:
        return CheckResult("latency", True, f"{figures} ({mine.samples} calls); nothing to compare with", data=data)
    ratio, tail = mine.p50_seconds / theirs.p50_seconds, mine.p95_seconds / theirs.p95_seconds
    limit = facts.policy.latency_ratio
    data |= {
        "stable_p50_seconds": theirs.p50_seconds,
        "stable_p95_seconds": theirs.p95_seconds,
        "ratio": ratio,
        "p95_ratio": tail,
        "limit": limit,
    }
    text = (
        f"{figures} against the stable version's {_ms(theirs.p50_seconds)} and {_ms(theirs.p95_seconds)} "
        f"({mine.samples} interleaved pairs): {ratio:.2f} and {tail:.2f} times; {limit:g} times may be"
    )
    if ratio > limit:
        return CheckResult("latency", False, text, data=data)
    return CheckResult("latency", tail <= limit, text, "error" if tail <= limit else "warning", data)


def check_memory(facts: Facts) -> CheckResult | None:
    """Growth of the process by the model; refused above the ratio, unless that is still next to nothing."""
    mine, theirs = facts.candidate.memory_bytes, facts.stable.memory_bytes if facts.stable else None
    if mine is None:
        return None
    if theirs is None:
        text = f"{_mb(mine)}; nothing to compare with"
        return CheckResult("memory", True, text, data={"memory_bytes": mine})
    limit = facts.policy.memory_ratio
    data = {"memory_bytes": mine, "stable_memory_bytes": theirs, "limit": limit}
    passed = mine <= max(limit * theirs, theirs + NEGLIGIBLE_MEMORY_BYTES)
    text = f"{_mb(mine)} against the stable version's {_mb(theirs)}; {limit:g} times may be"
    return CheckResult("memory", passed, text, data=data)


def check_rows(facts: Facts) -> CheckResult | None:
    """Whether the server may put several requests into one batch; no reason to refuse, it is then served one by one."""
    independent, how = facts.candidate.rows_independent, facts.candidate.rows_how or "not measured"
    data = {"rows_independent": independent, "how": how}
    if independent:
        return CheckResult("rows independent", True, how, data=data)
    text = f"{how}: it will never be batched"
    return CheckResult("rows independent", False, text, "warning", data)


CHECKS: tuple[Callable[[Facts], CheckResult | None], ...] = (
    check_tags,
    check_signature,
    check_golden_failures,
    check_finite,
    check_accuracy,
    check_metric,
    check_tolerances,
    check_latency,
    check_memory,
    check_profile,
    check_rows,
)
"""Every check, in the order of the report. A new one goes here: from Facts to its result, or None where it has no say.

What it needs and the probe does not measure yet is measured in serving/probe.py and carried by `Figures`.
"""


# --- what the checks compute ------------------------------------------------------------------------------------------


def signature_changes(old: Signature, new: Signature) -> tuple[list[str], list[str]]:
    """(what breaks clients of `old`, what they need not mind). An input must be given unless it is optional."""
    errors: list[str] = []
    notes: list[str] = []
    for kind, before, after in (("input", old.inputs, new.inputs), ("output", old.outputs, new.outputs)):
        now = {spec.name: spec for spec in after}
        known = {spec.name for spec in before}
        for spec in before:
            if spec.name not in now:
                errors.append(f"{kind} '{spec.name}' is gone (there are {', '.join(sorted(now)) or 'none'})")
            elif now[spec.name].datatype != spec.datatype:
                errors.append(f"{kind} '{spec.name}' is {now[spec.name].datatype}, was {spec.datatype}")
            elif spec.optional and not now[spec.name].optional:
                errors.append(f"{kind} '{spec.name}' must be sent now, and clients may leave it out")
            elif change := _shape_change(kind, spec, now[spec.name]):
                text, breaks = change
                (errors if breaks else notes).append(f"{kind} '{spec.name}' {text}")
        optional = [spec.name for spec in after if spec.name not in known and spec.optional]
        added = [spec.name for spec in after if spec.name not in known and not spec.optional]
        if optional:
            notes.append(f"{kind} {', '.join(map(repr, optional))} is new, and need not be sent")
        if added and kind == "input":
            errors.append(f"input {', '.join(map(repr, added))} is new, and clients do not send it")
        elif added:
            notes.append(f"output {', '.join(map(repr, added))} is new")
    return errors, notes


def _shape_change(kind: str, old: TensorSpec, new: TensorSpec) -> tuple[str, bool] | None:
    """What changed and whether it breaks a client: inputs may accept more, outputs may promise more."""
    if old.shape == new.shape:
        return None
    text = f"has shape {list(new.shape)}, had {list(old.shape)}"
    if len(old.shape) != len(new.shape):
        return text, True
    pairs = list(zip(old.shape, new.shape, strict=True))
    if kind == "input":
        return text, any(after not in (before, -1) for before, after in pairs)
    # An output whose dimension is no longer written down may still be the same: the golden cases tell.
    return text, any(-1 not in (before, after) and before != after for before, after in pairs)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MB"
