"""Where the time of a request goes: py-spy on the process that serves, by thread and by file, while wrk asks.

`python -m benchmarks.request_profile [--kind json|binary] [--model MODEL] [--connections 16] [--seconds 20]` prints
Markdown tables. Needs py-spy on the path (`pip install py-spy`), and leave to look at processes (root, or `kernel.yama.ptrace_scope` 0).
The server has the first core, wrk the last. py-spy looks on from wrk's core, a few hundred times a second, so rates are below those of
`make bench-serving`. Shares are of the samples in which a thread held the interpreter's lock, and a function's are those in which it was the
innermost of Python: what the kernel or a library does for it without giving the lock back is counted with it. A model's own computing is not.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks import _servers as servers
from benchmarks._report import KINDS
from benchmarks._turns import Driver, Turn, pinned, table, two_cores

RATE = 400
"""Samples a second."""
LEAST = 0.01
"""Files and functions with a smaller share are put together."""

Frame = tuple[str, str]
"""(file, function)."""


def samples(raw: str) -> list[tuple[tuple[Frame, ...], int]]:
    """py-spy's `raw` format: each line has frames, the outermost first, and in how many samples they were found.

    Raises ValueError with the line that is none of that format.
    """
    found = []
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if not (stack.startswith("thread (") and "): " in stack and count.isdigit()):
            raise ValueError(f"not py-spy's raw format: {line[:100]!r}")
        found.append((tuple(_frame(text) for text in stack.split(";")), int(count)))
    return found


def _frame(text: str) -> Frame:
    """`function (file:line)`, and the first of a stack `thread (number): name`, which has no file."""
    if text.startswith("thread ("):
        return "", text.partition("): ")[2]
    name, _, place = text.rpartition(" (")
    return place.rpartition(":")[0], name


def thread_of(stack: tuple[Frame, ...]) -> str:
    return stack[0][1]


def shares(found: Iterable[tuple[tuple[Frame, ...], int]]) -> list[tuple[str, str, float]]:
    """(file, its functions with the largest shares, its share of all samples), the largest first."""
    files: Counter[str] = Counter()
    functions: dict[str, Counter[str]] = {}
    for stack, count in found:
        file, name = stack[-1]
        files[file] += count
        functions.setdefault(file, Counter())[name] += count
    total = files.total()
    rows = []
    for file, count in files.most_common():
        if count < LEAST * total:
            break
        names = [f"{name} {n / total:.0%}" for name, n in functions[file].most_common(4) if n >= LEAST * total]
        rows.append((file, ", ".join(names), count / total))
    rest = total - sum(files[file] for file, _, _ in rows)
    return [*rows, ("all others", "", rest / total)] if rest else rows


def record(server: servers.Server, seconds: int, place: Path, core: int | None) -> str:
    """py-spy's samples of the process that answers. Raises RuntimeError with what py-spy said."""
    tool = shutil.which("py-spy")
    if tool is None:
        raise RuntimeError("py-spy is not on the path: pip install py-spy")
    child = servers.family(server.pid)[1]
    how = ["--rate", str(RATE), "--duration", str(seconds), "--threads", "--gil", "--format", "raw"]
    with pinned(core):
        done = subprocess.run(
            [tool, "record", "--pid", str(child), *how, "--output", str(place)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode or not place.exists():
        raise RuntimeError(f"py-spy: {done.stderr[-500:]}")
    return place.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, default="json")
    parser.add_argument("--model", choices=tuple(servers.CHANNELS), default="small")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--seconds", type=int, default=20)
    options = parser.parse_args()
    first, last = two_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = servers.write_models(folder / "models", (options.model,))
        with servers.modelkeep(folder / "modelkeep", files, first) as server:
            driver, turns = Driver(folder, last), list[Turn]()
            target = server.target(options.model, options.kind, fresh=options.model not in servers.CACHED)
            driver.turn(target, options.connections, 2)

            def load() -> None:
                turns.append(driver.turn(target, options.connections, options.seconds + 2, server.cpu_seconds))

            asking = threading.Thread(target=load)
            asking.start()
            raw = record(server, options.seconds, folder / "raw", last)
            asking.join()
    found = samples(raw)
    by_thread: Counter[str] = Counter()
    for stack, count in found:
        by_thread[thread_of(stack)] += count
    [turn] = turns
    print(
        f"{options.model}, {options.kind}, {options.connections} connections: {turn.requests_per_second:,.0f} requests a second, "
        f"{1e6 * (turn.cpu_seconds or 0):.0f} µs of CPU a request, {turn.failed} failed; {by_thread.total():,} samples\n"
    )
    for thread, count in by_thread.most_common():
        if count < LEAST * by_thread.total():
            break
        print(f"{thread}: {count / by_thread.total():.0%} of the samples\n")
        rows = [
            (f"`{file}`", f"{share:.0%}", names)
            for file, names, share in shares(s for s in found if thread_of(s[0]) == thread)
        ]
        print(table(("file", "share", "of it"), rows), "\n")
    return 1 if turn.failed else 0


if __name__ == "__main__":
    sys.exit(main())
