"""How far a backup is: bytes, shares, the time that remains, and how often it is told."""

from __future__ import annotations

import pytest

from tasks.backup.progress import Moment, Progress, duration, show, viewed


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_remaining_time_follows_from_bytes_done_and_what_the_last_backup_had() -> None:
    clock = _Clock()
    progress = Progress(["a", "b"], expected={"b": 300}, monotonic=clock)
    progress.begin("a")
    progress.update(50, 100)
    clock.now = 10.0
    moment = progress.moment()
    assert (moment.done_bytes, moment.total_bytes, moment.share) == (50, 400, 0.125)
    assert moment.remaining_seconds == pytest.approx(70.0)
    progress.update(100, 100)
    progress.end()
    progress.begin("b")
    assert progress.moment().total_bytes == 400
    progress.update(300)
    progress.end()
    assert progress.moment().share == 1.0


def test_without_knowing_how_much_there_is_no_time_is_promised() -> None:
    clock = _Clock()
    progress = Progress(["a", "b"], monotonic=clock)
    progress.begin("a")
    progress.update(50, 100)
    clock.now = 100.0
    moment = progress.moment()
    assert (moment.total_bytes, moment.share, moment.remaining_seconds) == (None, None, None)
    assert "a: 50 B of 100 B" in moment.text()


def test_a_source_that_grows_never_shows_more_than_all() -> None:
    progress = Progress(["a"], expected={"a": 10})
    progress.begin("a")
    progress.update(50)
    assert progress.moment().share == 1.0


def test_lines_come_every_ten_seconds_and_moments_twice_a_second() -> None:
    clock, lines, moments = _Clock(), list[str](), list[Moment]()
    progress = Progress(["a"], tell=lines.append, show=moments.append, monotonic=clock)
    progress.begin("a")
    shown = len(moments)
    for step in range(1, 201):
        clock.now = step * 0.1
        progress.update(step)
    assert len(lines) == 2
    assert len(moments) - shown == 40


def test_a_viewer_sees_moments_while_it_watches() -> None:
    seen: list[Moment] = []
    moment = Moment("a", 1, 2, 1, 2, 0.0, None)
    show(moment)
    with viewed(seen.append):
        show(moment)
    show(moment)
    assert seen == [moment]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (89, "89 s"), (120, "2 min"), (7500, "2 h 5 min"), (200_000, "2 days")]
)
def test_durations_are_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words
