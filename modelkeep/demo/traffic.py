"""The demo's client, a process of its own: open loop, one fresh connection a request, never a second try, one log line each.

Run as `python -m modelkeep.demo.traffic`. Times are `time.monotonic()`, which processes of one Linux machine share.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import errno
import gc
import json
import random
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from modelkeep.demo.data import INPUT_NAME, OUTPUT_NAME, Cases, read_traffic

BINARY_EVERY = 3
"""Each third request sends and receives binary tensors, the others JSON."""

TIMEOUT_SECONDS = 10.0
"""From the moment that a request was due; then it has failed with `timeout`. The usual one."""

FLUSH_SECONDS = 0.1
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class MalformedAnswerError(Exception):
    """The bytes of an answer do not make an answer of the protocol."""


@dataclass(slots=True)
class Answer:
    """What one request got: `status` where there was a status line, `error` where it failed, else `scores`."""

    status: int | None = None
    error: str | None = None
    version: str | None = None
    scores: NDArray[np.float32] | None = None
    message: str | None = None


def json_request(host: str, model: str, image: NDArray[np.float32]) -> bytes:
    """A whole V2 inference request for one image, as JSON."""
    tensor = {
        "name": INPUT_NAME,
        "datatype": "FP32",
        "shape": [1, *image.shape],
        "data": [float(v) for v in image.ravel()],
    }
    return _request(host, model, json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode(), b"", binary=False)


def binary_request(host: str, model: str, image: NDArray[np.float32]) -> bytes:
    """The same request with the binary tensor extension in both directions."""
    data = np.ascontiguousarray(image, dtype="<f4").tobytes()
    tensor = {
        "name": INPUT_NAME,
        "datatype": "FP32",
        "shape": [1, *image.shape],
        "parameters": {"binary_data_size": len(data)},
    }
    body = {"inputs": [tensor], "outputs": [{"name": OUTPUT_NAME, "parameters": {"binary_data": True}}]}
    return _request(host, model, json.dumps(body, separators=(",", ":")).encode(), data, binary=True)


def _request(host: str, model: str, head: bytes, data: bytes, *, binary: bool) -> bytes:
    kind = "application/octet-stream" if binary else "application/json"
    lines = [
        f"POST /v2/models/{model}/infer HTTP/1.1",
        f"Host: {host}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(head) + len(data)}",
    ]
    if binary:
        lines.append(f"Inference-Header-Content-Length: {len(head)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + head + data


def content_end(received: bytes | bytearray) -> int | None:
    """Where the answer that begins `received` ends, None while its headers are not complete."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    for line in received[:end].split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            try:
                return end + 4 + int(value)
            except ValueError as error:
                raise MalformedAnswerError(f"Content-Length {value!r}") from error
    raise MalformedAnswerError("an answer without Content-Length")


def parse(received: bytes | bytearray) -> Answer:
    """A complete HTTP answer, whatever its status. Raises MalformedAnswerError."""
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    try:
        status = int(lines[0].split(b" ", 2)[1])
    except (IndexError, ValueError) as error:
        raise MalformedAnswerError(f"status line {lines[0][:80]!r}") from error
    headers = {
        name.strip().lower(): value.strip().decode("latin-1")
        for name, _, value in (h.partition(b":") for h in lines[1:])
    }
    version = headers.get(b"x-model-version") or None
    if status != 200:
        return Answer(status, f"http {status}", version, message=body[:300].decode("utf-8", "replace"))
    try:
        length = headers.get(b"inference-header-content-length")
        document = json.loads(body if length is None else body[: int(length)])
        (output,) = (o for o in document["outputs"] if o["name"] == OUTPUT_NAME)
        size = (output.get("parameters") or {}).get("binary_data_size")
        scores = (
            np.asarray(output["data"], dtype=np.float32).ravel()
            if size is None
            else np.frombuffer(body[int(length or "") :][: int(size)], dtype="<f4")
        )
        named = document.get("model_version")
        shape = list(output["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedAnswerError(f"{type(error).__name__}: {error}") from error
    if named is None or (version is not None and version != str(named)):
        raise MalformedAnswerError(f"model_version {named!r} in the body, {version!r} in the header")
    if shape != [1, 10] or scores.shape != (10,):
        raise MalformedAnswerError(f"{OUTPUT_NAME} has shape {shape} and {len(scores)} values")
    return Answer(status, None, str(named), scores)


class Log:
    """One JSON document a line, appended; on disk `FLUSH_SECONDS` later at the latest, by `flush_forever`."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lines: list[str] = []

    def write(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record, separators=(",", ":")))

    def flush(self) -> None:
        if self._lines:
            self._file.write("\n".join(self._lines) + "\n")
            self._lines.clear()
            self._file.flush()

    async def flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            self.flush()


class Client:
    """Sends `cases` in a random order at `rate` requests a second, as independent users would (exponential gaps)."""

    def __init__(
        self,
        url: str,
        model: str,
        cases: Cases,
        log: Log,
        *,
        rate: float,
        seed: int,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url}: expected http://host:port")
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)[0]
        self._family, self._address = found[0], found[4]
        self._requests = [
            (json_request(parts.netloc, model, image), binary_request(parts.netloc, model, image))
            for image in cases.images
        ]
        self._log = log
        self._rate = rate
        self._timeout_seconds = timeout_seconds
        self._random = random.Random(seed)
        self._stop = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self.sent = 0
        self.max_lateness_seconds = 0.0

    def stop(self) -> None:
        self._stop.set()

    async def run(self, seconds: float | None) -> None:
        """Until `stop` (or for `seconds`); then waits for the requests in flight, each bounded by its time-out."""
        started = time.monotonic()
        due = started
        for image in self._images():
            due += self._random.expovariate(self._rate)
            if seconds is not None and due > started + seconds:
                break
            pause = due - time.monotonic()
            if pause > 0:
                try:
                    async with asyncio.timeout(pause):
                        await self._stop.wait()
                except TimeoutError:
                    pass  # nobody asked to stop before the next request was due
            elif self.sent % 16 == 0:
                await asyncio.sleep(0)  # behind schedule: still let the others run
            if self._stop.is_set():
                break
            task = asyncio.get_running_loop().create_task(self._one(self.sent, image, due))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            self.sent += 1
        if self._running:
            await asyncio.gather(*self._running)

    def _images(self) -> Iterator[int]:
        order = list(range(len(self._requests)))
        while True:
            self._random.shuffle(order)
            yield from order

    async def _one(self, index: int, image: int, due: float) -> None:
        binary = index % BINARY_EVERY == BINARY_EVERY - 1
        started = time.monotonic()
        self.max_lateness_seconds = max(self.max_lateness_seconds, started - due)
        answer = await self._exchange(self._requests[image][binary], due + self._timeout_seconds - started)
        record: dict[str, Any] = {
            "index": index,
            "image": image,
            "binary": binary,
            "scheduled": round(due, 6),
            "sent": round(started, 6),
            "finished": round(time.monotonic(), 6),
            "status": answer.status,
            "error": answer.error,
            "version": answer.version,
        }
        if answer.scores is not None:
            record["answer"] = base64.b64encode(answer.scores.astype("<f4").tobytes()).decode()
        if answer.message is not None:
            record["message"] = answer.message
        self._log.write(record)

    async def _exchange(self, request: bytes, timeout_seconds: float) -> Answer:
        loop = asyncio.get_running_loop()
        connection = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Closed after the whole answer; without TIME_WAIT, hundreds of connections a second cannot run out of ports.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            async with asyncio.timeout(timeout_seconds):
                await loop.sock_connect(connection, self._address)
                await loop.sock_sendall(connection, request)
                received = bytearray()
                end: int | None = None
                while end is None or len(received) < end:
                    chunk = await loop.sock_recv(connection, 65536)
                    if not chunk:
                        return Answer(error="eof", message=f"closed after {len(received)} bytes of the answer")
                    received += chunk
                    end = content_end(received) if end is None else end
            return parse(received[:end])
        except TimeoutError:
            return Answer(error="timeout")
        except ConnectionRefusedError:
            return Answer(error="refused")
        except (ConnectionResetError, BrokenPipeError):
            return Answer(error="reset")
        except MalformedAnswerError as error:
            return Answer(error="malformed", message=str(error))
        except OSError as error:
            return Answer(error=f"os {errno.errorcode.get(error.errno or 0, 'error')}", message=str(error))
        finally:
            connection.close()


async def drive(arguments: argparse.Namespace) -> None:
    cases = read_traffic(arguments.data)
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    with arguments.log.open("a", encoding="utf-8") as file:
        log = Log(file)
        client = Client(
            arguments.url, arguments.model, cases, log,
            rate=arguments.rate, seed=arguments.seed, timeout_seconds=arguments.timeout_seconds,
        )  # fmt: skip
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, client.stop)
        log.write(
            {
                "kind": "start",
                "monotonic": time.monotonic(),
                "wall": time.time(),
                "rate": arguments.rate,
                "seed": arguments.seed,
                "images": len(cases),
            }
        )
        log.flush()
        gc.collect()
        gc.freeze()
        flusher = loop.create_task(log.flush_forever())
        sender = loop.create_task(client.run(arguments.seconds))
        done, _ = await asyncio.wait({flusher, sender}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a log that cannot be written ends the client, with the error
        flusher.cancel()
        log.write(
            {
                "kind": "end",
                "monotonic": time.monotonic(),
                "sent": client.sent,
                "max_lateness_seconds": round(client.max_lateness_seconds, 6),
                "cpu_seconds": round(time.process_time(), 3),
            }
        )
        log.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m modelkeep.demo.traffic", description=__doc__)
    parser.add_argument("--url", required=True, help="the server, http://host:port")
    parser.add_argument("--model", default="digits")
    parser.add_argument("--rate", type=float, default=300.0, help="requests a second")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines are appended to it")
    parser.add_argument(
        "--data", type=Path, required=True, help="images and labels (.npz), as modelkeep.demo.data writes them"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--timeout-seconds", type=float, default=TIMEOUT_SECONDS, help="from the moment that a request is due"
    )
    parser.add_argument("--seconds", type=float, default=None, help="stop after this time; without it, at SIGTERM")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.rate <= 100_000:
        parser.error(f"--rate {arguments.rate}: expected a number of requests a second")
    try:
        asyncio.run(drive(arguments))
    except (OSError, ValueError) as error:
        print(f"modelkeep.demo.traffic: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
