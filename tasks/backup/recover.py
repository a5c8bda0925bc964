"""Recovery: from a backup to what it was taken of, planned first, in steps that a killed run takes up again. Needs no registry, no Prefect."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import make_url

from registry import clock
from registry.errors import ModelkeepError, NotFoundError, RefusedError, UsageError
from registry.redaction import redact
from registry.settings import Settings
from tasks.backup import kinds, ledger, point, selection, states, targets
from tasks.backup.components import Source, Target
from tasks.backup.journal import Journal, open_journal
from tasks.backup.locking import home_lock
from tasks.backup.manifest import FAILED, Component, Manifest
from tasks.backup.point import Point
from tasks.backup.remains import notes
from tasks.backup.written import write_files

if TYPE_CHECKING:
    from tasks.backup.repository import Repository

ORDER = ("config", "models", "database", "vectors", "queues", "files", "registry")
"""The registry comes last: with its new epoch the servers follow it, and what it names must be there by then."""

TOUCH_SECONDS = 600.0
"""So often a step that is under way says in the journal that it is."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Step:
    """One component on its way back. `target` None: its content is written as files into `folder`."""

    chosen: selection.Chosen
    target: Target | None
    folder: Path | None
    shown: str
    occupied: str | None
    done: bool = False
    """By an earlier run of this recovery, which was cut off."""
    point: Point | None = None
    """The shipped logs that follow the backup, up to a moment; None: the backup alone."""

    @property
    def as_of(self) -> str:
        """What was written later does not come back."""
        return self.component.began_at if self.point is None else self.point.reaches

    @property
    def component(self) -> Component:
        return self.chosen.component

    def as_dict(self) -> dict[str, Any]:
        return {
            "component": self.component.name,
            "only": list(self.chosen.only),
            "kind": self.component.kind,
            "to": self.shown,
            "size_bytes": self.component.size_bytes,
            "entries": self.component.entries,
            "as_of": self.as_of,
            "point": None if self.point is None else self.point.as_dict(),
            "occupied": self.occupied,
            "done": self.done,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recovery would do. `problems` keep it from beginning, `warnings` do not."""

    manifest: Manifest
    standing: states.Standing
    steps: tuple[Step, ...]
    missing: tuple[str, ...]
    """Components that the backup does not have: they failed when it was taken."""
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    lost_since: str
    """What was written after this moment is not in it."""

    @property
    def size_bytes(self) -> int:
        return sum(step.component.size_bytes for step in self.steps if not step.done)

    @property
    def remarks(self) -> list[str]:
        """What there is to say of it beside its steps and problems, for people."""
        applied = [
            f"{step.component.name}: then the shipped logs are applied: {step.point.text}"
            for step in self.steps
            if step.point is not None
        ]
        missing = [f"missing: {name} failed when the backup was taken" for name in self.missing]
        return applied + missing + [f"warning: {text}" for text in self.warnings]

    def as_dict(self) -> dict[str, Any]:
        return {
            "backup_id": self.manifest.backup_id,
            "backup_state": self.standing.state,
            "lost_since": self.lost_since,
            "size_bytes": self.size_bytes,
            "steps": [step.as_dict() for step in self.steps],
            "missing": list(self.missing),
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a recovery did. `state`: recovered, or partial where a component could not be brought back."""

    state: str
    plan: Plan
    restored: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    safety_copy: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "state": self.state,
            **self.plan.as_dict(),
            "notes": notes(self.restored),
            "restored": self.restored,
            "failed": self.failed,
            "safety_copy": self.safety_copy,
            "seconds": self.seconds,
        }


# The plan


def make_plan(
    repository: Repository,
    manifest: Manifest,
    settings: Settings,
    *,
    components: Sequence[str] = (),
    into: str | None = None,
    force: bool = False,
    at: dt.datetime | None = None,
) -> Plan:
    """Look at everything, change nothing. Raises UsageError, SettingsError for what cannot be asked for.

    `at`: databases whose logs were shipped come back as they were at that moment, which is after the backup.
    """
    chosen = sorted(selection.choose(manifest, components), key=_order)
    if into is not None and "://" in into and len(chosen) > 1:
        raise UsageError(
            f"--into {redact(into)} takes one component, {len(chosen)} are asked for: name it by --components"
        )
    aimed = [_aim(one, settings, manifest, into, force) for one in chosen]
    points, remarks = _points(repository, chosen, settings, at)
    journal = open_journal(
        settings.home,
        manifest.backup_id,
        [_key(one, shown, points.get(one.component.name)) for one, (_, _, shown) in aimed],
    )
    steps, problems = [], []
    for one, (target, folder, shown) in aimed:
        done = journal.done(one.component.name) is not None
        standing: str | None = None
        if not done:
            try:
                standing = _occupied(one, target, folder)
            except ModelkeepError as error:
                problems.append(f"{one.component.name}: {error}")
        if standing is not None and not force and not journal.ours(one.component.name, standing):
            problems.append(
                f"{one.component.name}: {shown} is not empty ({standing}): --into another place to look at it beside what is "
                "there, or --force, which backs up and verifies what is there first"
            )
        steps.append(Step(one, target, folder, shown, standing, done, points.get(one.component.name)))
    problems += _space([step for step in steps if not step.done])
    problems += _space_for_points(settings.home, [step for step in steps if not step.done])
    problems += _absent(repository, manifest, [step.component.name for step in steps if not step.done])
    standing_of_backup = states.derive(manifest, repository.states(manifest.backup_id))
    warnings = list(_warnings(manifest, standing_of_backup, [step.component for step in steps]))
    warnings += remarks
    ours = ledger.installation(settings.home)
    if ours is not None and manifest.installation != ours:
        warnings.append(f"it is of another installation ({manifest.installation[:12]}) than this home ({ours[:12]})")
    if journal.resumed:
        warnings.append(f"a recovery of {journal.document['began_at']} was cut off: it goes on where it was")
        if journal.safety_copies:
            warnings.append(f"what it found there before is in backup {', '.join(journal.safety_copies)}")
    return Plan(
        manifest=manifest,
        standing=standing_of_backup,
        steps=tuple(steps),
        missing=tuple(one.name for one in manifest.components if one.state == FAILED),
        problems=tuple(problems),
        warnings=tuple(warnings),
        lost_since=min((step.as_of for step in steps), default=manifest.began_at),
    )


def _order(one: selection.Chosen) -> tuple[int, str]:
    return ORDER.index(one.component.name.partition(":")[0]), one.component.name


def _aim(
    one: selection.Chosen, settings: Settings, manifest: Manifest, into: str | None, force: bool
) -> tuple[selection.Chosen, tuple[Target | None, Path | None, str]]:
    """(the component, (its target, or the folder for its content as files, that place in words))."""
    if into is None:
        target = targets.live(one, settings, force=force, backup_id=manifest.backup_id)
        return one, (target, None, _shown(target))
    into = targets.with_known_password(into, settings)
    aside = targets.into(one, into, backup_id=manifest.backup_id, environment=settings.environment)
    if aside is not None:
        return one, (aside, None, _shown(aside))
    folder = Path(into) / one.component.name.replace(":", "/")
    return one, (None, folder, str(folder))


def _key(one: selection.Chosen, shown: str, where: Point | None) -> tuple[str, str]:
    return one.text + ("" if where is None else f" at {clock.text(where.moment)}"), shown


def _points(
    repository: Repository, chosen: Sequence[selection.Chosen], settings: Settings, at: dt.datetime | None
) -> tuple[dict[str, Point], list[str]]:
    """By component, the logs that lead from the backup to the moment; and what there is to say of those that do not get there."""
    points: dict[str, Point] = {}
    remarks = []
    for one in chosen:
        name = one.component.name
        if at is None or one.component.kind not in point.KINDS:
            continue
        try:
            found = point.plan(repository, one.component, at)
        except NotFoundError as error:
            if name.partition(":")[2] in settings.backup.logs:
                remarks.append(f"{name}: only the backup of {one.component.began_at} comes back: {error}")
            continue
        points[name] = found
        if found.short is not None:
            remarks.append(f"{name}: what was written after {found.reaches} is lost: {found.short}")
    return points, remarks


def _shown(target: Target) -> str:
    if target.path is not None and target.url is None:
        return str(target.path)
    return redact(str(target.url))


def _occupied(one: selection.Chosen, target: Target | None, folder: Path | None) -> str | None:
    if target is not None:
        return kinds.kind(one.component.kind).occupied(target)
    assert folder is not None
    count = sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0
    return f"{count} file{'' if count == 1 else 's'}" if count else None


def _space(steps: Iterable[Step]) -> list[str]:
    """Where it will not fit, by file system. What goes to a server is that server's concern."""
    needed: dict[int, tuple[int, Path]] = {}
    for step in steps:
        folder = _folder_of(step)
        if folder is None:
            continue
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        before, place = needed.get(device, (0, folder))
        needed[device] = before + step.component.size_bytes, place
    problems = []
    for size, place in needed.values():
        free = shutil.disk_usage(place).free
        if size > free:
            problems.append(f"{place} has {free:,} bytes free, and {size:,} come back there: free some, or use --into")
    return problems


def _space_for_points(home: Path, steps: Iterable[Step]) -> list[str]:
    """A private server holds the database while its logs are applied, and a copy of what came of it."""
    needed = max((2 * step.component.size_bytes + step.point.size_bytes for step in steps if step.point), default=0)
    place = home
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed <= free:
        return []
    return [f"{place} has {free:,} bytes free, and logs are applied there with {needed:,}: free some"]


def _folder_of(step: Step) -> Path | None:
    if step.folder is not None:
        return step.folder
    assert step.target is not None
    url = step.target.url
    if url is None:
        return step.target.path
    if "://" not in url:
        return Path(url)
    if url.startswith("sqlite"):
        database = make_url(url).database
        return None if database is None else Path(database).parent
    return None


def _absent(repository: Repository, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Objects that are gone, before anything is written. That the others hold the right bytes is seen when they are read."""
    gone = repository.missing(manifest, names)
    if not gone:
        return []
    shown = ", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
    return [
        f"{len(gone)} objects of the backup are not in {', '.join(repository.shown)} ({shown}): take another backup"
    ]


def _warnings(manifest: Manifest, standing: states.Standing, components: Sequence[Component]) -> Iterable[str]:
    unverified = [one.name for one in components if one.name not in standing.verified]
    if unverified:
        yield f"never restored and compared before: {', '.join(unverified)}"
    if standing.damaged:
        yield "its verification found: " + "; ".join(f"{name}: {why}" for name, why in sorted(standing.damaged.items()))
    for one in components:
        for warning in one.warnings:
            yield f"{one.name}: {warning}"
        if one.snapshot.get("consistent") is False:
            yield f"{one.name} is not of one moment: {one.snapshot.get('why', 'it was exported while it was written to')}"


# Carrying it out


def carry_out(
    plan: Plan,
    repository: Repository,
    settings: Settings,
    *,
    safety_copy: Callable[[Sequence[str]], str],
    say: Say = lambda _: None,
    on_progress: Callable[[str, int, int | None], None] = lambda name, done, total: None,
    monotonic: Callable[[], float],
) -> Outcome:
    """Bring the components back, in order. `safety_copy` backs up and verifies the named live components and returns that
    backup's id; it raises where it cannot, and then nothing was changed.

    Raises RefusedError where the plan has problems, LockedError where a backup or recovery of this home is under way. A
    component that fails is named in the outcome, and those after it are tried: the registry only where none failed, so that no
    server follows a registry whose models are not there.
    """
    if plan.problems:
        raise RefusedError("nothing was restored: " + "; ".join(plan.problems))
    named = [_key(step.chosen, step.shown, step.point) for step in plan.steps]
    journal = open_journal(settings.home, plan.manifest.backup_id, named)
    due = [step.component.name for step in plan.steps if _endangers(step, journal)]
    if due:  # also where an earlier run has made one: it held other components, or the same as they were then
        say(f"what is there is backed up first: {', '.join(due)}")
        journal.saved(safety_copy(due))
    with home_lock(settings.home, f"recovery of {plan.manifest.backup_id}"):
        journal = open_journal(settings.home, plan.manifest.backup_id, named)
        copy = journal.safety_copies[-1] if journal.safety_copies else None
        outcome = Outcome("recovered", plan, safety_copy=copy)
        for step in plan.steps:
            _carry_out_one(step, outcome, repository, settings, plan.manifest, journal, say, on_progress, monotonic)
        state = "partial" if outcome.failed or (plan.missing and _is_whole(plan)) else "recovered"
        if not outcome.failed:
            journal.end(state)
        return Outcome(state, plan, outcome.restored, outcome.failed, copy, outcome.seconds)


def _endangers(step: Step, journal: Journal) -> bool:
    """Something stands there that is not what an earlier run of this recovery wrote."""
    return step.occupied is not None and not step.done and not journal.ours(step.component.name, step.occupied)


def _is_whole(plan: Plan) -> bool:
    return len(plan.steps) + len(plan.missing) == len(plan.manifest.components)


def _carry_out_one(
    step: Step,
    outcome: Outcome,
    repository: Repository,
    settings: Settings,
    manifest: Manifest,
    journal: Journal,
    say: Say,
    on_progress: Callable[[str, int, int | None], None],
    monotonic: Callable[[], float],
) -> None:
    name = step.component.name
    earlier = journal.done(name)
    if earlier is not None:
        outcome.restored[name] = earlier
        return
    if outcome.failed and name == "registry" and step.target is not None and not step.target.options.get("aside"):
        outcome.failed[name] = f"not begun, since {', '.join(outcome.failed)} could not be brought back"
        say(f"{name}: {outcome.failed[name]}")
        return
    mine = journal.ours(name, step.occupied)
    if step.occupied is None and not mine and (come := _standing(step)) is not None:
        outcome.failed[name] = f"{step.shown} was empty when the plan was made, and is not now ({come}): plan it anew"
        say(f"{name}: {outcome.failed[name]}")
        return
    say(f"{name}: {step.component.size_bytes:,} bytes to {step.shown}" + (", once more" if mine else ""))
    journal.begin(name)
    began = touched = monotonic()

    def progressed(component: str, done: int, total: int | None) -> None:
        nonlocal touched
        on_progress(component, done, total)
        if monotonic() - touched > TOUCH_SECONDS:
            journal.touch(name)
            touched = monotonic()

    try:
        with contextlib.ExitStack() as stack:
            source: Source = repository.source(manifest, name)
            replayed: dict[str, Any] = {}
            if step.point is not None:
                folder = settings.home / "backup-work"
                source, replayed = stack.enter_context(point.source(repository, source, step.point, folder, say=say))
            facts = _brought_back(step, source, mine, progressed) | ({"point": replayed} if replayed else {})
    except ModelkeepError as error:
        outcome.failed[name] = redact(str(error))
        say(f"{name}: {outcome.failed[name]}")
        with contextlib.suppress(ModelkeepError):  # where it does not answer, it is as after a kill
            journal.fail(name, _occupied(step.chosen, step.target, step.folder))
        return
    outcome.restored[name] = facts
    outcome.seconds[name] = round(monotonic() - began, 3)
    journal.finish(name, facts)
    say(f"{name}: restored and compared in {outcome.seconds[name]:.1f} s")


def _standing(step: Step) -> str | None:
    """What stands there now. None also where that cannot be seen: the restore itself then tells why."""
    try:
        return _occupied(step.chosen, step.target, step.folder)
    except ModelkeepError:
        return None


def _brought_back(
    step: Step, source: Source, mine: bool, on_progress: Callable[[str, int, int | None], None]
) -> dict[str, Any]:
    if step.target is None:
        assert step.folder is not None
        return write_files(source, step.folder)
    # What stands in a configuration has secrets, which are in no backup and so in no safety copy: it is never replaced.
    force = (step.target.force or mine) and step.component.kind != "config"
    target = Target(
        step.target.url, step.target.path, step.target.only, force, step.target.options,
        lambda done, total: on_progress(step.component.name, done, total),
    )  # fmt: skip
    return kinds.kind(step.component.kind).restore(source, target)
