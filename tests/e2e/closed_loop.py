"""A client of several connections, each of which sends its next request as soon as the one before is answered. A process of its own.

`python -m tests.e2e.closed_loop --port P --model M --data traffic.npz --log FILE.npz [--connections 16]`, until SIGTERM. Never a second try:
a connection that breaks is a failed request, and is opened again. The log has one entry a request: `sent` and `finished` (monotonic
seconds), `status` (0: no answer), `version`, `image`, `scores` (ten, NaN without an answer).
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkeep.demo.traffic import binary_request, content_end

SCORES_BYTES = 40


@dataclass(frozen=True, slots=True)
class Log:
    """What the client wrote, an array a field."""

    sent: NDArray[np.float64]
    finished: NDArray[np.float64]
    status: NDArray[np.int64]
    version: NDArray[Any]
    image: NDArray[np.int64]
    scores: NDArray[np.float32]

    @property
    def seconds(self) -> NDArray[np.float64]:
        return self.finished - self.sent

    @classmethod
    def read(cls, path: Path) -> Log:
        with np.load(path) as file:
            return cls(**{name: file[name] for name in cls.__slots__})


class Client:
    def __init__(self, port: int, requests: list[bytes]) -> None:
        self.port, self.requests = port, requests
        self.rows: list[tuple[float, float, int, bytes, int, bytes]] = []
        self.going = True

    async def loop(self, first: int, step: int) -> None:
        image, streams = first, None
        while self.going:
            sent = time.monotonic()
            try:
                if streams is None:
                    streams = await asyncio.open_connection("127.0.0.1", self.port)
                row = await self._one(streams, image)
            except (OSError, EOFError, asyncio.IncompleteReadError):
                streams, row = None, (0, b"", b"")
            self.rows.append((sent, time.monotonic(), row[0], row[1], image, row[2]))
            image = (image + step) % len(self.requests)
        if streams is not None:
            streams[1].close()

    async def _one(
        self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter], image: int
    ) -> tuple[int, bytes, bytes]:
        reader, writer = streams
        writer.write(self.requests[image])
        received = await reader.readuntil(b"\r\n\r\n")
        end = content_end(received)
        assert end is not None
        body = await reader.readexactly(end - len(received))
        status = int(received[9:12])
        at = received.find(b"x-model-version: ")
        version = received[at + 17 : received.find(b"\r\n", at)] if at >= 0 else b""
        return status, version, body[-SCORES_BYTES:] if status == 200 else b""

    def write(self, path: Path) -> None:
        nothing = np.full(10, np.nan, np.float32).tobytes()
        sent, finished, status, version, image, scores = zip(*self.rows, strict=True)
        fresh = path.with_suffix(".new.npz")
        np.savez(
            fresh,
            sent=np.array(sent),
            finished=np.array(finished),
            status=np.array(status, np.int64),
            version=np.array([v.decode("latin-1") for v in version]),
            image=np.array(image, np.int64),
            scores=np.frombuffer(b"".join(s or nothing for s in scores), "<f4").reshape(-1, 10),
        )
        fresh.replace(path)


async def run(client: Client, connections: int) -> None:
    def stop() -> None:
        client.going = False

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    await asyncio.gather(*(client.loop(number, connections) for number in range(connections)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    with np.load(options.data) as data:
        requests = [binary_request(f"127.0.0.1:{options.port}", options.model, image) for image in data["image"]]
    client = Client(options.port, requests)
    asyncio.run(run(client, options.connections))
    client.write(options.log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
