"""Starts Triton (as PyPI has it: Python backend, no backend of its own for ONNX) and our server with the same models."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest

from registry import untracked
from tests.integration.serving.parity.models import ParityModel, write_onnx, write_triton
from tests.own_environment import ROOT, own_environment

TRITON = "nvidia-pytriton==0.7.0"
NEEDED = ("onnxruntime", "flatbuffers", "protobuf", "packaging")
PACKAGES = (TRITON, "numpy==1.26.4", *(f"{name}=={metadata.version(name)}" for name in NEEDED))
"""All there is, without what they depend on: of Triton's wheel only the binaries are used, none of its Python. numpy 1, as it asks:
with numpy 2 its stubs misread arrays, and the first text kills one."""
WITHOUT = "NOT TESTED: parity with Triton: "
UNPACKED = Path("/tmp")
"""Where Triton makes a folder for packed environments, whatever TMPDIR says."""
START_SECONDS = 120
CACHE_BYTES = 256 << 20
Write = Callable[[ParityModel, Path, Path], None]
"""Writes a model into Triton's repository: the model, the repository, the ONNX file."""


def environment() -> Path:
    """The folder of an environment with Triton, made once: 98 MB to download, 320 MB, 10 s when this was written."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip(f"{WITHOUT}its wheel is for Linux on x86_64, this is {sys.platform} on {platform.machine()}")
    return own_environment("triton", PACKAGES, "--no-deps", without=f"parity with Triton: {TRITON} and what it needs")


@dataclass(frozen=True)
class Running:
    port: int
    process: subprocess.Popen[bytes]


@contextmanager
def triton(
    models: Sequence[ParityModel], files: Path, folder: Path, *, write: Write = write_triton, caching: bool = False
) -> Iterator[Running]:
    """A Triton with these models, written by `write`. Its processes are one group, which ends with the block.

    `caching`: with its local cache, for those models whose configuration asks for it.
    """
    env = environment()
    packages = env / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    home = packages / "pytriton" / "tritonserver"
    stub = (
        home
        / "python_backend_stubs"
        / f"{sys.version_info.major}.{sys.version_info.minor}"
        / "triton_python_backend_stub"
    )
    if not stub.is_file():
        pytest.skip(f"{WITHOUT}{TRITON} has no stub for Python {platform.python_version()}")
    shutil.copytree(home / "backends", folder / "backends")
    shutil.copy(stub, folder / "backends" / "python")
    for model in models:
        write(model, folder / "repository", files / f"{model.name}.onnx")
    cache = (f"--cache-directory={home / 'caches'}", f"--cache-config=local,size={CACHE_BYTES}") if caching else ()
    port = free_port()
    libraries = (sysconfig.get_config_var("LIBDIR"), packages / "nvidia_pytriton.libs")
    log = folder / "triton.log"
    unpacked = set(UNPACKED.glob("python_env_*"))
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                str(home / "bin" / "tritonserver"), f"--model-repository={folder / 'repository'}",
                f"--backend-directory={folder / 'backends'}", "--http-address=127.0.0.1", f"--http-port={port}",
                "--allow-grpc=false", "--allow-metrics=false", "--model-control-mode=explicit", "--load-model=*",
                "--exit-timeout-secs=2",
                f"--backend-config=python,shm-region-prefix-name=modelkeep-parity-{port}-", *cache,
            ],
            # The stub's Python is told where its packages are by the interpreter in front of the path, and by nothing else.
            env={
                "PATH": f"{env / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "OMP_NUM_THREADS": "1",
                "LD_LIBRARY_PATH": ":".join(map(str, libraries)), **untracked.SETTINGS,
            },
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        if not ready(port, process):
            said = [line for line in log.read_text().splitlines() if "UNAVAILABLE" in line or "rror" in line]
            pytest.skip(f"{WITHOUT}it did not start: {said[0][:200] if said else f'not ready in {START_SECONDS} s'}")
        yield Running(port, process)
    finally:
        end(process)
        # A Triton that was killed leaves its shared memory behind, and an empty folder.
        for region in Path("/dev/shm").glob(f"modelkeep-parity-{port}-*"):
            region.unlink()
        for left in set(UNPACKED.glob("python_env_*")) - unpacked:
            with suppress(OSError):
                left.rmdir()


@contextmanager
def ours(models: Sequence[ParityModel], files: Path) -> Iterator[Running]:
    """Our server with these models."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        command = [sys.executable, "-m", "tests.integration.serving.server", "--fd", str(listener.fileno())]
        for model in models:
            command += [] if model.rows else ["--whole", model.name]
            command += [item for name in model.optional for item in ("--optional", f"{model.name}={name}")]
            command += (
                ["--labels", f"{model.name}={model.outputs[0][0]}={','.join(model.labels)}"] if model.labels else []
            )
        command += [f"{model.name}={files / model.name}.onnx" for model in models]
        process = subprocess.Popen(command, cwd=ROOT, pass_fds=[listener.fileno()], start_new_session=True)
        try:
            port = listener.getsockname()[1]
            assert ready(port, process), "our server did not start"
            yield Running(port, process)
        finally:
            end(process)


def ready(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Whether the server says that it is ready before its time is over."""
    give_up = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < give_up:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return True
        except (OSError, http.client.HTTPException):
            pass  # it does not listen yet
        finally:
            connection.close()
        time.sleep(0.1)
    return False


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(15)
    finally:
        # Also the stubs of a server that died before them.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(15)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def written(models: Sequence[ParityModel], folder: Path) -> Path:
    for model in models:
        write_onnx(model, folder / f"{model.name}.onnx")
    return folder
