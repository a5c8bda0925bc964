"""Backups that the policy lets go: shown first, each with its rule, and deleted only where that is asked for."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from registry.errors import ConflictError, ModelkeepError, StorageError, UnavailableError
from registry.settings import Settings
from tasks.backup import garbage, ledger, log_plan, prune_logs, states
from tasks.backup.log_plan import Logs
from tasks.backup.manifest import COMPLETE, FAILED, SUFFIX, Manifest
from tasks.backup.registry_now import registry_of
from tasks.backup.retention import Decision, Kept, Policy, decide
from tasks.backup.states import Note

if TYPE_CHECKING:
    from tasks.backup.findings import Scan
    from tasks.backup.repository import Repository


@dataclass(frozen=True, slots=True)
class Pruned:
    """The decisions, and, where they were carried out, what became of them."""

    decisions: tuple[Decision, ...]
    backups: dict[str, dict[str, Any]]
    """Of each: state, ended_at, components, for people."""
    applied: bool = False
    removed: tuple[str, ...] = ()
    kept_by_place: dict[str, str] = field(default_factory=dict)
    """Backups that should have gone and that a place did not let go, with its words."""
    garbage: tuple[garbage.Collected, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    """Manifests that cannot be believed: they stay, and so does all that may be theirs."""
    logs: Logs = field(default_factory=Logs)
    """Shipped logs of databases that the backups which stay do not need."""

    @property
    def goes(self) -> list[str]:
        return [one.backup_id for one in self.decisions if not one.keep]

    def as_dict(self) -> dict[str, Any]:
        return {
            "applied": self.applied,
            "decisions": [{**one.as_dict(), **self.backups[one.backup_id]} for one in self.decisions],
            "removed": list(self.removed),
            "kept_by_place": self.kept_by_place,
            "unreadable": self.unreadable,
            "garbage": [one.as_dict() for one in self.garbage],
            "logs": self.logs.as_dict(),
        }

    @property
    def troubles(self) -> dict[str, str]:
        """What somebody must look at: it will not be better by itself."""
        return {**self.unreadable, **self.kept_by_place, **self.logs.troubles}

    @property
    def summary(self) -> str:
        """What went, or would go, and every trouble, once: those of logs stand in their lines."""
        count, what = (len(self.removed), "removed") if self.applied else (len(self.goes), "would go")
        troubles = [f"{one}: {why}" for one, why in {**self.unreadable, **self.kept_by_place}.items()]
        lines = self.logs.lines(applied=self.applied)
        return "; ".join([f"{count} of {len(self.decisions)} backups {what}", *lines, *troubles])

    def as_markdown(self) -> str:
        lines = ["| backup | state | | rule |", "|---|---|---|---|"]
        for one in self.decisions:
            row = (
                one.backup_id,
                self.backups[one.backup_id]["state"],
                "stays" if one.keep else "goes",
                "; ".join(one.rules),
            )
            lines.append("| " + " | ".join(row) + " |")
        for collected in self.garbage:
            lines += ["", f"{collected.place}: {collected.deleted} objects deleted, {collected.marked} marked"]
            lines[-1] += f"; the rest waits: {collected.waits}" if collected.waits else ""
        for line in self.logs.lines(applied=self.applied):
            lines += ["", line]
        return "\n".join(lines)


def policy_of(settings: Settings) -> Policy:
    section = settings.backup
    return Policy(
        section.keep_daily,
        section.keep_weekly,
        section.keep_monthly,
        section.minimum_redundancy,
        section.unverified_days,
    )


def preview(repository: Repository, policy: Policy, now: dt.datetime, grace: dt.timedelta) -> Pruned:
    """What would go, and why the others stay. Logs that only a backup needs which goes now follow after `grace`. Changes nothing.

    Raises StorageError where a place does not answer.
    """
    found, scan = _look(repository, policy, now)
    logs = log_plan.preview(repository, scan.manifests, now - grace)
    return replace(found, logs=replace(logs, waits=scan.unbelieved or logs.waits))


def _look(repository: Repository, policy: Policy, now: dt.datetime) -> tuple[Pruned, Scan]:
    """(the decisions on backups, what they were made by)."""
    scan = repository.scan()
    if scan.unanswered is not None:
        raise StorageError(f"nothing is decided while it is unknown what a place holds: {scan.unanswered}")
    notes = repository.all_states()
    if repository.down:  # a pin may have been noted just there
        raise StorageError(
            "nothing is decided while the notes of a place cannot be read: " + "; ".join(repository.down.values())
        )
    manifests = {one.backup_id: one for one in scan.manifests}
    known = {
        backup_id: kept
        for backup_id in sorted({*manifests, *notes})
        if backup_id not in scan.broken
        and (kept := _kept(backup_id, manifests.get(backup_id), notes.get(backup_id, []))) is not None
    }
    found = Pruned(
        tuple(_decided(known, manifests, policy, now)),
        {
            one.backup_id: {"state": one.state, "ended_at": one.at.isoformat(), "components": sorted(one.components)}
            for one in known.values()
        },
        unreadable=dict(scan.broken),
    )
    return found, scan


def _decided(
    known: Mapping[str, Kept], manifests: Mapping[str, Manifest], policy: Policy, now: dt.datetime
) -> list[Decision]:
    """Newest first. Installations that share a location each keep their own backups; what has no manifest may be of any of them."""
    groups: dict[str, list[Kept]] = {}
    for record in manifests.values():
        if record.backup_id in known:
            groups.setdefault(record.installation, []).append(known[record.backup_id])
    nobodys = [one for one in known.values() if one.backup_id not in manifests]
    found: dict[str, Decision] = {}
    for group in groups.values() or [[]]:
        for one in decide([*group, *nobodys], policy, now):
            if one.backup_id not in found or one.keep:
                found[one.backup_id] = one
    return sorted(found.values(), key=lambda one: (known[one.backup_id].sequence, one.backup_id), reverse=True)


def apply(
    repository: Repository,
    policy: Policy,
    *,
    now: dt.datetime,
    grace: dt.timedelta,
    say: Callable[[str], None] = lambda _: None,
    record: Callable[[Decision], None] = lambda _: None,
) -> Pruned:
    """Delete what `preview` would let go, decided anew, then collect garbage. Killed at any moment, another call goes on.

    A backup is noted as pruned first, and is none as soon as its manifest is gone; its objects go when nobody needs them. `record` gets
    each that is gone, before the next one goes. Raises StorageError where a place does not answer, or fails in the middle.
    """
    decided, scan = _look(repository, policy, now)
    manifests = {one.backup_id: one for one in scan.manifests}
    removed: list[str] = []
    refused: dict[str, str] = {}
    for decision in decided.decisions:
        if decision.keep:
            continue
        why = _remove(repository, decision, manifests.get(decision.backup_id))
        if why is None:
            record(decision)
            removed.append(decision.backup_id)
            say(f"{decision.backup_id} is removed: {decision.rules[0]}")
        else:
            refused[decision.backup_id] = why
    try:
        collected = tuple(garbage.collect(repository, now=now, grace=grace))
    except ConflictError as error:  # another one is at it; the next run does what is left
        collected = tuple(garbage.Collected(place.shown, waits=str(error)) for place in repository.all_places())
    return Pruned(
        decided.decisions, decided.backups, True, tuple(removed), refused, collected, unreadable=decided.unreadable
    )


def carry_out(
    settings: Settings,
    repository: Repository,
    *,
    now: dt.datetime,
    say: Callable[[str], None] = lambda _: None,
    flow_run_id: str | None = None,
) -> Pruned:
    """`apply` by the settings, then the shipped logs that no backup needs any more. What went is on record at once, where the registry
    answers: that may take hours, and a kill must not leave a change that nobody knows of. `say` gets what could not be put on record.

    Raises what `apply` does.
    """
    grace = dt.timedelta(hours=settings.backup.gc_grace_hours)
    locked_for = dt.timedelta(days=settings.backup.object_lock_days) if settings.backup.object_lock else None
    record = _Record(settings, say, flow_run_id)
    found = apply(repository, policy_of(settings), now=now, grace=grace, say=say, record=record.backup)
    logs = prune_logs.carry_out(
        repository, settings.home, now=now, grace=grace, say=say, record=record.logs, locked_for=locked_for
    )
    return replace(found, logs=logs)


@dataclass(frozen=True, slots=True)
class _Record:
    """Puts into the audit chain, and into backups.json, what went. A record that fails is told, and stops nothing: the deletion is done by then."""

    settings: Settings
    say: Callable[[str], None]
    flow_run_id: str | None

    def backup(self, decision: Decision) -> None:
        self._put(decision.backup_id, {"removed": {decision.backup_id: list(decision.rules)}, "logs": {}})
        try:
            ledger.note_removed(self.settings.home, [decision.backup_id])
        except StorageError as error:
            self.say(f"`status` does not know that {decision.backup_id} is removed: {error}")

    def logs(self, database: str, removed: Sequence[str]) -> None:
        what = f"logs of {database}, {len(removed)} from {removed[0]} to {removed[-1]}"
        self._put(what, {"removed": {}, "logs": {database: log_plan.span(removed)}})

    def _put(self, what: str, before: dict[str, Any]) -> None:
        try:
            with registry_of(self.settings) as registry:
                if registry.database is None:
                    raise UnavailableError(str(registry.why))
                with registry.database.write(flow_run_id=self.flow_run_id) as transaction:
                    transaction.record("backup.pruned", "backups", before=before)
        except ModelkeepError as error:
            self.say(f"what was removed is not in the audit chain: {what}: {error}")


def _kept(backup_id: str, manifest: Manifest | None, notes: list[Note]) -> Kept | None:
    """None for what is no backup any more: pruned, and only its record is left."""
    standing = states.derive(manifest, notes)
    if manifest is None:
        if standing.pruned or not notes:
            return None
        first = notes[0]
        requested = frozenset(str(name) for name in first.facts.get("requested", ()))
        sequence, at = int(first.facts.get("sequence", 0)), dt.datetime.fromisoformat(notes[-1].at)
        return Kept(backup_id, sequence, at, standing.state, requested, pinned=standing.pinned)
    held = frozenset(one.name for one in manifest.components if one.state == COMPLETE)
    return Kept(
        backup_id,
        manifest.sequence,
        dt.datetime.fromisoformat(manifest.ended_at),
        FAILED if standing.damaged else standing.state,
        held,
        standing.verified & held,
        pinned=standing.pinned,
        keep_until=None if standing.keep_until is None else dt.datetime.fromisoformat(standing.keep_until),
    )


def _remove(repository: Repository, decision: Decision, manifest: Manifest | None) -> str | None:
    """Why a place did not let it go; None where it is gone everywhere."""
    backup_id = decision.backup_id
    facts = {"rules": list(decision.rules), "logs": [] if manifest is None else log_plan.stands(manifest)}
    repository.note_state(backup_id, states.PRUNED, facts)
    problems = []
    for place in repository.all_places():
        try:
            place.delete(f"{backup_id}{SUFFIX}")
        except StorageError as error:
            problems.append(str(error))
    return "; ".join(problems) or None
