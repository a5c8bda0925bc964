"""The figures of a version: its last benchmark, what its last validation measured, and the live traffic that replicas report.

A figure that nobody measured is absent, never a default.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from registry import clock
from registry.database import Transaction
from registry.policy import METRICS
from registry.schema import Replica, Version


def note_benchmark(transaction: Transaction, row: Version, figures: dict[str, Any], *, device: str) -> None:
    """Keep the figures of a benchmark with the version, with when and on what it ran. The one before is in the audit trail."""
    before = row.benchmark
    row.benchmark = {**figures, "device": device, "at": clock.text(clock.now())}
    transaction.record("version.benchmarked", f"version:{row.model}/{row.version}", before=before, after=row.benchmark)


def measured(row: Version) -> dict[str, Any] | None:
    """What the last validation measured of this version in the probe, None where none did."""
    candidate = (row.validation or {}).get("candidate")
    if not candidate:
        return None
    latency, golden = candidate.get("latency") or {}, candidate.get("golden") or {}
    found = {
        "load_seconds": candidate.get("load_seconds"),
        "memory_bytes": candidate.get("memory_bytes"),
        "latency_p50_seconds": latency.get("p50_seconds"),
        "latency_p95_seconds": latency.get("p95_seconds"),
        "latency_samples": latency.get("samples"),
        "golden_cases": golden.get("cases"),
        "accuracy": golden.get("accuracy"),
        "rows_independent": row.rows_independent,
    }
    return {"by": "validation", **{name: value for name, value in found.items() if value is not None}}


def quality(row: Version) -> dict[str, float]:
    """What the last validation measured of its answers to the golden cases, by metric (registry.policy.METRICS); nothing is left out
    that was measured, and nothing stands for what was not. A share for accuracy and exact_match, the unit of the outputs for
    mean_absolute_error, of which less is better.
    """
    report = row.validation or {}
    golden = (report.get("candidate") or {}).get("golden") or {}
    found = {"accuracy": golden.get("accuracy")}
    for check in report.get("checks") or ():
        if check.get("name") in METRICS:
            found[check["name"]] = (check.get("data") or {}).get("candidate")
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def live(session: Session, models: set[str]) -> dict[tuple[str, str], dict[str, Any]]:
    """What the replicas count of each version of these models that they have loaded, by (model, version).

    Counts are of each server's present process, since it loaded the version; `as_of` is its last report. The mean is over all
    requests; `p95_seconds_worst` is the highest of the servers, since percentiles do not add up.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for replica in session.scalars(select(Replica).order_by(Replica.environment, Replica.id)):
        for loaded in replica.serving.get("loaded", ()):
            figures = loaded.get("figures")
            if loaded["model"] not in models or figures is None:
                continue
            sums = found.setdefault((loaded["model"], loaded["version"]), {"requests": 0, "errors": 0, "replicas": []})
            sums["requests"] += figures["requests"]
            sums["errors"] += figures["errors"]
            sums["replicas"].append(
                {
                    "replica": replica.id,
                    "environment": replica.environment,
                    "since": clock.text(replica.started_at),
                    "as_of": clock.text(replica.reported_at),
                    "memory_bytes": loaded.get("memory_bytes"),
                    **figures,
                }
            )
    for sums in found.values():
        if sums["requests"]:
            rows = [row for row in sums["replicas"] if row["requests"]]
            total = sum(row["mean_seconds"] * row["requests"] for row in rows)
            sums["error_rate"] = sums["errors"] / sums["requests"]
            sums["mean_seconds"] = total / sums["requests"]
            if all(row["p95_seconds"] is not None for row in rows):
                sums["p95_seconds_worst"] = max(row["p95_seconds"] for row in rows)
    return found
