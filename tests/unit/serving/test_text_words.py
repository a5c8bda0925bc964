"""Choosing tokens, making text of them, and where texts stop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from registry.errors import ModelkeepError, UsageError
from serving.text.detokenizer import LOST, Detokenizer
from serving.text.sampling import NotFiniteError, Sampler, Sampling
from serving.text.sequences import TextSequence, Wanted
from serving.text.stops import StopScanner
from serving.text.words import LONG, Words
from tests.unit.serving.text_toy import Letters

LOGITS = np.array([0.0, 3.0, 2.0, 1.0, -1.0, 3.0], dtype=np.float32)


def drawn(count: int = 400, **how: float) -> list[int]:
    sampler = Sampler(Sampling(seed=5, **how), [])  # type: ignore[arg-type]
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_greedy_takes_the_likeliest_and_of_equals_the_first() -> None:
    assert set(drawn(20, temperature=0.0)) == {1}


def test_sampling_follows_the_probabilities() -> None:
    counts = np.bincount(drawn(4000), minlength=6) / 4000
    expected = np.exp(LOGITS) / np.exp(LOGITS).sum()
    assert np.abs(counts - expected).max() < 0.03


def test_a_low_temperature_sharpens_and_a_high_one_flattens() -> None:
    assert set(drawn(200, temperature=0.05)) == {1, 5}
    assert set(drawn(400, temperature=50.0)) == set(range(6))


def test_top_k_leaves_the_k_likeliest_and_of_equals_the_first() -> None:
    assert set(drawn(top_k=1)) == {1}
    assert set(drawn(top_k=3, temperature=5.0)) == {1, 5, 2}
    assert set(drawn(top_k=100, temperature=50.0)) == set(range(6))


def test_top_p_leaves_the_fewest_that_have_so_much_together() -> None:
    assert set(drawn(top_p=0.01)) == {1}
    share = float(np.exp(3.0) / np.exp(LOGITS).sum())
    assert set(drawn(top_p=1.5 * share)) == {1, 5}
    assert set(drawn(top_p=0.999999, temperature=50.0)) == set(range(6))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
def test_top_p_of_a_large_vocabulary_leaves_what_sorting_all_of_it_would(temperature: float) -> None:
    logits = np.random.default_rng(1).normal(size=5000).astype(np.float32).round(2)  # many are equal
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    sums = np.cumsum(weights[order]) / weights.sum()
    allowed = set(order[: int(np.searchsorted(sums, 0.6)) + 1].tolist())
    sampler = Sampler(Sampling(seed=2, temperature=temperature, top_p=0.6), [])
    drawn_tokens = {sampler.choose(logits).token for _ in range(1500)}
    assert drawn_tokens <= allowed and len(drawn_tokens) > min(len(allowed), 100) * 0.8


def test_a_temperature_next_to_nothing_is_greedy() -> None:
    assert set(drawn(20, temperature=1e-308)) <= {1, 5}


def test_the_repetition_penalty_makes_what_is_there_less_likely_whatever_its_sign() -> None:
    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=2.0), [1])
    assert [sampler.choose(LOGITS).token for _ in range(3)] == [5, 2, 1]
    negative = np.array([-1.0, -1.2], dtype=np.float32)
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=1.5), [0]).choose(negative).token == 1


def test_a_prompts_tokens_beyond_the_vocabulary_are_no_matter_to_the_penalty() -> None:
    assert Sampler(Sampling(temperature=0.0, repetition_penalty=2.0), [1, 99]).choose(LOGITS).token == 5


def test_the_same_seed_draws_the_same() -> None:
    assert drawn(50, temperature=3.0) == drawn(50, temperature=3.0)


def test_log_probabilities_are_those_of_the_model_before_penalty_and_temperature() -> None:
    chosen = Sampler(Sampling(temperature=0.0, repetition_penalty=2.0, logprobs=2), [1]).choose(LOGITS)
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    assert chosen.token == 5 and chosen.logprob == pytest.approx(expected[5])
    assert chosen.top == ((1, pytest.approx(expected[1])), (5, pytest.approx(expected[5])))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(wrong: float) -> None:
    logits = LOGITS.copy()
    logits[3] = wrong
    with pytest.raises(NotFiniteError, match="token 3"):
        Sampler(Sampling(), []).choose(logits)


def test_tokens_that_the_graph_rules_out_are_never_drawn() -> None:
    logits = np.array([-np.inf, 1.0, -np.inf, 1.0], dtype=np.float32)
    for how in ({}, {"top_k": 3}, {"top_p": 0.999}):
        sampler = Sampler(Sampling(seed=1, temperature=9.0, **how), [])
        assert {sampler.choose(logits).token for _ in range(100)} == {1, 3}
    with pytest.raises(NotFiniteError):
        Sampler(Sampling(), []).choose(np.full(4, -np.inf, dtype=np.float32))


# Stop strings


def scanned(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopScanner(stops)
    return "".join(scanner.feed(piece) for piece in pieces) + scanner.finish(), scanner.found


def test_a_stop_string_ends_the_text_across_the_borders_of_tokens() -> None:
    assert scanned(["END"], ["so be it E", "N", "D and more", "still more"]) == ("so be it ", "END")


def test_what_could_have_been_a_stop_string_comes_when_it_was_none() -> None:
    scanner = StopScanner(["END"])
    assert [scanner.feed(piece) for piece in ("aE", "N", "x", "EN")] == ["a", "", "ENx", ""]
    assert scanner.finish() == "EN" and scanner.found is None


@settings(max_examples=200, deadline=None)
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
def test_where_a_text_is_cut_into_pieces_changes_nothing_and_no_stop_string_is_given_out(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    given_out, found = scanned(stops, pieces)
    assert (given_out, found) == scanned(stops, list(text))
    assert not any(stop in given_out for stop in stops)
    assert (found is None) == (not any(stop in text for stop in stops))
    assert text.startswith(given_out + (found or ""))


# Tokens to text


def byte_level() -> Tokenizer:
    """A token for every byte; and two for halves of a sign."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: number for number, sign in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama's: words with a mark for the blank, and bytes for all else."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for word in ("▁", "▁hello", "▁world", "he", "l", "o", "!", "▁a"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TEXTS = ["hello", "naïve café", "日本語のテキスト", "👩‍👩‍👧 family 👍🏽", "a\n\n b", "mixed 漢 x é", "\u0000\u0007"]


@pytest.mark.parametrize("text", TEXTS)
def test_no_character_is_cut_and_the_pieces_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("the prompt: é").ids)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(text).ids]
    assert all(LOST not in piece for piece in pieces)
    assert "".join(pieces) == text and detokenizer.finish() == ""


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_tokenizer_with_fallback_are_put_together(text: str) -> None:
    tokenizer = byte_fallback()
    ids = [byte + 1 for byte in text.encode()]
    detokenizer = Detokenizer(tokenizer, [tokenizer.token_to_id("▁hello")])
    pieces = [detokenizer.add(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all(LOST not in piece for piece in pieces)


def test_the_blank_before_a_word_stays_also_at_the_beginning_of_an_answer() -> None:
    tokenizer = byte_fallback()
    hello, world = tokenizer.token_to_id("▁hello"), tokenizer.token_to_id("▁world")
    detokenizer = Detokenizer(tokenizer, [hello])
    assert [detokenizer.add(world), detokenizer.add(world)] == [" world", " world"]


def test_half_a_character_at_the_end_is_given_out_as_what_it_is() -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [])
    first, second, _ = tokenizer.encode("語").ids
    assert [detokenizer.add(first), detokenizer.add(second)] == ["", ""]
    assert detokenizer.finish() == LOST


def test_bytes_that_can_be_no_character_are_not_held_for_ever() -> None:
    tokenizer = byte_level()
    lone = tokenizer.encode("é").ids[1]  # the second byte of a character, which none can begin with
    detokenizer = Detokenizer(tokenizer, [])
    given_out = "".join(detokenizer.add(lone) for _ in range(200))
    assert 150 <= len(given_out) <= 200 and set(given_out) == {LOST}
    assert len(given_out + detokenizer.finish()) == 200
    assert detokenizer.add(tokenizer.encode("a").ids[0]) == "a"


def test_tokens_without_a_text_do_not_pile_up_and_take_nothing_from_what_follows() -> None:
    """As where a text goes on after the token that ends it: each step would decode all of them again."""
    tokenizer = byte_fallback()
    tokenizer.add_special_tokens(["</s>"])
    decoded: list[int] = []

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
            decoded.append(len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    hello, world, end = (tokenizer.token_to_id(word) for word in ("▁hello", "▁world", "</s>"))
    detokenizer = Detokenizer(Counting(), [hello])
    assert {detokenizer.add(end) for _ in range(1000)} == {""}
    assert max(decoded) < 200
    assert [detokenizer.add(world), detokenizer.add(end), detokenizer.add(world)] == [" world", "", " world"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_come_out_as_decoding_them_at_once_gives(numbers: list[int]) -> None:
    tokenizer = byte_level()
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.add(number) for number in numbers) + detokenizer.finish()
    assert text == tokenizer.decode(numbers)


class PanicError(BaseException):
    """As a panic of Rust comes: it is no Exception."""


class Broken:
    """A tokenizer that breaks down at whatever it is asked."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        def panic(*_: object, **__: object) -> NoReturn:
            raise PanicError("index out of bounds")

        return panic


def test_a_tokenizer_that_panics_is_an_error_of_the_request_and_no_end_of_a_thread() -> None:
    words = Words(Broken())  # type: ignore[arg-type]
    for text in ("short", "l" * LONG):
        with pytest.raises(UsageError, match="index out of bounds"):
            words.encode(text)
    with pytest.raises(ModelkeepError, match="index out of bounds"):
        words.decode([1])
    with pytest.raises(ModelkeepError, match="index out of bounds"):
        words.name(1)


# One text


def pieces_of(answer: str, **wanted: object) -> tuple[str, list[str], str | None, list[str]]:
    """(text, pieces, reason, tokens that are told) of an answer that a model gives letter by letter."""
    words = Letters()
    how = Sampling(temperature=0.0, logprobs=0)
    one = TextSequence(Wanted((5,), 100, how, **wanted), words, [0])  # type: ignore[arg-type]
    pieces, told, reason = [], [], None
    for token in [*words.encode(answer), 0]:
        logits = np.zeros(96, dtype=np.float32)
        logits[token] = 9
        piece = one.advance(logits, 1.0)
        pieces.append(piece.text)
        told += [item.text for item in piece.told]
        if piece.reason is not None:
            reason = piece.reason
            break
    return "".join(pieces), pieces, reason, told


def test_tokens_are_told_with_the_text_that_they_belong_to_and_no_token_of_a_stop_string_is() -> None:
    text, _, reason, told = pieces_of("good, then STOP it", stops=("STOP",))
    assert (text, reason) == ("good, then ", "stop") and "".join(told) == text


def test_what_is_held_back_comes_at_the_end() -> None:
    text, pieces, reason, told = pieces_of("so ST", stops=("STOP",))
    assert (text, reason) == ("so ST", "stop") and pieces[-1] == "ST" and "".join(told) == text


def test_a_text_may_go_on_after_its_end_token() -> None:
    words = Letters()
    one = TextSequence(Wanted((5,), 3, Sampling(temperature=0.0), ignore_end=True), words, [0])
    logits = np.zeros(96, dtype=np.float32)
    logits[0] = 9
    assert [one.advance(logits, 1.0).reason for _ in range(3)] == [None, None, "length"]
