"""What every layer of tests shares: layers marked by folder, free ports, system programs, counted skips."""

from __future__ import annotations

import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.registry_servers import KINDS, Server, starter

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("unit", "integration", "e2e")
WANT = "for want of: "

# Where a Debian package puts a program under another name or outside of an ordinary user's PATH.
OTHER_PLACES: dict[str, tuple[str, ...]] = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "mariadbd": ("mariadbd", "/usr/sbin/mariadbd"),
    "postgres": ("postgres", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True))),
    "redis-server": ("redis-server", "/usr/bin/redis-server"),
}

ELSEWHERE = {
    "sqlite": "are about SQLite's own file",
    "server": "are about database servers (the layers mariadb and postgresql run them)",
}

left_out: Counter[str] = Counter()


def find_program(name: str) -> Path | None:
    """The path of a system program, or None; knows the other names that distributions give it."""
    for candidate in OTHER_PLACES.get(name, (name,)):
        if found := shutil.which(candidate):
            return Path(found)
    return None


@pytest.fixture(scope="session")
def program() -> Callable[[str], Path]:
    """`program("chromium")` is its path; where it is missing the test is skipped, and the summary counts it."""

    def require(name: str) -> Path:
        path = find_program(name)
        if path is None:
            pytest.skip(WANT + name)
        return path

    return require


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--registry-database",
        choices=("sqlite", *KINDS),
        default="sqlite",
        help="the database under the tests of the registry; a server is started privately, and only tests that use it are run",
    )


@pytest.fixture(scope="session")
def registry_server(request: pytest.FixtureRequest, program: Callable[[str], Path]) -> Iterator[Server | None]:
    """The private server that --registry-database names, None for SQLite."""
    kind = request.config.getoption("--registry-database")
    if kind == "sqlite":
        yield None
        return
    server = starter(kind, program)
    yield server
    server.close()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """`free_port()` is a TCP port of 127.0.0.1 that nobody listens on; the same test never gets one twice."""
    given: set[int] = set()

    def find() -> int:
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = int(probe.getsockname()[1])
            if port not in given:
                given.add(port)
                return port

    return find


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return ROOT


# First, because pytest's own hook deselects by marker: the marks must be there by then.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        layer = item.path.relative_to(ROOT / "tests").parts[0]
        if layer in LAYERS:
            item.add_marker(layer)
    on_sqlite = config.getoption("--registry-database") == "sqlite"
    other = "server" if on_sqlite else "sqlite"
    chosen = [
        item
        for item in items
        if (on_sqlite or "registry_server" in getattr(item, "fixturenames", ())) and not item.get_closest_marker(other)
    ]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
        items[:] = chosen


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in ("gpu", "long", *ELSEWHERE):
            if item.get_closest_marker(marker):
                left_out[marker] += 1
                break


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, count in reasons.most_common():
        text = reason if reason.startswith(WANT) else f"because: {reason}"
        terminalreporter.write_line(f"SKIPPED {_tests(count)} {text}", yellow=True, bold=True)
    for marker, count in sorted(left_out.items()):
        why = ELSEWHERE.get(marker, f"only `make test-{marker}` runs")
        terminalreporter.write_line(f"left out: {_tests(count)} that {why}")


def _tests(count: int) -> str:
    return f"{count} test{'' if count == 1 else 's'}"
