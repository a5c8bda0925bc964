"""Answers that are not computed again: hits, judgement, versions that change, what the API says of it."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import orjson
import pytest
from fastapi.testclient import TestClient

from registry.errors import UsageError
from registry.modeltoml import given as facts_given
from serving.caching.cache_store import _SLICE
from serving.caching.cache_values import Answer
from serving.traffic.routing import Route
from serving.views.cache_page import router
from serving.views.metrics import Metrics
from serving.views.pages import create_pages
from tests.unit.serving.caching import WATCHED, ask, cache_of, cached, landed, on_a_loop
from tests.unit.serving.helpers import Arrays, PythonRuntime, close, load, no_nudge, request, serve, until

# --- hits and misses


@on_a_loop
async def test_an_equal_request_is_answered_without_the_model_and_says_so() -> None:
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = cached(version)
    first = await server.infer(1, 2)
    await landed()
    second = await server.infer(1, 2)
    other = await server.infer(1, 3)
    assert len(runtime.calls) == 2
    assert "cache" not in first.json()["parameters"] and "cache" not in other.json()["parameters"]
    assert second.json()["parameters"]["cache"] == "l1"
    assert second.json()["outputs"] == first.json()["outputs"]
    assert second.headers["x-model-version"] == "1" and second.headers["x-request-id"] != first.headers["x-request-id"]
    assert version.telemetry.total.requests == 2, "a hit is none of the version's requests"
    assert version.telemetry.codes == {200: 3}
    stats = cache_of(server).stats()
    assert stats["hits"] == {"l1": 1, "l2": 0, "shared": 0} and stats["misses"] == 2 and stats["hit_rate"] == 0.333333
    assert stats["saved_seconds"] >= 0 and stats["l2"] is None
    seconds = stats["saved_seconds"] + stats["computed_seconds"]
    assert stats["computed_seconds"] > 0 and stats["saved_share"] == pytest.approx(
        stats["saved_seconds"] / seconds, abs=0.1
    )
    assert 0 < stats["saved_share"] < 1
    assert stats["versions"][0]["entries"] == stats["l1"]["entries"] == 2
    close(version)


@on_a_loop
async def test_an_answer_in_json_serves_a_binary_request_and_other_outputs_are_other_answers() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    await server.infer(1, 2)
    await landed()
    binary = await server.post(
        "/v2/models/m/infer", {**request(1, 2), "id": "7", "parameters": {"binary_data_output": True}}
    )
    length = int(binary.headers["inference-header-content-length"])
    header = orjson.loads(binary.body[:length])
    assert header["id"] == "7" and header["parameters"]["cache"] == "l1"
    assert np.frombuffer(binary.body[length:], "<f4").tolist() == [2, 4]
    named = await server.post("/v2/models/m/infer", {**request(1, 2), "outputs": [{"name": "y"}]})
    assert "cache" not in named.json()["parameters"] and len(runtime.calls) == 2
    close(version)


@on_a_loop
async def test_a_version_that_does_not_say_that_it_is_deterministic_computes_everything() -> None:
    version = load(runtime := PythonRuntime())
    server = cached(version)
    for _ in range(2):
        assert "cache" not in (await server.infer(1, 2)).json()["parameters"]
        await landed()
    assert version.answers is None and len(runtime.calls) == 2
    assert cache_of(server).stats()["versions"] == []
    close(version)


@on_a_loop
async def test_a_slice_of_a_batch_does_not_keep_the_batch_alive() -> None:
    runtime = PythonRuntime()
    version = load(runtime, deterministic=True)
    server = cached(version)
    runtime.gate.clear()
    works = [ask(version, number, 0) for number in range(5)]
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in works))
    await landed()
    hit = ask(version, 4, 0)
    assert hit.future.done() and hit.answer["y"].base is None and hit.answer["y"].tolist() == [[8, 0]]
    assert len(cache_of(server).local) == 5
    close(version)


# --- judgement


@on_a_loop
async def test_what_a_promotion_judges_is_computed_and_kept_for_afterwards() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version, route=WATCHED)
    for _ in range(3):
        assert "cache" not in (await server.infer(1, 2)).json()["parameters"]
        await landed()
    assert len(runtime.calls) == 3 and version.watch[1].requests == 3
    assert cache_of(server).counts.bypassed == 3
    server.serving.install({"m": Route("m", 2, "1")}, {("m", "1"): version}, "epoch", 2)
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    assert len(runtime.calls) == 3
    close(version)


@on_a_loop
async def test_a_version_named_in_the_path_is_judged_by_nobody_and_may_be_answered_from_the_cache() -> None:
    version = load(PythonRuntime(), deterministic=True)
    server = cached(version, route=WATCHED)
    await server.infer(1, 2)
    await landed()
    assert (await server.infer(1, 2, version="1")).json()["parameters"]["cache"] == "l1"
    assert version.watch[1].requests == 1
    close(version)


@on_a_loop
async def test_shadow_copies_of_answers_from_the_cache_are_computed() -> None:
    stable, candidate = (
        load(PythonRuntime(), deterministic=True),
        load(shadowed := PythonRuntime(), "2", deterministic=True),
    )
    server = cached(stable, candidate, route=Route("m", 1, "1", "2", shadow=True))
    for count in (1, 2, 3):
        await server.infer(1, 2)
        await until(lambda count=count: len(shadowed.calls) == count)
    await until(lambda: candidate.telemetry.total.shadow_requests == 3)
    assert cache_of(server).counts.l1 == 2 and candidate.telemetry.total.shadow_inexact == 0
    close(stable, candidate)


@on_a_loop
async def test_an_answer_that_json_cannot_carry_counts_as_the_versions_error_when_it_was_computed() -> None:
    version = load(PythonRuntime(lambda inputs: {"y": inputs["x"] * np.float32("nan")}), deterministic=True)
    server = cached(version)
    for _ in range(3):
        assert (await server.infer(1, 2)).status == 422
        await landed()
    assert (version.telemetry.total.requests, version.telemetry.total.errors) == (1, 1)
    assert version.telemetry.codes == {422: 3}
    close(version)


# --- versions that come and go


@on_a_loop
async def test_versions_never_answer_for_each_other_and_take_their_answers_with_them() -> None:
    one = load(PythonRuntime(), deterministic=True)
    two = load(PythonRuntime(lambda inputs: {"y": inputs["x"] * 3}), "2", deterministic=True)
    two.digest = "1" * 64
    server = cached(one, two)
    await server.infer(1, 2)
    await landed()
    assert (await server.infer(1, 2, version="2")).json()["outputs"][0]["data"] == [3, 6]
    await landed()
    assert len(cache_of(server).local) == 2
    assert server.serving.install({"m": Route("m", 2, "2")}, {("m", "2"): two}, "epoch", 2) == [one]
    assert cache_of(server).local.owners() == [("m", "2", two.digest)]
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    close(one, two)


@on_a_loop
async def test_what_ends_after_its_version_has_gone_is_not_kept() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version)
    runtime.gate.clear()
    work = ask(version, 1, 2)
    server.serving.install({}, {}, "epoch", 2)
    runtime.gate.set()
    await work.future
    await landed()
    assert len(cache_of(server).local) == 0
    close(version)


@on_a_loop
async def test_what_was_being_computed_when_the_answers_were_dropped_is_not_kept() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    work = ask(version, 1, 2)
    assert await cache.invalidate(["m"]) == (0, False)
    runtime.gate.set()
    await work.future
    await landed()
    assert len(cache.local) == 0
    close(version)


@on_a_loop
async def test_who_comes_after_the_answers_were_dropped_does_not_join_a_request_from_before() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True, max_batch=1)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    before = [ask(version, 1, 2), ask(version, 1, 2)]
    await until(runtime.entered.is_set)
    await cache.invalidate(["m"])
    after = [ask(version, 1, 2), ask(version, 1, 2)]
    before[0].future.cancel()  # who waited behind takes its place, and does not come between the later ones
    await landed()
    assert version.answers is not None
    (flight,) = version.answers._flights.values()
    assert flight.leader is after[0] and list(flight.behind) == [after[1]]
    runtime.gate.set()
    await asyncio.gather(*(work.future for work in [*before[1:], *after]))
    await landed()
    assert len(runtime.calls) == 3 and after[1].cached == "shared"
    assert not version.answers._flights and version.answers._waiting == 0
    close(version)


@on_a_loop
async def test_a_request_from_before_the_answers_were_dropped_does_not_end_what_a_later_one_began() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True, max_batch=1)
    cache = cache_of(cached(version))
    runtime.gate.clear()
    before = ask(version, 1, 2)
    await until(runtime.entered.is_set)
    await cache.invalidate(["m"])
    after = ask(version, 1, 2)
    before.future.cancel()
    await landed()
    behind = ask(version, 1, 2)
    runtime.gate.set()
    await asyncio.gather(after.future, behind.future)
    assert len(runtime.calls) == 2 and behind.cached == "shared"
    close(version)


@on_a_loop
async def test_many_answers_that_are_dropped_are_removed_little_by_little_and_none_is_given() -> None:
    version = load(runtime := PythonRuntime(), deterministic=True)
    server = cached(version, max_mb=8)
    cache = cache_of(server)
    many = 4 * _SLICE
    for number in range(many):
        cache.local.put(number.to_bytes(16, "little"), ("m", "1", version.digest), Answer({}, 0.0), 100)
    await server.infer(1, 2)
    await landed()
    assert cache.forget("m") == many + 1
    assert len(cache.local) == many + 1 - _SLICE and cache.stats()["versions"][0]["entries"] == 0
    assert "cache" not in (await server.infer(1, 2)).json()["parameters"] and len(runtime.calls) == 2
    await until(lambda: len(cache.local) == 1)
    assert (await server.infer(1, 2)).json()["parameters"]["cache"] == "l1"
    close(version)


# --- the API, the metrics, the flag


@on_a_loop
async def test_the_pages_show_and_empty_the_cache() -> None:
    one, other = load(PythonRuntime(), deterministic=True), load(PythonRuntime(), model="digits", deterministic=True)
    server = cached(one, other)
    cache = cache_of(server)
    for version in (one, other):
        for number in range(3):
            await ask(version, number, 0).future
    await landed()
    pages = TestClient(create_pages(server.serving, nudge=no_nudge, info=dict, routers=[router(cache)]))
    stats = pages.get("/api/cache/stats").json()
    assert stats["enabled"] and [v["entries"] for v in stats["versions"]] == [3, 3]
    assert pages.delete("/api/cache", params={"model": "m", "pattern": "*"}).status_code == 400
    assert pages.delete("/api/cache", params={"model": "nobody"}).status_code == 404
    assert pages.delete("/api/cache", params={"pattern": "x*"}).json()["models"] == []
    dropped = pages.delete("/api/cache", params={"model": "m"}).json()
    assert dropped == {"models": ["m"], "dropped": 3, "servers": "this", "within_seconds": 0.0}
    assert pages.delete("/api/cache", params={"pattern": "dig*"}).json()["dropped"] == 3
    assert pages.get("/api/cache/stats").json()["l1"]["entries"] == 0
    assert (
        'modelkeep_cache_requests_total{model="m",result="miss",version="1"} 3.0'
        in Metrics(server.serving).render().decode()
    )
    close(one, other)


def test_without_a_cache_the_pages_say_so() -> None:
    server = serve()
    pages = TestClient(create_pages(server.serving, nudge=no_nudge, info=dict, routers=[router(None)]))
    assert pages.get("/api/cache/stats").json() == {"enabled": False}
    assert pages.delete("/api/cache").json()["dropped"] == 0
    assert b"modelkeep_cache" not in Metrics(server.serving).render()


def test_the_option_says_that_a_model_is_deterministic() -> None:
    assert facts_given({}, {"deterministic": "true"}) == {"deterministic": True}
    assert facts_given({}, {"deterministic": "false"}) == {"deterministic": False}
    with pytest.raises(UsageError, match="it is true or false"):
        facts_given({}, {"deterministic": "yes"})


def test_the_settings_decide_whether_there_is_a_cache_and_whether_it_is_shared() -> None:
    from registry.settings import Settings
    from serving.child import open_cache

    assert open_cache(Settings(performance={"enable_caching": False})) is None  # type: ignore[arg-type]
    alone = open_cache(Settings(cache={"max_mb": 3}))  # type: ignore[arg-type]
    assert alone is not None and alone.shared is None
    assert alone.local.max_bytes + alone.written.max_bytes == 3 << 20
    shared = open_cache(Settings(redis_url="redis://127.0.0.1:1/0"))
    assert shared is not None and shared.shared is not None and not shared.shared.usable


@pytest.mark.parametrize("seed", [1, 2, 3])
@on_a_loop
async def test_in_any_order_of_requests_departures_swaps_and_errors_every_answer_is_its_versions_own(seed: int) -> None:
    draw = random.Random(seed)

    def unsteady(factor: int) -> PythonRuntime:
        def function(inputs: Arrays) -> dict[str, Any]:
            if draw.random() < 0.05:
                raise RuntimeError("now and then")
            return {"y": inputs["x"] * np.float32(factor)}

        return PythonRuntime(function)

    versions = {name: load(unsteady(int(name)), name, deterministic=True, max_batch=4) for name in ("2", "3")}
    for name, version in versions.items():
        version.digest = name * 64
    loaded = {("m", name): version for name, version in versions.items()}
    server = cached(*versions.values())
    cache = cache_of(server)
    seen: dict[str | None, int] = {}

    async def client() -> None:
        for _ in range(60):
            value, gone = draw.randrange(6), asyncio.Event()
            body = orjson.dumps(request(value, 1))
            if draw.random() < 0.1:
                gone.set()
            answer = await server.ask("POST", "/v2/models/m/infer", body, gone=gone)
            if answer is None or answer.status in (500, 503):
                continue
            assert answer.status == 200, answer.body
            factor = int(answer.headers["x-model-version"])
            assert answer.json()["outputs"][0]["data"] == [value * factor, factor]
            level = answer.json()["parameters"].get("cache")
            seen[level] = seen.get(level, 0) + 1

    clients = [asyncio.create_task(client()) for _ in range(12)]
    generation = 1
    while not all(task.done() for task in clients):
        await asyncio.sleep(draw.random() * 0.01)
        generation += 1
        route = Route("m", generation, draw.choice(["2", "3"]), watch=draw.random() < 0.3)
        only = ("m", route.stable)
        kept = loaded if draw.random() < 0.7 else {key: version for key, version in loaded.items() if key == only}
        server.serving.install({"m": route}, kept, "epoch", generation)
        if draw.random() < 0.2:
            await cache.invalidate(["m"])
    await asyncio.gather(*clients)
    await landed()
    assert set(seen) == {None, "l1", "shared"}, seen
    assert server.serving.in_flight == 0 and [version.references for version in versions.values()] == [0, 0]
    for version in versions.values():
        assert version.answers is None or not (version.answers._flights or version.answers._waiting)
    close(*versions.values())
