"""What the benchmark of backups found: marks, tables, one document. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks._backup_models import OURS
from benchmarks._turns import Mark, Spread, at_most, marks_table, spread, table, unmeasured
from benchmarks.backup_database import AGAIN, BACKUP, DUMP, LOAD, RECOVER
from benchmarks.backup_database import MARK as DATABASE_RATIO

MEMORY_MB = 200
FLAT_MB = 32
"""Two chunks: so much more than at the least size of the comparison may the largest one take."""
FLAT_FROM = 100_000_000
"""Below that, a backup has not as many chunks as it holds at once."""
DUMP_BYTES = 100_000_000
"""A dump below that takes no longer than what a backup does once whatever the size, so its ratio says nothing."""
PARTS = ("database", "models", "memory", "prune", "recovery")


@dataclass(slots=True)
class Found:
    """What each part of the benchmark returned, and why others did not."""

    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    """What cannot be had on this machine, or was not asked for."""
    failed: dict[str, str] = field(default_factory=dict)
    """What should have worked."""

    def why(self, part: str) -> str:
        return self.failed.get(part) or self.absent.get(part) or "not asked for"


def judge(found: Found) -> list[Mark]:
    return [*_database_marks(found), *_memory_marks(found)]


def _database_marks(found: Found) -> list[Mark]:
    names = {f"{BACKUP}, divided by {DUMP}": (BACKUP, DUMP), f"{RECOVER}, divided by {LOAD}": (RECOVER, LOAD)}
    if "database" not in found.parts:
        return [unmeasured(name, f"<= {DATABASE_RATIO:g}", found.why("database")) for name in names]
    if (size := found.parts["database"]["dump_bytes"]) < DUMP_BYTES:
        why = f"a dump of {_megabytes(size)} MB is too small for it: {_megabytes(DUMP_BYTES)} MB at least"
        return [unmeasured(name, f"<= {DATABASE_RATIO:g}", why) for name in names]
    seconds = found.parts["database"]["all_seconds"]
    return [
        at_most(name, DATABASE_RATIO, by_round(seconds[ours], seconds[theirs]))
        for name, (ours, theirs) in names.items()
    ]


def by_round(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours divided by theirs of the same round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def _memory_marks(found: Found) -> list[Mark]:
    most, flat = "memory of a backup above the import", "memory at the largest size, less that at 100 MB or the next"
    rows = found.parts.get("memory", {}).get("rows", [])
    if not rows:
        return [
            unmeasured(most, f"<= {MEMORY_MB} MB", found.why("memory")),
            unmeasured(flat, f"<= {FLAT_MB} MB", found.why("memory")),
        ]
    marks = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["size_bytes"])
        above = [row["above_bytes"] / 1e6 for row in mine]
        marks.append(_highest(f"{most}, {kind}", MEMORY_MB, above))
        large = [row for row in mine if row["size_bytes"] >= FLAT_FROM]
        if len(large) < 2:
            marks.append(unmeasured(f"{flat}, {kind}", f"<= {FLAT_MB} MB", "it needs two sizes of 100 MB and more"))
            continue
        grown = (large[-1]["above_bytes"] - large[0]["above_bytes"]) / 1e6
        marks.append(at_most(f"{flat}, {kind}", FLAT_MB, Spread(grown, grown, grown), " MB"))
    return marks


def _highest(name: str, limit: float, values: Sequence[float]) -> Mark:
    """A mark that every value has to meet, not only the one in the middle."""
    shown = f"{max(values):.0f} MB at most ({min(values):.0f} at least, {len(values)} sizes)"
    return Mark(name, f"<= {limit:g} MB", round(max(values), 1), max(values) <= limit, shown)


def document(found: Found, marks: Sequence[Mark], about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "about": dict(about),
        "marks": [asdict(mark) for mark in marks],
        **found.parts,
        "absent": found.absent,
        "failed": found.failed,
    }


def markdown(found: Found, marks: Sequence[Mark], about: Mapping[str, Any]) -> str:
    lines = [
        f"{about['date']}, commit {about['commit']}, {about['machine']}, load before {about['load_before']}; {about['seconds']} s, "
        f"medians of {about['rounds']} rounds (lowest to highest). MB are 1,000,000 bytes.",
        "",
        marks_table(marks),
    ]
    shown = {
        "database": _database, "models": _models, "memory": _memory, "prune": _prune, "recovery": _recovery,
    }  # fmt: skip
    for part in PARTS:
        if part in found.parts:
            lines += ["", shown[part](found.parts[part])]
    missing = {**found.absent, **found.failed}
    if missing:
        lines += ["", "Not measured:", "", *(f"- {name}: {why}" for name, why in missing.items())]
    return "\n".join(lines) + "\n"


def _seconds(values: Sequence[float]) -> str:
    one = spread(values)
    return f"{one.median:.2f} ({one.low:.2f} to {one.high:.2f})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _database(found: Mapping[str, Any]) -> str:
    stored = {DUMP: found["zstd_bytes"], BACKUP: found["stored_bytes"]}
    rows = [
        (name, _seconds(values), _megabytes(stored[name]) if name in stored else "–")
        for name in (DUMP, BACKUP, AGAIN, LOAD, RECOVER)
        if (values := found["all_seconds"].get(name))
    ]
    return table((f"MariaDB, a dump of {_megabytes(found['dump_bytes'])} MB", "seconds", "stored, MB"), rows)


def _models(found: Mapping[str, Any]) -> str:
    rows = []
    ours = found["tools"][OURS]
    for name, one in found["tools"].items():
        cells = []
        for turn in ("first", "second"):
            ratio = "" if name == OURS else f"; ours {by_round(ours[turn], one[turn]).median:.2f} of it"
            cells.append(f"{_seconds(one[turn])}{ratio}")
        sizes = (_megabytes(spread(one[f"{turn}_bytes"]).median) for turn in ("first", "second"))
        rows.append((name, *cells, *sizes))
    head = f"models, {found['mb']:,} MB in {found['files']} files"
    return table((head, "first time, seconds", "one changed, seconds", "MB after the first", "after both"), rows)


def _memory(found: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{row['kind']}, {row['size_bytes'] / 1e6:,.0f} MB",
            _megabytes(row["above_bytes"]),
            _megabytes(row["after_import_bytes"]),
            f"{row['seconds']:.1f}",
        )
        for row in found["rows"]
    ]
    return table(
        ("memory of a backup of random bytes", "peak above the import, MB", "after the import", "seconds"), rows
    )


def _prune(found: Mapping[str, Any]) -> str:
    words = {
        "preview": lambda one: f"{one['goes']:,} of {found['backups']:,} backups would go",
        "apply": lambda one: f"{one['removed']:,} backups removed, {one['marked']:,} objects marked",
        "second_phase": lambda one: f"{one['deleted']:,} objects deleted",
    }
    shown = {"preview": "preview", "apply": "apply, with marking", "second_phase": "again after the grace"}
    rows = [(shown[name], f"{found[name]['seconds']:.2f}", words[name](found[name])) for name in words]
    above = _megabytes(found["memory"]["above_bytes"])
    rows.append(("memory of all three", "–", f"{above} MB above the import at the peak"))
    head = f"prune, {found['backups']:,} backups and {found['objects']:,} objects in a directory"
    return table((head, "seconds", "what was done"), rows)


def _recovery(found: Mapping[str, Any]) -> str:
    rows = []
    for row in found["rows"]:
        seconds = spread(row["seconds"])
        rate = row["size_bytes"] / 1e6 / seconds.median if seconds.median else 0.0
        rows.append((row["component"], _megabytes(row["size_bytes"]), _seconds(row["seconds"]), f"{rate:,.0f}"))
    return table(("recovery to an empty home, compared", "MB", "seconds", "MB/s"), rows)
