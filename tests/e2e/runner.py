"""A promotion in a process of its own, without Prefect: the steps of flows/promote.py in their order, on the same registry and lease.

What a kill of the flow's process does is a matter of the lease and the registry; Prefect's part (3 s to import, 20 s for a
server) would only make each of two hundred kills slower. tests/e2e/test_promote_command.py kills the real command once.
"""

from __future__ import annotations

import argparse
import faulthandler
import signal
import sys

from registry import promotions
from registry.database import Database
from registry.errors import FencedError, LockedError
from registry.settings import load_settings
from registry.store import open_store
from tasks import lease, outage, promotion, servers, soak
from tasks.promoting import Ended, Promoting
from tests.e2e.harness import mark_validated


def steps(work: Promoting) -> Ended:
    if work.operation.progress.get("promoted"):
        return soak.soak(work)
    if not work.operation.progress.get("validated"):
        promotion.validate(work)
    if work.operation.stable is None:
        return promotion.without_comparison(work, "it is the first version")
    if not servers.alive(work.database, work.operation.environment, timeout_seconds=servers.RESTART_SECONDS):
        return promotion.without_comparison(work, "no server answers")
    promotion.baseline(work)
    promotion.shadow(work)
    promotion.canary(work)
    promotion.promote(work)
    return soak.soak(work)


def main() -> int:
    """Exit 0 promoted, 1 ended otherwise, 4 locked or fenced off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("version")
    parser.add_argument("--unvalidated", action="store_true", help="put a validation on record without doing it")
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1)  # to see in its log where one hangs
    settings = load_settings()
    database = Database(settings.database_url, anchors=settings.home / "audit.anchors")
    database.prepare()
    artifacts = open_store(settings.artifacts)
    print("waiting", flush=True)
    if sys.stdin.readline().strip() != "go":
        return 2
    try:
        operation = lease.taken(
            database, settings.environment, options.model,
            lambda: promotions.begin(
                database, environment=settings.environment, model=options.model, version=options.version,
                policy=settings.promotion, strategy="canary", ttl_seconds=settings.lease_seconds, flow_run_id=None,
            ),
        )  # fmt: skip
    except LockedError as error:
        print(error, flush=True)
        return 4
    with lease.kept(database, operation.held) as keeper:
        if options.unvalidated:
            mark_validated(database, operation)
        work = Promoting(
            database, artifacts, settings.home / "cache", operation, keeper, poll_seconds=settings.poll_seconds
        )
        try:
            ended = outage.steadfast(work, steps)
            assert ended is not None, "no approval was asked for"
        except Ended as early:
            ended = early
        except FencedError as error:
            found = outage.answered(
                database,
                lambda session: promotion.ended_in(session, operation.id),
                outage.Outage(tell=print),
            )
            if found is None:
                print(f"fenced off: {error}", flush=True)
                return 4
            ended = found
        except BaseException as error:
            promotion.failed(work, error)
            raise
    print(f"ended {ended.outcome}: {ended.reason}", flush=True)
    return 0 if ended.outcome == "promoted" else 1


if __name__ == "__main__":
    sys.exit(main())
