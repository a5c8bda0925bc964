"""Places for requests in flight: nobody who asks for little is kept out by those who ask for much."""

from __future__ import annotations

import asyncio

import pytest

from serving.access.places import Place, Places


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def fill(places: Places, key: str, model: str, count: int = 10_000) -> list[Place]:
    """As many as that key gets."""
    found: list[Place] = []
    while len(found) < count and (place := places.enter(key, model)) is not None:
        found.append(place)
    return found


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 256])
def test_a_key_that_is_alone_with_its_model_has_all_places(capacity: int) -> None:
    places = Places(capacity)
    held = fill(places, "a", "m")
    assert len(held) == places.in_flight == capacity
    for place in held:
        places.leave(place)
    assert places.in_flight == 0
    assert len(fill(places, "a", "m")) == capacity


def test_one_that_is_alone_is_told_to_come_again_at_once() -> None:
    async def scenario() -> None:
        places = Places(3)
        fill(places, "a", "m")
        assert await places.turn("a", "m", 30) is None
        assert places.refused["full"] == 1
        assert "3 requests in flight, of at most 3" in places.words("a", "m")

    asyncio.run(scenario())


@pytest.mark.parametrize("capacity", [5, 32, 256])
def test_a_key_that_comes_while_another_has_all_places_gets_the_next_one(capacity: int) -> None:
    async def scenario() -> None:
        places = Places(capacity)
        flood = fill(places, "flood", "m")
        assert places.enter("quiet", "m") is None
        waiting = asyncio.create_task(places.turn("quiet", "m", 30))
        await asyncio.sleep(0)
        assert await places.turn("flood", "m", 30) is None, "who has more than his share does not wait"
        assert places.refused["key"] == 1
        places.leave(flood.pop())
        assert await waiting is not None
        assert places.in_flight == capacity and places.waiting == 0

    asyncio.run(scenario())


def test_two_keys_that_both_flood_come_to_hold_alike() -> None:
    async def scenario() -> None:
        places = Places(8)
        held = {"a": fill(places, "a", "m"), "b": []}
        for _ in range(200):
            for key in ("a", "b"):
                if (place := places.enter(key, "m")) is not None:
                    held[key].append(place)
            waiting = [
                (key, asyncio.create_task(places.turn(key, "m", 30))) for key in ("a", "b") if len(held[key]) < 8
            ]
            await asyncio.sleep(0)
            longest = max(held, key=lambda key: len(held[key]))
            places.leave(held[longest].pop(0))
            await asyncio.sleep(0)
            for key, task in waiting:
                if task.done() and (place := task.result()) is not None:
                    held[key].append(place)
                elif not task.done():
                    task.cancel()
            await asyncio.sleep(0)
        assert abs(len(held["a"]) - len(held["b"])) <= 2
        assert places.in_flight == len(held["a"]) + len(held["b"]) and places.waiting == 0

    asyncio.run(scenario())


def test_a_slow_model_leaves_places_to_a_fast_one() -> None:
    clock = Clock()
    places = Places(5, monotonic=clock)
    quick = places.enter("", "quick")
    assert quick is not None
    places.leave(quick)
    assert len(fill(places, "", "slow")) == 4, "the last one is for who holds less than his share"
    for _ in range(100):
        quick = places.enter("", "quick")
        assert quick is not None
        places.leave(quick)
    clock.now += 60
    assert places.enter("", "slow") is not None, "nobody asks for another model any more"


@pytest.mark.parametrize("capacity", [2, 5, 32])
def test_what_takes_minutes_leaves_places_to_a_model_that_nobody_asked_until_now(capacity: int) -> None:
    async def scenario() -> None:
        places = Places(capacity)
        texts: list[Place] = []
        while (place := places.enter("", "texts", for_long=True)) is not None:
            texts.append(place)
        assert len(texts) == capacity - max(1, capacity // 8)
        assert await places.turn("", "texts", 30, for_long=True) is None
        assert "keeps the rest for other models" in places.words("", "texts")
        others = fill(places, "", "other")
        assert others, "at once, however long the texts take"
        waiting = asyncio.create_task(places.turn("", "texts", 30, patient=True, for_long=True))
        await asyncio.sleep(0)
        for place in others:
            places.leave(place)
        await asyncio.sleep(0)
        assert not waiting.done(), "what was kept stays kept"
        places.leave(texts.pop())
        assert await waiting is not None

    asyncio.run(scenario())


def test_who_asks_for_a_model_that_others_flood_waits_for_one_of_its_places() -> None:
    async def scenario() -> None:
        places = Places(5)
        other = places.enter("c", "other")
        assert other is not None
        places.leave(other)
        flood = fill(places, "flood", "m")
        waiting = asyncio.create_task(places.turn("quiet", "m", 30))
        await asyncio.sleep(0)
        places.leave(flood.pop())
        assert await waiting is not None

    asyncio.run(scenario())


def test_who_waits_too_long_or_goes_leaves_no_place_behind() -> None:
    async def scenario() -> None:
        places = Places(2)
        flood = fill(places, "flood", "m")
        assert await places.turn("quiet", "m", 0.001) is None
        gone = asyncio.create_task(places.turn("quiet", "m", 30))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        # It gets its place and is cancelled in the same moment.
        late = asyncio.create_task(places.turn("quiet", "m", 30))
        await asyncio.sleep(0)
        places.leave(flood.pop())
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        places.leave(flood.pop())
        assert (places.in_flight, places.waiting) == (0, 0)
        assert len(fill(places, "flood", "m")) >= 1

    asyncio.run(scenario())


def test_no_more_wait_than_there_are_places() -> None:
    async def scenario() -> None:
        places = Places(32)
        fill(places, "flood", "m")
        tasks = [asyncio.create_task(places.turn(f"key-{n}", "m", 30)) for n in range(100)]
        await asyncio.sleep(0)
        assert places.waiting == 32
        assert sum(task.done() for task in tasks) == 68
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert places.waiting == 0

    asyncio.run(scenario())


def test_those_who_connected_while_no_server_was_there_wait_whatever_they_hold() -> None:
    async def scenario() -> None:
        places = Places(2)
        held = fill(places, "a", "m")
        tasks = [asyncio.create_task(places.turn("a", "m", 30, patient=True)) for _ in range(5)]
        await asyncio.sleep(0)
        served = 0
        while held:
            places.leave(held.pop())
            await asyncio.sleep(0)
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                place = task.result()
                assert place is not None
                held.append(place)
                served += 1
        assert served == 5 and places.in_flight == 0

    asyncio.run(scenario())


def test_names_that_somebody_makes_up_share_one_share_and_no_memory() -> None:
    places = Places(16, known=lambda model: model == "m")
    for n in range(5000):
        place = places.enter("a", f"made-up-{n}")
        assert place is not None
        places.leave(place)
    assert list(places._models.by_name) == []
    for n in range(5000):
        place = places.enter(f"key-{n}", "m")
        assert place is not None
        places.leave(place)
    assert len(places._keys.by_name) <= 1024


@pytest.mark.parametrize("how", ["cancelled", "too late"])
def test_a_place_that_comes_free_as_its_waiter_leaves_goes_to_the_next_one(how: str) -> None:
    async def scenario() -> None:
        places = Places(2)
        flood = fill(places, "flood", "m")
        first = asyncio.create_task(places.turn("quiet", "m", 30))
        await asyncio.sleep(0)
        second = asyncio.create_task(places.turn("other", "m", 30))
        await asyncio.sleep(0)
        if how == "cancelled":
            first.cancel()
        else:
            places._waiters[0].turn.cancel()  # as a time-out does it: the task comes on later
        places.leave(flood.pop())
        with pytest.raises(asyncio.CancelledError):
            await first
        held = await second
        assert held is not None
        places.leave(held)
        places.leave(flood.pop())
        assert (places.in_flight, places.waiting) == (0, 0)
        assert all(share.waiting == 0 and share.held == 0 for share in places._keys.by_name.values())

    asyncio.run(scenario())
