"""A recovery as it is asked for: which backup, by which settings, and what must be saved before. The work is tasks.backup.recover's."""

from __future__ import annotations

import datetime as dt
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from registry.connect import open_database
from registry.errors import ModelkeepError, NotFoundError, RefusedError, SettingsError, UsageError
from registry.layers import FILE_NAME, PREFIX, of_an_entry, slug
from registry.redaction import redact
from registry.settings import Settings, build_settings, find_config, load_settings
from tasks.backup import ledger, newest, recover, run, states, verify
from tasks.backup.manifest import SUFFIX, Manifest
from tasks.backup.outcome import STORED
from tasks.backup.recover import Outcome, Plan
from tasks.backup.repository import Repository, open_repository


@dataclass(frozen=True, slots=True)
class Request:
    """`source`: a manifest (path, URL or id) or a whole location, whose newest backup is meant; None: the locations of the
    settings. `at`: the newest verified backup before that moment, and the shipped logs up to it. `into`: a folder or URL beside what is live.
    """

    source: str | None = None
    at: dt.datetime | None = None
    components: tuple[str, ...] = ()
    into: str | None = None
    force: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    repository: Repository
    settings: Settings
    """Those of this machine; where it has no modelkeep.toml, with the one of the backup."""
    plan: Plan


def settings_here(environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this machine. On one that has no modelkeep.toml, variables about its entries (a database's password, say) wait
    until that of the backup is known, which has the rest of them. Raises SettingsError.
    """
    environ = os.environ if environ is None else environ
    try:
        return load_settings(environ=environ)
    except SettingsError:
        if find_config(environ, Path.cwd()) is not None:
            raise
        return load_settings(environ={one: environ[one] for one in environ if not of_an_entry(Settings, one)})


def prepare(settings: Settings, request: Request, *, environ: Mapping[str, str] | None = None) -> Prepared:
    """Find the backup and plan its way back. Changes nothing.

    Raises UsageError, NotFoundError, ManifestError, BackupKeyError, SettingsError, StorageError.
    """
    if request.source is not None and request.at is not None:
        raise UsageError("--from and --at are both given: the first names a backup, the second looks for one")
    if request.into is not None and request.force:
        raise UsageError("--into with --force: a place beside what is live must be empty")
    repository, manifest = _backup(settings, request)
    environ = os.environ if environ is None else environ
    unset: list[str] = []
    if settings.config_file is None:
        settings, unset = _settings_of(repository, manifest, settings, environ), _unset(manifest, environ)
    plan = recover.make_plan(
        repository, manifest, settings, components=request.components, into=request.into, force=request.force,
        at=request.at,
    )  # fmt: skip
    looked_for = request.source is None or not (request.source.endswith(SUFFIX) or _names_one(request.source))
    if looked_for and not request.components:
        later = newest.newer(repository, manifest, request.at)
        plan = plan if later is None else replace(plan, warnings=(*plan.warnings, later))
    if unset:
        why = f"no backup holds secrets, and these of the lost machine are not set in this environment: {', '.join(unset)}"
        plan = replace(plan, warnings=(*plan.warnings, why))
    return Prepared(repository, settings, plan)


def carry_out(
    prepared: Prepared,
    request: Request,
    *,
    say: Callable[[str], None] = lambda _: None,
    on_progress: Callable[[str, int, int | None], None] = lambda name, done, total: None,
) -> Outcome:
    """Raises what `recover.carry_out` does."""

    def save(names: Sequence[str]) -> str:
        return safety_copy(prepared.settings, names, say=say)

    outcome = recover.carry_out(
        prepared.plan,
        prepared.repository,
        prepared.settings,
        safety_copy=save,
        say=say,
        on_progress=on_progress,
        monotonic=time.monotonic,
    )
    if request.into is None:
        _remember(prepared, outcome)
        _on_record(prepared, outcome, request.reason, say)
    return outcome


def _remember(prepared: Prepared, outcome: Outcome) -> None:
    """On a machine that knows of no backup: this one, and what of it came back whole, which is compared by that. Raises StorageError."""
    home, manifest = prepared.settings.home, prepared.plan.manifest
    if "registry" not in outcome.restored or ledger.document(home):
        return
    ledger.note_backup(home, manifest, places=dict.fromkeys(prepared.repository.shown, STORED))
    whole = {
        step.component.name: {"outcome": states.VERIFIED}
        for step in prepared.plan.steps
        if step.component.name in outcome.restored and not step.chosen.only
    }
    ledger.note_check(home, manifest, whole, whole=True)


def _on_record(prepared: Prepared, outcome: Outcome, reason: str, say: Callable[[str], None]) -> None:
    """An event in the audit chain of the registry that is there. One that came back itself has its own (`registry.restored`), and none
    is made for this: a later recovery would not find its place empty.
    """
    if "registry" in outcome.restored or not outcome.restored:
        return
    database = open_database(prepared.settings)
    try:
        if (database.sqlite and not Path(str(database.url.database)).exists()) or database.revision() is None:
            return
        came = {step.chosen.text: step.shown for step in prepared.plan.steps if step.component.name in outcome.restored}
        facts = {"restored": came, "failed": dict(outcome.failed), "safety_copy": outcome.safety_copy}
        with database.write() as transaction:
            subject = f"backup:{prepared.plan.manifest.backup_id}"
            transaction.record("backup.restored", subject, after=facts, reason=redact(reason))
    except ModelkeepError as error:
        say(f"the recovery is not in the audit chain: {redact(str(error))}")
    finally:
        database.dispose()


def safety_copy(settings: Settings, names: Sequence[str], *, say: Callable[[str], None]) -> str:
    """Back up and verify what a recovery is about to replace. Raises RefusedError where that cannot be done: nothing is changed then."""
    found = run.back_up(settings, run.Request(tuple(names), reason=newest.SAFETY_COPY), tell=say)
    bad = [f"{one.name}: {one.error}" for one in found.components if one.error is not None]
    if bad:
        raise RefusedError(
            f"what is there could not be backed up, so nothing was replaced ({'; '.join(bad)}): move it away yourself, then repeat "
            "the recovery, which finds an empty place"
        )
    report = verify.verify(settings, found.backup_id, tell=say)
    unproven = (states.FAILED_VERIFICATION, states.NOT_VERIFIED, states.UNVERIFIABLE)
    wrong = [f"{name}: {report.components[name].why}" for outcome in unproven for name in report.of(outcome)]
    if wrong:
        raise RefusedError(
            f"the safety copy {found.backup_id} is not verified, so nothing was replaced ({'; '.join(wrong)}): move what is there away "
            "yourself, then repeat the recovery"
        )
    return found.backup_id


def _backup(settings: Settings, request: Request) -> tuple[Repository, Manifest]:
    source, ours = request.source, ledger.installation(settings.home)
    if source is None:
        repository = open_repository(settings)
        return repository, newest.newest_before(repository, request.at, request.components, ours)
    if source.endswith(SUFFIX):
        location, _, name = source.rpartition("/")
        repository = open_repository(settings, location=location or str(Path.cwd()))
        return repository, repository.manifest(name.removesuffix(SUFFIX))
    if not _names_one(source):
        if "://" not in source and not Path(source).is_dir():
            raise NotFoundError(f"--from {source}: there is no such folder, and it is no manifest (*{SUFFIX})")
        repository = open_repository(settings, location=source.rstrip("/"))
        return repository, newest.newest_before(repository, None, request.components, ours)
    repository = open_repository(settings)
    return repository, repository.manifest(source)


def _names_one(source: str) -> bool:
    """Whether it is a backup's id, and not a place."""
    return "/" not in source and not Path(source).is_dir()


def _settings_of(
    repository: Repository, manifest: Manifest, settings: Settings, environ: Mapping[str, str]
) -> Settings:
    """The settings of the backup, under those of the environment: what an empty machine goes by."""
    if manifest.component("config") is None:
        return settings
    source = repository.source(manifest, "config")
    for entry in source.entries():
        if entry.name == FILE_NAME and entry.stream is not None:
            text = b"".join(source.open(entry.stream)).decode()
            return build_settings(
                settings.home / FILE_NAME,
                text,
                environ={"MODELKEEP_HOME": str(settings.home), **environ},
                cwd=Path.cwd(),
            )
    return settings


def _unset(manifest: Manifest, environ: Mapping[str, str]) -> list[str]:
    """The variables of the secrets that the backup left out of its configuration, as far as nobody has set them."""
    config = manifest.component("config")
    names = () if config is None else config.facts.get("secrets", ())
    variables = {
        name if name.startswith(PREFIX) else PREFIX + slug(name).upper().replace(".", "__") for name in map(str, names)
    }
    return sorted(one for one in variables if not environ.get(one))


def shown_plan(plan: Plan) -> str:
    """For Prefect: what would come back, and what is in the way."""
    lines = [
        f"Backup {plan.manifest.backup_id}, {plan.standing.state}; what was written after {plan.lost_since} is not in it.",
        "",
        "| component | to | bytes | what is there |",
        "|---|---|---|---|",
    ]
    for step in plan.steps:
        there = "done before" if step.done else step.occupied or "nothing"
        lines.append(f"| {step.chosen.text} | {step.shown} | {step.component.size_bytes:,} | {there} |")
    below = [f"- {text}" for text in plan.remarks] + [f"- **in the way**: {text}" for text in plan.problems]
    return "\n".join([*lines, "", *below] if below else lines)  # without the blank line they were rows of the table


def shown(outcome: Outcome) -> str:
    """For Prefect and logs: what came back, in a table."""
    lines = ["| component | to | state |", "|---|---|---|"]
    for step in outcome.plan.steps:
        name = step.component.name
        state = outcome.failed.get(name) or f"restored and compared: {json.dumps(outcome.restored.get(name, {}))}"
        lines.append(f"| {step.chosen.text} | {step.shown} | {state.replace('|', '¦')} |")
    return "\n".join(lines)
