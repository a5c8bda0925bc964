"""Private MariaDB and PostgreSQL servers, one of each for all these tests, with a fresh database for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.registry.conftest import mounted as mounted
from tests.registry_servers import Server, starter


@pytest.fixture(scope="session")
def mariadb(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("mariadb", program)
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgresql(program: Callable[[str], Path]) -> Iterator[Server]:
    server = starter("postgresql", program)
    yield server
    server.close()
