"""The benchmark of backups: what its options ask for, what its marks and tables say, and that the location it prunes is a real one."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import _backup_prune
from benchmarks._backup_models import OURS, RESTIC, TAR
from benchmarks._backup_report import Found, document, judge, markdown
from benchmarks._turns import Mark
from benchmarks.backup import FULL, QUICK, asked, measure
from benchmarks.backup_database import AGAIN, BACKUP, DUMP, LOAD, RECOVER
from registry import clock
from tasks.backup import prune
from tasks.backup.places import DirectoryPlace
from tasks.backup.repository import Repository
from tasks.backup.retention import Policy

MB = 1_000_000
ABOUT: dict[str, Any] = {
    "date": "2026-01-01", "commit": "abc", "machine": "m", "load_before": 0.1, "seconds": 9, "rounds": 3,
}  # fmt: skip


def row(kind: str, size: int, above: float) -> dict[str, Any]:
    return {
        "kind": kind, "size_bytes": size, "above_bytes": int(above * MB), "after_import_bytes": 60 * MB, "seconds": 1.5,
    }  # fmt: skip


def database(**changed: Any) -> dict[str, Any]:
    seconds = {
        DUMP: [2.0, 4.0, 2.0], BACKUP: [2.1, 4.0, 2.6], AGAIN: [1.0, 1.0, 1.0], LOAD: [8.0, 8.0, 8.0], RECOVER: [9.0, 9.0, 8.0],
    }  # fmt: skip
    return {
        "all_seconds": seconds,
        "dump_bytes": 600 * MB,
        "zstd_bytes": 80 * MB,
        "stored_bytes": 79 * MB,
        **changed,
    }


def found() -> Found:
    tool = {
        "first": [2.0, 2.2, 2.1],
        "second": [0.5, 0.5, 0.5],
        "first_bytes": [9e8] * 3,
        "second_bytes": [10e8] * 3,
    }
    phase = {"seconds": 1.0, "goes": 900, "removed": 900, "marked": 80_000, "deleted": 80_000, "waits": []}
    parts: dict[str, Any] = {
        "database": database(),
        "models": {"mb": 1000, "files": 10, "tools": {OURS: tool, TAR: {**tool, "first": [1.0, 1.1, 1.05]}}},
        "memory": {"rows": [row("files", 10 * MB, 20), row("files", 100 * MB, 90), row("files", 1000 * MB, 95)]},
        "prune": {
            "backups": 1000, "objects": 100_000, "preview": phase, "apply": phase, "second_phase": phase,
            "memory": {"above_bytes": 30 * MB},
        },
        "recovery": {
            "rows": [{"component": "models", "mb": 50, "size_bytes": 50 * MB, "seconds": [0.5, 0.25, 1.0]}]
        },
    }  # fmt: skip
    return Found(parts, {f"models, {RESTIC}": "restic is not installed"})


def mark(start: str, of: Found) -> Mark:
    return next(one for one in judge(of) if one.name.startswith(start))


def test_a_ratio_is_that_of_two_turns_of_one_round() -> None:
    backup, recover = mark(BACKUP, found()), mark(RECOVER, found())
    assert (backup.found, backup.met) == (1.05, True)
    assert (recover.found, recover.met) == (1.125, False)


def test_a_small_dump_says_nothing_of_the_ratio() -> None:
    small = found()
    small.parts["database"] = database(dump_bytes=5 * MB)
    assert mark(BACKUP, small).met is None
    assert "too small" in mark(BACKUP, small).why


def test_every_size_has_to_meet_the_mark_of_memory_and_the_largest_one_may_not_take_more() -> None:
    good = found()
    assert mark("memory of a backup", good).met is True
    assert (mark("memory at the largest", good).found, mark("memory at the largest", good).met) == (5.0, True)
    good.parts["memory"]["rows"] += [row("files", 10_000 * MB, 150)]
    assert mark("memory of a backup", good).met is True
    assert mark("memory at the largest", good).met is False
    good.parts["memory"]["rows"] += [row("files", 50 * MB, 201)]
    assert mark("memory of a backup", good).met is False


def test_memory_is_flat_or_not_only_where_two_sizes_are_large_enough() -> None:
    small = found()
    del small.parts["memory"]["rows"][-1]
    assert mark("memory at the largest", small).met is None


def test_what_was_not_measured_is_named_with_why() -> None:
    nothing = Found({}, {"database": "mariadbd is not installed"}, {"memory": "OSError: no room"})
    marks = judge(nothing)
    assert [one.met for one in marks] == [None] * len(marks)
    shown = markdown(nothing, marks, ABOUT)
    assert "- database: mariadbd is not installed" in shown
    assert "- memory: OSError: no room" in shown


def test_tables_have_medians_ratios_and_rates() -> None:
    shown = markdown(found(), judge(found()), ABOUT)
    assert "| tar | 1.05 (1.00 to 1.10); ours 2.00 of it |" in shown
    assert "| models | 50.0 | 0.50 (0.25 to 1.00) | 100 |" in shown
    assert "| apply, with marking | 1.00 | 900 backups removed, 80,000 objects marked |" in shown
    assert "| files, 1,000 MB | 95.0 | 60.0 | 1.5 |" in shown
    assert f"- models, {RESTIC}: restic is not installed" in shown


def test_the_document_is_json_with_all_parts() -> None:
    text = json.dumps(document(found(), judge(found()), ABOUT))
    assert {"about", "marks", "database", "models", "memory", "prune", "recovery", "absent", "failed"} == set(
        json.loads(text)
    )


def test_options_change_what_they_name_and_leave_the_rest() -> None:
    assert asked([])[1] == FULL
    assert asked(["--quick"])[1] == QUICK
    options, plan = asked(["--sizes", "10GB,10MB,10MB", "--rounds", "5", "--parts", "prune,memory"])
    assert plan.sizes == (10 * MB, 10_000 * MB)
    assert (plan.rounds, plan.model_mb, options.parts) == (5, FULL.model_mb, ("prune", "memory"))


@pytest.mark.parametrize(
    "words", [["--sizes", "10"], ["--sizes", "0MB"], ["--parts", "everything"], ["--rounds", "0"], ["--rounds", "x"]]
)
def test_options_that_make_no_sense_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        asked(words)


def test_a_part_that_fails_does_not_keep_the_others_from_being_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise OSError("no such thing")

    monkeypatch.setattr("benchmarks._backup_models.measure", broken)
    monkeypatch.setattr("benchmarks._backup_prune.measure", lambda *_: {"absent": {"a directory": "why not"}})
    got = measure(QUICK, tmp_path, ("models", "prune"))
    assert got.failed == {"models": "OSError: no such thing"}
    assert got.absent == {"prune, a directory": "why not"}
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_the_location_that_is_pruned_is_one_that_prune_believes(tmp_path: Path) -> None:
    count = _backup_prune.make(tmp_path, 6, 30)
    assert count == sum(1 for path in (tmp_path / "objects").rglob("*") if path.is_file())
    repository = Repository([DirectoryPlace(tmp_path)])
    assert [len(repository.missing(one)) for one in repository.manifests()] == [0] * 6
    assert repository.check(repository.manifests()[0]).good
    shown = prune.preview(repository, Policy(1, 0, 0, 2), clock.now() + dt.timedelta(hours=1), dt.timedelta(days=1))
    assert [one.keep for one in shown.decisions] == [True, True, False, False, False, False]
    assert shown.unreadable == {}
