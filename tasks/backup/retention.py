"""Which backups stay: a policy over what is known of them. Pure functions; deleting is tasks.backup.prune's.

The words are those of grandfather-father-son rotation: the newest verified backup of each of the last days, weeks and months
that have one. It is applied to each component by itself, since a daily backup may hold less than a weekly one. The order of
backups is their `sequence`; clocks only say to which day one belongs, so a clock that jumps can not make an old backup the newest.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

RUNNING, COMPLETE, VERIFIED, PARTIAL, FAILED = "running", "complete", "verified", "partial", "failed"


@dataclass(frozen=True, slots=True)
class Policy:
    """How much is kept. `unverified_days`: so long a backup that is not verified stays after a newer verified one."""

    daily: int = 7
    weekly: int = 5
    monthly: int = 12
    minimum_redundancy: int = 2
    """So many verified backups of each component stay, whatever else is said."""
    unverified_days: float = 3.0

    def __post_init__(self) -> None:
        if self.minimum_redundancy < 1:
            raise ValueError(
                f"minimum_redundancy = {self.minimum_redundancy}: the last verified backup always stays, so 1 is the least"
            )
        for name in ("daily", "weekly", "monthly", "unverified_days"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: 0 is the least")


@dataclass(frozen=True, slots=True)
class Kept:
    """What the policy looks at of one backup."""

    backup_id: str
    sequence: int
    at: dt.datetime
    """When it ended, by the clock of that time."""
    state: str
    components: frozenset[str]
    """Those that it holds, or was asked for where it failed."""
    verified: frozenset[str] = frozenset()
    """Those that were restored and compared."""
    pinned: bool = False
    keep_until: dt.datetime | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    backup_id: str
    keep: bool
    rules: tuple[str, ...]
    """Why, a sentence a rule. There is always one."""

    def as_dict(self) -> dict[str, object]:
        return {"backup_id": self.backup_id, "keep": self.keep, "rules": list(self.rules)}


def decide(backups: Iterable[Kept], policy: Policy, now: dt.datetime) -> list[Decision]:
    """A decision for each backup, newest first. Of every component its `minimum_redundancy` newest verified backups stay, and
    whatever is pinned, held by a date, or under way.
    """
    ordered = sorted(backups, key=_order, reverse=True)
    reasons: dict[str, list[str]] = {one.backup_id: [] for one in ordered}
    for component in sorted({name for one in ordered for name in one.verified}):
        verified = [one for one in ordered if component in one.verified]
        for backup, why in _rotation(verified, policy, component):
            reasons[backup.backup_id].append(why)
    decisions = []
    for one in ordered:
        rules = [*_held(one, ordered, now), *reasons[one.backup_id]]
        if not rules and not one.verified:
            rules = _unverified(one, ordered, policy, now)
        keep = bool(rules)
        decisions.append(Decision(one.backup_id, keep, tuple(rules) or (_why_gone(one, ordered),)))
    return decisions


def _order(one: Kept) -> tuple[int, str]:
    return one.sequence, one.backup_id


def _held(one: Kept, ordered: Sequence[Kept], now: dt.datetime) -> list[str]:
    rules = []
    if one.state == RUNNING:
        rules.append("it is under way")
    if one.pinned:
        rules.append("it is pinned")
    if one.keep_until is not None and one.keep_until >= _trusted(now, ordered):
        rules.append(f"it must be kept until {one.keep_until:%Y-%m-%d %H:%M} UTC")
    return rules


def _trusted(now: dt.datetime, ordered: Sequence[Kept]) -> dt.datetime:
    """The time that lets a hold expire: never more than a day past the newest backup, so that a clock that runs ahead frees nothing."""
    return min([now, *(one.at + dt.timedelta(days=1) for one in ordered[:1])])


def _rotation(verified: Sequence[Kept], policy: Policy, component: str) -> Iterable[tuple[Kept, str]]:
    """(backup, rule) of those that stay; `verified` is newest first."""
    least = policy.minimum_redundancy
    for number, one in enumerate(verified[:least], 1):
        yield one, f"{component}: number {number} of the {least} newest verified"
    spans: tuple[tuple[str, int, Callable[[dt.datetime], str]], ...] = (
        ("day", policy.daily, lambda at: f"{at:%Y-%m-%d}"),
        ("week", policy.weekly, lambda at: f"{at:%G-W%V}"),
        ("month", policy.monthly, lambda at: f"{at:%Y-%m}"),
    )
    for word, count, label in spans:
        seen: set[str] = set()
        for one in verified:
            name = label(one.at.astimezone(dt.UTC))
            if name in seen:
                continue
            if len(seen) == count:
                break
            seen.add(name)
            yield one, f"{component}: newest verified of {word} {name} ({len(seen)} of {count})"


def _unverified(one: Kept, ordered: Sequence[Kept], policy: Policy, now: dt.datetime) -> list[str]:
    """Why a backup that is not verified stays; nothing where every component of it has a newer verified one that is old enough."""
    rules = []
    newer = [other for other in ordered if _order(other) > _order(one)]
    for component in sorted(one.components) or [""]:
        after = [other for other in newer if (component in other.verified if component else other.verified)]
        named = component or "anything"
        if not after:
            rules.append(f"{named}: not verified, and no newer backup of it is")
            continue
        # The one that has been there longest, by the clock: else a prune could take away what another's going rests on.
        longest = min(after, key=lambda other: other.at)
        since = (now - longest.at).total_seconds() / 86400
        if since < policy.unverified_days:
            rules.append(
                f"{named}: not verified; a newer one that is ({longest.backup_id}) is {max(0.0, since):.1f} days old, "
                f"less than {policy.unverified_days:g}"
            )
    return rules


def _why_gone(one: Kept, ordered: Sequence[Kept]) -> str:
    if one.verified:
        return "verified, and beyond what days, weeks, months and the minimum redundancy keep of each of its components"
    return f"{one.state}, never verified, and newer verified backups of all it holds have been there long enough"
