"""What loading a model takes: measured by what it adds to the process and to the device, one load at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from registry.errors import ModelkeepError, RefusedError, UnavailableError
from serving.devices import Place, resident_bytes, taken_bytes
from serving.shortage import out_of_memory

# Loads take turns, so that the growth of the process can be laid at the door of one model.
_loading = threading.Lock()


class Load:
    """One load, as a context. Afterwards `memory` says what it took, by type: host, and device where there is one.

    What a framework raises in it becomes RefusedError, or UnavailableError where memory ran out.
    """

    def __init__(
        self,
        path: Path,
        framework: str,
        place: Place,
        *,
        half: bool = False,
        taken: Callable[[], int] | None = None,
    ) -> None:
        """`taken` says what is taken of the device by the framework's own allocator; else NVML does, by whomever."""
        self._path, self._framework, self._place = path, framework, place
        self._weights = weights_bytes(path) // (2 if half else 1)
        self._taken = taken or (lambda: taken_bytes(place))
        self.memory: dict[str, int] = {}
        self._host = self._device = 0

    def __enter__(self) -> Load:
        _loading.acquire()
        try:
            self.begin()
        except BaseException:
            _loading.release()
            raise
        return self

    def begin(self) -> None:
        """Count from here: what went before is no memory of this model."""
        self._host, self._device = resident_bytes(), self._taken()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                grown = resident_bytes() - self._host
                if self._place.kind == "cpu":
                    self.memory = {"host": max(grown, self._weights)}
                else:
                    taken = self._taken() - self._device
                    self.memory = {"host": max(grown, 0), "device": max(taken, self._weights)}
        finally:
            _loading.release()
        if isinstance(error, Exception) and not isinstance(error, ModelkeepError):
            if out_of_memory(error) is not None:
                raise UnavailableError(f"{self._path.name}: {self._framework} ran out of memory loading it") from error
            raise RefusedError(f"{self._path.name}: {self._framework} cannot load it: {first_line(error)}") from error

    @property
    def budget_bytes(self) -> int:
        """What counts against the memory budget: the device's where there is one."""
        return self.memory.get("device", self.memory["host"])


def weights_bytes(path: Path) -> int:
    """The size of the file, with the ONNX external data that lies beside it."""
    return sum(part.stat().st_size for part in (path, *path.parent.glob(path.name + "?data")))


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, for people who are not to see a stack trace."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
