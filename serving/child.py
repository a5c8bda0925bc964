"""The process that serves: it takes a listening socket from its parent, reconciles, then answers until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import logging
import secrets
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from registry.database import Database
from registry.errors import ModelkeepError
from registry.settings import Settings, load_settings
from registry.store import open_store
from serving.api import create_app, freeze_startup_objects
from serving.protocol import bounded_protocol
from serving.reconcile import Reconciler
from serving.state import Serving

log = logging.getLogger("modelkeep.serve")

_SETTLE_SECONDS = 0.15
_PR_SET_PDEATHSIG = 1


class Server(uvicorn.Server):
    """uvicorn, but nobody who has connected is turned away by a stop."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Readiness falls first; accepting stops; who is connected already has his request answered; then uvicorn's own end.

        Connections that come later wait in the socket, which the parent holds.
        """
        self._serving.ready = False
        for server in self.servers:
            server.close()
        await asyncio.sleep(_SETTLE_SECONDS)
        await super().shutdown(sockets)


def database_of(settings: Settings) -> Database:
    """The registry's database as the settings describe it."""
    return Database(
        settings.database_url,
        anchors=settings.home / "audit.anchors",
        pool={
            "pool_size": settings.database.pool_size,
            "max_overflow": settings.database.max_overflow,
            "pool_timeout": settings.database.pool_timeout_seconds,
            "pool_recycle": int(settings.database.pool_recycle_seconds),
        },
    )


def replica_identity(folder: Path) -> str:
    """An id that stays: kept in the replica's folder."""
    path = folder / "replica-id"
    with contextlib.suppress(FileNotFoundError):
        if found := path.read_text().strip():
            return found
    folder.mkdir(parents=True, exist_ok=True)
    identity = f"{socket.gethostname()[:32]}-{secrets.token_hex(4)}"
    path.write_text(identity)
    return identity


async def serve(settings: Settings, listener: socket.socket, address: str, folder: Path) -> None:
    serving = Serving(
        replica_id=replica_identity(folder), boot_id=secrets.token_hex(8), environment=settings.environment
    )
    reconciler = Reconciler(
        serving,
        settings,
        database_of(settings),
        open_store(settings.artifacts),
        state_folder=folder,
        address=address,
    )
    await reconciler.start()
    app = create_app(serving, settings=settings, nudge=reconciler.nudge, info=reconciler.info)
    freeze_startup_objects()
    config = uvicorn.Config(
        app,
        loop="none",
        http=bounded_protocol(settings.server.request_timeout_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.server.drain_seconds),
    )
    polling = asyncio.create_task(reconciler.run())
    try:
        await Server(config, serving).serve(sockets=[listener])
    finally:
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling
        for version in serving.loaded.values():
            version.close()
        await reconciler.stop()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="serving.child", description="Started by `modelkeep serve`, which holds the socket."
    )
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--address", required=True, help="the address that the registry shall know")
    parser.add_argument("--folder", type=Path, required=True, help="where this replica keeps its state")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # Without its parent nobody holds the socket: drain and go, so that the next start finds the port free.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    import uvloop

    try:
        settings = load_settings()
        logging.getLogger().setLevel(settings.log_level)
        listener = socket.socket(fileno=options.fd)
        uvloop.run(serve(settings, listener, options.address, options.folder))
    except ModelkeepError as error:
        log.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
