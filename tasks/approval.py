"""Waiting for an approval, and going on after it: in the process that asked, or by the run that Prefect keeps suspended.

Prefect is asked by plain HTTP, so that the command line and the watch loop need not import it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import httpx

from registry import approvals, leases, promotions
from registry.database import Database
from registry.errors import ConflictError, UnavailableError
from tasks import prefect_api
from tasks.promoting import Promoting

LOOK_AGAIN: Final = "look again"
"""What a form says when it has no answer of its own: somebody answered in another way, so the run shall look."""
_DEPLOYMENT = "promote-model/promote-model"
_START_SECONDS = 120.0
"""A run that has not taken the promotion up for so long does not count as going on with it."""


def ask(work: Promoting) -> bool:
    """Let the promotion wait for a person, where its policy wants that. Returns whether it waits now."""
    if not approvals.asks(work.policy) or "approved" in work.operation.progress:
        return False
    state = approvals.ask(work.database, work.operation, deadline_seconds=work.policy.approval_deadline_seconds)
    work.tell(in_words(state))
    return True


def in_words(state: dict[str, Any]) -> str:
    """What is waited for, for a person to read (`registry.approvals.state_of`)."""
    identity = state["promotion"]
    if state["approved"]:
        return f"promotion {identity} is approved; it goes on when its run does: modelkeep promotions resume {identity}"
    return (
        f"promotion {identity} waits for an approval until {state['until']} ({state['given']} of {state['needed']}): "
        f"{state['question']}. Who can give it: {state['whom']}. modelkeep approve {identity} --note TEXT, "
        f"or modelkeep reject {identity} --note TEXT"
    )


def wait(
    database: Database,
    identity: str,
    *,
    poll_seconds: float,
    tell: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait in this process until the promotion is approved or over; each poll says in the registry that somebody is there.

    A registry that does not answer is waited for as well. An interrupt leaves the promotion waiting.
    """
    told = 0
    try:
        while True:
            try:
                approvals.expire_due(database)
                with database.read() as session:
                    state = approvals.state_of(session, identity)
                    beats = leases.waiting(session, state["environment"])
                if state["state"] != promotions.AWAITING or state["approved"]:
                    return
                for answer in state["answers"][told:]:
                    note = "" if answer["counts"] else f" does not count: {answer['why_not']}"
                    tell(f"the answer of {answer['actor']} ({answer['verdict']}){note}")
                told = len(state["answers"])
                subject = leases.subject_of(state["environment"], state["model"])
                for beat in beats:
                    if beat.subject == subject:
                        leases.beat_waiting(database, subject, beat.token)
            except UnavailableError as error:
                tell(f"{error}; it is waited for")
            sleep(poll_seconds)
    except KeyboardInterrupt:
        tell(f"promotion {identity} goes on waiting: modelkeep approve {identity} --note TEXT")
        raise


def resume(api_url: str, flow_run_id: str) -> bool:
    """Tell the suspended run to look at the registry again. False where it is not suspended. Raises UnavailableError."""
    answer = prefect_api.post(api_url, f"/flow_runs/{flow_run_id}/resume", {"run_input": {"decision": LOOK_AGAIN}})
    if answer["status"] == "REJECT" and (run_of(api_url, flow_run_id) or {}).get("state_type") == "PAUSED":
        # Killed after it was suspended and before it left its form: without a form it can only be scheduled again.
        state = {"type": "SCHEDULED", "name": "Resuming"}
        answer = prefect_api.post(api_url, f"/flow_runs/{flow_run_id}/set_state", {"state": state, "force": True})
    return bool(answer["status"] == "ACCEPT")


def run_of(api_url: str, flow_run_id: str) -> dict[str, Any] | None:
    """The run as Prefect has it, None where that server does not know it. Raises UnavailableError."""
    answer = prefect_api.ask(api_url, "GET", f"/flow_runs/{flow_run_id}")
    return None if answer.status_code == httpx.codes.NOT_FOUND else dict(answer.json())


def start(api_url: str, state: dict[str, Any]) -> str | None:
    """A new run of the deployment that goes on with an approved promotion. None where one is on its way. Raises UnavailableError."""
    tag = f"promotion:{state['promotion']}"
    runs = prefect_api.post(api_url, "/flow_runs/filter", {"flow_runs": {"tags": {"all_": [tag]}}})
    for run in runs:
        waits = run["state_type"] in ("SCHEDULED", "PENDING")
        if waits or (run["state_type"] == "RUNNING" and run["estimated_run_time"] < _START_SECONDS):
            return None
    request = {
        "model": state["model"],
        "version": state["version"],
        "environment": state["environment"],
        "carry_on": state["promotion"],
    }
    found = prefect_api.ask(api_url, "GET", f"/deployments/name/{_DEPLOYMENT}")
    if found.status_code == httpx.codes.NOT_FOUND:
        raise UnavailableError(f"Prefect at {api_url} has no deployment {_DEPLOYMENT}: write it with modelkeep deploy")
    run = prefect_api.post(
        api_url,
        f"/deployments/{found.json()['id']}/create_flow_run",
        # Two that start one at the same time get the same run.
        {"parameters": {"request": request}, "tags": [tag], "idempotency_key": f"{tag}-{len(runs)}"},
    )
    return str(run["name"])


def go_on(database: Database, api_url: str, identity: str) -> str | None:
    """After an answer: wake the run that waits for it. A line that says so, or None. Raises UnavailableError, NotFoundError."""
    with database.read() as session:
        state = approvals.state_of(session, identity)
    if state["flow_run_id"] is None or (state["state"] == promotions.AWAITING and not state["approved"]):
        return None
    run = run_of(api_url, state["flow_run_id"])
    if run is None or run["state_type"] != "PAUSED" or not resume(api_url, state["flow_run_id"]):
        return None
    return f"run {run['name']} goes on with promotion {identity}"


class Carrier:
    """Sees to it that what was answered goes on, whoever answered and whoever died: looked at now and then by one loop."""

    def __init__(self, database: Database, api_url: str, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._database, self._api_url, self._monotonic = database, api_url, monotonic
        self._name = f"carrier:{socket.gethostname()}:{os.getpid()}"
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}

    def look(self) -> list[str]:
        """End what is overdue, wake suspended runs, start new ones. A line for each. Raises UnavailableError."""
        lines = approvals.expire_due(self._database, observer=self._name)
        with self._database.read() as session:
            waiting = approvals.waiting(session)
        for one in waiting:
            run = run_of(self._api_url, one.flow_run_id) if one.flow_run_id is not None else None
            kind = run["state_type"] if run is not None else None
            if one.approved:
                lines += filter(None, [self._go_on(one, run)])
            elif kind in ("CANCELLED", "CANCELLING"):
                reason = "its run was cancelled in Prefect while it waited for an approval"
                if approvals.withdraw(self._database, one.promotion, reason=reason, actor=self._name):
                    lines.append(f"promotion {one.promotion} is withdrawn: {reason}")
        return lines + self._wake_ended()

    def _go_on(self, one: approvals.Waiting, run: dict[str, Any] | None) -> str | None:
        kind = run["state_type"] if run is not None else None
        left_lying = self._unmoved_seconds(one)
        if kind == "PAUSED":
            return go_on(self._database, self._api_url, one.promotion)
        if kind in ("SCHEDULED", "PENDING"):
            return None
        # A process that waits for its approval moves the heartbeat; the run of a deployment needs some time to come up.
        patience = _START_SECONDS if kind == "RUNNING" and run is not None and run["deployment_id"] else 0.0
        if one.beat is None or left_lying < max(patience, one.beat.ttl_seconds):
            return None
        with self._database.read() as session:
            state = approvals.state_of(session, one.promotion)
        name = start(self._api_url, state)
        return name and f"run {name} goes on with promotion {one.promotion}, which was approved and left lying"

    def _unmoved_seconds(self, one: approvals.Waiting) -> float:
        """How long we have watched an approved promotion with nobody at it; wall clocks are not compared."""
        now, mark = self._monotonic(), (one.beat.token, one.beat.heartbeat) if one.beat is not None else ("", 0)
        if self._seen.get(one.promotion, (None, 0.0))[0] != mark:
            self._seen[one.promotion] = (mark, now)
        return now - self._seen[one.promotion][1]

    def _wake_ended(self) -> list[str]:
        """A run that is suspended for a promotion that is over has only to say how it ended."""
        query = {
            "flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}},
            "flows": {"name": {"any_": ["promote-model"]}},
        }
        lines = []
        for run in prefect_api.post(self._api_url, "/flow_runs/filter", query):
            with self._database.read() as session:
                row = promotions.of_run(session, run["id"])
            if row is not None and row.state not in promotions.ACTIVE and resume(self._api_url, run["id"]):
                lines.append(f"run {run['name']} ends: its promotion is {row.state}")
        return lines


def carried_on(
    database: Database, identity: str, *, ttl_seconds: float, flow_run_id: str | None
) -> promotions.Operation | None:
    """Go on with an approved promotion; None where it has to be looked at again (over, or not approved any more).

    Raises ConflictError where another process goes on with it.
    """
    try:
        return approvals.carry_on(database, identity, ttl_seconds=ttl_seconds, flow_run_id=flow_run_id)
    except ConflictError:
        with database.read() as session:
            row = promotions.get(session, identity)
            if row.state in (promotions.RUNNING, promotions.SOAKING):
                raise
        return None
