"""What this server knows of API keys: as the registry has them, and on the disk for when the registry does not answer at the start."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from registry import clock, keys, rates
from registry.database import Database
from registry.errors import UsageError
from registry.keys import Failure, Principal, StoredKey
from serving.process import documents

log = logging.getLogger("modelkeep.keys")

InThread = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function where it may wait for the registry."""

_FORMAT = 1


class Keyring:
    """Changed and asked on the event loop only. `seen` is (epoch, counter) of the registry that it holds the keys of."""

    def __init__(
        self,
        path: Path,
        address: str,
        *,
        wants_internal: bool = False,
        now: Callable[[], dt.datetime] = clock.now,
    ) -> None:
        self.path, self.address = path, address
        self.wants_internal = wants_internal
        """Whether this server asks everybody for a key, our own processes too."""
        self.seen: tuple[str, int] | None = None
        """None: neither the registry nor the disk has told of any keys yet."""
        self._now = now
        self._keys: dict[str, StoredKey] = {}
        self._internal: str | None = None
        self._right: dict[bytes, tuple[Principal, dt.datetime | None]] = {}
        """What was found right before, by the digest of its text: nobody learns anything from how long a look takes."""
        self._current = False  # whether they are from the registry, and not from the disk

    @property
    def empty(self) -> bool:
        """Whether nobody has a key that works."""
        now = self._now()
        return not any(
            key.role in keys.ROLES and not key.revoked and (key.expires_at is None or now < key.expires_at)
            for key in self._keys.values()
        )

    def install(self, found: Iterable[StoredKey], seen: tuple[str, int]) -> None:
        """From now on these are the keys: a new one works, a revoked one is refused."""
        self._keys = {key.id: key for key in found}
        secret = next((k.hash for k in self._keys.values() if k.role == keys.INTERNAL and not k.revoked), None)
        self._internal = None if secret is None else keys.internal_text(secret, self.address)
        self._right = {}
        self.seen = seen

    async def follow(self, database: Database, epoch: str, counter: int | None, in_thread: InThread) -> None:
        """Take the registry's keys where they are others than those here. `counter`: None where no pulse brought it.

        Raises what the registry raises; keys that cannot be kept on the disk are an error in the log.
        """
        if self._current and counter is not None and self.seen == (epoch, counter):
            return
        found, number = await in_thread(partial(_read, database))
        if self._current and self.seen == (epoch, number):
            return
        self.install(found, (epoch, number))
        self._current = True
        try:
            await in_thread(self.keep)
        except OSError as error:
            log.error("the keys could not be kept in %s: %s", self.path, error)

    async def agree(self, database: Database, replica: str, in_thread: InThread) -> None:
        """Where this server asks everybody for a key: make sure that there is one for our own processes."""
        if self.wants_internal and self._current and self._internal is None and self.seen is not None:
            await in_thread(partial(keys.ensure_internal, database, actor=f"replica:{replica}"))
            await self.follow(database, self.seen[0], None, in_thread)

    def check(self, text: str, mark: bytes | None = None) -> Principal | Failure:
        """Whose key it is, or why it is none. `mark`: `mark_of(text)`, where it is known already."""
        if mark is None:
            mark = mark_of(text)
        known = self._right.get(mark)
        if known is not None and (known[1] is None or self._now() < known[1]):
            return known[0]
        if text.startswith(keys.INTERNAL_PREFIX):
            same = hmac.compare_digest(text.encode(), (self._internal or keys.INTERNAL_PREFIX).encode())
            if not same or self._internal is None:
                return "wrong"
            principal = Principal(keys.INTERNAL, keys.INTERNAL, "infer")
            self._right[mark] = principal, None
            return principal
        found = keys.check(text, self._keys, self._now)
        if isinstance(found, Principal):
            self._right[mark] = found, self._keys[found.key_id].expires_at
        return found

    def recall(self) -> None:
        """Take the keys from the disk, where there are some. What cannot be used is said in the log."""
        try:
            document = json.loads(self.path.read_text())
            if not isinstance(document, dict) or document.get("format") != _FORMAT:
                raise ValueError(f"it is none of format {_FORMAT}")
            self.install([_key(row) for row in document["keys"]], (str(document["epoch"]), int(document["counter"])))
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
            log.error("the keys in %s cannot be used, waiting for the registry: %r", self.path, error)

    def keep(self) -> None:
        """Write them to the disk, in one step, for this user only. Raises OSError."""
        assert self.seen is not None
        epoch, counter = self.seen
        document = {
            "format": _FORMAT,
            "epoch": epoch,
            "counter": counter,
            "keys": [
                {
                    "id": key.id,
                    "name": key.name,
                    "role": key.role,
                    "hash": key.hash,
                    "expires_at": None if key.expires_at is None else clock.text(key.expires_at),
                    "revoked": key.revoked,
                    "rate": key.rate,
                }
                for key in self._keys.values()
            ],
        }
        documents.replace(self.path, document)


def mark_of(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read(database: Database) -> tuple[list[StoredKey], int]:
    """The keys, and the counter as it was before they were read: a change in between is read once more."""
    with database.read() as session:
        number = keys.counter(session)
        return keys.stored(session), number


def _key(row: dict[str, Any]) -> StoredKey:
    expires_at = row["expires_at"]
    if not isinstance(row["revoked"], bool):
        raise TypeError(f"revoked = {row['revoked']!r}")
    moment = None if expires_at is None else dt.datetime.fromisoformat(expires_at)
    if moment is not None and moment.tzinfo is None:
        raise ValueError(f"expires_at = {expires_at!r} has no zone")
    rate = row.get("rate")  # an earlier modelkeep wrote none
    if rate is not None:
        rate = rates.written(str(rate))
    return StoredKey(
        id=str(row["id"]),
        name=str(row["name"]),
        role=str(row["role"]),
        hash=str(row["hash"]),
        expires_at=moment,
        revoked=row["revoked"],
        rate=rate,
    )
