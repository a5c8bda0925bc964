"""What loading a model takes: measured by what it adds to the process and to the device, one load at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from registry.errors import ModelkeepError, RefusedError, UnavailableError
from serving.device.devices import Place, resident_bytes, taken_bytes
from serving.device.shortage import out_of_memory

if TYPE_CHECKING:
    from serving.compute.runtimes import Runtime


class _Turns:
    """Loads take turns, so that the growth of the process can be laid at the door of one model; who takes very long lets others pass."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._under_way: dict[Load, bool] = {}
        """Whether each lets others pass."""
        self._waiting: set[int] = set()

    def begin(self, load: Load) -> None:
        with self._changed:
            self._waiting.add(load.thread)
            try:
                self._changed.wait_for(lambda: all(self._under_way.values()))
            finally:
                self._waiting.discard(load.thread)
            if self._under_way:
                load.alone = False
            for other in self._under_way:
                other.alone = False
            self._under_way[load] = False

    def end(self, load: Load) -> None:
        with self._changed:
            self._under_way.pop(load, None)
            self._changed.notify_all()

    def let_pass(self, thread: int) -> None:
        with self._changed:
            for load in self._under_way:
                if load.thread == thread:
                    self._under_way[load] = True
            self._changed.notify_all()

    def give_up(self, thread: int) -> None:
        with self._changed:
            for load in [load for load in self._under_way if load.thread == thread]:
                load.alone = False  # should it come to its end after all
                del self._under_way[load]
            self._changed.notify_all()

    def waiting(self) -> frozenset[int]:
        with self._changed:
            return frozenset(self._waiting)


_turns = _Turns()


def let_pass(thread: int) -> None:
    """The load on this thread takes so long that others shall not wait for it any more."""
    _turns.let_pass(thread)


def give_up(thread: int) -> None:
    """The load on this thread hangs: others are measured as if it were not there."""
    _turns.give_up(thread)


def waiting() -> frozenset[int]:
    """The threads that wait for the turn of another's load."""
    return _turns.waiting()


class Load:
    """One load, as a context. Afterwards `memory` says what it took, by type: host, and device where there is one.

    What a framework raises in it becomes RefusedError, or UnavailableError where memory ran out. Loads take turns; where one took
    so long that another did not wait for it, whose growth is whose cannot be told, and each counts with the size of its file.
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
        self.thread = threading.get_ident()
        self.alone = True
        """Whether nothing else was loaded at the same time."""
        self._host = self._device = 0

    def __enter__(self) -> Load:
        self.thread = threading.get_ident()
        _turns.begin(self)
        try:
            self.begin()
        except BaseException:
            _turns.end(self)
            raise
        return self

    def begin(self) -> None:
        """Count from here: what went before is no memory of this model."""
        self._host, self._device = resident_bytes(), self._taken()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if error is None:
                grown = resident_bytes() - self._host if self.alone else 0
                if self._place.kind == "cpu":
                    self.memory = {"host": max(grown, self._weights)}
                else:
                    taken = self._taken() - self._device if self.alone else 0
                    self.memory = {"host": max(grown, 0), "device": max(taken, self._weights)}
        finally:
            _turns.end(self)
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
    # Not by `glob`: the library keeps what it makes of each pattern, and every version would leave one.
    beside = (part for part in path.parent.iterdir() if len(part.name) == len(path.name) + len("?data"))
    data = (part for part in beside if part.name.startswith(path.name) and part.name.endswith("data"))
    return sum(part.stat().st_size for part in (path, *data))


def first_line(error: BaseException, limit: int = 300) -> str:
    """The first line of an error's text, for people who are not to see a stack trace."""
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def memory_by_type(runtime: Runtime) -> Mapping[str, int]:
    """Bytes by the type of memory: host, and device where it has some there."""
    found: Mapping[str, int] = getattr(runtime, "memory", None) or {"host": runtime.memory_bytes}
    return found


def beside_torch(runtime: Runtime) -> int:
    """What a version took of the device outside of torch's allocator, which tells its own."""
    return 0 if runtime.platform.startswith("pytorch") else memory_by_type(runtime).get("device", 0)
