"""Verification: each component of a backup restored into private places and compared, in a fresh process, on the CPU.

`python -P -m tasks.backup.verify` is that process: it reads what to do as JSON from its input, and writes the result to a file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from registry import actor, clock
from registry.errors import ArtifactError, ModelkeepError, NotFoundError, StorageError, UnavailableError, UsageError
from registry.settings import Settings
from tasks.backup import garbage, kinds, ledger, states, sweeping
from tasks.backup.chain import Program
from tasks.backup.hiding import hider
from tasks.backup.manifest import COMPLETE, Component, Manifest, ManifestError
from tasks.backup.progress import duration
from tasks.backup.registry_now import registry_of
from tasks.backup.repository import Repository, open_repository

log = logging.getLogger("modelkeep.backup")

START_SECONDS = 600.0
SLOWEST_BYTES_A_SECOND = 1_000_000
"""A check that takes longer than its start and this rate allow is given up: it hangs."""
ROOM = 1.2
"""Free space that a check wants, as a share of the component's size."""
NEWEST = 10
"""So many backups are looked at by the schedule: older ones were, or newer ones stand for them."""
PROCESS = ("-P", "-m", "tasks.backup.verify")
_SERVERS = ("mariadb", "mysql", "postgresql", "queues", "vectors")
"""Kinds that are restored into a server of their own."""
_RESULT = "result.json"
_SAID_LETTERS = 2000
_SETTINGS = ("home", "backups", "backup_key_file", "s3_endpoint_url")


@dataclass(frozen=True, slots=True)
class Checked:
    """Of one component. `outcome` is one of states.VERIFIED, UNVERIFIABLE, FAILED_VERIFICATION, NOT_VERIFIED."""

    outcome: str
    why: str | None = None
    checked: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "why": self.why,
            "checked": dict(self.checked),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, slots=True)
class Report:
    """Of a backup. `share` is None where it was restored as a whole."""

    backup_id: str
    state: str
    components: Mapping[str, Checked]
    share: float | None
    seconds: float

    @property
    def exit_code(self) -> int:
        outcomes = {one.outcome for one in self.components.values()}
        if outcomes & {states.FAILED_VERIFICATION, states.NOT_VERIFIED}:
            return 1
        return 3 if states.UNVERIFIABLE in outcomes else 0

    def of(self, outcome: str) -> list[str]:
        return [name for name, one in self.components.items() if one.outcome == outcome]

    def summary(self) -> str:
        how = "restored and compared" if self.share is None else f"a sample of {self.share:.0%} read back"
        text = f"backup {self.backup_id}: {how} in {duration(self.seconds)}; it is {self.state}"
        for outcome in (states.FAILED_VERIFICATION, states.NOT_VERIFIED, states.UNVERIFIABLE):
            text += "".join(f"; {name} {outcome}: {self.components[name].why}" for name in self.of(outcome))
        return text

    def as_dict(self) -> dict[str, Any]:
        return {
            "backup_id": self.backup_id,
            "state": self.state,
            "share": self.share,
            "seconds": round(self.seconds, 3),
            "components": {name: one.as_dict() for name, one in self.components.items()},
        }

    def as_markdown(self) -> str:
        lines = [
            f"## Backup {self.backup_id}: {self.state}",
            "",
            "| component | outcome | what was compared | why |",
            "|---|---|---|---|",
        ]
        for name, one in self.components.items():
            shown = ", ".join(f"{key} {value}" for key, value in one.checked.items())
            lines.append(f"| {name} | {one.outcome} | {shown} | {(one.why or '').replace('|', '¦')} |")
        return "\n".join([*lines, "", self.summary()])


def verify(
    settings: Settings,
    backup_id: str,
    *,
    share: float | None = None,
    tell: Callable[[str], None] = log.info,
    flow_run_id: str | None = None,
) -> Report:
    """Check a backup: wholly, or a `share` of its bytes at random, and note what was found. Nothing live is touched.

    Raises NotFoundError, ManifestError (its manifest is torn, edited or of another key), StorageError where no place answers.
    """
    if share is not None and not 0 < share <= 1:
        raise UsageError(f"--sample {share:g}: a share above 0 and at most 1, as in 0.05")
    actor.current()  # a key that may only look notes nothing
    began, hide = time.monotonic(), hider(settings)
    for line in sweeping.sweep_folders(settings.home):
        tell(line)
    repository = open_repository(settings)
    manifest = repository.manifest(backup_id)
    found: dict[str, Checked] = {}
    with sweeping.work_folder(settings.home, f"verify-{manifest.backup_id}") as folder:
        repository.scratch = folder
        for one in manifest.components:
            if one.state != COMPLETE:
                continue
            tell(f"checking {one.name} of {manifest.backup_id}")
            check = (
                _apart(settings, manifest, one, folder) if share is None else _sampled(repository, manifest, one, share)
            )
            found[one.name] = check = replace(check, why=None if check.why is None else hide(check.why))
            tell(f"{one.name}: {check.outcome}" + (f": {check.why}" if check.why else ""))
    facts: dict[str, Any] = {"components": {name: one.as_dict() for name, one in found.items()}}
    if share is not None:
        facts["share"] = share
    note = _note(found, share)
    _distrust(
        repository, manifest, [name for name, one in found.items() if one.outcome == states.FAILED_VERIFICATION], tell
    )
    repository.note_state(manifest.backup_id, note, facts)
    _on_record(settings, manifest.backup_id, note, facts, tell, flow_run_id)
    state = states.derive(manifest, repository.states(manifest.backup_id)).state
    ledger.note_check(settings.home, manifest, facts["components"], whole=share is None)
    return Report(manifest.backup_id, state, found, share, time.monotonic() - began)


def _distrust(repository: Repository, manifest: Manifest, failed: list[str], tell: Callable[[str], None]) -> None:
    """Objects that are to blame are not reused: the next backup that has their bytes stores them again."""
    if not failed:
        return
    try:
        damaged = repository.check(manifest, components=failed).damaged
        if damaged and (count := garbage.distrust(repository, damaged, now=clock.now())):
            tell(
                f"{count} damaged objects are written anew by the next backup that holds them: take one now (modelkeep backup)"
            )
    except ModelkeepError as error:
        tell(f"which objects are damaged could not be found out: {error}")


def due(repository: Repository, share: float) -> list[tuple[str, float | None]]:
    """What the schedule has to check, newest first: (backup id, None for all of it or the share of a sample).

    Of the newest backups each full one wholly, unless that was done; of the others a sample. What could not be checked is due again.
    """
    found: list[tuple[str, float | None]] = []
    for manifest in sorted(repository.manifests(), key=lambda one: (one.sequence, one.backup_id), reverse=True)[
        :NEWEST
    ]:
        notes = repository.states(manifest.backup_id)
        noted = {one.state for one in notes}
        if noted & {states.VERIFIED, states.UNVERIFIABLE, states.FAILED_VERIFICATION, states.PRUNED}:
            continue
        if kinds.ALL in manifest.requested:
            found.append((manifest.backup_id, None))
        elif states.SAMPLED not in noted:
            found.append((manifest.backup_id, share))
    return found


def _on_record(
    settings: Settings,
    backup_id: str,
    note: str,
    facts: Mapping[str, Any],
    tell: Callable[[str], None],
    flow_run_id: str | None,
) -> None:
    """An event in the audit chain, where the registry answers; it is no part of what is checked."""
    outcomes = {name: one["outcome"] for name, one in facts["components"].items()}
    with registry_of(settings) as registry:
        try:
            if registry.database is None:
                raise UnavailableError(str(registry.why))
            with registry.database.write(flow_run_id=flow_run_id) as transaction:
                transaction.record(f"backup.{note}", f"backup:{backup_id}", after={"components": outcomes})
        except ModelkeepError as error:
            tell(f"the check is not in the audit chain: {error}")


def _note(found: Mapping[str, Checked], share: float | None) -> str:
    outcomes = {one.outcome for one in found.values()}
    for bad in (states.FAILED_VERIFICATION, states.NOT_VERIFIED):
        if bad in outcomes:
            return bad
    if share is not None:
        return states.SAMPLED
    return states.UNVERIFIABLE if states.UNVERIFIABLE in outcomes else states.VERIFIED


def _apart(settings: Settings, manifest: Manifest, component: Component, folder: Path) -> Checked:
    """In a process of its own, which shares no memory, no caches and no imports with the one that took the backup."""
    began = time.monotonic()
    room = folder / component.name.replace(":", "-")
    needed = int(component.size_bytes * ROOM)
    try:
        room.mkdir()
        free = shutil.disk_usage(room).free
    except OSError as error:
        return Checked(states.NOT_VERIFIED, f"no folder to restore into: {error}")
    if free < needed:
        return Checked(
            states.NOT_VERIFIED, f"{needed} bytes are needed to restore it, and {free} are free below {settings.home}"
        )
    work = {
        "settings": {name: getattr(settings, name) for name in _SETTINGS},
        "backup_id": manifest.backup_id,
        "component": component.name,
        "folder": str(room),
    }
    limit = START_SECONDS + component.size_bytes / SLOWEST_BYTES_A_SECOND
    status, said = _run(json.dumps(work, default=str), limit)
    try:
        result = json.loads((room / _RESULT).read_bytes()) if status == 0 else None
    except (OSError, ValueError) as error:
        result, said = None, f"no result: {error}; {said}"
    finally:
        shutil.rmtree(room, ignore_errors=True)
    seconds = time.monotonic() - began
    if result is None:
        how = f"gave no answer in {limit:.0f} s" if status is None else f"ended with {status}"
        return Checked(
            states.NOT_VERIFIED, f"the check {how}: {said[-_SAID_LETTERS:] or 'it said nothing'}", {}, seconds
        )
    return Checked(result["outcome"], result["why"], result["checked"], seconds)


def _run(work: str, limit: float) -> tuple[int | None, str]:
    """Exit status (None: it was ended for its time) and what the process printed."""
    program = Program([sys.executable, *PROCESS])
    with subprocess.Popen(
        program.launched(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(work, timeout=limit)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started ends with it


def _sampled(repository: Repository, manifest: Manifest, component: Component, share: float) -> Checked:
    """Its index as a whole, that every object is there, and a share of them, chosen at random, read back and compared."""
    began = time.monotonic()
    try:
        found = repository.check(manifest, components=[component.name], share=share)
    except (StorageError, NotFoundError) as error:
        return Checked(states.NOT_VERIFIED, str(error), {}, time.monotonic() - began)
    checked = {"objects": found.objects, "bytes": found.bytes_read}
    if not found.good:
        return Checked(states.FAILED_VERIFICATION, "; ".join(found.problems), checked, time.monotonic() - began)
    return Checked(states.SAMPLED, "; ".join(found.elsewhere) or None, checked, time.monotonic() - began)


def compare(work: Mapping[str, Any]) -> dict[str, Any]:
    """What the process of its own does: {"outcome", "why", "checked"}. Raises what stands in the way of a check."""
    repository = open_repository(Settings(**work["settings"]))
    manifest = repository.manifest(work["backup_id"])
    folder = Path(work["folder"])
    repository.scratch = folder
    record = manifest.component(work["component"])
    if record is None:
        raise NotFoundError(f"backup {manifest.backup_id} has no component {work['component']}")
    if record.kind not in _SERVERS:
        tempfile.tempdir = str(folder)  # what a kill leaves is swept there; a server's socket needs a shorter path
    try:
        found = kinds.kind(record.kind).verify(repository.source(manifest, record.name), folder)
    except (ArtifactError, ManifestError) as error:
        return {"outcome": states.FAILED_VERIFICATION, "why": str(error), "checked": {}}
    except ModelkeepError as error:
        return {"outcome": states.NOT_VERIFIED, "why": str(error), "checked": {}}
    if found.differences:
        more = f" … and {len(found.differences) - 10} more" if len(found.differences) > 10 else ""
        why = "; ".join(found.differences[:10]) + more
        return {"outcome": states.FAILED_VERIFICATION, "why": why, "checked": found.checked}
    if found.unverifiable is not None:
        return {"outcome": states.UNVERIFIABLE, "why": found.unverifiable, "checked": found.checked}
    return {"outcome": states.VERIFIED, "why": None, "checked": found.checked}


def main() -> int:
    work = json.load(sys.stdin)
    result = compare(work)
    (Path(work["folder"]) / _RESULT).write_text(json.dumps(result, default=str), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
