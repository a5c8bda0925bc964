"""Memory for key/value caches: what fits comes, the youngest gives way to be computed again, and nothing takes more than there is."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from registry.errors import ModelkeepError
from serving.statuses import OutOfMemoryError
from serving.text.batching import AHEAD_TOKENS, Batcher
from serving.text.caches import COPIES, Caches, Share, claim_at_rest, unlimited
from serving.text.sampling import Sampling
from serving.text.sequences import TextSequence
from tests.unit.serving.limited import Pool
from tests.unit.serving.test_text_batching import GREEDY, Gathered, alone, text
from tests.unit.serving.text_toy import Toy, toy_model

FORMS = [(True, True), (True, False)]
PER_TOKEN = toy_model().cache_bytes_per_token
PLENTY = 1 << 30


def batcher(toy: Toy, share: Share, *, running: int = 8, rows: int = 8, release: Any = None) -> Batcher:
    def failure(error: Exception) -> ModelkeepError:
        return error if isinstance(error, ModelkeepError) else ModelkeepError(str(error))

    return Batcher(
        toy.run, toy.model, toy.signature, max_running=running, max_rows=rows, share=share, failure=failure,
        ran_out=release,
    )  # fmt: skip


def tokens(count: int) -> int:
    """The budget that so many tokens of cache need, while a step has both old and new."""
    return COPIES * count * PER_TOKEN


def holder(memory_bytes: int) -> Any:
    class Held:
        runtime = SimpleNamespace(memory_bytes=memory_bytes)
        ended = False

    return Held()


@pytest.mark.parametrize("form", FORMS)
def test_many_texts_in_a_budget_for_few_all_end_with_the_text_that_they_have_alone(form: tuple[bool, bool]) -> None:
    toy = Toy(toy_model(cached=form[0], padded=form[1]))
    share = Caches(tokens(3 * 70)).share(toy.model, 40 * PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    prompts = [
        ("hello", 60),
        ("some", 55),
        ("text", 64),
        ("a", 40),
        ("zz top", 62),
        ("again", 33),
        ("x" * 20, 45),
        ("y", 1),
    ]
    texts = [text(prompt, most) for prompt, most in prompts]
    batches.waiting.extend(texts)
    found = Gathered(batches)
    together, taken = 0, 0
    while batches.busy:
        found.step()
        together, taken = max(together, batches.running), max(taken, batches.cache_bytes)
    assert [found.texts[id(one)] for one in texts] == [alone(prompt, most, form) for prompt, most in prompts]
    assert all(found.ends[id(one)].reason == "length" for one in texts)
    assert batches.gave_way > 0 and batches.cut == 0, "the budget was not tight"
    assert 1 < together < len(texts) and 0 < taken * COPIES <= tokens(3 * 70)
    assert share.taken_bytes == 0


@pytest.mark.parametrize("form", FORMS)
def test_many_texts_over_an_allocator_that_really_runs_out_all_end_with_the_same_text(form: tuple[bool, bool]) -> None:
    toy = Toy(toy_model(cached=form[0], padded=form[1]))
    toy.pool = pool = Pool(tokens(100))
    batches = batcher(toy, unlimited(toy.model), release=lambda error: pool.release())
    prompts = [("hello", 60), ("some", 55), ("text", 64), ("a", 40), ("zz top", 62), ("again", 33)]
    texts = [text(prompt, most) for prompt, most in prompts]
    batches.waiting.extend(texts)
    found = Gathered(batches).all()
    assert [found.texts[id(one)] for one in texts] == [alone(prompt, most, form) for prompt, most in prompts]
    assert pool.order, "the allocator never ran out"
    assert pool.in_use == 0 and batches.cut == 0


def test_the_youngest_gives_way_and_goes_on_where_it_was_seed_and_all() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(2 * 40)).share(toy.model, PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    sampling = Sampling(temperature=8.0, seed=1, repetition_penalty=1.3)
    old, young = text("older", 60), text("young", 50, sampling)
    batches.waiting.extend([old, young])
    found = Gathered(batches)
    while not batches.gave_way:
        assert batches.busy
        found.step()
    assert young.fed == 0 and young.generated > 0 and old.fed > 0
    assert batches.queued == 1 and batches.running == 1
    before = found.texts[id(young)]
    found.all()
    assert found.texts[id(young)].startswith(before) and len(found.texts[id(young)]) == 50
    assert found.texts[id(young)] == alone("young", 50, (True, True), sampling)
    assert found.texts[id(old)] == alone("older", 60, (True, True))


def test_who_gave_way_comes_before_those_that_wait_and_leaves_as_they_do() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(2 * 50)).share(toy.model, PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    texts = [text("first", 70), text("other", 70), text("third", 5)]
    batches.waiting.extend(texts)
    found = Gathered(batches)
    while not batches.gave_way:
        assert batches.busy
        found.step()
    assert texts[2].started is None
    texts[1].cancelled = True
    found.all()
    assert id(texts[1]) not in found.ends and found.texts[id(texts[2])] == alone("third", 5, (True, True))


def test_a_text_that_outgrows_the_memory_alone_ends_with_what_there_is_of_it() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(40)).share(toy.model, PER_TOKEN)
    batches = batcher(toy, share)
    one = text("alone", 300)
    batches.waiting.append(one)
    found = Gathered(batches).all()
    assert found.ends[id(one)].reason == "length" and batches.cut == 1
    assert len(one.ids) == 41, "the last token's numbers are in no cache"
    assert found.texts[id(one)] == alone("alone", 36, (True, True))


def test_a_text_that_an_allocator_refuses_alone_ends_with_what_there_is_of_it() -> None:
    toy = Toy(toy_model())
    toy.pool = Pool(tokens(40))
    batches = batcher(toy, unlimited(toy.model), release=lambda error: toy.pool and toy.pool.release())
    one = text("alone", 300)
    batches.waiting.append(one)
    found = Gathered(batches).all()
    assert found.ends[id(one)].reason == "length" and batches.cut == 1
    assert found.texts[id(one)] == alone("alone", len(found.texts[id(one)]), (True, True))
    assert len(found.texts[id(one)]) > 30


def test_a_prompt_that_never_fits_is_refused_with_its_size_and_the_next_one_comes() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(40)).share(toy.model, PER_TOKEN)
    batches = batcher(toy, share)
    first, large, small = text("first", 20), text("p" * 60, 5), text("ok", 5)
    batches.waiting.extend([first, large, small])
    found = Gathered(batches)
    found.step()
    assert id(large) in found.ends and id(first) not in found.ends, "nobody behind it waits for that"
    found.all()
    error = found.ends[id(large)].error
    assert isinstance(error, OutOfMemoryError) and "60 tokens" in str(error) and "shorter prompt" in str(error)
    assert found.texts[id(small)] == alone("ok", 5, (True, True))


def test_a_text_waits_while_another_version_has_the_memory_and_comes_when_that_is_given_back() -> None:
    caches = Caches(tokens(100))
    toys = [Toy(toy_model()), Toy(toy_model())]
    shares = [caches.share(toy.model, 10 * PER_TOKEN) for toy in toys]
    for share in shares:
        share.most_bytes = PLENTY
    first, second = (batcher(toy, share) for toy, share in zip(toys, shares, strict=True))
    long, late = text("l" * 60, 25), text("c" * 50, 9)
    first.waiting.append(long)
    second.waiting.append(late)
    ones, others = Gathered(first), Gathered(second)
    ones.step()
    others.step()
    assert second.stalled and late.started is None and others.ends == {}
    ones.all()
    others.all()
    assert not second.stalled
    assert others.texts[id(late)] == alone("c" * 50, 9, (True, True))


def test_no_more_are_let_in_than_have_room_to_go_on_for_a_while() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(2 * (1 + AHEAD_TOKENS))).share(toy.model, PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    batches.waiting.extend([text("a", 90), text("b", 90), text("c", 90)])
    Gathered(batches).step()
    assert batches.running == 2


def test_the_share_of_several_texts_is_bounded_and_that_of_one_by_the_memory_only() -> None:
    share = Caches(tokens(100)).share(toy_model(), 20 * PER_TOKEN)
    assert share.fits(20 * PER_TOKEN, alone=False) and not share.fits(21 * PER_TOKEN, alone=False)
    assert share.fits(100 * PER_TOKEN, alone=True) and not share.fits(101 * PER_TOKEN, alone=True)


def test_a_version_has_its_claim_whatever_else_is_there_and_models_come_before_the_rest() -> None:
    caches = Caches(tokens(100))
    share, other = caches.share(toy_model(), 10 * PER_TOKEN), caches.share(toy_model(), 20 * PER_TOKEN)
    assert (share.claim_bytes, other.claim_bytes) == (tokens(10), tokens(20))
    share.most_bytes = PLENTY
    assert share.fits(80 * PER_TOKEN, alone=False) and not share.fits(81 * PER_TOKEN, alone=False)
    model = holder(tokens(60))
    caches.note(model)
    assert share.fits(20 * PER_TOKEN, alone=False) and not share.fits(21 * PER_TOKEN, alone=False)
    beside = holder(tokens(50))
    caches.note(beside)
    assert share.fits(10 * PER_TOKEN, alone=False) and not share.fits(11 * PER_TOKEN, alone=False)
    beside.ended = True
    other.end()
    assert share.fits(40 * PER_TOKEN, alone=False)


def test_a_claim_is_one_text_of_the_whole_context_but_no_more_than_may_be() -> None:
    model = toy_model(context_length=100)
    assert claim_at_rest(model, PLENTY) == 100 * PER_TOKEN and claim_at_rest(model, 7) == 7
    assert claim_at_rest(toy_model(cached=False), PLENTY) == 0


def test_a_model_that_comes_waits_until_the_caches_in_its_way_are_smaller_and_all_texts_end_right() -> None:
    toy, caches = Toy(toy_model()), Caches(tokens(200))
    share = caches.share(toy.model, 10 * PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    texts = [text("one", 45), text("two", 45), text("six", 45)]
    batches.waiting.extend(texts)
    found = Gathered(batches)
    for _ in range(30):
        found.step()
    assert batches.running == 3 and share.taken_bytes > tokens(90)
    here, leave = threading.Event(), threading.Event()
    seen: list[int] = []

    def load() -> None:
        with caches.coming(tokens(140), patience_seconds=30.0):
            seen.append(share.taken_bytes)
            here.set()
            leave.wait(30)

    thread = threading.Thread(target=load)
    thread.start()
    while not caches._coming:
        time.sleep(0.0005)
    while not here.wait(0.001):
        found.step()
    found.step()
    assert seen[0] <= tokens(60) and batches.gave_way >= 1 and batches.running < 3
    leave.set()
    thread.join(30)
    found.all()
    assert [found.texts[id(one)] for one in texts] == [alone(word, 45, (True, True)) for word in ("one", "two", "six")]


def test_who_gave_way_is_not_forgotten_where_all_are_dropped() -> None:
    toy = Toy(toy_model())
    share = Caches(tokens(2 * 50)).share(toy.model, PER_TOKEN)
    share.most_bytes = PLENTY
    batches = batcher(toy, share)
    texts: list[TextSequence] = [text("first", 70, GREEDY), text("other", 70)]
    batches.waiting.extend(texts)
    while not batches.gave_way:
        assert batches.busy
        batches.step()
    assert sorted(map(id, batches.drop())) == sorted(map(id, texts))
    assert not batches.busy and share.taken_bytes == 0
