"""The process that serves: it takes a listening socket from its parent, reconciles, then answers until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter

from registry.connect import open_database
from registry.errors import ModelkeepError
from registry.settings import Settings, load_settings
from registry.store import open_store
from serving import entry
from serving.access.auth import Rules, is_local
from serving.access.keyring import Keyring
from serving.api import create_app
from serving.caching.cache import ResponseCache
from serving.caching.cache_shared import SharedStore
from serving.device import devices
from serving.figures.performance import Performance
from serving.follow.emergency import REGISTRY_SECONDS, Emergency
from serving.follow.orders import Orders
from serving.follow.reconcile import Reconciler
from serving.http.handshakes import Handshakes
from serving.http.protocol import BoundedHttpProtocol
from serving.http.tls import certificates
from serving.process import headroom, threads
from serving.process.collector import collect, freeze_startup_objects
from serving.process.pulse import Pulse
from serving.process.tasks import ended
from serving.state import Serving
from serving.text import api as text_api
from serving.text.exchange import end_texts
from serving.traffic.capture import Capture
from serving.views import cache_page, captured_page, feedback_page, memory_page, operations, rollback_page
from serving.views.backup_metrics import BackupMetrics

log = logging.getLogger("modelkeep.serve")

_SETTLE_SECONDS = 0.15
_CATCH_UP_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


class Server(uvicorn.Server):
    """uvicorn, but nobody who has connected is turned away by a stop."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's own, but who has not come to terms on TLS counts as a connection, and is not waited for as long as he likes."""
        if self.config.ssl is None or sockets is None:
            await super().startup(sockets)
            return
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()
        make: Callable[..., asyncio.Protocol] = self.config.http_protocol_class
        loop.set_exception_handler(entry.quiet_handshakes)

        def protocol() -> asyncio.Protocol:
            return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

        most = getattr(make, "max_connections", BoundedHttpProtocol.max_connections)
        made = [
            Handshakes(protocol, self.config.ssl, listener, self.server_state.connections, most) for listener in sockets
        ]
        self.servers: list[Any] = list(made)  # what uvicorn does with them is close and wait_closed
        self._serving.handshakes = made[0]
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Readiness falls first; accepting stops; who is connected already, or is sending, has his request answered, all of them
        together within the time that a stop has: the parent waits no longer.

        Connections that come later wait in the socket, which the parent holds.
        """
        self._serving.ready = False
        for server in self.servers:
            server.close()
        # Texts go on for most of the time that there is, then their streams get a last event.
        grace = float(self.config.timeout_graceful_shutdown or 0)
        ending = asyncio.get_running_loop().call_later(
            max(grace - _LAST_WORDS_SECONDS, grace / 2), end_texts, self._serving
        )
        try:
            await asyncio.sleep(_SETTLE_SECONDS)
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises a signal again when it is done, which would end the process before the rest is put in order."""
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()


def replica_identity(folder: Path) -> str:
    """An id that stays: kept in the replica's folder. Where that cannot be written it lasts as long as this process."""
    path = folder / "replica-id"
    with contextlib.suppress(FileNotFoundError):
        if found := path.read_text().strip():
            return found
    identity = f"{socket.gethostname()[:32]}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(identity)
    except OSError as error:
        log.error("the id of this server could not be kept in %s: %s", path, error)
    return identity


def performance_of(reconciler: Reconciler) -> Performance:
    """What takes samples of how this server does."""
    serving, settings = reconciler.serving, reconciler.settings
    return Performance(
        reconciler.memory.device, settings.alerts, lambda: (telemetry for _, _, telemetry in serving.telemetry())
    )


def routers(reconciler: Reconciler, performance: Performance | None = None) -> list[APIRouter]:
    """What this server answers beside inference and its own pages, a module each."""
    settings = reconciler.settings
    capture = reconciler.serving.capture
    quick = open_database(settings, answer_seconds=REGISTRY_SECONDS, statement_seconds=REGISTRY_SECONDS)
    reconciler.serving.orders = Orders(reconciler, quick, timeout_seconds=settings.server.request_timeout_seconds)
    return [
        *([captured_page.router(capture)] if capture is not None else []),
        cache_page.router(reconciler.serving.cache),
        feedback_page.router(reconciler.serving),
        memory_page.router(reconciler.serving, reconciler.memory, performance or performance_of(reconciler)),
        operations.router(reconciler.database),
        rollback_page.router(Emergency(reconciler, quick), lease_seconds=settings.lease_seconds),
        text_api.router(reconciler.serving, settings),
    ]


def rules_of(settings: Settings, listener: socket.socket) -> Rules:
    """Whom the guard lets in, by the address that the socket really has."""
    security = settings.security
    return Rules(
        local=is_local(listener.getsockname()),
        require_keys=security.require_keys,
        allow_unauthenticated=security.allow_unauthenticated,
        origins=tuple(origin.lower() for origin in security.cors_origins),
        aliases=frozenset(alias.path for alias in settings.aliases),
    )


def open_cache(settings: Settings) -> ResponseCache | None:
    """The cache of answers as the settings want it; None where they want none. Call it in the event loop."""
    if not settings.performance.enable_caching:
        return None
    cache = ResponseCache(settings.cache)
    if settings.redis_url is not None:
        cache.shared = SharedStore(
            settings.redis_url,
            settings.environment,
            timeout_seconds=settings.cache.redis_timeout_seconds,
            ttl_seconds=settings.cache.ttl_seconds,
            models=cache.models,
            changed=cache.forget,
        )
    return cache


async def serve(
    settings: Settings, listener: socket.socket, address: str, folder: Path, pulse: Pulse | None = None
) -> None:
    beating = None if pulse is None else asyncio.create_task(pulse.beat())
    asyncio.get_running_loop().set_default_executor(threads.beside_the_loop())
    serving = Serving(
        replica_id=replica_identity(folder), boot_id=secrets.token_hex(8), environment=settings.environment
    )
    serving.capture = Capture(folder / "captured", settings.capture)
    serving.capture.start()
    serving.cache = open_cache(settings)
    if serving.cache is not None and serving.cache.shared is not None:
        serving.cache.shared.start()
    tls = certificates(settings.server)
    rules = rules_of(settings, listener)
    reconciler = Reconciler(
        serving,
        settings,
        open_database(settings),
        open_store(settings.artifacts),
        state_folder=folder,
        address=address,
        keyring=Keyring(folder / "keys.json", address, wants_internal=not rules.open),
    )
    loop = asyncio.get_running_loop()
    # Until uvicorn listens to it, a stop ends the process in the middle of a load: that is no crash of the version.
    loop.add_signal_handler(signal.SIGTERM, _end_early, reconciler)
    await reconciler.start()
    performance = performance_of(reconciler)
    entry.equip(serving, settings)
    app = entry.guarded(
        create_app(
            serving,
            settings=settings,
            nudge=reconciler.nudge,
            info=reconciler.info,
            routers=routers(reconciler, performance),
            aliases=settings.aliases,
            backups=BackupMetrics(settings.home),
        ),
        serving,
        settings,
        reconciler.keyring,
        rules,
    )
    freeze_startup_objects()
    with devices.apart():
        headroom.take()
    config = entry.config(app, settings, tls)
    # Those who connected while no server was there come all at once: nobody of them is told to try again later.
    serving.catching_up = True
    loop.call_later(_CATCH_UP_SECONDS, setattr, serving, "catching_up", False)
    loop.remove_signal_handler(signal.SIGTERM)
    polling = asyncio.create_task(reconciler.run())
    collecting = asyncio.create_task(collect())
    watching = asyncio.create_task(reconciler.watchdog.run(lambda: serving.loaded.values()))
    looking = asyncio.create_task(reconciler.memory.watch(measure=performance.measure, then=performance.sample))
    following = asyncio.create_task(tls.follow()) if tls is not None else None
    try:
        await Server(config, serving).serve(sockets=[listener])
    finally:
        await entry.end(serving)
        await ended(task for task in (collecting, watching, looking, polling, following) if task is not None)
        for version in serving.loaded.values():
            version.close()
        serving.capture.end()
        if serving.cache is not None and serving.cache.shared is not None:
            await serving.cache.shared.stop()
        reconciler.caretaker.end()
        await reconciler.stop()
        if beating is not None:
            await ended([beating])
        reconciler.watchdog.leave(serving.loaded.values(), loading=reconciler.loader.at_work())


def _end_early(reconciler: Reconciler) -> None:
    reconciler.caretaker.end()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serving.child", description="Started by `modelkeep serve`, which holds the socket."
    )
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--parent", type=int, required=True, help="process id of the parent")
    parser.add_argument("--address", required=True, help="the address that the registry shall know")
    parser.add_argument("--folder", type=Path, required=True, help="where this replica keeps its state")
    parser.add_argument("--pulse", type=int, help="where the parent sees that this process does not stand still")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Without its parent nobody holds the socket: drain and go, so that the next start finds the port free.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != options.parent:
        log.error("the parent, process %d, is gone already", options.parent)
        return 1
    import uvloop

    try:
        settings = load_settings()
        logging.getLogger().setLevel(settings.log_level)
        listener = socket.socket(fileno=options.fd)
        pulse = None if options.pulse is None else Pulse(options.pulse)
        uvloop.run(serve(settings, listener, options.address, options.folder, pulse))
    except ModelkeepError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
