"""The tests of faults can fail: ten drawn at random do, each with the defence taken out that it is about (tests/defences.py)."""

from __future__ import annotations

import datetime as dt
import os

import pytest

from tests import defences


@pytest.mark.long
@pytest.mark.timeout(0)
def test_ten_tests_of_faults_drawn_at_random_fail_without_their_defence() -> None:
    """Another ten each day, or those of MODELKEEP_TEST_SEED."""
    seed = int(os.environ.get("MODELKEEP_TEST_SEED") or f"{dt.datetime.now(dt.UTC):%Y%m%d}")
    with defences.copied() as copy:
        found = [defences.show(copy, place, defences.defence_of(test)) for place, test in defences.draw(seed)]
    print(defences.table(found))
    assert [one.row for one in found if not one.good] == [], f"MODELKEEP_TEST_SEED={seed}"
