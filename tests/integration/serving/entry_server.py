"""A server process for the tests of access: a model behind all that stands in front of the application, set by MODELKEEP_* as ever.

The model "affine" computes, "slow" waits for so many seconds as its input says, "large" answers megabytes. Keys come by --key NAME:ROLE:RATE.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from pathlib import Path
from typing import Any

import uvloop

from registry import keys
from registry.keys import StoredKey
from registry.settings import Settings, load_settings
from serving import child, entry
from serving.access.keyring import Keyring
from serving.api import create_app
from serving.compute.engine import LoadedVersion
from serving.http.tls import certificates
from serving.state import Serving
from serving.traffic.routing import Route
from tests.integration.serving.access_models import key_text, versions


def stored(described: str) -> StoredKey:
    name, role, rate = described.split(":")
    text = key_text(name)
    return StoredKey(text[3:15], name, role, keys.digest(text[16:]), None, False, rate or None)


async def main(settings: Settings, listener: socket.socket, folder: Path, known: list[str]) -> None:
    serving = Serving(environment="production", replica_id="test", boot_id="0123456789")
    loaded: dict[tuple[str, str], LoadedVersion] = {(v.model, v.version): v for v in versions()}
    serving.install({model: Route(model, 1, "1") for model, _ in loaded}, loaded, "epoch", 1)
    serving.ready = True
    tls = certificates(settings.server)
    keyring = Keyring(folder / "keys.json", "http://127.0.0.1")
    keyring.install([stored(described) for described in known], ("epoch", 1))

    async def nudge() -> dict[str, Any]:
        raise RuntimeError("a fault that nobody thought of, with a path: /somewhere/inside.py")

    def info() -> dict[str, Any]:
        return {"renewals": tls.renewals if tls is not None else 0}

    entry.equip(serving, settings)
    made = create_app(serving, settings=settings, nudge=nudge, info=info)
    app = entry.guarded(made, serving, settings, keyring, child.rules_of(settings, listener))
    following = asyncio.create_task(tls.follow(every_seconds=0.1)) if tls is not None else None
    try:
        await child.Server(entry.config(app, settings, tls), serving).serve(sockets=[listener])
    finally:
        if following is not None:
            following.cancel()
        await entry.end(serving)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--key", action="append", default=[])
    options = parser.parse_args()
    uvloop.run(main(load_settings(), socket.socket(fileno=options.fd), options.folder, options.key))
