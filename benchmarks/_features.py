"""What single features cost a request: the serving process as it is beside the same with one feature switched off, by its setting where it has
one, otherwise by taking the code out (`--without`). And what more models cost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks._report import KEPT, KINDS, SHOWN, SMALL
from benchmarks._servers import Absent, Server, add_model, answers, ask, end, registered
from benchmarks._turns import Driver, Turn, in_turns, pinned
from tests.e2e.harness import Box

CONNECTIONS = 16
SECONDS = 1.0
WITHOUT = ("keys", "metrics", "validation")
"""Features that can only be taken out of the code."""


def cost_of_features(
    folder: Path, files: Mapping[str, Path], driver: Driver, core: int | None, rounds: int, kinds: Sequence[str] = KINDS
) -> dict[str, dict[str, list[Turn]]]:
    """{feature: {"JSON, with": turns, "JSON, without": …, "binary, with": …}}."""
    small = {name: files[name] for name in (SMALL, KEPT)}
    found: dict[str, dict[str, list[Turn]]] = {}
    with registered(folder, small, {}) as (one, key), contextlib.ExitStack() as stack:
        headers = {"Authorization": f"Bearer {key}"}
        plain = stack.enter_context(child(one, "plain", headers, core))
        # (name, server with it, model, path) and the same without it
        with_it = (plain, SMALL, "")
        pairs: dict[str, tuple[tuple[Server, str, str], tuple[Server, str, str]]] = {
            "routing (against a version in the path)": (with_it, (plain, SMALL, "/versions/1")),
            "the cache: a request that it has not seen": ((plain, KEPT, ""), with_it),
        }
        for name in WITHOUT:
            bare = stack.enter_context(child(one, name, headers, core, "--without", name))
            pairs[name] = (with_it, (bare, SMALL, ""))
        for name, settings, without in SWITCHED:
            other = stack.enter_context(child(one, name, headers, core, **settings))
            other_one = (other, SMALL, "")
            pairs[name] = (with_it, other_one) if without else (other_one, with_it)
        for name, (yes, no) in pairs.items():
            found[name] = {}
            for kind in kinds:
                shown = SHOWN[kind]

                def one_turn(which: str, yes: Any = yes, no: Any = no, kind: str = kind) -> Turn:
                    server, model, path = yes if which == "with" else no
                    target = server.target(model, kind, fresh=True)
                    return driver.turn(
                        type(target)(
                            target.address, f"/v2/models/{model}{path}/infer", target.body, target.headers, target.fresh, target.binary
                        ),
                        CONNECTIONS, SECONDS, server.cpu_seconds,
                    )  # fmt: skip

                turns = in_turns(("with", "without"), rounds, one_turn)
                found[name] |= {f"{shown}, {which}": turns[which] for which in turns}
    return found


SWITCHED: tuple[tuple[str, dict[str, str], bool], ...] = (
    ("the limit on a key's rate", {"MODELKEEP_SECURITY__RATE_LIMIT": "none"}, True),
    ("counts of the whole API", {"MODELKEEP_MONITORING__PROMETHEUS_ENABLED": "false"}, True),
    ("the access log, to a file", {"MODELKEEP_LOGGING__ACCESS": "file"}, False),
)
"""(feature, settings of the server that differs, whether that one is without it)."""


@contextlib.contextmanager
def child(
    one: Box, name: str, headers: Mapping[str, str], core: int | None, *options: str, **settings: str
) -> Iterator[Server]:
    """The process that serves, without a supervisor, on the registry of a box. `options` are of this module."""
    folder = one.folder / f"child-{name.replace(' ', '-')}"
    folder.mkdir()
    log = folder / "log"
    with socket.socket() as listener, log.open("w") as output:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "benchmarks._features", *options, "--fd", str(listener.fileno())]
        command += ["--parent", str(os.getpid()), "--address", f"http://{address}", "--folder", str(folder)]
        with pinned(core):
            process = subprocess.Popen(
                command, cwd=folder, env={**one.environment, **settings}, pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            server = Server(name, address, process.pid, headers)
            answers(server, process, [SMALL], log)
            yield server
        finally:
            end(process)


def cost_of_models(
    folder: Path,
    model: Path,
    driver: Driver,
    core: int | None,
    loaded: Sequence[int],
    registered_only: int,
    rounds: int,
) -> dict[str, dict[str, list[Turn]]]:
    """{how many: {"JSON": turns, "binary": turns}}: requests to one model of a server that has so many loaded, and to one that has one loaded and
    so many more registered.
    """
    with contextlib.ExitStack() as stack:
        running: dict[str, Server] = {}
        for count in loaded:
            one, key = stack.enter_context(
                registered(
                    folder / f"loaded-{count}", {SMALL: model}, {"MODELKEEP_MODELS__MAX_CONCURRENT_MODELS": str(count)}
                )
            )
            # No "-": a name that ends with "-28" would say the side of its images.
            more = [f"more{number}" for number in range(1, count)]
            for name in more:
                add_model(one, name, model)
            running[f"{count} loaded"] = _one(stack, one, key, core, more)
        one, key = stack.enter_context(registered(folder / "registered", {SMALL: model}, {}))
        for number in range(registered_only):
            add_model(one, f"more{number}", model, routed=False)
        running[f"1 loaded, {registered_only:,} more registered"] = _one(stack, one, key, core)
        found: dict[str, dict[str, list[Turn]]] = {name: {} for name in running}
        for kind, shown in (("json", "JSON"), ("binary", "binary")):
            turns = in_turns(
                tuple(running), rounds, lambda name, kind=kind: driver.turn(running[name].target(SMALL, kind), CONNECTIONS, SECONDS, running[name].cpu_seconds)  # type: ignore[misc]
            )  # fmt: skip
            for name in running:
                found[name][shown] = turns[name]
        return found


def _one(stack: contextlib.ExitStack, one: Box, key: str, core: int | None, more: Sequence[str] = ()) -> Server:
    """Models are loaded at their first request: each of `more` has had one."""
    server = stack.enter_context(child(one, "one", {"Authorization": f"Bearer {key}"}, core))
    for name in more:
        status, said = ask(server.target(name, "binary"))
        if status != 200:
            raise Absent(f"{name} of {len(more) + 1} models does not answer: {status} {said[:200]}")
    return server


def take_out(feature: str) -> None:
    """Make this process serve without a feature. Raises AttributeError where that has moved: what is left in would be measured as free."""
    from serving import entry
    from serving.compute import engine
    from serving.figures import telemetry
    from serving.wire import v2

    if feature == "keys":
        _replace(entry, "Guard", lambda app, *_args, **_options: app)
    elif feature == "metrics":
        _replace(engine.LoadedVersion, "_count", lambda self, work, latency_seconds, *, error: None)
        _replace(telemetry.VersionTelemetry, "answered", lambda self, code: None)
    elif feature == "validation":
        _replace(engine, "Codec", _trusting(v2))
    else:
        raise ValueError(f"{feature}: there are {', '.join(WITHOUT)}")


def _replace(owner: Any, name: str, instead: Any) -> None:
    getattr(owner, name)
    setattr(owner, name, instead)


def _trusting(v2: Any) -> Any:
    """A codec that believes what it reads: one input of FP32, of the shape that it says, the answer as asked for."""
    import numpy as np
    import orjson

    class Trusting(v2.Codec):  # type: ignore[misc]
        def decode(self, body: bytes, header_length: int | None) -> Any:
            document = orjson.loads(body if header_length is None else memoryview(body)[:header_length])
            item = document["inputs"][0]
            if header_length is not None:
                array = np.frombuffer(body, np.float32, offset=header_length)
                return v2.InferRequest(None, {item["name"]: array.reshape(item["shape"])}, None, True, {})
            array = np.array(item["data"], dtype=np.float32)
            return v2.InferRequest(None, {item["name"]: array.reshape(item["shape"])}, None, False, {})

    return Trusting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--without", choices=WITHOUT)
    options, rest = parser.parse_known_args()
    if options.without:
        take_out(options.without)
    from serving import child as process

    return process.main(rest)


if __name__ == "__main__":
    sys.exit(main())
