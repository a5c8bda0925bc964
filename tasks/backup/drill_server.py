"""A server over what a drill restored: on a free port of loopback, on the CPU, and its answers beside those of the live one."""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from registry import schema, untracked
from registry.client_tls import verify
from registry.connect import open_database
from registry.database import Database
from registry.errors import ModelkeepError, UnavailableError
from registry.settings import Settings
from registry.store import DirectoryStore
from tasks import answering, servers
from tasks.backup.chain import Program
from tasks.backup.components import Target

START_SECONDS = 120.0
READY_SECONDS = 600.0
END_SECONDS = 20.0
REQUEST_SECONDS = 60.0
RELATIVE, ABSOLUTE = 1e-3, 1e-5
"""Two servers may compute on other devices, in batches of other sizes."""
SAME, DIFFERS, ALONE = "same", "differs", "not compared"


@dataclass(frozen=True, slots=True)
class Model:
    """The answer of the restored server beside the live one's. `why`: what differs, or why there was nothing to compare with."""

    model: str
    version: str
    outcome: str
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Served:
    """`seconds`: from its start until every route was served. `why` None: it served all of them."""

    seconds: float | None = None
    models: tuple[Model, ...] = ()
    why: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "models": [one.as_dict() for one in self.models], "why": self.why}


def serve_and_compare(settings: Settings, home: Target, artifacts: Path) -> Served:
    """Start a server over a restored registry and ask it for every route's answer. Nothing is raised for what it does wrong."""
    assert home.url is not None and home.path is not None
    database = Database(home.url)
    try:
        with database.read() as session:
            routes = [
                (str(route.model), str(route.stable))
                for route in session.scalars(
                    select(schema.Route)
                    .where(schema.Route.environment == settings.environment)
                    .order_by(schema.Route.model)
                )
                if route.stable is not None
            ]
        if not routes:
            return Served(0.0)
        began = time.monotonic()
        with _running(settings, home.url, home.path, artifacts) as address:
            late = _wait_until_served(address, dict(routes), settings.environment)
            if late:
                return Served(why="; ".join(late))
            seconds = round(time.monotonic() - began, 3)
            live, access = _live(settings)
            store = DirectoryStore(artifacts)
            models = [_compared(address, live, access, database, store, *route) for route in routes]
        return Served(seconds, tuple(models))
    except (ModelkeepError, httpx.HTTPError) as error:
        return Served(why=str(error) or type(error).__name__)
    finally:
        database.dispose()


@contextlib.contextmanager
def _running(settings: Settings, url: str, home: Path, artifacts: Path) -> Iterator[str]:
    """Its address. It has no settings but these, so that it reaches nothing of what is live."""
    keep = ("PATH", "LD_LIBRARY_PATH", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH")
    environment = {
        **{name: os.environ[name] for name in keep if name in os.environ},
        **untracked.told(os.environ),
        "MODELKEEP_HOME": str(home),
        "MODELKEEP_DATABASE_URL": url,
        "MODELKEEP_ARTIFACTS": str(artifacts),
        "MODELKEEP_ENVIRONMENT": settings.environment,
        "MODELKEEP_PROFILE": "cpu",
        "MODELKEEP_SERVERS": '["http://127.0.0.1:9"]',
        "MODELKEEP_SECURITY__REQUIRE_KEYS": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HOME": str(home),
    }
    log = home / "server.log"
    program = Program([sys.executable, "-P", "-m", "modelkeep", "serve", "--host", "127.0.0.1", "--port", "0"])
    with log.open("wb") as output:
        process = subprocess.Popen(
            program.launched(), cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield _address(process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The supervisor, and all that it has started: its child has a process group of its own."""
    import psutil

    try:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        started = []
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS)
    _, alive = psutil.wait_procs(started, timeout=END_SECONDS)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, timeout=END_SECONDS)
    process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        text = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"^serving \S+ at (\S+)$", text, re.MULTILINE):
            return found.group(1)
        if process.poll() is not None:
            raise UnavailableError(f"the server over what was restored ended with {process.returncode}: {text[-1000:]}")
        time.sleep(0.05)
    raise UnavailableError(f"the server over what was restored did not start in {START_SECONDS:.0f} s")


def _wait_until_served(address: str, routes: Mapping[str, str], environment: str) -> list[str]:
    """What is not served by then. A model that does not load is told at once by the server's own words."""
    deadline = time.monotonic() + READY_SECONDS
    late: list[str] = []
    with httpx.Client(base_url=address, timeout=REQUEST_SECONDS) as client:
        while True:
            with contextlib.suppress(httpx.TransportError):
                told = client.get("/api/v2/model-info").json()
                errors = told.get("errors", {})
                late = [
                    f"{model} {version}: {errors.get(f'{model}/{version}', 'is not served')}"
                    for model, version in routes.items()
                    if client.get(f"/v2/models/{model}/ready").status_code != 200
                ]
                if not late or any(f"{model}/{version}" in errors for model, version in routes.items()):
                    return late
            if time.monotonic() > deadline:
                return late or [
                    f"no answer from the server over what was restored in {READY_SECONDS:.0f} s ({environment})"
                ]
            time.sleep(0.2)


def _live(settings: Settings) -> tuple[str | None, servers.Access]:
    """A live server to compare with, where one answers."""
    try:
        database = open_database(settings)
        try:
            access = servers.access(database)
            living = servers.alive(database, settings.environment)
        finally:
            database.dispose()
        addresses = [*living.values(), *settings.servers]
    except ModelkeepError:
        addresses, access = list(settings.servers), servers.NOBODY
    for address in addresses:
        try:
            if httpx.get(f"{address}/v2/health/live", timeout=5.0, verify=verify(address)).status_code == 200:
                return address, access
        except httpx.HTTPError:
            continue
    return None, access


def _compared(
    address: str,
    live: str | None,
    access: servers.Access,
    database: Database,
    store: DirectoryStore,
    model: str,
    version: str,
) -> Model:
    tensors = answering.golden_row(database, store, model, version)
    try:
        with httpx.Client(base_url=address, timeout=REQUEST_SECONDS) as client:
            mine = _answer(client, model, version, tensors)
    except (httpx.HTTPError, UnavailableError) as error:
        return Model(model, version, DIFFERS, f"the restored server does not answer for it: {error}")
    if live is None:
        return Model(model, version, ALONE, "no live server answers")
    try:
        with httpx.Client(base_url=live, timeout=REQUEST_SECONDS, **access.reaching(live)) as client:
            theirs = _answer(client, model, version, tensors)
    except (httpx.HTTPError, UnavailableError) as error:
        return Model(model, version, ALONE, f"the live server gives no answer by this version: {error}")
    why = _difference(mine, theirs)
    return Model(model, version, DIFFERS if why else SAME, why)


def _answer(client: httpx.Client, model: str, version: str, tensors: answering.Tensors | None) -> Any:
    """Outputs by name; of a text model the text. Raises UnavailableError for an error of the server."""
    described = client.get(f"/v1/models/{model}")
    if described.status_code == 200 and described.json().get("object") == "model":
        asked = {"model": model, "prompt": "The drill", "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/completions", json=asked)
        if answer.status_code == 200:
            return {"text": [answer.json()["choices"][0]["text"]]}
    else:
        if tensors is None:
            tensors = answering.zeros(client.get(f"/v2/models/{model}/versions/{version}").raise_for_status().json())
        answer = client.post(f"/v2/models/{model}/versions/{version}/infer", json={"inputs": tensors})
        if answer.status_code == 200:
            return {one["name"]: [one["shape"], *one["data"]] for one in answer.json()["outputs"]}
    raise UnavailableError(f"{answer.status_code} {answer.text[:200]}")


def _difference(mine: Mapping[str, list[Any]], theirs: Mapping[str, list[Any]]) -> str:
    """Empty where both say the same."""
    if mine.keys() != theirs.keys():
        return f"outputs {sorted(mine)} and {sorted(theirs)}"
    for name, values in mine.items():
        others = theirs[name]
        if len(values) != len(others):
            return f"{name} has {len(values) - 1} numbers, the live server's {len(others) - 1}"
        for number, (one, other) in enumerate(zip(values, others, strict=True)):
            if not _close(one, other):
                return f"{name}[{number - 1}] is {one}, the live server's {other}"
    return ""


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        if isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other):
            return True
        return math.isclose(one, other, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(one == other)
