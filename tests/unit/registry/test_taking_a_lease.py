"""Beginning an operation where another holds the lease: wait for a dead one, give way to a living one."""

from __future__ import annotations

import pytest

from registry import leases, promotions
from registry.database import Database
from registry.errors import LockedError
from registry.promotions import Operation
from tasks import lease
from tests.unit.registry import kit


@pytest.fixture
def two(database: Database) -> Database:
    for version in "123":
        kit.add_version(database, version)
    kit.stable_by(database, "1")
    return database


def taken(database: Database, begin: object, clock: kit.Clock) -> Operation:
    def sleep(seconds: float) -> None:
        clock.seconds += seconds

    return lease.taken(  # type: ignore[return-value]
        database,
        kit.ENVIRONMENT,
        kit.MODEL,
        begin,
        sleep=sleep,
        monotonic=clock,  # type: ignore[arg-type]
    )


def expire(database: Database) -> None:
    with database.read() as session:
        (beat,) = leases.beats(session, kit.ENVIRONMENT)
    assert promotions.expire(database, kit.ENVIRONMENT, beat, observer="replica:r1") is not None


def test_a_lease_that_somebody_else_ended_between_the_try_and_the_look_is_taken(two: Database) -> None:
    kit.begin(two, "2")
    tries: list[int] = []

    def begin() -> Operation:
        tries.append(1)
        try:
            return kit.begin(two, "3")
        except LockedError:
            expire(two)  # a server sees it stand still at this very moment
            raise

    assert taken(two, begin, kit.Clock()).version == "3"
    assert len(tries) == 2


def test_a_lease_that_stands_still_is_ended_here(two: Database) -> None:
    kit.begin(two, "2", ttl_seconds=3.0)
    assert taken(two, lambda: kit.begin(two, "3"), kit.Clock()).version == "3"


def test_a_lease_that_moves_is_somebodys(two: Database) -> None:
    held = kit.begin(two, "2", ttl_seconds=3.0).held

    def begin() -> Operation:
        try:
            return kit.begin(two, "3")
        finally:
            leases.beat(two, held)

    with pytest.raises(LockedError, match="is locked by promotion of digits 2"):
        taken(two, begin, kit.Clock())


def test_what_is_refused_although_the_lease_is_free_is_refused(two: Database) -> None:
    tries: list[int] = []

    def begin() -> Operation:
        tries.append(1)
        raise LockedError("another process carries it")

    with pytest.raises(LockedError, match="another process carries it"):
        taken(two, begin, kit.Clock())
    assert len(tries) < 10
