"""Which backups stay. The promises hold for any history, whatever the clocks did."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.backup.retention import COMPLETE, FAILED, PARTIAL, RUNNING, VERIFIED, Kept, Policy, decide

NOW = dt.datetime(2026, 11, 21, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
NAMES = ("database:app", "models", "vectors")


def kept(
    sequence: int, days_ago: float, state: str = VERIFIED, components: tuple[str, ...] = NAMES[:1], **more: object
) -> Kept:
    verified = frozenset(components) if state == VERIFIED else frozenset()
    return Kept(
        f"b{sequence:03}",
        sequence,
        NOW - days_ago * DAY,
        state,
        frozenset(components),
        **{"verified": verified, **more},
    )  # type: ignore[arg-type]


def staying(backups: list[Kept], policy: Policy, now: dt.datetime = NOW) -> set[str]:
    return {decision.backup_id for decision in decide(backups, policy, now) if decision.keep}


ONE = Policy(daily=0, weekly=0, monthly=0, minimum_redundancy=1, unverified_days=3)

moments = st.datetimes(dt.datetime(2015, 1, 1), dt.datetime(2040, 1, 1)).map(lambda at: at.replace(tzinfo=dt.UTC))
"""Any: the clock that stamped a backup may have been years off."""


@st.composite
def histories(draw: st.DrawFn) -> list[Kept]:
    backups = []
    for sequence in range(draw(st.integers(0, 25))):
        components = draw(st.frozensets(st.sampled_from(NAMES), min_size=0, max_size=3))
        state = draw(st.sampled_from([RUNNING, COMPLETE, VERIFIED, PARTIAL, FAILED]))
        verified = components if state == VERIFIED else frozenset()
        if state == PARTIAL and draw(st.booleans()):
            verified = frozenset(sorted(components)[:1])
        backups.append(
            Kept(
                f"b{sequence:03}", sequence, draw(moments), state, components, verified,
                pinned=draw(st.integers(0, 9)) == 0, keep_until=draw(st.none() | moments),
            )
        )  # fmt: skip
    return draw(st.permutations(backups))


policies = st.builds(
    Policy,
    daily=st.integers(0, 8),
    weekly=st.integers(0, 4),
    monthly=st.integers(0, 4),
    minimum_redundancy=st.integers(1, 4),
    unverified_days=st.floats(0, 30),
)


@settings(max_examples=80, deadline=None)
@given(histories(), policies, moments)
def test_minimum_redundancy_pins_and_the_last_verified_backup_of_each_component_survive_any_history_and_any_clock(
    backups: list[Kept], policy: Policy, now: dt.datetime
) -> None:
    stays = staying(backups, policy, now)
    for name in NAMES:
        verified = sorted((one.sequence, one.backup_id) for one in backups if name in one.verified)
        assert {backup_id for _, backup_id in verified[-policy.minimum_redundancy :]} <= stays
    assert {one.backup_id for one in backups if one.pinned or one.state == RUNNING} <= stays


@settings(max_examples=40, deadline=None)
@given(histories(), policies, moments)
def test_what_a_prune_leaves_is_left_by_the_next_one_too(backups: list[Kept], policy: Policy, now: dt.datetime) -> None:
    first = staying(backups, policy, now)
    assert staying([one for one in backups if one.backup_id in first], policy, now) == first


@settings(max_examples=40, deadline=None)
@given(histories(), policies, moments)
def test_a_backup_that_is_not_verified_stays_until_everything_in_it_has_a_newer_verified_one(
    backups: list[Kept], policy: Policy, now: dt.datetime
) -> None:
    stays = staying(backups, policy, now)
    for one in backups:
        if one.verified or one.backup_id in stays:
            continue
        for name in one.components:
            assert any(name in other.verified and other.sequence > one.sequence for other in backups)


@settings(max_examples=25, deadline=None)
@given(histories(), policies, moments)
def test_every_decision_says_by_which_rule(backups: list[Kept], policy: Policy, now: dt.datetime) -> None:
    decisions = decide(backups, policy, now)
    assert sorted(one.backup_id for one in decisions) == sorted(one.backup_id for one in backups)
    assert all(one.rules and all(one.rules) for one in decisions)


def test_days_weeks_and_months_each_keep_their_newest() -> None:
    backups = [kept(100 - ago, ago) for ago in range(90)]
    stays = staying(backups, Policy(daily=3, weekly=2, monthly=2, minimum_redundancy=1))
    assert stays == {
        "b100", "b099", "b098",  # three days: 21, 20, 19 November
        "b094",  # the newest of the week before: Sunday 15 November
        "b079",  # the newest of October
    }  # fmt: skip


def test_several_backups_of_a_day_count_as_one_of_it() -> None:
    backups = [kept(9 - number, 0.1 * number) for number in range(4)]
    assert staying(backups, Policy(daily=2, weekly=0, monthly=0, minimum_redundancy=1)) == {"b009"}


def test_a_component_that_only_an_old_backup_has_keeps_that_backup() -> None:
    backups = [kept(1, 60, components=("models",)), *(kept(number, 30 - number) for number in range(2, 20))]
    assert staying(backups, ONE) == {"b001", "b019"}


def test_an_unverified_backup_goes_some_days_after_a_newer_verified_one() -> None:
    backups = [kept(1, 9, COMPLETE), kept(2, 2.5), kept(3, 0, COMPLETE)]
    assert staying(backups, ONE) == {"b001", "b002", "b003"}
    assert staying(backups, ONE, NOW + DAY) == {"b002", "b003"}


def test_a_failed_backup_without_anything_in_it_goes_when_any_newer_one_is_verified_long_enough() -> None:
    backups = [kept(1, 9, FAILED, ()), kept(2, 5)]
    assert staying(backups, ONE) == {"b002"}
    assert staying(backups[:1], ONE) == {"b001"}


def test_a_partial_backup_counts_for_the_components_that_were_verified_in_it() -> None:
    part = kept(5, 0, PARTIAL, NAMES[:2], verified=frozenset(NAMES[:1]))
    older = kept(4, 1, VERIFIED, NAMES[:2])
    assert staying([part, older, kept(3, 2, VERIFIED, NAMES[:2])], ONE) == {"b005", "b004"}


def test_a_legal_hold_keeps_a_backup_and_a_clock_that_runs_ahead_does_not_free_it() -> None:
    backups = [kept(1, 60, keep_until=NOW + 30 * DAY), kept(2, 0)]
    assert "b001" in staying(backups, ONE)
    assert "b001" in staying(backups, ONE, NOW + 3650 * DAY), "no backup was taken since: the clock may have jumped"
    later = [*backups, kept(3, -32)]
    assert "b001" not in staying(later, ONE, NOW + 33 * DAY)


def test_a_backup_stamped_by_a_clock_of_the_future_is_not_taken_for_the_newest() -> None:
    jumped = [kept(number, -3650 - number) for number in range(1, 9)]
    real = [kept(20, 1), kept(21, 0)]
    assert {"b020", "b021"} <= staying([*jumped, *real], Policy(daily=2, weekly=0, monthly=0, minimum_redundancy=2))


def test_the_policy_refuses_to_keep_nothing() -> None:
    with pytest.raises(ValueError, match="minimum_redundancy = 0"):
        Policy(minimum_redundancy=0)
    with pytest.raises(ValueError, match="weekly = -1"):
        Policy(weekly=-1)


def test_the_rules_are_sentences_for_a_person() -> None:
    found = decide([kept(1, 40), kept(2, 0)], ONE, NOW)
    assert found[0].rules == ("database:app: number 1 of the 1 newest verified",)
    assert found[1].rules == (
        "verified, and beyond what days, weeks, months and the minimum redundancy keep of each of its components",
    )
