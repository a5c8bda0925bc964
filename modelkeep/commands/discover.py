"""`models discover`: what is new in a folder is registered, once or for as long as the command runs."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from modelkeep import output, shown
from modelkeep.commands.common import Json, opened


def models_discover(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="NAME.onnx, NAME/VERSION.onnx, NAME/VERSION/ in it.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until Ctrl-C; with --json, one document a line.")
    ] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 2.0,
    as_json: Json = False,
) -> None:
    """Register the model files of a folder that are new. A file is taken when two looks see it the same."""
    from registry.discovery import Discovery, scan

    next(scan(folder), None)  # a folder that is none is bad usage, before anything is opened
    with opened() as context:
        discovery = Discovery(
            context.database, context.artifacts, folder, max_bytes=context.settings.models.max_file_bytes
        )
        if not watch:
            discovery.look()
            time.sleep(interval)
            found = discovery.look()
            if found.failure is not None:
                raise found.failure
            told = found.as_dict()
            if as_json:
                output.document(told)
            elif any(told.values()):
                shown.look(told)
            else:
                output.say(f"there are no model files in {folder}")
            raise typer.Exit(_exit_code(told))
        away = False
        with _ended() as ended:
            while True:
                found = discovery.look()
                if found.failure is not None and not away:
                    output.problem(f"{found.failure}; going on with the next look")
                elif found.failure is None and away:
                    output.problem("the registry answers again")
                away = found.failure is not None
                # What is waiting is taken up by the next look; to tell of it would be a line every look.
                told = {**found.as_dict(), "waiting": []}
                if any(told.values()) and as_json:
                    sys.stdout.write(json.dumps(told) + "\n")
                    sys.stdout.flush()
                elif any(told.values()):
                    shown.look(told)
                if ended(interval):
                    break


def _exit_code(found: dict[str, Any]) -> int:
    """0 where all is registered; 3 where some is and some is wrong or was left alone; 1 where nothing is."""
    left = found["wrong"] + found["waiting"]
    return 0 if not left else 3 if found["registered"] or found["known"] else 1


@contextmanager
def _ended() -> Iterator[Callable[[float], bool]]:
    """Waits, up to so many seconds, for Ctrl-C or SIGTERM. The first one ends the watch after what it is at, a second one at once."""
    reading, writing = os.pipe()

    def tell(number: int, _frame: Any) -> None:
        os.write(writing, b"x")
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda seconds: bool(select.select([reading], [], [], seconds)[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reading)
        os.close(writing)
