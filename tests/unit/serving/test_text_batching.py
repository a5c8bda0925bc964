"""Continuous batching: company changes no text, whoever leaves frees its place, and what fails fails alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from registry.errors import ModelkeepError
from serving.statuses import OutOfMemoryError
from serving.text.batching import READ_TOKENS, REGROW_STEPS, Batcher
from serving.text.caches import unlimited
from serving.text.groups import Group
from serving.text.sampling import Sampling
from serving.text.sequences import Piece, TextSequence, Wanted
from tests.unit.serving.text_toy import Letters, Toy, toy_model

WORDS = Letters()
GREEDY = Sampling(temperature=0.0)
FORMS = [(True, True), (True, False), (False, True), (False, False)]


def batcher(toy: Toy, *, running: int = 8, rows: int = 8, cache: int = 1 << 30) -> Batcher:
    def failure(error: Exception) -> ModelkeepError:
        return error if isinstance(error, ModelkeepError) else ModelkeepError(str(error))

    return Batcher(
        toy.run,
        toy.model,
        toy.signature,
        max_running=running,
        max_rows=rows,
        share=unlimited(toy.model, cache),
        failure=failure,
    )


def text(prompt: str, most: int, sampling: Sampling = GREEDY) -> TextSequence:
    return TextSequence(Wanted(tuple(WORDS.encode(prompt)), most, sampling), WORDS, [0])


class Gathered:
    """Everything that the steps of a batcher gave each text."""

    def __init__(self, batches: Batcher) -> None:
        self.batches = batches
        self.texts: dict[int, str] = {}
        self.ends: dict[int, Piece] = {}

    def step(self) -> None:
        for one, piece in self.batches.step():
            assert id(one) not in self.ends, "a text went on after its end"
            self.texts[id(one)] = self.texts.get(id(one), "") + piece.text
            if piece.last:
                self.ends[id(one)] = piece

    def all(self) -> Gathered:
        for _ in range(5000):
            if not self.batches.busy:
                return self
            self.step()
        raise AssertionError("the texts did not come to an end")


def alone(prompt: str, most: int, form: tuple[bool, bool], sampling: Sampling = GREEDY) -> str:
    one = text(prompt, most, sampling)
    batches = batcher(Toy(toy_model(cached=form[0], padded=form[1])))
    batches.waiting.append(one)
    return Gathered(batches).all().texts[id(one)]


@pytest.mark.parametrize("form", FORMS)
def test_a_text_is_the_same_alone_and_in_company_that_comes_and_goes(form: tuple[bool, bool]) -> None:
    prompts = [("hello", 30), ("a", 7), ("the quick brown fox", 1), ("zz", 25), ("some more words", 12), ("x" * 40, 19)]
    batches = batcher(Toy(toy_model(cached=form[0], padded=form[1])), running=4, rows=3)
    found = Gathered(batches)
    texts = [text(prompt, most) for prompt, most in prompts]
    for one in texts:  # each comes while the others are under way
        batches.waiting.append(one)
        found.step()
        found.step()
    found.all()
    assert [found.texts[id(one)] for one in texts] == [alone(prompt, most, form) for prompt, most in prompts]
    assert all(found.ends[id(one)].reason == "length" for one in texts)
    assert batches.running == 0 and batches.cache_bytes == 0


def test_texts_of_different_lengths_share_a_batch_where_a_mask_hides_the_padding() -> None:
    toy = Toy(toy_model())
    batches = batcher(toy)
    batches.waiting.extend([text("a", 20), text("long prompt", 20), text("something else", 20)])
    Gathered(batches).all()
    assert max(toy.rows) == 3


def test_without_a_mask_only_texts_of_one_length_share_a_batch() -> None:
    toy = Toy(toy_model(padded=False))
    batches = batcher(toy)
    batches.waiting.extend([text("abc", 9), text("xyz", 9), text("longer", 9)])
    Gathered(batches).all()
    assert max(toy.rows) == 2


def test_a_seeded_text_is_the_same_whatever_its_company() -> None:
    sampling = Sampling(temperature=8.0, seed=77)
    expected = alone("seed", 25, (True, True), sampling)
    batches = batcher(Toy(toy_model()))
    one = text("seed", 25, sampling)
    others = [text("other" * n, 30, Sampling(temperature=8.0, seed=n)) for n in (1, 2, 3)]
    batches.waiting.extend([*others[:2], one, others[2]])
    assert Gathered(batches).all().texts[id(one)] == expected
    assert expected != alone("seed", 25, (True, True), Sampling(temperature=8.0, seed=78))


def test_who_left_is_computed_no_more_from_the_next_step_on() -> None:
    toy = Toy(toy_model())
    batches = batcher(toy)
    found = Gathered(batches)
    stays, leaves = text("stays", 50), text("leaves after a moment", 50)
    batches.waiting.extend([stays, leaves])
    for _ in range(5):
        found.step()
    before = batches.cache_bytes
    leaves.cancelled = True
    found.step()
    assert batches.running == 1 and toy.rows[-1] == 1
    assert batches.cache_bytes < before / 2, "the padding for the longer text goes with it"
    found.all()
    assert found.texts[id(stays)] == alone("stays", 50, (True, True))
    assert id(leaves) not in found.ends


def test_who_waits_and_left_never_begins() -> None:
    toy = Toy(toy_model())
    batches = batcher(toy, running=1)
    first, second, third = text("a", 5), text("b", 5), text("c", 5)
    batches.waiting.extend([first, second, third])
    second.cancelled = True
    found = Gathered(batches).all()
    assert set(found.ends) == {id(first), id(third)} and second.started is None


def test_no_more_texts_run_than_may_and_they_come_in_their_order() -> None:
    batches = batcher(Toy(toy_model()), running=2)
    texts = [text("n" * n, 6) for n in range(1, 6)]
    batches.waiting.extend(texts)
    found = Gathered(batches)
    most = 0
    while batches.busy:
        found.step()
        most = max(most, batches.running)
    assert most == 2
    starts = [one.started or 0 for one in texts]
    assert starts == sorted(starts)


def test_texts_whose_caches_would_not_fit_together_wait_and_one_alone_always_runs() -> None:
    per_token = toy_model().cache_bytes_per_token
    batches = batcher(Toy(toy_model()), cache=2 * 40 * per_token)
    small, other, big = text("a", 30), text("b", 30), text("c" * 50, 60)
    batches.waiting.extend([small, other, big])
    found = Gathered(batches)
    found.step()
    assert batches.running == 2 and big.started is None
    found.all()
    assert found.texts[id(big)] == alone("c" * 50, 60, (True, True))


def test_a_long_prompt_is_read_in_pieces_while_the_others_go_on() -> None:
    toy = Toy(toy_model(context_length=2000))
    batches = batcher(toy)
    found = Gathered(batches)
    short, long = text("short", 60), text("l" * (3 * READ_TOKENS + 5), 4)
    batches.waiting.append(short)
    found.step()
    batches.waiting.append(long)
    for step in range(1, 4):
        tokens = len(found.texts[id(short)])
        found.step()
        assert len(found.texts[id(short)]) == tokens + 1
        assert long.fed == step * READ_TOKENS and long.first_at is None
    found.step()
    assert long.first_at is not None
    found.all()
    assert found.texts[id(long)] == alone("l" * (3 * READ_TOKENS + 5), 4, (True, True))


@pytest.mark.parametrize("form", FORMS)
def test_out_of_memory_splits_the_batch_and_every_text_goes_on(form: tuple[bool, bool]) -> None:
    toy = Toy(toy_model(cached=form[0], padded=form[1]))
    toy.most_rows = 2
    batches = batcher(toy)
    texts = [text(prompt, 12) for prompt in ("one", "two", "six", "ten", "red")]
    batches.waiting.extend(texts)
    found = Gathered(batches).all()
    for one, prompt in zip(texts, ("one", "two", "six", "ten", "red"), strict=True):
        assert found.ends[id(one)].reason == "length"
        assert found.texts[id(one)] == alone(prompt, 12, form)
    assert batches.most_rows <= 2
    assert sum(rows > 2 for rows in toy.rows) <= 2, "the limit is learnt"


def test_the_learnt_limit_grows_again() -> None:
    toy = Toy(toy_model(context_length=10**6))
    toy.most_rows = 1
    batches = batcher(toy, running=2, rows=2)
    batches.waiting.extend([text("a", 5), text("b", 5)])
    Gathered(batches).all()
    assert batches.most_rows == 1
    toy.most_rows = None
    toy.choose = lambda seen: 5
    batches.waiting.append(text("a", REGROW_STEPS + 5))
    Gathered(batches).all()
    assert batches.most_rows == 2


def test_a_text_that_does_not_fit_alone_fails_alone() -> None:
    toy = Toy(toy_model())
    toy.most_rows = 0
    batches = batcher(toy)
    one = text("a", 5)
    batches.waiting.append(one)
    error = Gathered(batches).all().ends[id(one)].error
    assert isinstance(error, OutOfMemoryError)


@pytest.mark.parametrize("form", FORMS)
def test_a_text_that_the_graph_cannot_compute_fails_alone(form: tuple[bool, bool]) -> None:
    toy = Toy(toy_model(cached=form[0], padded=form[1]))
    good = [text("good", 15), text("fine", 15)]
    # It begins well, and its fourth token is poison.
    bad = text("bad", 15)
    fourth = WORDS.encode(alone("bad", 15, form))[3]
    others = "".join(alone(prompt, 15, form) for prompt in ("good", "fine"))
    assert fourth not in WORDS.encode(others + "goodfinebad"), "choose other prompts"
    toy.poison = fourth
    batches = batcher(toy)
    batches.waiting.extend([good[0], bad, good[1]])
    found = Gathered(batches).all()
    assert str(found.ends[id(bad)].error) == f"token {fourth} is poison"
    assert [found.texts[id(one)] for one in good] == [alone("good", 15, form), alone("fine", 15, form)]


def test_logits_that_are_no_numbers_are_an_error_of_that_text_only() -> None:
    toy = Toy(toy_model())
    toy.lost = WORDS.encode("~")[0]
    batches = batcher(toy)
    good, bad = text("good", 8), text("bad~", 8)
    batches.waiting.extend([good, bad])
    found = Gathered(batches).all()
    assert "nan" in str(found.ends[id(bad)].error)
    assert found.texts[id(good)] == alone("good", 8, (True, True))


@pytest.mark.parametrize("at", ["the first token", "a later one"])
def test_a_token_that_the_tokenizer_cannot_decode_fails_its_own_text_only(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone("good", 12, (True, True))
    wrong = WORDS.encode(alone("bad", 12, (True, True)))[0 if at == "the first token" else 3]
    assert wrong not in WORDS.encode(expected + "goodbad"), "choose other prompts"
    decode = WORDS.decode

    def strict(ids: list[int], skip_special_tokens: bool = True) -> str:
        if wrong in ids:
            raise ValueError(f"no text for {wrong}")
        return decode(ids)

    words = Letters()
    monkeypatch.setattr(words, "decode", strict)
    batches = batcher(Toy(toy_model()))
    good, bad = text("good", 12), TextSequence(Wanted(tuple(WORDS.encode("bad")), 12, GREEDY), words, [0])
    batches.waiting.extend([good, bad])
    found = Gathered(batches).all()
    assert f"no text for {wrong}" in str(found.ends[id(bad)].error)
    assert found.texts[id(good)] == expected and found.ends[id(good)].reason == "length"


def test_a_step_that_fails_loses_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drops them then can tell every client."""
    batches = batcher(Toy(toy_model()), rows=1, running=3)
    texts = [text(prompt, 9) for prompt in ("one", "two", "and a third", "waits")]
    batches.waiting.extend(texts)
    batches.step()
    advance, calls = batches._advance, itertools.count()

    def fails(group: Group, gained: list[tuple[TextSequence, Piece]]) -> list[Group]:
        if next(calls) == 1:
            raise RuntimeError("a fault of the server")
        return advance(group, gained)

    monkeypatch.setattr(batches, "_advance", fails)
    with pytest.raises(RuntimeError, match="a fault"):
        batches.step()
    assert sorted(map(id, batches.drop())) == sorted(map(id, texts))
    assert not batches.busy


def test_who_left_is_not_computed_again_where_a_batch_is_split() -> None:
    toy = Toy(toy_model())
    batches = batcher(toy)
    texts = [text(prompt, 9) for prompt in ("one", "two", "six", "ten")]
    batches.waiting.extend(texts)
    batches.step()
    run, begun = toy.run, len(toy.rows)

    def fails(inputs: dict[str, np.ndarray], outputs: object) -> dict[str, np.ndarray]:
        for one in texts:  # as at a run that hangs: all are told, then it is given up
            one.cancelled = True
        run(inputs, None)
        raise ValueError("given up")

    batches._run = fails  # type: ignore[assignment]
    assert batches.step() == [] and len(toy.rows) == begun + 1
    assert not batches.busy


def test_a_prompt_that_finds_no_memory_is_told_of_as_a_batch_is() -> None:
    toy = Toy(toy_model())
    toy.most_rows = 0
    told: list[OutOfMemoryError] = []
    batches = batcher(toy)
    batches._ran_out = told.append
    batches.waiting.append(text("a", 5))
    Gathered(batches).all()
    assert len(told) == 1


def test_the_end_token_ends_a_text_and_is_no_part_of_it() -> None:
    toy = Toy(toy_model())
    toy.choose = lambda seen: 0 if len(seen) >= 6 else 10
    batches = batcher(toy)
    one = text("abc", 50)
    batches.waiting.append(one)
    found = Gathered(batches).all()
    assert found.texts[id(one)] == WORDS.decode([10, 10, 10]) and found.ends[id(one)].reason == "stop"
    assert found.ends[id(one)].tokens == 1


def test_a_cache_that_comes_out_in_another_shape_is_named() -> None:
    toy = Toy(toy_model())
    run = toy.run
    toy.run = (
        lambda inputs, outputs: {  # type: ignore[method-assign]
            name: value[:, :, -1:] if name == "present.0" else value for name, value in run(inputs, outputs).items()
        }
    )
    batches = batcher(toy)
    one = text("abc", 5)
    batches.waiting.append(one)
    assert "must hold what went in" in str(Gathered(batches).all().ends[id(one)].error)


def test_tokens_beyond_the_tokenizer_are_never_chosen() -> None:
    toy = Toy(toy_model())
    run = toy.run

    def wider(inputs: dict[str, np.ndarray], outputs: object) -> dict[str, np.ndarray]:
        answer = run(inputs, None)
        beyond = np.full((*answer["logits"].shape[:2], 8), 100.0, dtype=np.float32)
        return {**answer, "logits": np.concatenate([answer["logits"], beyond], axis=2)}

    toy.run = wider  # type: ignore[method-assign,assignment]
    batches = batcher(toy)
    one = text("abc", 10)
    batches.waiting.append(one)
    assert Gathered(batches).all().texts[id(one)] == alone("abc", 10, (True, True))


def test_dropped_texts_are_all_of_them() -> None:
    batches = batcher(Toy(toy_model()), running=2)
    texts = [text("a", 5), text("b" * 300, 5), text("c", 5)]
    batches.waiting.extend(texts)
    batches.step()
    assert sorted(map(id, batches.drop())) == sorted(map(id, texts))
    assert not batches.busy


@pytest.mark.parametrize("seed", range(12))
def test_random_comings_goings_and_failures_change_no_text(seed: int) -> None:
    random = np.random.default_rng(seed)
    form = FORMS[seed % len(FORMS)]
    toy = Toy(toy_model(cached=form[0], padded=form[1]))
    batches = batcher(toy, running=5, rows=4)
    found = Gathered(batches)
    wanted = [
        ("".join(chr(c) for c in random.integers(33, 120, random.integers(1, 30))), int(random.integers(1, 25)))
        for _ in range(14)
    ]
    texts = [text(prompt, most) for prompt, most in wanted]
    left = set(random.choice(14, 3, replace=False).tolist())
    coming = iter(texts)
    for step in itertools.count():
        if step < 200 and random.random() < 0.4 and (one := next(coming, None)) is not None:
            batches.waiting.append(one)
        if random.random() < 0.1:
            toy.most_rows = int(random.integers(1, 5))
        for number in left:
            if len(found.texts.get(id(texts[number]), "")) >= 2:
                texts[number].cancelled = True
        found.step()
        if step >= 200 and not batches.busy:
            break
    for number, (one, (prompt, most)) in enumerate(zip(texts, wanted, strict=True)):
        if not one.cancelled and one.started is not None:
            assert found.texts[id(one)] == alone(prompt, most, form), number
