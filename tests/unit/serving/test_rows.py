"""Rows of counts: each its own, zeros at first, given back when nobody holds it."""

from __future__ import annotations

import threading

from serving.process.rows import Rows


def test_rows_are_apart_and_begin_at_zero() -> None:
    rows = Rows(3, at_once=2)
    taken = [rows.take() for _ in range(5)]  # more than one block holds
    for number, row in enumerate(taken):
        row[number % 3] += number + 1
    assert [row.tolist() for row in taken] == [[1, 0, 0], [0, 2, 0], [0, 0, 3], [4, 0, 0], [0, 5, 0]]


def test_a_row_that_nobody_holds_is_taken_again_and_is_zero_again() -> None:
    rows = Rows(2, at_once=4)
    kept = rows.take()
    kept[0] = 7
    for _ in range(1000):
        row = rows.take()
        assert row.tolist() == [0, 0]
        row[0], row[1] = -1, 2**62
        del row
    assert kept.tolist() == [7, 0] and len(rows._blocks) == 1


def test_threads_never_get_the_same_row() -> None:
    rows, wrong = Rows(4, at_once=2), []

    def use(mark: int) -> None:
        for _ in range(300):
            held = [rows.take() for _ in range(5)]
            for row in held:
                row[0] += mark
            wrong.extend(row.tolist() for row in held if row.tolist() != [mark, 0, 0, 0])

    threads = [threading.Thread(target=use, args=(mark,)) for mark in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
