"""Go back to an earlier version, and check it where it counts: by an answer of every server. Works without Prefect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from registry import replicas, rollbacks
from registry.database import Database
from tasks import lease, servers

FOLLOW_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a rollback came to. `followed` answer by the target, `behind` do not, with why."""

    model: str
    environment: str
    from_version: str
    to_version: str
    generation: int
    followed: tuple[str, ...]
    behind: dict[str, str]
    withdrawn: str | None = None

    @property
    def complete(self) -> bool:
        return not self.behind

    def summary(self) -> str:
        text = f"{self.model} is back from {self.from_version} to {self.to_version} in {self.environment}"
        if self.from_version == self.to_version:
            text = f"{self.model} stays on {self.to_version} in {self.environment}"
        if self.withdrawn is not None:
            text += f", the promotion of {self.withdrawn} is withdrawn"
        if not self.followed and not self.behind:
            return f"{text}; no server answers now, it takes effect when one comes"
        text += f"; {len(self.followed)} server(s) answer by it"
        return text + "".join(f"; {replica} does not: {why}" for replica, why in self.behind.items())

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "environment": self.environment,
            "from": self.from_version,
            "to": self.to_version,
            "withdrawn": self.withdrawn,
            "generation": self.generation,
            "followed": list(self.followed),
            "behind": self.behind,
        }

    def as_markdown(self) -> str:
        rows = [f"| {replica} | answers by {self.to_version} |" for replica in self.followed]
        rows += [f"| {replica} | {why} |" for replica, why in self.behind.items()]
        table = "\n".join(["| server | |", "| --- | --- |", *rows]) if rows else "No server answers now."
        return f"# Rollback of {self.model}\n\n{self.summary()}.\n\n{table}\n"


def change(
    database: Database,
    *,
    environment: str,
    model: str,
    to: str | None,
    reason: str,
    ttl_seconds: float,
    emergency: bool = False,
    flow_run_id: str | None = None,
) -> dict[str, Any]:
    """Set the route back, in one transaction; a lease whose holder has died is ended first. Raises LockedError, NotFoundError, RefusedError."""
    return lease.taken(
        database,
        environment,
        model,
        lambda: rollbacks.roll_back(
            database,
            environment=environment,
            model=model,
            to=to,
            reason=reason,
            ttl_seconds=ttl_seconds,
            emergency=emergency,
            flow_run_id=flow_run_id,
        ),
    )


def follow(database: Database, result: dict[str, Any], *, timeout_seconds: float = FOLLOW_SECONDS) -> Outcome:
    """Wait until the servers follow, then ask each for the model's metadata without a version: who answers by the target has followed."""
    environment, model, target = result["environment"], result["model"], result["to"]
    with database.read() as session:
        pulse = replicas.pulse(session, environment)
    epoch = pulse.epoch if pulse is not None else ""
    following = servers.follow(
        database, environment, epoch=epoch, generation=result["generation"], timeout_seconds=timeout_seconds
    )
    living = servers.alive(database, environment)
    followed, behind = [], {}
    for replica, address in living.items():
        why = _differs(address, model, target)
        if why is None:
            followed.append(replica)
        else:
            errors = following.errors.get(replica, {}).get(f"{model}/{target}")
            behind[replica] = errors or why
    return Outcome(
        model,
        environment,
        result["from"],
        target,
        result["generation"],
        tuple(followed),
        behind,
        result.get("withdrawn"),
    )


def _differs(address: str, model: str, target: str) -> str | None:
    info = servers.model_info(address)
    if info is None:
        return "does not answer"
    route = info["models"].get(model)
    if route is None or route["stable"] != target or route["candidate"] is not None:
        return f"still serves {route['stable'] if route else 'nothing'}"
    try:
        ready = httpx.get(f"{address}/v2/models/{model}/versions/{target}/ready", timeout=5.0)
    except httpx.HTTPError as error:
        return f"does not answer: {error}"
    return None if ready.status_code == 200 else f"version {target} is not ready there ({ready.status_code})"
