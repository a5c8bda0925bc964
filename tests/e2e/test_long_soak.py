"""Hours of traffic with a swap of the version every ten seconds: nothing fails, and memory, threads and descriptors stay where they are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.e2e.harness import box, build, wait_for
from tests.e2e.records import record
from tests.e2e.slopes import Slope, slope

SAMPLE_SECONDS = 2.0
WARM_UP_SHARE = 0.2
TABLE = "| date | commit | seconds | swaps |"


def test_what_grows_is_told_from_what_only_wavers() -> None:
    noise = np.random.default_rng(1).normal(0, 1, 400)
    seconds = np.arange(400) * 10.0
    flat, growing = slope(seconds.tolist(), noise.tolist()), slope(seconds.tolist(), (noise + seconds / 720).tolist())
    assert flat.is_flat and flat.low < 0 < flat.high
    assert not growing.is_flat and growing.low < 5.0 < growing.high
    assert slope(seconds.tolist(), (-seconds).tolist()).is_flat
    assert slope(seconds.tolist(), [21.0] * 400) == Slope(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="10 samples"):
        slope(seconds[:10].tolist(), noise[:10].tolist())


BYTES_A_SWAP = 48
"""What one piece of the C library's heap may be; ONNX Runtime once kept as much of each session."""


def in_use(url: str) -> tuple[float, float]:
    """Pieces of memory that Python has in use; bytes that the C library has, above those of its start."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    names = ("modelkeep_python_blocks ", 'modelkeep_memory_bytes{device="cpu",what="allocated"} ')
    blocks, allocated = (next(float(line.split()[1]) for line in lines if line.startswith(name)) for name in names)
    return blocks, allocated


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_two_hours_of_swaps_under_traffic_leave_memory_threads_and_descriptors_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is one piece of Python's memory kept for each swap, or one of the C library's.

    MODELKEEP_TEST_SOAK_SECONDS (7200), MODELKEEP_TEST_SWAP_SECONDS (10). With MODELKEEP_TEST_RECORD=1 the figures are added to docs/RELIABILITY.md.
    """
    seconds = float(os.environ.get("MODELKEEP_TEST_SOAK_SECONDS", "7200"))
    each = float(os.environ.get("MODELKEEP_TEST_SWAP_SECONDS", "10"))
    with box(tmp_path) as one:
        one.register("1", build(one.folder / "v1.onnx", seed=1))
        one.settle_by_hand("1")
        one.serve()
        server = psutil.Process(one.child_pid())
        traffic = one.start_traffic(rate=60, seed=2026)
        samples: list[tuple[float, float, float, float, float, float]] = []
        began, swaps = time.monotonic(), 0
        while (now := time.monotonic() - began) < seconds:
            if now >= swaps * each:
                swaps += 1
                version = str(swaps + 1)
                one.register(version, build(one.folder / f"v{version}.onnx", seed=swaps + 1))
                one.settle_by_hand(version)
                wait_for(f"the swap to {version}", lambda: one.infer().headers.get("x-model-version") == version)  # noqa: B023
            held = (server.memory_info().rss / 2**20, server.num_threads(), server.num_fds(), *in_use(one.url))
            samples.append((now, *held))
            time.sleep(SAMPLE_SECONDS)
        requests = traffic.stop()
        assert one.child_pid() == server.pid
        failed = [request for request in requests if request.error is not None]
        checked = one.check(requests)
        usual = [row for row in samples if row[0] >= WARM_UP_SHARE * seconds]
        moments = [row[0] for row in usual]
        memory, threads, descriptors = (slope(moments, [row[column] for row in usual]) for column in (1, 2, 3))
        blocks, allocated = (slope(moments, [row[column] for row in usual]) for column in (4, 5))
        figures = [
            round(seconds),
            swaps,
            len(requests),
            len(failed),
            checked.wrong,
            f"{usual[0][1]:.0f} → {usual[-1][1]:.0f}",
            memory,
            threads,
            descriptors,
        ]
        with capsys.disabled():
            print("\nsoak:", json.dumps([str(figure) for figure in figures], ensure_ascii=False))
            means = [
                round(float(np.mean([row[1] for row in part])), 2) for part in np.array_split(np.array(samples), 12)
            ]
            print("resident MB, means of twelfths of the whole time:", means)
            print("pieces of memory that Python has in use, more an hour:", blocks, "of", round(usual[-1][4]))
            print("bytes that the C library has in use, more an hour:", allocated, "of", round(usual[-1][5]))
        record(TABLE, figures)
        assert (len(failed), checked.wrong) == (0, 0), failed[:5]
        # The heaps have room from the start (serving.process.headroom): that nothing is kept of each swap, what is in use says, not their size.
        assert blocks.high < 3600 / each, blocks
        assert allocated.high < BYTES_A_SWAP * 3600 / each, allocated
        assert memory.is_flat and threads.is_flat and descriptors.is_flat, (memory, threads, descriptors)
