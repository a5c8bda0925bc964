"""Starts the server process of these tests, once for all that do not change it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.serving.helpers import affine_model, identity_model


@contextmanager
def running(repository: Path, folder: Path, *options: str) -> Iterator[str]:
    """The address of a server with models that compute ("affine") or answer what they are sent. The socket listens before the process does."""
    from onnx import TensorProto

    models = {
        "affine": affine_model(folder / "affine.onnx", fails_above=100),
        "text": identity_model(folder / "text.onnx", TensorProto.STRING),
        "halves": identity_model(folder / "halves.onnx", TensorProto.FLOAT16),
        "brains": identity_model(folder / "brains.onnx", TensorProto.BFLOAT16),
        "flags": identity_model(folder / "flags.onnx", TensorProto.BOOL),
    }
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        named = [f"{name}={path}" for name, path in models.items()]
        command = [sys.executable, "-m", "tests.integration.serving.server", "--fd", str(listener.fileno())]
        process = subprocess.Popen([*command, *options, *named], cwd=repository, pass_fds=[listener.fileno()])
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


@pytest.fixture(scope="session")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(repository, tmp_path_factory.mktemp("models")) as address:
        yield address


@pytest.fixture(scope="session")
def impatient_server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One that waits only half a second for a request to come in."""
    with running(repository, tmp_path_factory.mktemp("models"), "--receive-timeout", "0.5") as address:
        yield address


@pytest.fixture
def talk() -> Callable[[str, bytes], bytes]:
    """`talk(address, bytes)` sends exactly these bytes and reads until the server closes."""

    def send(address: str, data: bytes) -> bytes:
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(data)
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
            return answer

    return send
