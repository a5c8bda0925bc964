"""Backup and recovery beside what else there is, in turns, in one run: databases, models, memory, prune, recovery by component and size.

`python -m benchmarks.backup [--quick] [--parts database,models,memory,prune,recovery] [--json FILE] [--markdown FILE] [--into PAGE]`, or
`make bench-backup`: one JSON document on standard output (or in FILE), the tables in Markdown on standard error (or in FILE). What cannot
be had on this machine is named there, with why.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import _backup_memory, _backup_models, _backup_prune, _backup_recovery, backup_database
from benchmarks import _tell as tell
from benchmarks._backup_home import NotMeasuredError, room
from benchmarks._backup_report import PARTS, Found, document, judge, markdown
from registry.errors import NotFoundError
from tasks.backup import throwaway

UNITS = {"KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. MB are 1,000,000 bytes."""

    rounds: int
    database_mb: int
    """Of the dump, about."""
    model_mb: int
    sizes: tuple[int, ...]
    """Of what is backed up for the figures of memory, bytes."""
    backups: int
    objects: int
    recovery_mb: tuple[int, ...]


FULL = Plan(3, 600, 1000, (10_000_000, 100_000_000, 1_000_000_000), 1000, 100_000, (50, 500))
QUICK = Plan(1, 5, 5, (1_000_000, 4_000_000), 30, 300, (1, 2))


def measure(plan: Plan, folder: Path, parts: Sequence[str]) -> Found:
    """Part by part. One that fails does not keep the others from being measured."""
    works: dict[str, Callable[[Path], dict[str, Any]]] = {
        "database": lambda place: _database(place, plan),
        "models": lambda place: _backup_models.measure(place, plan.model_mb, plan.rounds),
        "memory": lambda place: _backup_memory.measure(place, plan.sizes),
        "prune": lambda place: _backup_prune.measure(place, plan.backups, plan.objects),
        "recovery": lambda place: _backup_recovery.measure(place, plan.recovery_mb, plan.rounds),
    }
    found = Found()
    for name in parts:
        place = folder / name
        place.mkdir()
        try:
            with tell.say(name):
                found.parts[name] = works[name](place)
        except (NotMeasuredError, NotFoundError) as why:
            found.absent[name] = str(why)
        except Exception as error:
            traceback.print_exc()
            found.failed[name] = f"{type(error).__name__}: {error}"
        for what, why in found.parts.get(name, {}).pop("absent", {}).items():
            found.absent[f"{name}, {what}"] = why
        subprocess.run(["rm", "-rf", place], check=True)
    return found


def _database(folder: Path, plan: Plan) -> dict[str, Any]:
    room(folder, 10 * plan.database_mb * 1_000_000)
    # What is asked of it is the size of the tables, of which the dump has about two thirds.
    asked = argparse.Namespace(mb=plan.database_mb * 3 // 2, turns=plan.rounds, levels=False)
    with throwaway.mariadb(folder, options=["--innodb-buffer-pool-size=512M"]) as server:
        return backup_database.measured(server, folder, asked)


def size_of(text: str) -> int:
    """Bytes of "10MB". Raises argparse's error for what is no size."""
    found = re.fullmatch(r"(\d+) ?([KMG]B)", text.strip(), re.IGNORECASE)
    if found is None or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: 10MB, 1GB")
    return int(found[1]) * UNITS[found[2].upper()]


def sizes_of(text: str) -> tuple[int, ...]:
    return tuple(sorted({size_of(one) for one in text.split(",")}))


def numbers_of(text: str) -> tuple[int, ...]:
    return tuple(sorted({at_least_one(one) for one in text.split(",")}))


def at_least_one(text: str) -> int:
    if not text.strip().isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def parts_of(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(one.strip() for one in text.split(",")))
    if unknown := [one for one in names if one not in PARTS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(PARTS)}")
    return names


def asked(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Plan]:
    """The options, and what they say is to be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: a minute, and no figures to go by")
    parser.add_argument("--parts", type=parts_of, default=PARTS, help=f"only these of {','.join(PARTS)}")
    parser.add_argument("--rounds", type=at_least_one, help=f"turns of each (default {FULL.rounds})")
    parser.add_argument(
        "--database-mb", type=at_least_one, help=f"size of the dump, about (default {FULL.database_mb})"
    )
    parser.add_argument("--model-mb", type=at_least_one, help=f"size of the ten models (default {FULL.model_mb})")
    parser.add_argument(
        "--sizes", type=sizes_of, help="sizes for memory (default 10MB,100MB,1GB; 10GB needs 40 GB of disk and time)"
    )
    parser.add_argument("--backups", type=at_least_one, help=f"backups to prune (default {FULL.backups})")
    parser.add_argument("--objects", type=at_least_one, help=f"objects there (default {FULL.objects})")
    parser.add_argument("--recovery-mb", type=numbers_of, help="sizes of each component (default 50,500)")
    parser.add_argument("--folder", type=Path, help="where all of it is written: the disk that is measured")
    tell.add_outputs(parser)
    options = parser.parse_args(arguments)
    base = QUICK if options.quick else FULL
    given = {
        name: getattr(options, name) if getattr(options, name) is not None else getattr(base, name)
        for name in Plan.__slots__
    }
    return options, Plan(**given)


def main() -> int:
    """Exit 1 where a part failed that should have worked; what cannot be had here is no failure. A mark that is not met is shown."""
    options, plan = asked()
    began, load = time.monotonic(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-backup-", dir=options.folder) as folder:
        found = measure(plan, Path(folder), options.parts)
    about = {
        "date": dt.date.today().isoformat(),
        "commit": tell.commit(),
        "machine": tell.machine(),
        "load_before": round(load, 2),
        "seconds": round(time.monotonic() - began),
        "rounds": plan.rounds,
        "plan": {name: getattr(plan, name) for name in Plan.__slots__},
    }
    marks = judge(found)
    tell.put_out(options, document(found, marks, about), markdown(found, marks, about), name="bench-backup")
    return 1 if found.failed else 0


if __name__ == "__main__":
    sys.exit(main())
