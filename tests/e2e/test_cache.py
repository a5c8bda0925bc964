"""Answers that two servers share through Redis: from `deterministic = true` in model.toml to what the client is told."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import MODEL, box, free_port, images, wait_for
from tests.redis_server import RedisCluster, RedisServer

TENSOR = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": images()[0].ravel().tolist()}


def stats(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/api/cache/stats", timeout=10).json())


def test_two_servers_share_what_a_deterministic_version_answered_until_it_is_dropped(
    tmp_path: Path, program: Callable[[str], Path]
) -> None:
    redis = RedisServer(program("redis-server"), tmp_path, free_port())
    try:
        with box(tmp_path / "box") as made:
            made.extra |= {"MODELKEEP_REDIS_URL": redis.url, "MODELKEEP_CACHE__REDIS_TIMEOUT_SECONDS": "0.5"}
            (made.folder / "model.toml").write_text("deterministic = true\n")
            made.first("1")
            urls = [made.url, f"http://127.0.0.1:{(port := free_port())}"]
            made.start("second", "modelkeep", "serve", MODELKEEP_SERVER__PORT=str(port))
            made.serve()

            def answered_by(url: str) -> str | None:
                answer = httpx.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": [TENSOR]}, timeout=10)
                assert answer.status_code == 200 and answer.headers["x-model-version"] == "1", answer.text
                level: str | None = answer.json()["parameters"].get("cache")
                return level

            for url in urls:
                wait_for("Redis", lambda url=url: shares(url))
            assert answered_by(urls[0]) is None
            wait_for("the answer in Redis", lambda: stats(urls[0])["l2"]["written"])
            assert [answered_by(urls[0]), answered_by(urls[1]), answered_by(urls[1])] == ["l1", "l2", "l1"]
            found = httpx.delete(f"{urls[0]}/api/cache", params={"pattern": f"{MODEL[:2]}*"}, timeout=10).json()
            assert found == {"models": [MODEL], "dropped": 1, "servers": "all", "within_seconds": 1.0}
            wait_for("the other server", lambda: stats(urls[1])["l1"]["entries"] == 0)
            assert answered_by(urls[1]) is None
    finally:
        redis.close()


def test_two_servers_on_a_cluster_fail_no_request_when_a_master_is_killed_and_share_again(
    tmp_path: Path, program: Callable[[str], Path]
) -> None:
    """With the time that Redis has by default, a few milliseconds: what comes too late is computed."""
    (folder := tmp_path / "redis").mkdir()
    ports = dict.fromkeys(free_port() for _ in range(100))
    cluster = RedisCluster(program("redis-server"), folder, iter(ports).__next__, replicas=1)
    try:
        with box(tmp_path / "box") as made:
            made.extra |= {"MODELKEEP_REDIS_URL": cluster.url_of(0, 1, 2)}
            (made.folder / "model.toml").write_text("deterministic = true\n")
            made.first("1")
            urls = [made.url, f"http://127.0.0.1:{(port := free_port())}"]
            made.start("second", "modelkeep", "serve", MODELKEEP_SERVER__PORT=str(port))
            made.serve()
            for url in urls:
                wait_for("Redis", lambda url=url: shares(url))
            numbers = itertools.count(1)

            def taken_from_the_other() -> bool:
                """Whether what one server has just computed was an answer from Redis for the other. Both answer alike, whatever is away."""
                tensor = {**TENSOR, "data": [next(numbers) / 4096.0, *TENSOR["data"][1:]]}
                answers = []
                for url in urls:
                    answer = httpx.post(f"{url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, timeout=10)
                    assert answer.status_code == 200, answer.text
                    answers.append(answer.json())
                    time.sleep(0.02)  # it is written beside the answer
                assert answers[0]["outputs"] == answers[1]["outputs"]
                return answers[1]["parameters"].get("cache") == "l2"

            def its_replica_serves() -> bool:
                taken_from_the_other()  # none fails meanwhile
                return len(cluster.masters_now()) == 3

            wait_for("answers from the other server", lambda: sum(taken_from_the_other() for _ in range(10)) >= 5)
            gone = cluster.masters_now()[0]
            cluster.nodes[gone].kill()
            for _ in range(20):
                taken_from_the_other()  # a third of them are computed twice, and none fails
            wait_for("its replica", its_replica_serves)
            wait_for("answers of all nodes", lambda: sum(taken_from_the_other() for _ in range(20)) >= 15)
    finally:
        cluster.close()


def shares(url: str) -> bool:
    """Whether a server answers and looks into Redis for the model."""
    try:
        found = stats(url)["l2"]
    except httpx.HTTPError:
        return False
    return bool(found["usable"]) and MODEL in found["models"]
