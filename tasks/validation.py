"""The validation of a candidate: runs the probe under limits, and decides on its figures.

`run_probe` starts and ends the process; `decide` is pure. A new check is one function in the list `CHECKS`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from registry.errors import StorageError
from registry.policy import PromotionPolicy
from registry.signature import Signature, TensorSpec
from tasks.judgement import binomial_tail

PROBE_ARGUMENTS: tuple[str, ...] = ("-P", "-B", "-m", "serving.probe")

SIGNIFICANCE = 0.01
"""A loss of accuracy is certain when McNemar's exact test finds it this improbable for two equally good versions."""

NEGLIGIBLE_MEMORY_BYTES = 64 * 2**20
"""Growth below this is the runtime's own buffers as much as the model's, and no reason to refuse."""

_LOG_BYTES = 16_384
_OUTPUT_BYTES = 256 * 2**20

# The probe runs code that came with a model: it gets what it needs to start, and no credentials.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHOME")

Severity = Literal["error", "warning"]


# --- the probe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeModel:
    """A model file to probe; `signature` is needed for formats whose files have none (TorchScript)."""

    path: Path
    format: str
    signature: Signature | None = None

    def as_dict(self) -> dict[str, Any]:
        signature = None if self.signature is None else self.signature.as_dict()
        return {"path": str(self.path.resolve()), "format": self.format, "signature": signature}


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """What to measure. `rtol` and `atol` are for expected outputs in the golden file (as in numpy.allclose)."""

    candidate: ProbeModel
    stable: ProbeModel | None = None
    golden: Path | None = None
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    rtol: float = 1e-3
    atol: float = 1e-5
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate.as_dict(),
            "stable": None if self.stable is None else self.stable.as_dict(),
            "golden": None if self.golden is None else str(self.golden.resolve()),
            "threads": self.threads,
            "rtol": self.rtol,
            "atol": self.atol,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class GoldenFigures:
    """Lists have one entry a case that was run: 1 right, 0 wrong or failed; None where the file knows no answer."""

    cases: int
    correct: list[int] | None
    labels: list[int] | None
    outputs: list[int] | None
    failures: int
    first_failure: str | None
    non_finite: int
    first_non_finite: str | None

    @property
    def accuracy(self) -> float | None:
        """Share of right labels; where the file has none, of cases whose outputs match."""
        known = self.labels if self.labels is not None else self.outputs
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of one call at batch 1, from a run in which the models took turns."""

    p50_seconds: float
    p95_seconds: float
    samples: int


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of one model; what could not be measured is None."""

    loaded: bool
    error: str | None = None
    load_seconds: float | None = None
    memory_bytes: int | None = None
    signature: Signature | None = None
    golden: GoldenFigures | None = None
    latency: Latency | None = None
    rows_independent: bool | None = None
    rows_how: str | None = None

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Figures:
        signature, golden, latency = value.get("signature"), value.get("golden"), value.get("latency")
        return cls(
            loaded=bool(value["loaded"]),
            error=value.get("error"),
            load_seconds=value.get("load_seconds"),
            memory_bytes=value.get("memory_bytes"),
            signature=None if signature is None else Signature.from_dict(signature),
            golden=None if golden is None else GoldenFigures(**golden),
            latency=None if latency is None else Latency(**latency),
            rows_independent=value.get("rows_independent"),
            rows_how=value.get("rows_how"),
        )

    def as_dict(self) -> dict[str, Any]:
        """Without the verdicts case by case, which are as many as there are cases."""
        golden = self.golden
        return {
            "loaded": self.loaded,
            "error": self.error,
            "load_seconds": self.load_seconds,
            "memory_bytes": self.memory_bytes,
            "signature": None if self.signature is None else self.signature.as_dict(),
            "golden": None
            if golden is None
            else {
                "cases": golden.cases,
                "accuracy": golden.accuracy,
                "failures": golden.failures,
                "first_failure": golden.first_failure,
                "non_finite": golden.non_finite,
                "first_non_finite": golden.first_non_finite,
            },
            "latency": None
            if self.latency is None
            else {
                "p50_seconds": self.latency.p50_seconds,
                "p95_seconds": self.latency.p95_seconds,
                "samples": self.latency.samples,
            },
            "rows_independent": self.rows_independent,
            "rows_how": self.rows_how,
        }


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How the probe ended and what it measured.

    `outcome`: "done"; "refused" (the job or the golden file cannot be used); "timeout" (killed at its limit); "crashed"
    (ended by a signal or without a result). `phase` is the last one that it began, `log_tail` the end of what it wrote.
    """

    outcome: Literal["done", "refused", "timeout", "crashed"]
    problem: str | None = None
    phase: str | None = None
    candidate: Figures | None = None
    stable: Figures | None = None
    golden_cases: int | None = None
    inputs: str | None = None
    seconds: float | None = None
    log_tail: str = ""


def run_probe(job: ProbeJob, *, timeout_seconds: float, memory_mb: int) -> ProbeResult:
    """Run the probe on `job` in a process group of its own, and leave nothing of it behind.

    Args:
        job: what to measure.
        timeout_seconds: wall-clock time after which the whole group is killed.
        memory_mb: limit on the process's private memory (RLIMIT_DATA: heap and anonymous mappings; model files that are
            mapped and address space that is only reserved do not count, which RLIMIT_AS would).

    Raises: StorageError where there is no room for its working directory.
    """
    document = json.dumps({**job.as_dict(), "seconds": timeout_seconds}).encode()
    try:
        with tempfile.TemporaryDirectory(prefix="modelkeep-probe-", ignore_cleanup_errors=True) as folder:
            return _run(job, document, Path(folder), timeout_seconds, memory_mb)
    except OSError as error:
        raise StorageError(
            f"the probe could not run: {error}; is {tempfile.gettempdir()} full or read-only?"
        ) from error


def _run(job: ProbeJob, document: bytes, folder: Path, timeout_seconds: float, memory_mb: int) -> ProbeResult:
    # Files, not pipes: a process that outlives the probe in its group would hold a pipe open.
    with (folder / "out").open("w+b") as out, (folder / "err").open("w+b") as err:
        process = subprocess.Popen(
            [sys.executable, *PROBE_ARGUMENTS],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=_environment(job, folder),
            start_new_session=True,
        )
        timed_out = False
        try:
            # It waits for its job before it loads anything, so the limits are there in time.
            _limit(process.pid, memory_mb)
            process.communicate(document, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            _kill_group(process)
        return _result(process.returncode, timed_out, timeout_seconds, memory_mb, out, err)


def _limit(pid: int, memory_mb: int) -> None:
    limits = {
        resource.RLIMIT_DATA: memory_mb * 2**20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: _OUTPUT_BYTES,
    }
    for limit, value in limits.items():
        try:
            _, hard = resource.prlimit(pid, limit)
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.prlimit(pid, limit, (value, value))
        except ProcessLookupError:
            return  # it is dead already; its exit status says how


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The group has the process's own id, which stays taken until it is waited for: kill first, then wait.
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nobody else was in the group


def _environment(job: ProbeJob, folder: Path) -> dict[str, str]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # The probe is to be of the same tree as this module, whether that is installed or not.
    root = Path(__file__).resolve().parents[1]
    paths = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if "site-packages" not in root.parts:
        paths.append(str(root))
    if paths:
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in paths)
    environment.update(TMPDIR=str(folder), OMP_NUM_THREADS=str(job.threads), OPENBLAS_NUM_THREADS=str(job.threads))
    if job.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return environment


def _result(
    returncode: int, timed_out: bool, timeout_seconds: float, memory_mb: int, out: Any, err: Any
) -> ProbeResult:
    out.seek(0)
    lines = out.read().decode(errors="replace").splitlines()
    err.seek(max(err.seek(0, os.SEEK_END) - _LOG_BYTES, 0))
    log_tail = err.read().decode(errors="replace").strip()
    last: dict[str, Any] = {}
    phase = None
    for line in lines:
        try:
            last = json.loads(line)
        except ValueError:  # a line cut off by the end of the process
            last = {}
        phase = last.get("phase", phase)
    while_ = f" while {phase}" if phase else " before it began"
    if timed_out:
        problem = f"the probe was stopped after {timeout_seconds:g} s{while_}"
        return ProbeResult("timeout", problem, phase, log_tail=log_tail)
    if returncode == 2 and "error" in last:
        return ProbeResult("refused", str(last["error"]), phase, log_tail=log_tail)
    if returncode != 0 or "candidate" not in last:
        problem = f"the probe {_death(returncode, log_tail, memory_mb)}{while_}"
        return ProbeResult("crashed", problem, phase, log_tail=log_tail)
    stable, golden = last["stable"], last["golden"]
    return ProbeResult(
        "done",
        None,
        phase,
        Figures.from_dict(last["candidate"]),
        None if stable is None else Figures.from_dict(stable),
        None if golden is None else int(golden["cases"]),
        last["inputs"],
        last["seconds"],
        log_tail,
    )


def _death(returncode: int, log_tail: str, memory_mb: int) -> str:
    if returncode < 0:
        name = signal.Signals(-returncode).name if -returncode in list(signal.Signals) else f"signal {-returncode}"
        why = f"was ended by {name}"
    else:
        last_line = log_tail.splitlines()[-1] if log_tail else "nothing on standard error"
        why = f"ended with exit code {returncode} and no result ({last_line})"
    if any(sign in log_tail for sign in ("MemoryError", "bad_alloc", "Cannot allocate memory", "can't allocate")):
        why += f", out of the {memory_mb} MB that it may have,"
    elif returncode == -signal.SIGKILL:
        why += " (not by us; on Linux most often the kernel, out of memory)"
    return why


# --- the decision -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check: its verdict, what it counts for, and the figures, as a sentence and as data."""

    name: str
    passed: bool
    text: str
    severity: Severity = "error"
    data: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "severity": self.severity,
            "text": self.text,
            "data": dict(self.data or {}),
        }


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


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks look at: a candidate that was loaded, and the stable version's figures where there are some."""

    candidate: Figures
    stable: Figures | None
    golden_cases: int | None
    policy: PromotionPolicy


def decide(result: ProbeResult, policy: PromotionPolicy, *, has_stable: bool) -> ValidationReport:
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
        facts = Facts(candidate, compared, result.golden_cases, policy)
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


def check_accuracy(facts: Facts) -> CheckResult | None:
    """The same cases through both versions: refused on a loss above the margin, or a smaller one that is certain."""
    golden = facts.candidate.golden
    if golden is None or golden.accuracy is None:
        return None
    known = "labels" if golden.labels is not None else "outputs"
    mine: list[int] = getattr(golden, known)
    theirs: list[int] | None = getattr(facts.stable.golden, known) if facts.stable and facts.stable.golden else None
    what = "accuracy" if known == "labels" else "expected outputs"
    if not theirs:
        text = f"{golden.accuracy:.1%} of {len(mine)} cases; nothing to compare with"
        return CheckResult(what, True, text, data={"cases": len(mine), "candidate": golden.accuracy})
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
    check_signature,
    check_golden_failures,
    check_finite,
    check_accuracy,
    check_latency,
    check_memory,
    check_rows,
)
"""Every check, in the order of the report. A new one goes here: from Facts to its result, or None where it has no say.

What it needs and the probe does not measure yet is measured in serving/probe.py and carried by `Figures`.
"""


# --- what the checks compute ------------------------------------------------------------------------------------------


def signature_changes(old: Signature, new: Signature) -> tuple[list[str], list[str]]:
    """(what breaks clients of `old`, what they need not mind). Every input of a signature is one that must be given."""
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
            elif change := _shape_change(kind, spec, now[spec.name]):
                text, breaks = change
                (errors if breaks else notes).append(f"{kind} '{spec.name}' {text}")
        added = [spec.name for spec in after if spec.name not in known]
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


@dataclass(frozen=True, slots=True)
class Paired:
    """Two versions on the same cases; `low` and `high` bound candidate minus stable at 95 %."""

    cases: int
    candidate: float
    stable: float
    only_candidate: int
    only_stable: int
    difference: float
    low: float
    high: float
    p_value: float

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare_pairs(candidate: list[int], stable: list[int]) -> Paired:
    """Difference of two paired proportions, with an interval and a one-sided p for "the candidate is no worse".

    Interval: square-and-add on Wilson's, with the correlation of the pairs (Newcombe, Statistics in Medicine 17, 1998,
    2635-2650, method 10). p: McNemar's test in its exact binomial form on the cases that only one of them gets right.
    """
    n = min(len(candidate), len(stable))
    pairs = list(zip(candidate[:n], stable[:n], strict=True))
    both = sum(c and s for c, s in pairs)
    only_candidate = sum(c and not s for c, s in pairs)
    only_stable = sum(s and not c for c, s in pairs)
    neither = n - both - only_candidate - only_stable
    p1, p2 = (both + only_candidate) / n, (both + only_stable) / n
    low1, high1 = wilson(both + only_candidate, n)
    low2, high2 = wilson(both + only_stable, n)
    product = (both + only_candidate) * (only_stable + neither) * (both + only_stable) * (only_candidate + neither)
    covariance = float(both * neither - only_candidate * only_stable)
    if covariance > 0:
        covariance = max(covariance - n / 2, 0.0)
    phi = covariance / math.sqrt(product) if product else 0.0

    def spread(one: float, two: float) -> float:
        return math.sqrt(max(one * one - 2 * phi * one * two + two * two, 0.0))

    difference = p1 - p2
    return Paired(
        cases=n,
        candidate=p1,
        stable=p2,
        only_candidate=only_candidate,
        only_stable=only_stable,
        difference=difference,
        low=difference - spread(p1 - low1, high2 - p2),
        high=difference + spread(high1 - p1, p2 - low2),
        p_value=binomial_tail(only_stable, only_candidate + only_stable, 0.5),
    )


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default."""
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max((middle - half) / (1 + z * z / n), 0.0), min((middle + half) / (1 + z * z / n), 1.0)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MB"
