"""What a backup is, by its manifest and by what was noted of it."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.backup import states
from tasks.backup.manifest import Component, Manifest
from tasks.backup.states import Note, derive


def _manifest(state: str = "complete", **components: str) -> Manifest:
    made = tuple(
        Component(name, "fake", found, "t", "t")
        for name, found in (components or {"a": "complete", "b": "complete"}).items()
    )
    return Manifest("20261121T020000Z-000000", "i", state, "t", "t", ("all",), made)


def _check(state: str, at: int, **outcomes: str) -> Note:
    return _note(state, at, components={name: {"outcome": one, "why": "rows differ"} for name, one in outcomes.items()})


def _note(state: str, at: int, **facts: Any) -> Note:
    return Note(state, f"2026-11-21T00:00:{at:02}.000000Z", facts)


def test_without_a_manifest_it_runs_or_has_failed() -> None:
    assert derive(None, [_note("running", 1)]).state == "running"
    failed = derive(None, [_note("running", 1), _note("failed", 2, why="killed")])
    assert (failed.state, failed.why) == ("failed", "killed")


@pytest.mark.parametrize("state", ["complete", "partial"])
def test_with_a_manifest_it_is_what_that_says(state: str) -> None:
    assert derive(_manifest(state), [_note("running", 1)]).state == state


def test_a_manifest_outweighs_a_failure_that_was_noted_too() -> None:
    assert derive(_manifest(), [_note("failed", 2, why="killed")]).state == "complete"


def test_it_is_verified_when_each_component_was() -> None:
    notes = [_check("verified", 3, a="verified", b="verified")]
    found = derive(_manifest(), notes)
    assert (found.state, found.verified) == ("verified", frozenset("ab"))
    assert found.verified_at == notes[0].at


def test_one_component_that_cannot_be_verified_here_leaves_it_complete() -> None:
    found = derive(_manifest(), [_check("unverifiable", 3, a="verified", b="unverifiable")])
    assert (found.state, found.verified) == ("complete", frozenset("a"))


def test_a_sample_leaves_it_complete_and_is_dated() -> None:
    found = derive(_manifest(), [_check("sampled", 3, a="sampled", b="sampled")])
    assert (found.state, found.verified) == ("complete", frozenset())
    assert found.sampled_at is not None


def test_a_partial_one_stays_partial_whatever_of_it_is_verified() -> None:
    found = derive(_manifest("partial", a="complete", b="failed"), [_check("verified", 3, a="verified")])
    assert (found.state, found.verified) == ("partial", frozenset("a"))


@pytest.mark.parametrize("noted", ["failed-verification", "sampled"])
def test_a_difference_makes_it_failed_also_after_it_was_verified(noted: str) -> None:
    found = derive(
        _manifest(),
        [_check("verified", 3, a="verified", b="verified"), _check(noted, 4, a="failed-verification")],
    )
    assert (found.state, found.verified, found.damaged) == ("failed", frozenset("b"), {"a": "rows differ"})


def test_the_newest_check_decides_whatever_the_order_of_the_notes() -> None:
    good, bad = (
        _check("verified", 5, a="verified", b="verified"),
        _check("failed-verification", 4, a="failed-verification"),
    )
    assert derive(_manifest(), [good, bad]).state == "verified"


def test_a_check_that_could_not_be_made_says_nothing_of_the_backup() -> None:
    found = derive(_manifest(), [_check("not-verified", 4, a="not-verified", b="verified")])
    assert (found.state, found.damaged) == ("complete", None)


def test_pins_come_and_go_and_a_date_only_moves_on() -> None:
    notes = [
        _note("pinned", 1),
        _note("keep-until", 2, until="2030-01-01T00:00:00.000000Z"),
        _note("keep-until", 3, until="2027-01-01T00:00:00.000000Z"),
    ]
    found = derive(_manifest(), notes)
    assert (found.pinned, found.keep_until) == (True, "2030-01-01T00:00:00.000000Z")
    assert not derive(_manifest(), [*notes, _note("unpinned", 4)]).pinned


def test_a_damaged_note_counts_for_nothing() -> None:
    assert derive(_manifest(), [Note("damaged", "20261121T000001.000000Z", {"name": "x"})]).state == "complete"
    assert "damaged" not in states.NOTES
