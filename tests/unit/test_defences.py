"""Every test of faults has a defence whose text is in the code, so that tests/defences.py can take it out. No test is run here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import defences
from tests.backup_faults import FAULTS
from tests.defence_list import DEFENCES, Defence

ROOT = Path(__file__).resolve().parents[2]
NAMES = [one.test.rpartition("/")[2] for one in DEFENCES]


def test_every_test_of_faults_has_one_defence_and_no_other_test_has_one() -> None:
    assert sorted(one.test for one in DEFENCES) == sorted(test for tests in FAULTS.values() for test in tests)


@pytest.mark.parametrize("defence", DEFENCES, ids=NAMES)
def test_a_defence_stands_in_the_code_once_and_the_code_without_it_is_still_code(defence: Defence) -> None:
    assert defence.what
    texts = {module: (ROOT / module).read_text(encoding="utf-8") for module, _, _ in defence.changes}
    for module, code, without in defence.changes:
        before = ast.dump(ast.parse(texts[module]))
        assert texts[module].count(code) == 1, f"{code!r} in {module}: bring tests/defence_list.py after the code"
        texts[module] = texts[module].replace(code, without)
        assert ast.dump(ast.parse(texts[module])) != before, f"without {code!r} {module} is the same"


def test_a_seed_draws_the_same_tests_each_time_and_no_test_twice() -> None:
    drawn = defences.draw(2026)
    assert drawn == defences.draw(2026) != defences.draw(2027)
    assert len({test for _, test in drawn}) == len(drawn) == 10
    assert set(drawn) <= set(defences.every())
    every = defences.every()
    assert sorted(defences.draw(1, len(every))) == sorted(every)


def test_what_failed_is_read_from_what_pytest_prints() -> None:
    output = """
E   KeyError: 'first'
The above exception was the direct cause of the following exception:
tests/unit/test_x.py:3: in test_a
E   AssertionError: assert [] == ['x']
E     at /tmp/somewhere/else/file.txt
=========================== short test summary info ============================
FAILED tests/unit/test_x.py::test_a[one - two] - AssertionError: assert [] == ['x']
ERROR tests/unit/test_x.py::test_b - OSError
"""
    assert defences.failures(output) == {"tests/unit/test_x.py::test_a"}
    assert defences.said(output) == "AssertionError: assert [] == ['x']"
    assert defences.said("E   at /tmp/somewhere/else/file.txt") == "at …/file.txt"
    assert defences.said("no tests ran\n") == "no tests ran"


def test_a_test_that_passes_without_its_defence_is_a_finding() -> None:
    place, defence = ("all", "backup"), DEFENCES[0]
    passed = defences.Shown(place, defence, None)
    assert not passed.good and "it passed" in passed.row
    assert not defences.Shown(place, defence, None, "it was skipped").good
    failed = defences.Shown(place, defence, "AssertionError: a | b `c`")
    assert failed.good and "`AssertionError: a ¦ b 'c'`" in failed.row
    assert defences.table([failed]).count("\n") == 2
