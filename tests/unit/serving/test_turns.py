"""The order of a queue: one request of each key in turn."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import Any

import numpy as np

from serving.compute.work import Work
from serving.traffic.turns import Turns
from tests.unit.serving.helpers import PythonRuntime, close, load, row, until


def work(asker: str, number: int) -> Work:
    made = Work({}, None, number, None, None, 0.0, None, None)  # type: ignore[arg-type]
    made.asker = asker
    return made


def order(live: deque[Work]) -> str:
    return " ".join(f"{w.asker or '-'}{w.rows}" for w in live)


def test_without_keys_the_order_is_that_of_their_coming() -> None:
    live, turns = deque[Work](), Turns()
    for n in range(5):
        turns.put(live, work("", n))
    assert order(live) == "-0 -1 -2 -3 -4"


def test_a_key_that_comes_late_stands_behind_one_of_each_other() -> None:
    live, turns = deque[Work](), Turns()
    for n in range(5):
        turns.put(live, work("a", n))
    for n in range(2):
        turns.put(live, work("b", n))
    turns.put(live, work("c", 0))
    turns.put(live, work("", 0))
    assert order(live) == "a0 b0 c0 -0 a1 b1 a2 a3 a4"
    for _ in range(4):
        live.popleft()
    turns.put(live, work("c", 1))
    turns.put(live, work("d", 0))
    assert order(live) == "a1 b1 c1 d0 a2 a3 a4", "who had nothing waiting begins with the round that is served"


def test_a_queue_that_was_empty_remembers_nobody() -> None:
    live, turns = deque[Work](), Turns()
    for n in range(100):
        turns.put(live, work("a", n))
    live.clear()
    turns.put(live, work("a", 0))
    turns.put(live, work("b", 0))
    turns.put(live, work("a", 1))
    assert order(live) == "a0 b0 a1"


def test_none_is_lost_while_a_worker_takes_them() -> None:
    live, turns = deque[Work](), Turns()
    taken: list[Work] = []
    ended = threading.Event()

    def take() -> None:
        while not ended.is_set() or live:  # in this order: once it is set, nothing more comes
            try:
                taken.append(live.popleft())
            except IndexError:
                continue

    worker = threading.Thread(target=take)
    worker.start()
    sent = [work("abc"[n % 7 % 3], n) for n in range(20_000)]
    for one in sent:
        turns.put(live, one)
    ended.set()
    worker.join(30)
    assert sorted(w.rows for w in taken) == list(range(20_000))


def test_a_version_answers_the_quiet_key_before_the_flood() -> None:
    async def scenario() -> None:
        seen: list[float] = []

        def note(inputs: Any) -> dict[str, Any]:
            seen.append(float(inputs["x"][0, 0]))
            return {"y": np.zeros((1, 2), np.float32)}

        runtime = PythonRuntime(note)
        version = load(runtime, rows_independent=False)
        runtime.gate.clear()
        works = [version.submit(row(0, 0), None, asker="flood") for _ in range(30)]
        await until(runtime.entered.is_set)
        works.append(version.submit(row(1, 1), None, asker="quiet"))
        runtime.gate.set()
        await asyncio.gather(*(one.future for one in works))
        assert seen.index(1.0) <= 2
        close(version)

    asyncio.run(scenario())
