"""What a replay keeps of the answers: of the stable version's so many bytes, of the candidate's none for longer than a comparison takes."""

from __future__ import annotations

import resource
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from serving import replay


def answer(value: float = 1.0) -> dict[str, Any]:
    return {"y": np.full((1, 1000), value, np.float32)}  # 4000 bytes


class Requests:
    kind, count, texts = "captured", 50, False

    def call(self, runtime: Any, number: int) -> Any:
        return runtime


def run(monkeypatch: pytest.MonkeyPatch, made: Any, wanted: int, take: Any) -> replay._Run:
    class Runtime:
        def __call__(self) -> Any:
            return made()

        def close(self) -> None:
            pass

    monkeypatch.setattr(replay, "load_runtime", lambda *_, **__: Runtime())
    model: Any = SimpleNamespace(path=None, format="onnx", signature=None)
    job: Any = SimpleNamespace(threads=1)
    return replay._run(model, Requests(), wanted, job, take, until=float("inf"))


def test_the_stable_version_stops_where_its_answers_take_what_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replay._Kept(40_000)
    before = run(monkeypatch, answer, 50, kept.take)
    assert before.requests == len(kept.answers) == 10 and before.error is None


def test_answers_that_were_compared_are_kept_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "WAITING_BYTES", 12_000)
    kept = replay._Kept(1 << 30)
    run(monkeypatch, answer, 50, kept.take)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def other() -> dict[str, Any]:
        nonlocal most
        made = answer(2.0)
        alive.add(_Held := made["y"].view(Tracked))
        most = max(most, len(alive))
        return {"y": _Held}

    compared = replay._Compared(kept.answers)
    after = run(monkeypatch, other, 50, compared.take)
    assert most <= 5, "three that wait, the last one, and the one that is made"
    compared.finish()
    assert (after.requests, compared.count, len(kept.answers)) == (50, 50, 0)
    assert compared.disagreements == {"top": 0, "tolerance": 50, "exact": 50}


class Tracked(np.ndarray):  # type: ignore[type-arg]
    """An array that a WeakSet can hold: by identity."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return self is other


def test_a_request_that_either_could_not_answer_is_not_compared() -> None:
    kept = replay._Kept(1 << 30)
    for old in (answer(), None, answer()):
        kept.take(old)
    compared = replay._Compared(kept.answers)
    for new in (None, answer(), answer()):
        compared.take(new)
    compared.finish()
    assert compared.count == 1 and compared.disagreements["exact"] == 0


def test_texts_count_with_what_they_hold() -> None:
    texts = np.array([["x" * 10_000] * 3], dtype=object)
    assert replay._size({"y": texts}) > 30_000 and replay._size(None) == 0


def test_a_process_of_little_memory_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, most in ((resource.RLIM_INFINITY, 512 << 20), (8 << 30, 512 << 20), (256 << 20, 32 << 20)):
        monkeypatch.setattr(replay.resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert replay._most_bytes() == most
