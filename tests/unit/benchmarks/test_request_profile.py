"""The profile of a request: what py-spy wrote, by thread and by file."""

from __future__ import annotations

import pytest

from benchmarks.request_profile import samples, shares, thread_of

RAW = """\
thread (17): MainThread;main (serving/child.py:303);V2.infer (serving/api.py:210) 30
thread (17): MainThread;main (serving/child.py:303);V2.infer (serving/api.py:214) 10
thread (17): MainThread;main (serving/child.py:303);V2.infer (serving/api.py:214);Cycle._send (serving/http/cycle.py:9) 59
thread (17): MainThread;main (serving/child.py:303);loads (<frozen json>:1) 1
thread (18): small 1;_run (serving/compute/worker.py:80) 25
"""


def test_a_sample_counts_for_its_thread_and_for_the_innermost_of_its_functions() -> None:
    found = samples(RAW)
    assert [count for _, count in found] == [30, 10, 59, 1, 25]
    assert {thread_of(stack) for stack, _ in found} == {"MainThread", "small 1"}
    loop = [one for one in found if thread_of(one[0]) == "MainThread"]
    assert shares(loop) == [
        ("serving/http/cycle.py", "Cycle._send 59%", 0.59),
        ("serving/api.py", "V2.infer 40%", 0.4),
        ("<frozen json>", "loads 1%", 0.01),
    ]


def test_what_is_below_a_hundredth_is_put_together() -> None:
    found = samples("".join(f"thread (1): M;f (a{n}.py:1) 1\n" for n in range(200)) + "thread (1): M;g (b.py:2) 200\n")
    assert shares(found) == [("b.py", "g 50%", 0.5), ("all others", "", 0.5)]


@pytest.mark.parametrize("line", ["", "no count", "f (a.py:1) 3", "thread (1): M;f (a.py:1) x"])
def test_what_py_spy_does_not_write_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="not py-spy's raw format"):
        samples(f"{line}\n")
