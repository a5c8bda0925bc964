"""The checks that a policy asks for: tags, the memory of the hardware profile, tolerances, the metric of the golden file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry import budget as budgets
from registry.errors import UnavailableError
from registry.settings import Settings
from tasks.facts import Budget, CheckResult, Facts
from tasks.paired import compare_losses, compare_pairs

SIGNIFICANCE = 0.01
"""A loss of accuracy is certain when McNemar's exact test finds it this improbable for two equally good versions."""


def budget_of(settings: Settings) -> Budget:
    """The memory for models on this machine, by its settings."""
    try:
        return Budget(settings.hardware.name, budgets.of_this_machine(settings))
    except UnavailableError as error:
        return Budget(settings.hardware.name, None, str(error))


def check_tags(facts: Facts) -> CheckResult | None:
    """The tags that the policy asks for, KEY or KEY=VALUE."""
    wanted, tags = facts.policy.required_tags, facts.subject.tags
    if not wanted:
        return None
    missing = [tag for tag in wanted if not _tagged(tag, tags)]
    data = {"required": list(wanted), "missing": missing, "tags": dict(tags)}
    if missing:
        has = ", ".join(f"{key}={value}" for key, value in sorted(tags.items())) or "none"
        text = f"{', '.join(missing)} is asked for and not there (it has {has}): modelkeep models tag sets it"
        return CheckResult("required tags", False, text, data=data)
    return CheckResult("required tags", True, f"it has {', '.join(wanted)}", data=data)


def _tagged(wanted: str, tags: Mapping[str, Any]) -> bool:
    key, mark, value = wanted.partition("=")
    found = tags.get(key.strip())
    return found is not None and (not mark or str(found) == value.strip())


def check_profile(facts: Facts) -> CheckResult | None:
    """The memory that models may have by the hardware profile: alone always, beside the stable version where the policy says so."""
    subject, mine = facts.subject, facts.candidate.memory_bytes
    theirs = facts.stable.memory_bytes if facts.stable else None
    if subject.budget is None:
        return None
    if subject.budget.size_bytes is None:
        return CheckResult("fits the profile", False, f"not judged: {subject.budget.problem}", "warning")
    if mine is None:
        return CheckResult("fits the profile", False, "not judged: its memory could not be measured", "warning")
    budget, whose = subject.budget.size_bytes, f"profile {subject.budget.profile}"
    data = {
        "memory_bytes": mine,
        "stable_memory_bytes": theirs,
        "budget_bytes": budget,
        "profile": subject.budget.profile,
    }
    if mine > budget:
        text = (
            f"{_mb(mine)} alone, {whose} has {_mb(budget)} for models: make it smaller, or serve it where there is more memory "
            "(gpu.max_memory_mb, MODELKEEP_PROFILE)"
        )
        return CheckResult("fits the profile", False, text, data=data)
    if theirs is None or mine + theirs <= budget:
        beside = f" and the stable version's {_mb(theirs)}" if theirs is not None else ""
        return CheckResult("fits the profile", True, f"{_mb(mine)}{beside} of {_mb(budget)} ({whose})", data=data)
    text = f"{_mb(mine)} and the stable version's {_mb(theirs)} together are more than {whose} has for models, {_mb(budget)}"
    if not subject.together:
        return CheckResult("fits the profile", True, f"{text}; they are judged one after the other", data=data)
    if facts.policy.fits_profile:
        return CheckResult(
            "fits the profile", False, f"{text}: --strategy replay judges them one after the other", data=data
        )
    return CheckResult("fits the profile", False, text, "warning", data)


def check_tolerances(facts: Facts) -> CheckResult | None:
    """Every output that the policy names must be as near to the golden one as it says, in every case."""
    wanted, golden = facts.policy.tolerances, facts.candidate.golden
    if not wanted:
        return None
    if golden is None:
        text = f"{', '.join(sorted(wanted))}: there are no golden cases to hold them to (register with --golden)"
        return CheckResult("tolerances", False, text, data={"tolerances": dict(wanted)})
    parts, passed = [], True
    for name, limit in sorted(wanted.items()):
        found = golden.deviations.get(name)
        if found is None:
            passed = False
            parts.append(f"output '{name}': the golden cases have no 'output.{name}'")
            continue
        if found["beyond"]:
            passed = False
            worst = "" if found["worst"] is None else f", by {found['worst']:.4g} in case {found['worst_case']}"
            problem = f"; {found['problem']}" if found["problem"] else ""
            parts.append(
                f"output '{name}': {found['beyond']} of {found['cases']} cases are beyond {limit:g}{worst}{problem}"
            )
        else:
            parts.append(f"output '{name}': {found['worst']:.4g} at most in {found['cases']} cases, {limit:g} may be")
    data = {"tolerances": dict(wanted), "deviations": golden.deviations}
    return CheckResult("tolerances", passed, "; ".join(parts), data=data)


def check_accuracy(facts: Facts) -> CheckResult | None:
    """The same cases through both versions: refused on a loss above the margin, or a smaller one that is certain."""
    golden = facts.candidate.golden
    if golden is None or golden.accuracy is None or facts.metric not in (None, "accuracy"):
        return None
    known = "labels" if golden.labels is not None else "outputs"
    mine: list[int] = getattr(golden, known)
    theirs: list[int] | None = getattr(facts.stable.golden, known) if facts.stable and facts.stable.golden else None
    return _shares("accuracy" if known == "labels" else "expected outputs", mine, theirs, facts)


def check_metric(facts: Facts) -> CheckResult | None:
    """A metric other than accuracy, case by case against the stable version. What could not be measured is no number.

    exact_match: as accuracy. mean_absolute_error: the mean of the paired differences with its interval, refused above the margin; a
    smaller loss that is certain is noted only, since any other rounding is one with enough cases.
    """
    golden, metric = facts.candidate.golden, facts.metric
    if metric in (None, "accuracy") or golden is None or golden.scores is None:
        return None
    assert metric is not None
    theirs = facts.stable.golden.scores if facts.stable and facts.stable.golden else None
    if metric == "exact_match":
        mine = [int(score or 0) for score in golden.scores]
        return _shares(metric, mine, None if theirs is None else [int(score or 0) for score in theirs], facts)
    scored = [score for score in golden.scores if score is not None]
    if not scored:
        return CheckResult(metric, False, f"could not be measured in any of {golden.cases} cases")
    if theirs is None:
        mean = sum(scored) / len(scored)
        text = f"{mean:.6g} over {len(scored)} cases; nothing to compare with"
        return CheckResult(metric, True, text, data={"cases": len(scored), "candidate": mean})
    pairs = list(zip(golden.scores, theirs, strict=False))
    lost = sum(c is None and s is not None for c, s in pairs)
    if lost:
        text = f"{lost} of {len(pairs)} cases have a score with the stable version and none with the candidate"
        return CheckResult(metric, False, text, data={"cases": len(pairs), "without_score": lost})
    both = [(c, s) for c, s in pairs if c is not None and s is not None]
    if len(both) < 2:
        return CheckResult(
            metric, False, f"{len(both)} cases that both versions answer are too few to compare", "warning"
        )
    losses, margin = compare_losses([c for c, _ in both], [s for _, s in both]), facts.policy.accuracy_margin
    data = {**losses.as_dict(), "margin": margin}
    text = (
        f"{losses.candidate:.6g} against the stable version's {losses.stable:.6g} on the same {losses.cases} cases: "
        f"{losses.difference:+.4g} (95 %: {losses.low:+.4g} to {losses.high:+.4g}; less is better)"
    )
    if losses.difference > margin:
        return CheckResult(metric, False, f"{text}: more than the {margin:g} that it may lose", data=data)
    if losses.low > 0:
        return CheckResult(metric, False, f"{text}: within the margin, but certain", "warning", data)
    return CheckResult(metric, True, text, data=data)


def _shares(what: str, mine: list[int], theirs: list[int] | None, facts: Facts) -> CheckResult:
    if not theirs:
        share = sum(mine) / len(mine)
        text = f"{share:.1%} of {len(mine)} cases; nothing to compare with"
        return CheckResult(what, True, text, data={"cases": len(mine), "candidate": share})
    paired = compare_pairs(mine, theirs)
    margin = facts.policy.accuracy_margin
    data = {**paired.as_dict(), "margin": margin, "significance": SIGNIFICANCE}
    text = (
        f"{paired.candidate:.1%} against the stable version's {paired.stable:.1%} on the same {paired.cases} cases: "
        f"{100 * paired.difference:+.1f} points (95 %: {100 * paired.low:+.1f} to {100 * paired.high:+.1f}; "
        f"only the stable right {paired.only_stable}, only the candidate {paired.only_candidate}, "
        f"one-sided p = {paired.p_value:.2g})"
    )
    if -paired.difference > margin + 1e-12:
        return CheckResult(what, False, f"{text}: more than the {100 * margin:g} points that it may lose", data=data)
    if paired.p_value < SIGNIFICANCE:
        return CheckResult(what, False, f"{text}: a small loss, but a certain one", data=data)
    return CheckResult(what, True, text, data=data)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MB"
