"""Promotions, soaks, approvals, commands, rollbacks, deaths, restarts and restores in any order: what must be true is true after each step."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import select

from registry import approvals, catalogue, commands, leases, promotions, rollbacks
from registry.actor import Who
from registry.database import Database
from registry.errors import ModelkeepError
from registry.promotions import Operation
from registry.schema import AuditEvent, Environment, Lease, Promotion, PromotionCommand, Route, RouteChange, Version
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL

pytestmark = pytest.mark.sqlite  # it looks into the file beside the registry
VERSIONS = ("1", "2", "3")
WHO = Who("os:test")
OUTCOMES: tuple[promotions.Outcome, ...] = ("promoted", "rejected", "withdrawn", "held", "failed")


class Promotions(RuleBasedStateMachine):
    """All operations that ever began stay at hand, the dead ones too: a zombie may try anything at any time."""

    template: Path

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="promotions"))
        self.database = kit.prepared(self.folder, self.template)
        self.observer = sqlite3.connect(self.folder / "registry.db")
        self.operations: list[Operation] = []
        for version in VERSIONS:
            kit.add_version(self.database, version)

    def teardown(self) -> None:
        verdict = kit.verdict(self.database)
        self.observer.close()
        self.database.dispose()
        shutil.rmtree(self.folder)
        assert verdict.faults == []

    def commits(self) -> int:
        """A number that every commit of another connection changes."""
        return int(self.observer.execute("PRAGMA data_version").fetchone()[0])

    def attempt(self, what: Callable[[], Any]) -> Any:
        """What is refused changes nothing."""
        before = self.commits()
        try:
            return what()
        except ModelkeepError:
            assert self.commits() == before
            return None

    @rule(version=st.sampled_from(VERSIONS), run=st.sampled_from([None, "run-1", "run-2"]))
    def begin(self, version: str, run: str | None) -> None:
        if (operation := self.attempt(lambda: kit.begin(self.database, version, flow_run_id=run))) is not None:
            self.operations.append(operation)

    @precondition(lambda self: self.operations)
    @rule(data=st.data(), step=st.sampled_from([kit.shadow, kit.weigh, kit.promote]))
    def go_on(self, data: st.DataObject, step: Callable[[Database, Operation], Any]) -> None:
        operation = self.choose(data)
        kept, lives = (operation.step, operation.progress), self.lives(operation)
        before = self.commits()
        self.attempt(lambda: step(self.database, operation))
        if self.commits() == before:
            assert (operation.step, operation.progress) == kept
        else:
            assert lives, "a dead token wrote"

    @precondition(lambda self: self.operations)
    @rule(data=st.data(), run=st.sampled_from([None, "run-1", "run-2", "run-3"]))
    def carry_on(self, data: st.DataObject, run: str | None) -> None:
        """Whatever its state: mostly a soak whose lease is free."""
        identity = self.choose(data).id
        again = self.attempt(
            lambda: promotions.carry_on(self.database, identity, ttl_seconds=30.0, flow_run_id=run, holder="carrier")
        )
        if again is not None:
            self.operations.append(again)

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        operation = self.choose(data)
        self.attempt(lambda: promotions.let_go(self.database, operation, "told to end"))

    @precondition(lambda self: self.operations)
    @rule(data=st.data(), command=st.sampled_from(commands.COMMANDS))
    def tell(self, data: st.DataObject, command: str) -> None:
        identity = self.choose(data).id
        self.attempt(lambda: commands.give(self.database, identity, command=command, who=WHO, reason="because"))

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        """What a carrier does at each look, a dead one too."""
        operation, lives = self.choose(data), False
        with self.database.read() as session:
            waiting = [one for one in commands.standing(session, operation.id).waiting if one.command != "advance"]
        for given in waiting:
            lives = self.lives(operation)
            taken = self.attempt(lambda given=given: commands.take(self.database, operation, given))
            assert lives or taken is None, "a dead carrier took a command"

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        operation = self.choose(data)
        if operation.step == "begin":
            self.attempt(lambda: approvals.ask(self.database, operation, deadline_seconds=600.0))

    @precondition(lambda self: self.operations)
    @rule(data=st.data(), verdict=st.sampled_from(["approve", "reject"]))
    def answer(self, data: st.DataObject, verdict: approvals.Verdict) -> None:
        identity = self.choose(data).id
        self.attempt(lambda: approvals.give(self.database, identity, verdict=verdict, who=WHO, note=""))

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def go_on_approved(self, data: st.DataObject) -> None:
        identity = self.choose(data).id
        again = self.attempt(lambda: approvals.carry_on(self.database, identity, ttl_seconds=30.0, flow_run_id="run-3"))
        if again is not None:
            self.operations.append(again)

    @rule()
    def restore(self) -> None:
        """A registry that was restored has a new epoch: every token of before is dead."""
        kit.new_epoch(self.database)

    @rule(version=st.sampled_from(VERSIONS))
    def archive(self, version: str) -> None:
        """What is served, on its way there, or what a soak would go back to, is refused."""
        self.attempt(lambda: catalogue.archive(self.database, MODEL, version, reason="old"))

    @precondition(lambda self: self.operations)
    @rule(data=st.data(), outcome=st.sampled_from(OUTCOMES))
    def end(self, data: st.DataObject, outcome: promotions.Outcome) -> None:
        operation = self.choose(data)
        self.attempt(lambda: kit.end(self.database, operation, outcome))

    @rule(version=st.sampled_from(VERSIONS))
    def go_all_the_way(self, version: str) -> None:
        if (operation := self.attempt(lambda: kit.begin(self.database, version))) is not None:
            if operation.stable is not None:
                kit.canary(self.database, operation)
            kit.promote(self.database, operation)
            kit.end(self.database, operation, "promoted")

    @precondition(lambda self: self.operations)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        operation = self.choose(data)
        self.attempt(lambda: leases.beat(self.database, operation.held))

    @rule()
    def expire(self) -> None:
        with self.database.read() as session:
            beats = leases.beats(session, ENVIRONMENT)
        for beat in beats:
            assert promotions.expire(self.database, ENVIRONMENT, beat, observer="replica:r1") is not None

    @rule(to=st.sampled_from([None, *VERSIONS]), emergency=st.booleans())
    def roll_back(self, to: str | None, emergency: bool) -> None:
        self.attempt(
            lambda: rollbacks.roll_back(
                self.database,
                environment=ENVIRONMENT,
                model=MODEL,
                to=to,
                reason="",
                ttl_seconds=1.0,
                emergency=emergency,
            )
        )

    def lives(self, operation: Operation) -> bool:
        """Whether an operation holds the lease, by the rows alone."""
        with self.database.read() as session:
            lease = session.get_one(Lease, operation.held.subject)
            epoch = session.get_one(Environment, ENVIRONMENT).epoch
        return (
            lease.state != leases.RELEASED
            and lease.token == operation.held.token
            and lease.token.rpartition(".")[0] == epoch
        )

    def choose(self, data: st.DataObject) -> Operation:
        """Mostly the newest: it is the one that may be alive."""
        newest = len(self.operations) - 1
        return self.operations[data.draw(st.integers(0, newest).map(lambda n: n if n % 3 == 0 else newest))]

    @invariant()
    def the_registry_is_in_step(self) -> None:
        with self.database.read() as session:
            route = session.get(Route, (ENVIRONMENT, MODEL))
            lease = session.get(Lease, leases.subject_of(ENVIRONMENT, MODEL))
            active = session.scalars(select(Promotion).where(Promotion.state.in_(promotions.ACTIVE))).all()
            archived = set(session.scalars(select(Version.version).where(Version.state == "archived")))
            told_all = session.scalars(select(PromotionCommand)).all()
            known = set(session.scalars(select(Version.version)))
            changes = session.scalars(select(RouteChange).order_by(RouteChange.generation)).all()
            events = session.scalars(select(AuditEvent.action).where(AuditEvent.action.startswith("route.")))
            told = list(events.all())
        places = kit.places(self.database)
        stable = [version for version, status in places.items() if status == "stable"]
        assert len(stable) <= 1, "never two stable versions"
        assert stable == ([route.stable] if route is not None and route.stable is not None else [])
        if route is not None:
            live = {route.stable, route.candidate} - {None}
            assert live <= known, "never a route to a version that is not there"
            assert not live & archived, "never a route to an archived version"
            assert route.candidate is None or route.candidate != route.stable
            if route.weight:
                assert places[str(route.candidate)] == "candidate"
            if not active:
                assert (route.candidate, route.watch, route.shadow, route.weight) == (None, False, False, 0.0)
        held = lease is not None and lease.state != leases.RELEASED
        assert len(active) <= 1, "never two promotions of a model under way"
        if held and lease is not None:
            assert [promotion.id for promotion in active] == [lease.promotion]
            waits = lease.state == leases.AWAITING
            assert not waits or active[0].state == promotions.AWAITING
        else:
            assert all(promotion.state == promotions.SOAKING for promotion in active), (
                "only a soak goes on without a lease"
            )
        for promotion in active:
            assert (promotion.state == promotions.SOAKING) == bool(promotion.progress.get("promoted"))
        if active and active[0].state == promotions.SOAKING:
            assert route is not None and (route.stable, route.promotion) == (active[0].version, active[0].id)
        assert len({o.held.token for o in self.operations if self.lives(o)}) <= 1, "never two live carriers"
        waiting = [row for row in told_all if row.taken_at is None]
        assert all(row.command != "stop" for row in waiting), "a stop never waits"
        assert {row.promotion for row in waiting} <= {promotion.id for promotion in active}, (
            "nothing waits after the end"
        )
        assert len([row for row in waiting if row.command == "advance"]) <= 1, "a repeated advance skips no stage"
        assert told == [f"route.{change.kind}" for change in changes]
        assert [change.generation for change in changes] == list(range(1, len(changes) + 1))


def run(template: Path, **changes: Any) -> None:
    Promotions.template = template
    Promotions.TestCase.settings = settings(deadline=None, suppress_health_check=list(HealthCheck), **changes)
    Promotions.TestCase("runTest").debug()


def test_no_order_of_steps_brings_the_registry_out_of_step(template: Path) -> None:
    phases = (Phase.explicit, Phase.reuse, Phase.generate)  # to shrink what fails takes minutes: the long test does it
    run(template, max_examples=20, stateful_step_count=15, phases=phases, report_multiple_bugs=False)


@pytest.mark.long
@pytest.mark.timeout(7200)  # a second or so an example
def test_thousands_of_orders_bring_it_out_of_step_neither(template: Path) -> None:
    run(template, max_examples=2000, stateful_step_count=50)
