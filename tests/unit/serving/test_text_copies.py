"""Texts in a shadow, kept for a replay, and replayed: what the candidate says is compared by tokens, and nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from registry.errors import ModelkeepError, UsageError
from serving import replay
from serving.text import asked as asked_module
from serving.text.agreement import ENDED, compare_texts, said
from serving.text.sampling import Sampling
from serving.text.sequences import Wanted
from serving.text.trial import TextRuntime
from serving.text.version import TextVersion
from serving.traffic import capture as capturing
from serving.traffic.routing import Route
from tests.unit.serving.helpers import close
from tests.unit.serving.text_toy import Letters, Toy, toy_model
from tests.unit.serving.texting import COMPLETIONS, GENERATE, WORDS, asked, expected, serve, text_version

SHADOW = Route("m", 3, "1", "2", 0.0, shadow=True, watch=True, slow_threshold_seconds=60.0)


def other_toy() -> Toy:
    """Says the same for three tokens, and something else from then on."""
    toy = Toy(toy_model())
    usual = Toy(toy_model())._next
    toy._next = lambda seen: usual(seen) if len(seen) < 6 else 7  # type: ignore[method-assign]
    return toy


def copied(version: TextVersion, count: int) -> Any:
    total = version.telemetry.total
    return lambda: total.shadow_requests + total.shadow_dropped >= count


async def met(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_texts_are_compared_by_their_first_token_their_first_half_and_all_of_them() -> None:
    assert compare_texts((1, 2, 3), (1, 2, 3)) == (False, False, False)
    assert compare_texts((1, 2, 3, 4), (1, 2, 9, 9)) == (False, False, True)
    assert compare_texts((1, 2, 3, 4), (1, 9, 3, 4)) == (False, True, True)
    assert compare_texts((1, 2), (9, 2)) == (True, True, True)
    assert compare_texts((1, 2), (1, 2, 3, 4, 5)) == (False, True, True)
    assert compare_texts((1,), ()) == (True, True, True) and compare_texts((), ()) == (False, False, False)
    assert said([1, 2], "stop") == (1, 2, ENDED) and said([1, 2], "length") == (1, 2)


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
def test_the_candidate_of_a_shadow_repeats_each_text_with_its_seed(path: str, stream: bool) -> None:
    async def scenario() -> None:
        stable, candidate = text_version(), text_version(version="2")
        server = serve(stable, candidate, route=SHADOW)
        for number in range(3):
            answer = await server.post(path, asked(temperature=8, seed=number, stream=stream, stop="~~"))
            assert answer.status == 200 and answer.headers["x-model-version"] == "1"
            await met(copied(candidate, number + 1))
        total, watched = candidate.telemetry.total, candidate.watch[3]
        for counts in (total, watched):
            assert (counts.shadow_requests, counts.shadow_errors, counts.shadow_inexact) == (3, 0, 0)
            assert counts.shadow_slow == 0
        assert (total.requests, candidate.text_counts.completion_tokens, candidate.text_counts.endings) == (0, 0, {})
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_candidate_that_says_something_else_disagrees_and_one_that_fails_has_an_error() -> None:
    async def scenario() -> None:
        stable, candidate = text_version(), text_version(other_toy(), "2")
        server = serve(stable, candidate, route=SHADOW)
        assert (await server.post(GENERATE, asked())).json()["text"] == expected("abc", 8)
        await met(copied(candidate, 1))
        total = candidate.telemetry.total
        assert (total.shadow_disagreements, total.shadow_differences, total.shadow_inexact) == (0, 1, 1)
        broken: Any = candidate.runtime
        broken.poison = WORDS.encode("q")[0]
        assert (await server.post(GENERATE, asked("q"))).status == 200
        await met(copied(candidate, 2))
        assert (total.shadow_requests, total.shadow_errors, total.shadow_inexact) == (2, 1, 1)
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_candidate_whose_context_or_tokenizer_does_not_take_the_prompt_has_an_error() -> None:
    class Few(Letters):
        def encode(self, text: str) -> list[int]:
            raise UsageError("no text that it takes")

    async def scenario() -> None:
        stable, candidate = text_version(), text_version(Toy(toy_model(context_length=5)), "2")
        server = serve(stable, candidate, route=SHADOW)
        assert (await server.post(GENERATE, asked())).status == 200
        await met(copied(candidate, 1))
        candidate.words = Few()
        assert (await server.post(GENERATE, asked())).status == 200
        await met(copied(candidate, 2))
        assert candidate.telemetry.total.shadow_errors == 2
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_copy_is_slow_by_its_own_time_and_not_where_the_stable_version_computed_meanwhile() -> None:
    async def scenario() -> None:
        stable, candidate = text_version(), text_version(version="2")
        server = serve(stable, candidate, route=replace(SHADOW, slow_threshold_seconds=0.0))
        assert (await server.post(GENERATE, asked())).status == 200
        await met(copied(candidate, 1))
        assert candidate.telemetry.total.shadow_slow == 1
        wanted = Wanted((1, 2), 40, Sampling(temperature=0))
        candidate.copies.offer(replace(SHADOW, slow_threshold_seconds=0.0), stable, wanted, (1,), 60.0)
        stable.batcher.steps += 1
        await met(copied(candidate, 2))
        assert candidate.telemetry.total.shadow_slow == 1
        close(stable, candidate)

    asyncio.run(scenario())


def test_copies_are_dropped_where_the_candidate_goes_and_where_it_has_clients_of_its_own() -> None:
    async def scenario() -> None:
        toy = Toy(toy_model())
        toy.gate = gate = threading.Semaphore(0)
        stable, candidate = text_version(), text_version(toy, "2")
        server = serve(stable, candidate, route=SHADOW)
        own = candidate.generate(Wanted((1, 2), 300, Sampling(temperature=0)))
        assert (await server.post(GENERATE, asked())).status == 200
        await met(copied(candidate, 1))
        assert candidate.telemetry.total.shadow_dropped == 1
        own.cancel()
        wanted = Wanted((1, 2), 300, Sampling(temperature=0))
        for _ in range(20):  # one runs, sixteen wait
            candidate.copies.offer(SHADOW, stable, wanted, (1,), 60.0)
        assert candidate.telemetry.total.shadow_dropped == 4 and candidate.shadow_queue_length == 17
        candidate.close()
        gate.release(1000)
        assert candidate.telemetry.total.shadow_dropped == 21 and candidate.shadow_queue_length == 0
        close(stable, candidate)

    asyncio.run(scenario())


def test_a_copy_that_takes_too_long_is_given_up_and_the_next_one_comes() -> None:
    async def scenario() -> None:
        stable, candidate = text_version(), text_version(version="2")
        wanted, right = Wanted((1, 2), 40, Sampling(temperature=0)), said(WORDS.encode(expected(" !", 40)), "length")
        assert wanted.prompt == (1, 2)
        assert candidate.copies.offer(SHADOW, stable, wanted, right, 0.0)
        assert candidate.copies.offer(SHADOW, stable, wanted, right, 60.0)
        await met(copied(candidate, 2))
        total = candidate.telemetry.total
        assert (total.shadow_dropped, total.shadow_requests, total.shadow_inexact) == (1, 1, 0)
        close(stable, candidate)

    asyncio.run(scenario())


class Limits:
    share, requests, max_mb, days = 1.0, 100, 1, 1.0


def test_what_was_asked_is_kept_with_its_seed_and_replayed_to_the_same_tokens(tmp_path: Path) -> None:
    async def scenario() -> list[str]:
        stable = text_version()
        server = serve(stable)
        server.serving.capture = capture = capturing.Capture(tmp_path / "captured", Limits())
        capture.start()
        texts = []
        for number in range(4):  # no seed is given: what is kept has the one that was chosen
            answer = await server.post(GENERATE, asked(f"p{number}", temperature=9, stop=["|"], ignore_eos=True))
            texts.append(answer.json()["text"])
        by_tokens = await server.post(COMPLETIONS, asked() | {"prompt": WORDS.encode("xyz")})
        texts.append(by_tokens.json()["choices"][0]["text"])
        assert (await server.post(GENERATE, asked(max_tokens=999))).status == 400
        await met(lambda: capture.counts["kept"] == 5)
        capture.end()
        close(stable)
        return texts

    texts = asyncio.run(scenario())
    folder = tmp_path / "captured" / "m"
    assert {path.suffix for path in folder.iterdir()} == {".text"}
    requests = replay._Captured(folder)
    assert requests.count == 5 and requests.texts
    for version, same in ((Toy(toy_model()), True), (other_toy(), False)):
        runtime = TextRuntime(version, version.model, Letters())
        answers = [requests.call(runtime, number)() for number in range(5)]
        found = [WORDS.decode([n for n in answer["tokens"].tolist() if n != ENDED]) for answer in answers]
        agreed = [one.startswith(text) for one, text in zip(found, texts, strict=True)]
        assert all(agreed) if same else not all(agreed)
    with pytest.raises(UsageError, match="generates none"):
        requests.call(Toy(toy_model()), 0)()


def test_texts_of_a_replay_are_counted_as_they_agree() -> None:
    kept = replay._Kept(1 << 30)
    runtime, other = (TextRuntime(toy, toy.model, Letters()) for toy in (Toy(toy_model()), other_toy()))
    body = asked_module.keep(asked_module.generate(orjson.dumps(asked())), Wanted((1,), 8, Sampling(temperature=0)))
    for _ in range(2):
        kept.take(runtime.kept(body))
    compared = replay._Compared(kept.answers)
    compared.take(runtime.kept(body))
    compared.take(other.kept(body))
    compared.finish()
    assert compared.count == 2 and compared.disagreements == {"top": 0, "tolerance": 1, "exact": 1}


def test_a_kept_text_that_is_none_is_refused_by_its_field() -> None:
    runtime = TextRuntime(Toy(toy_model()), toy_model(), Letters())
    with pytest.raises(UsageError, match="prompt"):
        runtime.kept(b'{"model": "m"}')
    with pytest.raises(UsageError, match="numbers from 0 to 95"):
        runtime.kept(b'{"model": "m", "prompt": [96]}')
    with pytest.raises(UsageError, match="more than the model's 400"):
        runtime.kept(b'{"model": "m", "prompt": "a", "max_tokens": 400}')
    broken = Toy(toy_model())
    broken.poison = 1
    with pytest.raises((ModelkeepError, ValueError), match="poison"):
        TextRuntime(broken, broken.model, Letters()).kept(b'{"model": "m", "prompt": " ", "max_tokens": 4}')
