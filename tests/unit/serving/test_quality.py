"""What a validation measured on the golden cases, from the registry to /metrics; how long failures take is counted as well."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from registry import figures
from registry.schema import Version
from serving.views.metrics import Metrics
from tests.unit.serving.boxes import Box, Run
from tests.unit.serving.helpers import PythonRuntime, load, row
from tests.unit.serving.rounds import stable


def report(accuracy: float | None, **checks: Any) -> dict[str, Any]:
    golden = {"cases": 40, "accuracy": accuracy, "failures": 0}
    return {
        "passed": True,
        "candidate": {"loaded": True, "golden": golden},
        "checks": [{"name": name, "passed": True, "data": data} for name, data in checks.items()],
    }


@pytest.mark.parametrize(
    ("validation", "found"),
    [
        (None, {}),
        ({}, {}),
        ({"candidate": None, "checks": []}, {}),
        ({"candidate": {"golden": None}}, {}),
        (report(None), {}),
        (report(0.0), {"accuracy": 0.0}),
        (report(0.5, mean_absolute_error={"candidate": 3, "stable": 2.0}), {"accuracy": 0.5, "mean_absolute_error": 3.0}),
        (report(None, mean_absolute_error={"cases": 4, "without_score": 1}), {}),
        (report(0.5, exact_match={"candidate": 0.25}, latency={"candidate": 9.0}), {"accuracy": 0.5, "exact_match": 0.25}),
    ],
)  # fmt: skip
def test_only_what_was_measured_is_a_score(validation: dict[str, Any] | None, found: dict[str, float]) -> None:
    assert figures.quality(Version(model="m", version="1", validation=validation)) == found


def test_a_server_shows_the_score_of_what_it_serves_and_a_new_one_with_the_next_change(run: Run) -> None:
    async def test(box: Box) -> None:
        serving, database = box.reconciler.serving, box.reconciler.database

        def shown() -> list[str]:
            page = Metrics(serving).render().decode().splitlines()
            return [line for line in page if line.startswith("modelkeep_model_quality_score{")]

        def measure(version: str, accuracy: float) -> None:
            with database.write(actor="test") as transaction:
                transaction.session.get_one(Version, ("a", version)).validation = report(accuracy)
                transaction.record("version.measured", f"version:a/{version}")

        assert shown() == []
        measure("2", 0.75)
        stable(database, "a", "2")
        await box.reconciler.once()
        assert shown() == ['modelkeep_model_quality_score{metric_type="accuracy",model="a",version="2"} 0.75']
        measure("2", 0.5)
        stable(database, "b", "2")
        await box.reconciler.once()
        assert shown() == ['modelkeep_model_quality_score{metric_type="accuracy",model="a",version="2"} 0.5']

    run(test, {"max_concurrent_models": 3})


def test_what_fails_takes_time_that_is_counted() -> None:
    async def scenario() -> None:
        def fails(_: object) -> Any:
            raise ValueError("never")

        runtime = PythonRuntime(fails)
        version = load(runtime)
        runtime.gate.clear()
        work = version.submit(row(1, 2), None)
        await asyncio.to_thread(runtime.entered.wait, 10)
        await asyncio.sleep(0.05)
        runtime.gate.set()
        with pytest.raises(Exception, match="never"):
            await work.future
        total = version.telemetry.total
        assert (total.requests, total.errors, sum(total.latency)) == (1, 1, 1)
        assert total.latency_seconds_total >= 0.05 and total.error_seconds_total == total.latency_seconds_total
        version.close()

    asyncio.run(scenario())
