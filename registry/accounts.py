"""The whole account of one promotion: what it decided and on which evidence, what it was told, and what it waits for."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from registry import approvals, commands, endings, replicas, stories
from registry.schema import Promotion
from registry.stories import ACTIVE, AWAITING, SOAKING


def of(session: Session, promotion_id: str) -> dict[str, Any]:
    """Raises NotFoundError.

    `paused`, `waits_for` and `approval` are None where they do not apply; `evidence` is that of the last judgement on record.
    """
    row = stories.get(session, promotion_id)
    steps = stories.story(session, promotion_id)
    paused = commands.standing(session, promotion_id).paused if row.state in ACTIVE else None
    asked = approvals.state_of(session, promotion_id)
    return {
        **stories.describe(row),
        "paused": None if paused is None else {"by": paused.actor, "reason": paused.reason},
        "waits_for": _waits_for(session, row, paused),
        "approval": asked if asked["question"] else None,
        "commands": commands.listed(session, promotion_id),
        "evidence": next((s["figures"]["evidence"] for s in reversed(steps) if s["figures"].get("evidence")), []),
        "story": steps,
    }


def _waits_for(session: Session, row: Promotion, paused: commands.Given | None) -> str | None:
    if row.state not in ACTIVE:
        return None
    if row.state == AWAITING:
        if "approved" in row.progress:
            return f"somebody to go on with it, it is approved: modelkeep promotions resume {row.id}"
        return f"an approval: modelkeep approve {row.id} --note TEXT"
    if paused is not None:
        return f"a person, paused by {paused}: modelkeep promotions resume {row.id}"
    if row.state == SOAKING:
        alone = row.id in endings.orphans(session)
        return "a watchman to carry on its watch: `modelkeep serve` runs one" if alone else "the end of its watch"
    windows = row.progress.get("windows") or []
    if windows:
        return f"the judgement of {windows[-1]['stage']}{_so_far(session, row, windows[-1])}"
    return "its first stage" if "validated" in row.progress else "its validation"


def _so_far(session: Session, row: Promotion, window: dict[str, Any]) -> str:
    """How many requests the candidate has had in a stage: where they do not come, the stage stands still."""
    if not window["stage"].startswith("canary"):
        return ""
    counted = replicas.counts(session, row.model, window["epoch"], window["generation"]).get(row.version, [])
    requests = sum(int(counts["requests"]) for counts in counted)
    return f": {requests} requests so far, at least {row.policy['minimum_requests']} are needed"
