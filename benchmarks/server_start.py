"""How long `modelkeep serve` takes from the start of its process to the first answer of a model, and what it has imported by then.

Prints one JSON document. Run by `make bench`, or `python -m benchmarks.server_start [--runs N]`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from modelkeep.demo.traffic import content_end, json_request, parse
from tests.e2e.harness import MODEL, Box, box, images

HEAVY = ("torch", "prefect", "scipy", "pandas", "boto3", "chromadb", "alembic", "sklearn", "onnx")
PATIENCE_SECONDS = 60.0


def first_answer(one: Box) -> tuple[float, float]:
    """(seconds to the first 200 of a model, seconds until connections were taken). Each try is a fresh connection."""
    request = json_request(f"127.0.0.1:{one.port}", MODEL, images()[0])
    started = time.perf_counter()
    process = one.start("server", "modelkeep", "serve")
    listening = None
    while True:
        if process.poll() is not None or time.perf_counter() - started > PATIENCE_SECONDS:
            raise SystemExit(f"the server did not answer: {one.log('server').read_text()}")
        try:
            with socket.create_connection(("127.0.0.1", one.port), timeout=PATIENCE_SECONDS) as connection:
                listening = listening or time.perf_counter() - started
                connection.sendall(request)
                received = bytearray()
                while (end := content_end(received)) is None or len(received) < end:
                    if not (chunk := connection.recv(65536)):
                        raise ConnectionResetError
                    received += chunk
                if parse(received[:end]).status == 200:
                    return time.perf_counter() - started, listening
        except (ConnectionRefusedError, ConnectionResetError):
            time.sleep(0.002)


def stop(one: Box) -> None:
    pid = int((one.state_folder / "supervisor.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    next(process for process in one._processes if process.pid == pid).wait(timeout=30)


def imported(pid: int) -> dict[str, bool]:
    """Which heavy packages have a shared object mapped in a process. Prefect has none of its own: see `imported_modules`."""
    mapped = Path(f"/proc/{pid}/maps").read_text()
    return {name: f"/site-packages/{name}/" in mapped for name in ("torch", "scipy", "pandas", "onnxruntime", "numpy")}


def imported_modules(one: Box) -> list[str]:
    """The heavy packages that a child with these models imports, by Python's own account (`-X importtime`), until it serves."""
    with socket.socket() as listener, tempfile.TemporaryFile("w+") as log:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        command = [sys.executable, "-X", "importtime", "-P", "-m", "serving.child", "--fd", str(listener.fileno())]
        command += ["--parent", str(os.getpid()), "--address", f"http://127.0.0.1:{address[1]}"]
        process = subprocess.Popen(
            [*command, "--folder", str(one.folder / "importtime")],
            pass_fds=[listener.fileno()], env=one.environment, stdin=subprocess.DEVNULL, stderr=log,
        )  # fmt: skip
        with socket.create_connection(address, timeout=PATIENCE_SECONDS) as connection:
            connection.sendall(json_request("x", MODEL, images()[0]))
            if not connection.recv(65536):
                raise SystemExit("the child closed the connection")
        process.terminate()
        process.wait(timeout=30)
        log.seek(0)
        names = {line.rpartition("|")[2].strip().partition(".")[0] for line in log if line.startswith("import time:")}
    return sorted(names.intersection(HEAVY))


def memory_bytes(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure(runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, box(Path(folder)) as one:
        one.first("1")
        first_answer(one)  # the files of the packages come from the disk once, for all
        stop(one)
        times, listening = [], []
        for _ in range(runs):
            seconds, accepted = first_answer(one)
            times.append(seconds)
            listening.append(accepted)
            child = one.child_pid()
            found = {"mapped": imported(child), "memory_bytes": memory_bytes(child)}
            stop(one)
        return {
            "benchmark": "server_start",
            "runs": runs,
            "first_answer_seconds_median": round(statistics.median(times), 3),
            "first_answer_seconds": [round(value, 3) for value in times],
            "listening_seconds_median": round(statistics.median(listening), 3),
            "mark_seconds": 2.0,
            "child_memory_bytes": found["memory_bytes"],
            "child_mapped": found["mapped"],
            "child_imported_of": {"looked_for": list(HEAVY), "found": imported_modules(one)},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    print(json.dumps(measure(parser.parse_args().runs), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
