"""Connections over TLS, from the moment when they are accepted: who has not agreed on a cipher yet counts and is timed like everybody."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Collection

from serving.http.tls import HANDSHAKE_SECONDS

log = logging.getLogger("modelkeep.tls")

BEYOND_THE_LIMIT = 32
"""So many may shake hands while there are as many connections as the server takes: they are told so, which takes TLS."""
_AT_A_TIME = 100
_NO_DESCRIPTOR_SECONDS = 1.0


class Handshakes:
    """Accepts the connections of one listening socket, in the place of asyncio's server, which tells of them once TLS is agreed on.

    On the event loop only.
    """

    def __init__(
        self,
        protocol: Callable[[], asyncio.Protocol],
        context: ssl.SSLContext,
        listener: socket.socket,
        connections: Collection[object],
        max_connections: int,
        *,
        timeout_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        """`protocol` makes what speaks once TLS is agreed on; `connections` are those that do."""
        self.protocol, self.context, self.listener, self.timeout_seconds = protocol, context, listener, timeout_seconds
        self._connections, self._most = connections, max_connections
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        self.under_way: set[asyncio.Task[None]] = set()
        self.turned_away = 0
        """Connections that were closed at once: there were too many."""
        self.failed = 0
        """Those that came to no agreement, or not in time."""
        listener.setblocking(False)
        self._follow()

    def close(self) -> None:
        """Accept no more; who shakes hands goes on. As asyncio's server has it."""
        self._loop.remove_reader(self.listener)
        if self._again is not None:
            self._again.cancel()

    async def wait_closed(self) -> None:
        """As asyncio's server has it: connections are not waited for here."""

    def _follow(self) -> None:
        self._again = None
        self._loop.add_reader(self.listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_A_TIME):
            try:
                accepted, _ = self.listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor is left, most likely
                log.error("no connection can be accepted for a moment: %s", error)
                self._loop.remove_reader(self.listener)
                self._again = self._loop.call_later(_NO_DESCRIPTOR_SECONDS, self._follow)
                return
            if len(self._connections) + len(self.under_way) >= self._most + BEYOND_THE_LIMIT:
                self.turned_away += 1
                accepted.close()
                continue
            task = self._loop.create_task(self._shake(accepted))
            self.under_way.add(task)
            task.add_done_callback(self.under_way.discard)

    async def _shake(self, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._loop.connect_accepted_socket(
                self.protocol, accepted, ssl=self.context, ssl_handshake_timeout=self.timeout_seconds
            )
        except (OSError, EOFError) as error:  # a time-out is an OSError, and what is wrong with TLS too
            # Whoever connects without speaking TLS, or trusts us not, or goes, is no fault of ours.
            self.failed += 1
            log.debug("a connection ended before it was one: %r", error)
            accepted.close()
