"""A bucket in which somebody deleted or overwrote backups: what was there at a moment becomes what is there, where the bucket keeps versions."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from registry.errors import RefusedError, StorageError
from tasks.backup.manifest import SUFFIX
from tasks.backup.places import Place

if TYPE_CHECKING:
    from tasks.backup.s3 import ObjectVersion

KEPT = ("objects/", "keys/", "states/", "logs/")
"""With the manifests, all that a recovery reads. Intents and marks of garbage are of their moment and stay gone."""
WORKERS = 8


@runtime_checkable
class Versioned(Protocol):
    """A place that keeps what was overwritten or deleted: a bucket."""

    shown: str

    def versions(self) -> Iterator[ObjectVersion]: ...

    def put_back(self, name: str, version: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PutBack:
    """What was found in a bucket, by the names of objects. `lost` could not be put back, each with why."""

    place: str
    looked_at: int
    deleted: list[str] = field(default_factory=list)
    overwritten: list[str] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


def put_back(places: Sequence[Place], before: dt.datetime) -> list[PutBack]:
    """By place. What was deleted or overwritten after `before` is there again as it was then; nothing is taken away, so that
    what was done stays to be looked at. Raises RefusedError where no place keeps versions, StorageError.
    """
    buckets = [place for place in places if isinstance(place, Versioned)]
    if not buckets:
        shown = " and ".join(place.shown for place in places)
        raise RefusedError(
            f"{shown} keeps no older versions: only a bucket with versions does; use another copy of the backups"
        )
    return [_put_back(place, before) for place in buckets]


def _put_back(place: Versioned, before: dt.datetime) -> PutBack:
    by_name: dict[str, list[ObjectVersion]] = {}
    for version in place.versions():
        if version.name.startswith(KEPT) or version.name.endswith(SUFFIX):
            by_name.setdefault(version.name, []).append(version)
    found = PutBack(place.shown, len(by_name))
    wanted = {name: one for name, versions in by_name.items() if (one := _as_it_was(versions, before)) is not None}

    def back(name: str) -> str | None:
        try:
            place.put_back(name, wanted[name].id)
        except StorageError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(WORKERS, thread_name_prefix="put-back") as pool:
        for name, why in zip(sorted(wanted), pool.map(back, sorted(wanted)), strict=True):
            if why is not None:
                found.lost[name] = why
            elif any(one.latest and one.deleted for one in by_name[name]):
                found.deleted.append(name)
            else:
                found.overwritten.append(name)
    return found


def _as_it_was(versions: Sequence[ObjectVersion], before: dt.datetime) -> ObjectVersion | None:
    """The version of that moment; None where it is the present one, or where there was none."""
    then = max(
        (one for one in versions if one.modified <= before), key=lambda one: (one.modified, one.latest), default=None
    )
    now = next((one for one in versions if one.latest), None)
    if then is None or then.deleted or then.latest:
        return None
    same = now is not None and not now.deleted and now.content == then.content != ""
    return None if same else then
