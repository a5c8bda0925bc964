"""One private Prefect server for all tests of the flows, and this process set up to use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.prefect_server import environment, prefect_server


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's address. Prefect is imported only here, after its variables are set."""
    folder: Path = tmp_path_factory.mktemp("prefect")
    with prefect_server(folder) as url, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(folder, url).items():
            patch.setenv(name, value)
        from prefect.settings import (
            PREFECT_API_URL,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
            PREFECT_LOGGING_TO_API_ENABLED,
            temporary_settings,
        )

        # Without the heartbeat each flow run saves a second of its thread's sleep.
        settings = {
            PREFECT_API_URL: url,
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
            PREFECT_LOGGING_TO_API_ENABLED: False,
        }
        with temporary_settings(settings):
            yield url
