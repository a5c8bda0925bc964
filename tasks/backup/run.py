"""A backup, from its lock to its manifest: the order, the lease, what is noted, and what remains when something fails."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import select

from registry import actor, clock
from registry.errors import FencedError, LockedError, ModelkeepError, RefusedError, StorageError
from registry.schema import Environment
from registry.settings import Settings
from tasks import lease
from tasks.backup import kinds, ledger, states, sweeping, system
from tasks.backup.components import Captured, Part
from tasks.backup.hiding import hider
from tasks.backup.locking import HomeLock, home_lock, release_lease, take_lease
from tasks.backup.manifest import COMPLETE, FAILED, PARTIAL, Component, Manifest
from tasks.backup.outcome import STORED, Outcome
from tasks.backup.places import keep_until
from tasks.backup.progress import Moment, Progress
from tasks.backup.registry_now import RegistryNow, registry_of
from tasks.backup.repository import Repository, new_backup_id, open_repository
from tasks.backup.writer import Writer

log = logging.getLogger("modelkeep.backup")

BEAT_SECONDS = 30.0
"""How often the intent in the location is written again, so that others see a backup that lives."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for. `names` as kinds.wanted gives them."""

    names: tuple[str, ...] = (kinds.ALL,)
    reason: str = ""
    flow_run_id: str | None = None


def back_up(
    settings: Settings, request: Request, *, tell: Tell = log.info, show: Callable[[Moment], None] = lambda _: None
) -> Outcome:
    """Take a backup of what is asked for.

    Raises UsageError for names that nothing answers to, LockedError where another backup runs, StorageError and
    BackupKeyError where nothing can be stored at all. Of a component that fails the error stands in the outcome.
    """
    actor.current()  # a key that may only look is refused before anything is touched
    parts = kinds.parts(settings, request.names)
    with home_lock(settings.home, "backup") as lock, contextlib.ExitStack() as stack:
        registry = stack.enter_context(registry_of(settings))
        keeper = stack.enter_context(_leased(settings, registry, lock, tell))
        repository = open_repository(settings, create=True)
        swept = sweeping.sweep(repository, settings.home, registry.database)
        for note in swept.said:
            tell(note)
        return _Backup(settings, request, parts, registry, keeper, repository, swept, tell, show).run()


@contextlib.contextmanager
def _leased(settings: Settings, registry: RegistryNow, lock: HomeLock, tell: Tell) -> Iterator[lease.Keeper | None]:
    """None where the registry cannot be written (it is away, full, damaged): that is no reason to have no backup."""
    database = registry.database
    held = None
    if database is not None:
        try:
            held = take_lease(database, settings.environment, lock, ttl_seconds=settings.lease_seconds)
        except (LockedError, FencedError, RefusedError):
            raise
        except ModelkeepError as error:
            tell(f"without a lease: {error}")
    if database is None or held is None:
        yield None
        return
    try:
        with lease.kept(database, held) as keeper:
            yield keeper
    finally:
        try:
            release_lease(database, held)
        except ModelkeepError as error:
            # It ends by itself: the next backup of this home knows its token, others see that it stands still.
            log.warning("the lease on backups could not be released: %s", error)


class _Backup:
    """One run: `run` reads as it happens."""

    def __init__(
        self,
        settings: Settings,
        request: Request,
        parts: Sequence[Part],
        registry: RegistryNow,
        keeper: lease.Keeper | None,
        repository: Repository,
        swept: sweeping.Swept,
        tell: Tell,
        show: Callable[[Moment], None],
    ) -> None:
        self.settings, self.request, self.parts = settings, request, parts
        self.registry, self.keeper, self.repository = registry, keeper, repository
        self.notes, self.tell = list(swept.said), tell
        self.began_at = clock.text(clock.now())
        self.backup_id = new_backup_id(clock.now())
        self.sequence = 0 if swept.sequence is None else swept.sequence + 1
        self.hide = hider(settings)
        self.began = time.monotonic()
        self.progress = Progress(
            [part.name for part in parts], expected=ledger.expected(settings.home), tell=tell, show=show
        )
        self.programs = system.programs()
        self.captured: dict[str, Captured] = {}

    def run(self) -> Outcome:
        """Whatever happens in here, the intent is gone afterwards and the states say how it ended; a kill leaves that to
        the next run."""
        if self.registry.why is not None:
            self._say(self.hide(f"without the registry: {self.registry.why}"))
        self._copy_missing()
        with _beating(self.repository, self.backup_id, {**self._intent(), **sweeping.identity(self.settings.home)}):
            try:
                self._begin()
                return self._end(self._capture_all())
            except BaseException as error:
                self._failed(self._words(error))
                raise

    def _copy_missing(self) -> None:
        """A place that was away when an earlier backup was stored gets its copy now."""
        with self._noting():
            copied = self.repository.copy_missing()
            for backup_id, places in copied.copied.items():
                self._say(f"backup {backup_id} is now in {', '.join(places)} too")
            for place, why in copied.failed.items():
                self._say(self.hide(f"{place} still lacks earlier backups: {why}"))

    def _intent(self) -> dict[str, Any]:
        return {"requested": [part.name for part in self.parts], "began_at": self.began_at}

    def _begin(self) -> None:
        # The order of backups, which no clock can turn round.
        self.sequence = self.sequence or next_sequence(self.repository)
        facts = {**self._intent(), "sequence": self.sequence, "reason": self.request.reason}
        self.repository.note_state(self.backup_id, states.RUNNING, facts)
        self._record("backup.begun", {"components": [part.name for part in self.parts], "sequence": self.sequence})
        self.tell(f"backup {self.backup_id} of {', '.join(part.name for part in self.parts)}")

    def _capture_all(self) -> list[Component]:
        with sweeping.work_folder(self.settings.home, self.backup_id) as folder, _temporary_files_in(folder):
            self.repository.scratch = folder
            locked = keep_until(self.settings)
            with self.repository.writer(self.backup_id, progress=self._progressed, keep_until=locked) as writer:
                return [self._capture(writer, part) for part in self.parts]

    def _progressed(self, _component: str, done_bytes: int, total_bytes: int | None) -> None:
        self.progress.update(done_bytes, total_bytes)

    def _capture(self, writer: Writer, part: Part) -> Component:
        """An error of the part, of whatever kind, is that of the component, and the others go on. Raises StorageError where
        what was captured is not stored: then nothing of this backup can be relied on."""
        began_at = clock.text(clock.now())
        self.progress.begin(part.name)
        record = Component(part.name, part.kind, COMPLETE, began_at, began_at)
        sink = writer.component(part.name)
        try:
            if part.name == "registry" and self.registry.why is not None:
                raise StorageError(self.registry.why)
            follow = getattr(part, "follow", None)
            if follow is not None and self.captured:
                follow(self.captured)
            found = part.capture(sink)
            json.dumps([found.facts, found.snapshot])  # what no manifest can hold shall not spoil it for the others
        except BaseException as error:
            sink.drop()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, ModelkeepError):
                log.error(
                    "component %s failed by an error of our own:\n%s", part.name, self.hide(traceback.format_exc())
                )
            why = self._words(error)
            self.tell(f"{part.name} FAILED: {why}")
            return replace(record, state=FAILED, ended_at=clock.text(clock.now()), error=why)
        finally:
            self.progress.end()
        done = sink.finish()
        self.captured[part.name] = found
        self.programs.update(found.programs)
        self.tell(f"{part.name}: {done.entries} entries, {done.size_bytes} bytes, {done.new_bytes} of them new")
        return replace(
            record,
            ended_at=clock.text(clock.now()),
            entries=done.entries,
            size_bytes=done.size_bytes,
            stored_bytes=done.stored_bytes,
            new_bytes=done.new_bytes,
            index=done.index,
            facts=found.facts,
            snapshot=found.snapshot,
            warnings=tuple(self.hide(one) for one in done.warnings),
        )

    def _end(self, components: list[Component]) -> Outcome:
        self._still_ours()
        failed = [one for one in components if one.state == FAILED]
        if len(failed) == len(components):
            self._failed("; ".join(f"{one.name}: {one.error}" for one in failed))
            return Outcome(self.backup_id, FAILED, tuple(components), self._seconds(), notes=tuple(self.notes))
        manifest = self.repository.signed(self._manifest(components, PARTIAL if failed else COMPLETE))
        kept = self.repository.write_manifest(manifest, keep_until=keep_until(self.settings))
        places = {**dict.fromkeys(kept.at, STORED), **{place: self.hide(why) for place, why in kept.missing.items()}}
        for place in kept.missing:
            self.tell(f"{place} has no copy yet: {places[place]}; the next backup brings it there")
        digest = hashlib.sha256(manifest.text()).hexdigest()
        self._record("backup.completed", _audited(manifest, digest, places))
        with self._noting():
            ledger.note_backup(self.settings.home, manifest, places=places)
        return Outcome(
            self.backup_id, manifest.state, manifest.components, self._seconds(), manifest, places, tuple(self.notes)
        )

    def _still_ours(self) -> None:
        """Raises FencedError where the registry was restored meanwhile (it then has another epoch): this backup may be half of
        before and half of after. A lease that was only lost, because nobody saw it beat, harms nothing."""
        if self.keeper is None or self.registry.database is None:
            return
        held = self.keeper.held
        try:
            with self.registry.database.read() as session:
                epoch = session.scalar(select(Environment.epoch).where(Environment.name == held.environment))
        except ModelkeepError as error:
            self._say(self.hide(f"the registry went away: {error}"))
            return
        if epoch != held.token.rpartition(".")[0]:
            raise FencedError(
                f"the registry was restored while backup {self.backup_id} was taken, which is void for that: start another"
            )
        if self.keeper.lost is not None:
            self._say(f"the lease was lost on the way: {self.keeper.lost}")

    def _manifest(self, components: list[Component], state: str) -> Manifest:
        captured = self.captured.get("registry")
        registry = captured.facts.get("registry") if captured is not None else None
        document = ledger.document(self.settings.home)
        installation = document.get("installation")
        if self.registry.database is not None:
            try:
                installation = system.installation(self.registry.database) or installation
                registry = registry or {**system.registry_now(self.registry.database), "of": "the end of this backup"}
            except ModelkeepError as error:
                self._say(self.hide(f"the registry went away: {error}"))
        return Manifest(
            backup_id=self.backup_id,
            installation=installation or "unknown",
            state=state,
            began_at=self.began_at,
            ended_at=clock.text(clock.now()),
            requested=self.request.names,
            components=tuple(components),
            sequence=self.sequence,
            programs=dict(sorted(self.programs.items())),
            registry=registry,
            settings=system.shown_settings(self.settings),
            system=system.facts(self.settings),
            reason=self.hide(self.request.reason),
        )

    def _failed(self, why: str) -> None:
        """Nothing of it is a backup. What cannot be noted now is noted by the next run, which finds the intent."""
        self.tell(f"backup {self.backup_id} FAILED: {why}")
        with self._noting():
            facts = {**self._intent(), "sequence": self.sequence, "why": why}
            self.repository.note_state(self.backup_id, states.FAILED, facts)
        self._record("backup.failed", {"why": why})
        with self._noting():
            ledger.note_failed(
                self.settings.home,
                self.backup_id,
                began_at=self.began_at,
                requested=self.request.names,
                why=why,
            )

    def _record(self, action: str, after: dict[str, Any]) -> None:
        """An event in the audit chain, where the registry answers."""
        if self.registry.database is None:
            return
        with self._noting(), self.registry.database.write(flow_run_id=self.request.flow_run_id) as transaction:
            transaction.record(action, f"backup:{self.backup_id}", after=after, reason=self.hide(self.request.reason))

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        """What is written beside the backup itself: where it fails, that is said, and the backup goes on."""
        try:
            yield
        except ModelkeepError as error:
            self._say(f"could not be noted: {self.hide(str(error))}")

    def _say(self, note: str) -> None:
        self.notes.append(note)
        self.tell(note)

    def _words(self, error: BaseException) -> str:
        text = str(error) if isinstance(error, ModelkeepError) else f"{type(error).__name__}: {error}"
        return self.hide(text)

    def _seconds(self) -> float:
        return time.monotonic() - self.began


def next_sequence(repository: Repository) -> int:
    """One more than any backup has that left a trace where it can be seen now."""
    seen = [one.sequence for one in repository.manifests()]
    for notes in repository.all_states().values():
        seen += [int(note.facts.get("sequence", 0)) for note in notes if note.state == states.RUNNING]
    return max(seen, default=0) + 1


def _audited(manifest: Manifest, digest: str, places: dict[str, str]) -> dict[str, Any]:
    return {
        "state": manifest.state,
        "sequence": manifest.sequence,
        "manifest_sha256": digest,
        "components": {one.name: one.state for one in manifest.components},
        "size_bytes": sum(one.size_bytes for one in manifest.components),
        "places": places,
    }


@contextlib.contextmanager
def _beating(repository: Repository, backup_id: str, facts: dict[str, Any]) -> Iterator[None]:
    """The intent, written again and again, so that others see that the backup lives; gone at the end."""
    stop = threading.Event()
    repository.begin_intent(backup_id, {**facts, "heartbeat": 0})

    def beat() -> None:
        count = 0
        while not stop.wait(BEAT_SECONDS):
            count += 1
            try:
                repository.beat_intent(backup_id, {**facts, "heartbeat": count})
            except ModelkeepError as error:
                log.warning("the intent of backup %s could not be renewed: %s", backup_id, error)

    thread = threading.Thread(target=beat, name="backup-intent", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        repository.end_intent(backup_id)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Whatever makes a temporary file makes it there, so that a kill leaves nothing that the next run does not find."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
