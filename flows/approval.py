"""The approval in a run: the form of a suspended run, or waiting in the process of a command."""

from __future__ import annotations

import time
from typing import Literal

from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field, ValidationError

from flows.common import Connections, logger, run_id
from registry import approvals, promotions
from registry.actor import Who
from registry.errors import ConflictError, LockedError, UnavailableError
from registry.promotions import Operation
from tasks import approval
from tasks.promoting import Ended
from tasks.promotion import ended_meanwhile

_AFTER_DEADLINE_SECONDS = 3600
"""Prefect fails a run that is suspended for longer than its deadline; ours is kept by the registry, so Prefect's comes later."""


class Answer(RunInput):
    """The form of a promotion that waits."""

    decision: Literal["approve", "reject", "look again"] = Field(
        description="approve or reject it; `look again` answers nothing: the run looks whether somebody else has answered."
    )
    name: str = Field(
        default="", max_length=128, description="Who you are. Nobody checks it: it is recorded as claimed."
    )
    note: str = Field(default="", max_length=approvals.NOTE_CHARACTERS, description="Why; it goes on record.")


def waits(with_all: Connections, carry_on: str | None) -> str | None:
    """The promotion that this run is to go on with, where it waits for an approval: its own from before it was suspended, or `carry_on`.

    One that ended while it waited counts too: the run comes back only to say so, and must not begin another.
    """
    run = run_id()
    with with_all.database.read() as session:
        row = promotions.get(session, carry_on) if carry_on else promotions.of_run(session, run) if run else None
        if row is None or row.state == promotions.AWAITING:
            return None if row is None else row.id
        ended_waiting = row.step == approvals.STEP and row.state not in promotions.ACTIVE
        return row.id if ended_waiting else None


def approved(with_all: Connections, identity: str) -> Operation | Ended:
    """Wait until a promotion is approved, and take it up; or how it ended instead.

    Raises LockedError where another process goes on with it, Prefect's Pause where the run is
    suspended: it comes back here from the top.
    """
    while True:
        try:
            found = _look(with_all, identity)
        except UnavailableError as error:  # whatever was answered is kept, by the registry or by Prefect
            logger().warning("%s; it is waited for", error)
            time.sleep(with_all.settings.poll_seconds)
            continue
        if found is not None:
            return found


def _look(with_all: Connections, identity: str) -> Operation | Ended | None:
    """Ask or wait for one answer, or take it up; None where it is to be looked at again."""
    with with_all.database.read() as session:
        state = approvals.state_of(session, identity)
    if state["state"] == promotions.AWAITING and not state["approved"]:
        if _is_deployed():
            _ask_by_form(with_all, identity)
        else:
            approval.wait(with_all.database, identity, poll_seconds=with_all.settings.poll_seconds, tell=logger().info)
        return None
    if (ended := ended_meanwhile(with_all.database, identity)) is not None:
        return ended
    try:
        operation = approval.carried_on(
            with_all.database, identity, ttl_seconds=with_all.settings.lease_seconds, flow_run_id=run_id()
        )
    except ConflictError as error:
        raise LockedError(f"another process goes on with it: {error}") from error
    if operation is not None:
        logger().info("approved by %s", " and ".join(operation.progress["approved"]["by"]))
    return operation  # None: not approved any more, say because a key was revoked since


def _is_deployed() -> bool:
    """Only the run of a deployment can be suspended: a worker starts it again."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


def _ask_by_form(with_all: Connections, identity: str) -> None:
    """Suspend the run with a form; or, where it comes back from that, take the form's answer. Each form has a key of its own."""
    approvals.expire_due(with_all.database)
    with with_all.database.read() as session:
        state = approvals.state_of(session, identity)
    if state["state"] != promotions.AWAITING or state["approved"]:
        return
    form = f"{identity}-{len(state['forms']) + 1}"
    try:
        answer = suspend_flow_run(
            wait_for_input=Answer.with_initial_data(description=_page(state)),
            key=form,
            timeout=round(state["seconds_left"]) + _AFTER_DEADLINE_SECONDS,
        )
    except ValidationError:  # started again without a form: by hand, or after a kill before the form was left
        answer = None
    if answer is None or answer.decision == approval.LOOK_AGAIN:
        approvals.take_form(with_all.database, identity, form)
        return
    who = Who("prefect-ui", via="form", claimed=answer.name or None)
    try:
        found = approvals.give(
            with_all.database, identity, verdict=answer.decision, who=who, note=answer.note, form=form
        )
    except ConflictError as error:
        logger().warning("the form's answer came too late: %s", error)
        return
    if found["counts"]:
        logger().info("the form's answer counts: %s by %s", answer.decision, answer.name or "nobody named")
    else:
        logger().warning("the form's answer does not count: %s", found["why_not"])


def _page(state: dict[str, object]) -> str:
    lines = [
        f"**May {state['question']}?**".replace(" may take", " take"),
        "",
        f"Until {state['until']}. Who can answer: {state['whom']}. Given so far: {state['given']} of {state['needed']}.",
        "",
        f"What was found: `modelkeep promotions show {state['promotion']}`.",
    ]
    answers = state["answers"]
    assert isinstance(answers, list)
    lines += [
        f"- {answer['verdict']} by {answer['actor']}"
        + ("" if answer["counts"] else f" does not count: {answer['why_not']}")
        for answer in answers
    ]
    return "\n".join(lines)
