"""Two servers of one registry: a key gets the same version on both, verdicts go to either, counts outlive a killed server."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import pytest

from registry import promotions
from registry.policy import PromotionPolicy
from registry.promotions import Operation
from tasks import observation
from tasks.judgement import StreamCounts, judge
from tests.e2e.harness import MODEL, Box, box, free_port, images, mark_validated, wait_for
from tests.unit.registry import kit

KEYS = [f"user-{k}" for k in range(60)]


@dataclass
class Two:
    """A box with a second server, in the middle of a canary of version 2."""

    box: Box
    urls: tuple[str, str]
    operation: Operation
    client: httpx.Client

    def ask(self, url: str, **headers: str) -> httpx.Response:
        data = images()[0].ravel().tolist()
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, 1, 8, 8], "data": data}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = self.client.post(
            f"{url}/v2/models/{MODEL}/infer", json={"inputs": [tensor]}, headers=names, timeout=30
        )
        assert answer.status_code == 200, answer.text
        return answer

    def chosen(self, url: str) -> dict[str, str]:
        return {key: self.ask(url, X_Route_Key=key).headers["x-model-version"] for key in KEYS}

    def follow(self, generation: int) -> None:
        def there() -> bool:
            return all(
                self.client.get(f"{url}/api/v2/model-info").json()["generation"] == generation for url in self.urls
            )

        wait_for("both servers to follow", there)

    def say(self, url: str, *verdicts: tuple[str, str]) -> httpx.Response:
        body = [{"request_id": identity, "verdict": verdict} for identity, verdict in verdicts]
        return self.client.post(f"{url}/api/v2/feedback", json=body, timeout=30)

    def counted(self) -> observation.Window:
        return observation.canary_windows(self.box.database, self.operation)[-1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with box(tmp_path_factory.mktemp("two")) as made, httpx.Client() as client:
        made.first("1")
        made.add("2")
        made.serve()
        other = free_port()
        made.start("server-2", "modelkeep", "serve", MODELKEEP_SERVER__PORT=str(other))
        urls = (made.url, f"http://127.0.0.1:{other}")
        wait_for("the second server", lambda: _ready(urls[1]))
        operation = promotions.begin(
            made.database, environment="production", model=MODEL, version="2", policy=PromotionPolicy(**made.policy),
            strategy="canary", ttl_seconds=300, flow_run_id=None,
        )  # fmt: skip
        mark_validated(made.database, operation)
        found = Two(made, urls, operation, client)
        found.follow(kit.canary(made.database, operation, 0.3)[1])
        yield found


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_key_gets_the_same_version_on_both_servers_and_keeps_the_candidate_as_its_share_grows(two: Two) -> None:
    first, second = two.urls
    before = two.chosen(first)
    assert before == two.chosen(second)
    assert set(before.values()) == {"1", "2"}
    two.follow(kit.weigh(two.box.database, two.operation, 0.7)[1])
    after = two.chosen(second)
    assert after == two.chosen(first)
    assert {key for key, version in before.items() if version == "2"} < {
        key for key, version in after.items() if version == "2"
    }


def test_verdicts_posted_to_the_other_server_reach_the_judge_and_count_once(two: Two) -> None:
    first, second = two.urls
    verdicts, answered = [], {"1": 0, "2": 0}
    while min(answered.values()) < 25:
        answer = two.ask(first)
        version = answer.headers["x-model-version"]
        answered[version] += 1
        verdicts.append((answer.headers["x-request-id"], "bad" if version == "2" else "good"))
    assert two.say(second, *verdicts).json() == {"accepted": len(verdicts)}
    assert two.say(first, *verdicts).status_code == 202

    def reached(version: str) -> Callable[[], bool]:
        side = "candidate" if version == "2" else "stable"
        return lambda: getattr(two.counted(), side).get("feedback", StreamCounts()).requests >= answered[version]

    for version in answered:
        wait_for(f"the verdicts on version {version}", reached(version))
    window = two.counted()
    assert window.candidate["feedback"] == StreamCounts(answered["2"], answered["2"])
    assert window.stable["feedback"] == StreamCounts(answered["1"], 0)
    streams = observation.judged_streams(two.operation, [window])
    judgement = judge([window], {}, two.operation.policy, stage_seconds=1, streams=streams)
    assert judgement.verdict == "withdraw" and "bad verdicts" in judgement.reason

    def known() -> float:
        """Either copy may come second: the two servers write to the registry at their own times."""
        texts = [httpx.get(f"{url}/metrics").text for url in two.urls]
        found = [re.search(r'^modelkeep_feedback_total\{result="known"\} (\S+)$', text, re.MULTILINE) for text in texts]
        return sum(float(match[1]) for match in found if match)

    wait_for("the second copy of the verdicts to be found known", lambda: known() == len(verdicts))
    assert two.counted().candidate["feedback"].requests == answered["2"]


def test_a_clients_own_id_is_echoed_and_known_to_the_server_that_answered(two: Two) -> None:
    first, second = two.urls
    assert two.ask(first, X_Request_ID="order 17").headers["x-request-id"] == "order 17"
    refused = two.say(second, ("order 17", "good"))
    assert refused.status_code == 404
    assert "post it to the server that answered" in refused.json()["error"]
    before = sum(_verdicts(two).values())
    assert two.say(first, ("order 17", "good")).status_code == 202
    wait_for("the verdict", lambda: sum(_verdicts(two).values()) == before + 1)


def _verdicts(two: Two) -> dict[str, int]:
    window = two.counted()
    sides = {"1": window.stable, "2": window.candidate}
    return {version: side["feedback"].requests for version, side in sides.items() if "feedback" in side}


def test_counts_of_both_servers_outlive_a_killed_one_and_nothing_counts_twice(two: Two) -> None:
    first, second = two.urls

    def total() -> int:
        window = two.counted()
        return sum(side["error"].requests for side in (window.candidate, window.stable))

    two.follow(kit.weigh(two.box.database, two.operation, 0.9)[1])  # a window of its own
    for _ in range(20):
        two.ask(first)
        two.ask(second)
    wait_for("the first counts", lambda: total() == 40)
    before = two.box.child_pid()
    os.kill(before, signal.SIGKILL)
    wait_for("the next server", lambda: two.box.child_pid() != before and two.box.is_ready())
    for _ in range(15):
        two.ask(first)
        two.ask(second)
    wait_for("the counts of both boots", lambda: total() >= 70)
    assert total() == 70
