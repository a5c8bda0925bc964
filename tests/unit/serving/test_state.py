"""What is served now: routing, the swap, and counts that outlive the route and the version that they belong to."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from registry.errors import NotFoundError, UnavailableError
from serving.figures.telemetry import LATENCY_BOUNDS_SECONDS, METRIC_BUCKETS_SECONDS, WatchCounts, cumulative_buckets
from serving.state import Serving
from serving.traffic.routing import Route, choose
from serving.views.metrics import Metrics
from tests.unit.serving.helpers import PythonRuntime, close, load, row, serve


def state() -> Serving:
    return Serving(environment="production", replica_id="box", boot_id="abcdef")


def test_the_weight_is_the_candidates_share() -> None:
    random = Random(1).random
    drawn = Counter(choose(Route("m", 1, "1", "2", 0.25), random) for _ in range(20_000))
    assert drawn["2"] == pytest.approx(5000, abs=250)


@pytest.mark.parametrize(
    ("route", "version"),
    [
        (Route("m", 1, "1"), "1"),
        (Route("m", 1, "1", "2", 0.0), "1"),
        (Route("m", 1, "1", "2", 1.0), "2"),
        (Route("m", 1, None, "2", 1.0), "2"),
    ],
)
def test_the_ends_of_the_weight_leave_nothing_to_chance(route: Route, version: str) -> None:
    for drawn in (0.0, 0.5, 1.0 - 2**-53):
        assert choose(route, lambda drawn=drawn: drawn) == version  # type: ignore[misc]


def test_a_route_without_a_version_says_so() -> None:
    with pytest.raises(NotFoundError, match="no version in traffic"):
        choose(Route("m", 1, None, "2", 0.0), lambda: 0.0)


def test_who_cannot_be_served_is_told_what_is_there() -> None:
    version = load(version="1")
    serving = serve(version).serving
    with pytest.raises(NotFoundError, match=r"model 'x' is not known; this server has 'm'"):
        serving.admit("x", None)
    with pytest.raises(NotFoundError, match=r"model 'm' has no version '9' loaded; loaded are '1'"):
        serving.admit("m", "9")
    with pytest.raises(NotFoundError, match="this server has no models yet"):
        state().admit("m", None)
    serving.install({"m": Route("m", 2, "2")}, {("m", "1"): version}, "epoch", 2)
    with pytest.raises(UnavailableError, match="version '2' is not loaded yet"):
        serving.admit("m", None)
    close(version)


def test_a_candidate_that_is_not_loaded_leaves_its_share_to_the_stable_version() -> None:
    version = load(version="1")
    serving = serve(version, route=Route("m", 1, "1", "2", 1.0)).serving
    admitted, route, _ = serving.admit("m", None)
    assert admitted is version and route is not None
    close(version)


def test_an_installed_state_returns_what_is_no_longer_needed_and_its_requests_finish() -> None:
    async def scenario() -> None:
        runtime = PythonRuntime()
        old, new = load(runtime, "1"), load(version="2")
        serving = serve(old).serving
        runtime.gate.clear()
        held, _, _ = serving.admit("m", None)
        assert serving.install({"m": Route("m", 2, "2")}, {("m", "2"): new}, "epoch", 2) == [old]
        # Routed before the swap, queued after it.
        work = held.submit(row(1, 2), None)
        draining = asyncio.create_task(old.drain(30))
        await asyncio.sleep(0)
        assert not draining.done()
        runtime.gate.set()
        await work.future
        held.release()
        assert await draining
        assert serving.admit("m", None)[0] is new
        assert serving.install(serving.routes, serving.loaded, "epoch", 2) == []
        close(old, new)

    asyncio.run(scenario())


def test_counts_outlive_their_version_until_they_are_forgotten() -> None:
    async def scenario() -> None:
        old, new = load(version="1"), load(version="2")
        watched = Route("m", 1, "1", "2", 0.5, watch=True)
        serving = serve(old, new, route=watched).serving
        await old.submit(row(1, 1), None, watched).future
        await new.submit(row(1, 1), None, watched).future
        serving.install({"m": Route("m", 2, "1", watch=True)}, {("m", "1"): old}, "epoch", 2)
        await new.submit(row(1, 1), None, watched).future  # was on its way when the route changed
        rows = {(row["version"], row["generation"]): row for row in serving.watch_counts()}
        assert {key: row["requests"] for key, row in rows.items()} == {("1", 1): 1, ("2", 1): 2}
        assert rows["2", 1]["epoch"] == "epoch" and rows["2", 1]["model"] == "m"
        serving.forget_counts("other", [1])
        assert len(serving.watch_counts()) == 2
        serving.forget_counts("m", [1])
        assert serving.watch_counts() == []
        close(old, new)

    asyncio.run(scenario())


def test_a_version_that_is_loaded_again_goes_on_counting() -> None:
    async def scenario() -> None:
        route = Route("m", 1, "1", watch=True)
        first, second = load(version="1"), load(version="1")
        serving = serve(first, route=route).serving
        await first.submit(row(1, 1), None, route).future
        assert serving.install({"m": route}, {("m", "1"): second}, "epoch", 1) == [first]
        await second.submit(row(1, 1), None, route).future
        assert [row["requests"] for row in serving.watch_counts()] == [2]
        assert second.telemetry.total.requests == 2
        close(first, second)

    asyncio.run(scenario())


def test_a_new_epoch_starts_new_counts() -> None:
    async def scenario() -> None:
        route = Route("m", 1, "1", watch=True)
        version = load(version="1")
        serving = serve(version, route=route).serving
        await version.submit(row(1, 1), None, route).future
        serving.install({"m": route}, {("m", "1"): version}, "after a restore", 1)
        assert serving.watch_counts() == []
        await version.submit(row(1, 1), None, route).future
        assert [(row["epoch"], row["requests"]) for row in serving.watch_counts()] == [("after a restore", 1)]
        close(version)

    asyncio.run(scenario())


def test_latency_bounds_rise_by_about_five_percent_and_hold_the_coarse_buckets() -> None:
    bounds = LATENCY_BOUNDS_SECONDS
    assert (bounds[0], bounds[-1]) == (50e-6, 120.0)
    assert all(1.03 < b / a < 1.06 for a, b in pairwise(bounds))
    assert set(METRIC_BUCKETS_SECONDS) <= set(bounds)


def test_a_latency_is_counted_under_the_first_bound_that_is_not_below_it() -> None:
    counts = WatchCounts()
    for seconds in (1e-6, 0.001, 0.00101, 119.0, 500.0):
        counts.record(seconds, error=False, slow=False)
    assert counts.as_dict()["latency"] == {"5e-05": 1, "0.001": 1, "0.001051": 1, "120": 1, "inf": 1}
    buckets = dict(cumulative_buckets(counts.latency))
    assert (buckets["0.001"], buckets["0.002"], buckets["120.0"], buckets["+Inf"]) == (2, 3, 4, 5)


def test_the_summary_has_what_was_measured_and_nothing_else() -> None:
    counts = WatchCounts()
    assert counts.summary() == {"requests": 0, "errors": 0, "mean_seconds": None, "p95_seconds": None}
    for k in range(100):
        counts.record(0.001 if k < 95 else 0.5, error=k < 3, slow=False)
    assert counts.summary() == {"requests": 100, "errors": 3, "mean_seconds": 0.02595, "p95_seconds": 0.001}
    for _ in range(100):
        counts.record(500.0, error=False, slow=False)
    assert counts.summary()["p95_seconds"] is None, "beyond the last bound nobody measured it"


def test_metrics_have_no_labels_but_those_of_versions_that_were_loaded() -> None:
    async def scenario() -> None:
        version = load(version="1")
        version.quality = {"accuracy": 0.975, "mean_absolute_error": 3.5}
        server = serve(version, route=Route("m", 3, "1", "2", 0.25))
        for k in range(50):
            await server.infer(model=f"unknown-{k}")
            await server.infer(version=f"unknown-{k}")
        await server.infer()
        page = Metrics(server.serving).render().decode()
        assert "unknown-" not in page
        for line in (
            'modelkeep_requests_total{code="404",model="",version=""} 100.0',
            'modelkeep_requests_total{code="200",model="m",version="1"} 1.0',
            'modelkeep_request_duration_seconds_count{model="m",version="1"} 1.0',
            'modelkeep_request_duration_seconds_bucket{le="120.0",model="m",version="1"} 1.0',
            'modelkeep_model_errors_total{model="m",version="1"} 0.0',
            'modelkeep_queue_length{model="m",version="1"} 0.0',
            'modelkeep_model_quality_score{metric_type="accuracy",model="m",version="1"} 0.975',
            'modelkeep_model_quality_score{metric_type="mean_absolute_error",model="m",version="1"} 3.5',
            'modelkeep_shadow_requests_total{model="m",version="1"} 0.0',
            'modelkeep_route_weight{model="m",role="stable",version="1"} 0.75',
            'modelkeep_route_weight{model="m",role="candidate",version="2"} 0.25',
            'modelkeep_route_generation{model="m"} 3.0',
            "modelkeep_requests_in_flight 0.0",
            "modelkeep_ready 1.0",
        ):
            assert line in page.splitlines(), line
        assert float(page.split("\nmodelkeep_python_blocks ")[1].split()[0]) > 10_000
        assert "modelkeep_build_info{" in page and "modelkeep_process_resident_memory_bytes" in page
        close(version)

    asyncio.run(scenario())
