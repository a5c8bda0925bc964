"""Models that this server was told not to serve: local holds, kept on its disk until they are loaded again, and on record in the registry."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import select

from registry import clock
from registry.actor import Who
from registry.database import Database
from registry.errors import StorageError, UnavailableError
from registry.schema import AuditEvent
from serving.process import documents

log = logging.getLogger("modelkeep.unloads")

_FORMAT = 1
_LOOKED_BACK = 200
Action = Literal["model.unloaded", "model.loaded"]


@dataclass(frozen=True, slots=True)
class Order:
    """Somebody told this server to unload a model, or to load it again. `identity` tells it from others on record."""

    action: Action
    model: str
    actor: str
    key_id: str | None
    claimed: str | None
    reason: str
    at: str
    identity: str

    @classmethod
    def now(cls, action: Action, model: str, who: Who, reason: str) -> Order:
        at = clock.text(clock.now())
        return cls(action, model, who.actor, who.key_id, who.claimed, reason, at, secrets.token_hex(8))

    def why(self) -> str:
        """For clients and operators."""
        return f"by {self.actor} at {self.at}" + (f": {self.reason}" if self.reason else "")


class Unloads:
    """The unloaded models of this replica, and what of it the registry has not been told. Changed on the event loop only."""

    def __init__(self, path: Path, *, environment: str, replica_id: str) -> None:
        self.path, self._environment, self._replica = path, environment, replica_id
        self.by_model: dict[str, Order] = {}
        self.untold: list[Order] = []
        self._telling = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._refused: set[str] = set()

    def recall(self) -> None:
        """Read what a process before this one was told. A file that cannot be read is said loudly: what it says is not in force."""
        try:
            document = json.loads(self.path.read_text())
            if document.get("format") != _FORMAT:
                raise ValueError(f"{self.path} is of format {document.get('format')!r}")
            unloaded = {value["model"]: Order(**value) for value in document["unloaded"]}
            self.by_model, self.untold = unloaded, [Order(**value) for value in document["untold"]]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("which models are unloaded here cannot be read, so all are served: %s", error)
        for order in self.by_model.values():
            log.warning("%s is not served here, unloaded %s", order.model, order.why())

    def put(self, order: Order) -> None:
        """The order is in force; `save` keeps it."""
        if order.action == "model.unloaded":
            self.by_model[order.model] = order
        else:
            self.by_model.pop(order.model, None)
        self.untold.append(order)
        log.warning("%s: %s %s", order.action, order.model, order.why())

    async def save(self) -> str | None:
        """Keep it on the disk. Returns why that failed (a restart would forget it), None where it did not."""
        # Who gives up waiting does not end the writing: what comes next shall not be overtaken by it.
        return await asyncio.shield(asyncio.ensure_future(self._save()))

    async def _save(self) -> str | None:
        async with self._saving:
            document = {
                "format": _FORMAT,
                "unloaded": [asdict(order) for order in self.by_model.values()],
                "untold": [asdict(order) for order in self.untold],
            }
            try:
                await asyncio.to_thread(documents.replace, self.path, document)
            except OSError as error:
                log.error("which models are unloaded here could not be kept in %s: %s", self.path, error)
                return f"{self.path} could not be written: {error.strerror or error}"
        return None

    async def tell(self, database: Database, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Put what the registry has not been told on record, each once. Raises UnavailableError, StorageError; the rest is logged."""
        if not self.untold:
            return
        async with self._telling:
            for order in list(self.untold):
                try:
                    await in_thread(partial(self._record, database, order))
                except (UnavailableError, StorageError):
                    raise
                except Exception as error:
                    # Whatever it is, it shall not keep this server from following its routes.
                    if order.identity not in self._refused:
                        self._refused.add(order.identity)
                        log.error("%s of %s is not on record yet: %r", order.action, order.model, error)
                    continue
                self.untold.remove(order)
            await self.save()

    def _record(self, database: Database, order: Order) -> None:
        subject = f"model:{self._environment}/{order.model}"
        with database.write(actor=order.actor) as transaction:
            known = transaction.session.scalars(
                select(AuditEvent.text)
                .where(AuditEvent.subject == subject, AuditEvent.action == order.action)
                .order_by(AuditEvent.seq.desc())
                .limit(_LOOKED_BACK)
            )
            if any(order.identity in text for text in known):
                return  # a process before this one, or a try that was given up, was quicker
            after: dict[str, Any] = {"replica": self._replica, "at": order.at, "order": order.identity}
            if order.key_id is not None:
                after["key_id"] = order.key_id
            if order.claimed is not None:
                after["claimed"] = order.claimed
            transaction.record(order.action, subject, after=after, reason=order.reason)

    def reasons(self) -> dict[str, str]:
        """By model, for clients."""
        return {model: order.why() for model, order in self.by_model.items()}

    def as_list(self) -> list[dict[str, Any]]:
        """For model-info."""
        untold = {order.identity for order in self.untold}
        return [
            {**asdict(order), "recorded": order.identity not in untold} for _, order in sorted(self.by_model.items())
        ]
