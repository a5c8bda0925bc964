"""A flow whose output nobody reads any more: the worker that read it was killed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture
def unread(prefect_api: str) -> Iterator[logging.Logger]:
    """A logger that writes as Prefect's do, to a pipe that nobody reads."""
    from prefect.logging.handlers import PrefectConsoleHandler

    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(1)  # on a broken pipe rich points descriptor 1 at /dev/null
    logger = logging.getLogger("modelkeep.tests.unread")
    logger.propagate = False
    with os.fdopen(writing, "w") as stream:
        handler = PrefectConsoleHandler(stream=stream)
        logger.addHandler(handler)
        try:
            yield logger
        finally:
            logger.removeHandler(handler)
            os.dup2(kept, 1)
            os.dup2(kept, writing)  # what is left in the buffer goes somewhere
            os.close(kept)


def test_prefects_console_ends_the_process_of_a_flow_that_nobody_reads(unread: logging.Logger) -> None:
    """What we defend against. When this fails, the defence can go."""
    with pytest.raises(SystemExit):
        unread.warning("hello")


def test_a_flow_outlives_the_reader_of_its_output(unread: logging.Logger) -> None:
    from flows.common import outlive_readers

    outlive_readers()
    unread.warning("hello")
    unread.warning("and again")
