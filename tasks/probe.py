"""Runs the probe (serving.probe) under limits on time and memory, and reads what it measured. What the figures mean: tasks.validation."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from registry import untracked
from registry.errors import StorageError
from registry.policy import METRICS
from registry.signature import Signature

PROBE_ARGUMENTS: tuple[str, ...] = ("-P", "-B", "-m", "serving.probe")

_LOG_BYTES = 16_384
_OUTPUT_BYTES = 256 * 2**20

# The probe runs code that came with a model: it gets what it needs to start, and no credentials.
_ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONHOME")


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
    """What to measure. `rtol` and `atol` are for expected outputs in the golden file (as in numpy.allclose), `tolerances` (absolute,
    by output) instead of them. With `replay` the two versions get so many of the captured requests (a folder of them), or else of the
    golden inputs, one after the other, and nothing else."""

    candidate: ProbeModel
    stable: ProbeModel | None = None
    golden: Path | None = None
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    rtol: float = 1e-3
    atol: float = 1e-5
    seed: int = 0
    metric: str = METRICS[0]
    tolerances: Mapping[str, float] = field(default_factory=dict)
    replay: int = 0
    slow_factor: float = 1.25
    captured: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate.as_dict(),
            "stable": None if self.stable is None else self.stable.as_dict(),
            "golden": None if self.golden is None else str(self.golden.resolve()),
            "threads": self.threads,
            "rtol": self.rtol,
            "atol": self.atol,
            "seed": self.seed,
            "metric": self.metric,
            "tolerances": dict(self.tolerances),
            "replay": self.replay,
            "slow_factor": self.slow_factor,
            "captured": None if self.captured is None else str(self.captured.resolve()),
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
    scores: list[float | None] | None = None
    deviations: dict[str, dict[str, Any]] = field(default_factory=dict)

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
    metric: str | None = None
    replay: Mapping[str, Any] | None = None


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
    environment.update(untracked.told(os.environ))
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
    stable, golden, candidate = last["stable"], last["golden"], last["candidate"]
    return ProbeResult(
        "done",
        None,
        phase,
        None if candidate is None else Figures.from_dict(candidate),
        None if stable is None else Figures.from_dict(stable),
        None if golden is None else int(golden["cases"]),
        last["inputs"],
        last["seconds"],
        log_tail,
        None if golden is None else golden.get("metric"),
        last.get("replay"),
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
