"""`/api/gpu` and the metrics of the memory: what a page says with and without a device."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from registry.sections import AlertsSection
from serving.api import create_app
from serving.device.devices import CpuDevice
from serving.device.memory import MemoryOptimizer
from serving.device.memory_limits import BatchLimit
from serving.figures.performance import Performance
from serving.traffic.routing import Route
from serving.views.memory_page import router
from serving.views.metrics import Metrics
from tests.unit.serving.helpers import PythonRuntime, Server, close, load, no_nudge, row, serve
from tests.unit.serving.limited import Pool, PoolRuntime

MEBIBYTE = 1 << 20


class Named(Pool):
    kind = "cuda"
    name: Any = "Device of a test"

    def temperature_celsius(self) -> float | None:
        return 55.0


def served(device: Any, *versions: Any) -> tuple[Server, MemoryOptimizer, Performance]:
    server = serve(*versions)
    memory = server.serving.memory = MemoryOptimizer(device, collect=int)
    taker = Performance(device, AlertsSection(), lambda: (one for _, _, one in server.serving.telemetry()))
    limits = SimpleNamespace(
        server=SimpleNamespace(request_timeout_seconds=30.0, max_body_bytes=100_000, max_receiving_mb=64),
        performance=SimpleNamespace(max_concurrent_requests=100),
    )
    pages = [router(server.serving, memory, taker)]
    server.app = create_app(server.serving, settings=limits, nudge=no_nudge, info=dict, routers=pages)
    return server, memory, taker


def test_without_a_device_its_profile_is_zeros_beside_null_and_the_budget_is_what_counts() -> None:
    async def scenario() -> None:
        version = load(PythonRuntime())
        server, _, _ = served(CpuDevice(2048 * MEBIBYTE), version)
        found = (await server.get("/api/gpu/profile")).json()
        assert found["device"] is None
        assert found["profile"]["total_mb"] == 0 and found["profile"]["pressure_level"] == "none"
        assert found["memory"]["of"] == "the memory budget" and found["memory"]["total_mb"] == 2048.0
        assert found["memory"]["pressure_level"] == "low" and found["memory"]["timestamp"] > 1e9
        assert found["models"][0] | {"memory_bytes": None} == {
            **{"model": "m", "version": "1", "memory_bytes": None, "computes_on": "cpu", "precision": "fp32"},
            **{
                "caches": None,
                "precision_reason": None,
                "batch_rows": 8,
                "batch_rows_most": 8,
                "rows_learnt": None,
                "out_of_memory": 0,
            },
        }
        close(version)

    asyncio.run(scenario())


def test_the_report_tells_of_memory_that_ran_out_of_clean_ups_and_of_the_servers_figures() -> None:
    async def scenario() -> None:
        device = Named(10 * MEBIBYTE)
        server, memory, taker = served(device)
        runtime = PoolRuntime(device, MEBIBYTE)
        version = load(runtime, max_batch=16, limit=BatchLimit(16), clean_up=memory.ran_out)  # type: ignore[arg-type]
        server.serving.install(server.serving.routes, {("m", "1"): version}, "epoch", 2)
        work = version.submit({"x": row(1, 2)["x"].repeat(14, axis=0)}, None)
        await work.future
        taker.measure()
        taker.sample()
        found = (await server.get("/api/gpu/optimization-report")).json()
        assert found["device"] == {
            "index": 0,
            "name": "Device of a test",
            "temperature_celsius": 55.0,
            "busy_percent": None,
        }
        assert found["profile"]["total_mb"] == 10.0 and found["memory"]["of"] == "the device"
        assert found["out_of_memory_count"] == len(runtime.refused) == found["cleanup_events_count"] >= 1
        assert found["cleanup_events"][0]["reason"] == "m 1 ran out of memory"
        assert found["models"][0]["rows_learnt"] == version.limit.learnt and found["models"][0]["batch_rows_most"] == 16
        assert set(found) >= {"fragmentation_stats", "trend", "total_freed_mb", "recommendations", "target_percent"}
        assert found["fragmentation_stats"]["samples"] == 1 and found["performance"]["sample"]["requests"] == 1
        text = Metrics(server.serving).render().decode()
        assert f'modelkeep_out_of_memory_total{{model="m",version="1"}} {float(len(runtime.refused))}' in text
        assert 'modelkeep_out_of_memory_failed_total{model="m",version="1"} 0.0' in text
        assert f'modelkeep_batch_rows_limit{{model="m",version="1"}} {float(version.limit.rows)}' in text
        assert 'modelkeep_model_memory_bytes{memory_type="host",model="m",version="1"}' in text
        assert 'modelkeep_memory_bytes{device="cuda",what="total"} 1.048576e+07' in text
        assert 'modelkeep_memory_pressure{level="low"}' in text and "modelkeep_memory_clean_ups_total" in text
        close(version)

    asyncio.run(scenario())


def test_metrics_have_nothing_of_a_memory_that_was_never_looked_at() -> None:
    server = serve()
    assert "modelkeep_memory_bytes{" not in Metrics(server.serving).render().decode()


def test_a_request_that_does_not_fit_alone_is_answered_507_with_the_reason_and_counted_apart() -> None:
    async def scenario() -> None:
        device = Named(MEBIBYTE)
        server, memory, _ = served(device)
        version = load(PoolRuntime(device, 2 * MEBIBYTE), clean_up=memory.ran_out)  # type: ignore[arg-type]
        server.serving.install({"m": Route("m", 2, "1")}, {("m", "1"): version}, "epoch", 2)
        answer = await server.infer(1, 2)
        assert answer.status == 507 and "does not fit the memory, also by itself" in answer.error
        text = Metrics(server.serving).render().decode()
        assert 'modelkeep_out_of_memory_failed_total{model="m",version="1"} 1.0' in text
        assert 'modelkeep_requests_total{code="507",model="m",version="1"} 1.0' in text
        close(version)

    asyncio.run(scenario())
