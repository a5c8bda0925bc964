"""promote-model: bring a version up to all of the traffic, in judged stages; every decision is on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.tasks import Task
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from flows import approval
from flows.common import Connections, artifact_key, connect, logger, run_id
from registry import promotions
from registry.errors import ConflictError, FencedError, LockedError, NotFoundError, RefusedError, UsageError
from registry.policy import PromotionPolicy, resolved
from registry.promotions import Operation
from tasks import approval as approving
from tasks import gates, lease, outage, promotion, servers, story, ways
from tasks import soak as watch
from tasks.promoting import Ended, Promoting

P = ParamSpec("P")
R = TypeVar("R")


class PromoteModel(BaseModel):
    """Which version goes up, and how."""

    model_config = ConfigDict(extra="forbid", title="Promotion")

    model: str = Field(description="Name of the model, as in `modelkeep models`.")
    version: str = Field(description="The version to promote.")
    environment: str | None = Field(
        default=None, description="Where to; empty: the environment that the settings name."
    )
    strategy: Literal["canary", "blue-green", "shadow", "replay"] = Field(
        default="canary",
        description="canary: stage by stage. blue-green: everything at once after the shadow, then watched. shadow: copies only, "
        "nothing is promoted. replay: golden inputs through both versions one after the other, then everything at once, then watched.",
    )
    force: bool = Field(
        default=False,
        description="Give it all of the traffic whatever the validation says, without a canary. Needs a reason.",
    )
    reason: str | None = Field(default=None, description="Why; it goes on record. Needed to force.")
    policy: PromotionPolicy | None = Field(
        default=None,
        description="Stages, evidence, dwell, soak: the whole policy; empty: that of the settings, with what they have for the model.",
    )
    changes: dict[str, Any] = Field(
        default={}, description='What this run has other than its policy, field by field, as in {"soak_seconds": 60}.'
    )
    approval: bool = Field(
        default=False, description="Ask a person before it takes any traffic, also where the policy does not."
    )
    carry_on: str | None = Field(
        default=None,
        description="The promotion of record to go on with (its id), where its run has gone; its own strategy and policy hold.",
    )


def _step(name: str, work: Callable[P, R]) -> Task[P, R]:
    """A step as a Prefect task. Prefect repeats none: tasks.outage does, from what is on record when the registry answers again."""
    return task(name=name, cache_policy=NO_CACHE, persist_result=False)(work)


validate = _step("validate", promotion.validate)
ask = _step("ask for approval", approving.ask)
baseline = _step("baseline", promotion.baseline)
shadow = _step("shadow", promotion.shadow)
canary = _step("canary", promotion.canary)
promote = _step("promote", promotion.promote)
soak = _step("soak", watch.soak)
replay = _step("replay", ways.replay)
take_all = _step("take-all", promotion.without_comparison)


@flow(
    name="promote-model",
    description="Validate a version, show it copies of live requests, give it a growing share of the traffic, judge it at each "
    "stage, make it the stable version, and watch it. It is withdrawn on evidence that it is worse.",
    flow_run_name="{request.model} {request.version}",
    validate_parameters=True,
    persist_result=False,
)
def promote_model(request: PromoteModel) -> State[Any]:
    """Ends Promoted, Shadowed, Rejected, RolledBack, Held, Refused or Locked, each with its reason."""
    if request.force and not request.reason:
        return Failed(name="Refused", message="a forced promotion needs a reason: it goes on record")
    if request.force and request.strategy == "shadow":
        return Failed(
            name="Refused", message="force gives it all of the traffic, the strategy shadow none: leave one out"
        )
    with_all = connect()
    environment = request.environment or with_all.settings.environment
    try:
        _check(with_all, environment, request)
    except (NotFoundError, UsageError) as error:
        return Failed(name="Refused", message=str(error))
    if (done := promotion.promoted_by(with_all.database, run_id())) is not None:
        return _tell(with_all, done[0], _state_of(done[1]))
    identity = approval.waits(with_all, request.carry_on)
    while True:
        try:
            taken = (
                approval.approved(with_all, identity)
                if identity is not None
                else lease.taken(
                    with_all.database, environment, request.model, lambda: _begin(with_all, environment, request)
                )
            )
        except LockedError as error:
            return Failed(name="Locked", message=str(error))
        except (RefusedError, NotFoundError, UsageError, ConflictError) as error:
            return Failed(name="Refused", message=str(error))
        if isinstance(taken, Operation):
            identity = taken.id
            result = _carry(with_all, taken)
            if result is None:
                continue
        else:
            assert identity is not None
            result = taken
        return _tell(with_all, identity, _state_of(result) if isinstance(result, Ended) else result)


def _carry(with_all: Connections, operation: Operation) -> Ended | State[Any] | None:
    """Do the steps under the lease. Returns how it ended, the state of a run that lost it, or None where it waits for an approval."""
    with lease.kept(with_all.database, operation.held) as keeper:
        work = Promoting(
            with_all.database,
            with_all.artifacts,
            with_all.cache,
            operation,
            keeper,
            budget=gates.budget_of(with_all.settings),
            poll_seconds=with_all.settings.poll_seconds,
            tell=logger().info,
        )
        try:
            return outage.steadfast(work, _steps)
        except Ended as early:
            return early
        except FencedError as error:
            # Somebody stopped it or rolled it back, and the record says so; or another process carries it.
            found = outage.answered(
                with_all.database, lambda session: promotion.ended_in(session, operation.id), _away()
            )
            return found or Failed(name="Fenced", message=str(error))
        except BaseException as error:
            promotion.failed(work, error)
            _tell(with_all, operation.id, None)
            raise


def _state_of(ended: Ended) -> State[Any]:
    states = {
        "promoted": (Completed, "Promoted"),
        "shadowed": (Completed, "Shadowed"),
        "rejected": (Failed, "Rejected"),
        "held": (Failed, "Held"),
    }
    make, name = states.get(ended.outcome, (Failed, "RolledBack"))
    return make(name=name, message=ended.reason)


def _check(with_all: Connections, environment: str, request: PromoteModel) -> None:
    """Raises NotFoundError, UsageError where the promotion to go on with is of something else."""
    if request.carry_on is None:
        return
    with with_all.database.read() as session:
        row = promotions.get(session, request.carry_on)
    if (row.model, row.version, row.environment) != (request.model, request.version, environment):
        raise UsageError(
            f"promotion {row.id} is of {row.model} {row.version} in {row.environment}, "
            f"not of {request.model} {request.version} in {environment}: give the form what the promotion is of"
        )


def _begin(with_all: Connections, environment: str, request: PromoteModel) -> Operation:
    if request.carry_on is not None:
        return promotions.carry_on(
            with_all.database, request.carry_on, ttl_seconds=with_all.settings.lease_seconds, flow_run_id=run_id()
        )
    changes = {**request.changes, **({"approval": True} if request.approval else {})}
    policy, sources = resolved(with_all.settings, request.model, changes, whole=request.policy)
    return promotions.begin(
        with_all.database,
        environment=environment,
        model=request.model,
        version=request.version,
        policy=policy,
        policy_from=sources,
        strategy="forced" if request.force else request.strategy,
        ttl_seconds=with_all.settings.lease_seconds,
        flow_run_id=run_id(),
        force_reason=request.reason if request.force else None,
    )


def _steps(work: Promoting) -> Ended | None:
    """None: it waits for an approval, and nobody holds it meanwhile."""
    operation = work.operation
    if operation.progress.get("promoted"):
        return soak(work)
    if not operation.progress.get("validated"):
        validate(work)
    if operation.strategy == "shadow":  # nobody gets its answers, so nobody is asked
        return _copies_only(work)
    if ask(work):  # a forced one too: force answers for the quality, not for the person who was to be asked
        return None
    if operation.forced is not None:
        return take_all(work, f"forced: {operation.forced}")
    if operation.stable is None:
        return take_all(work, "it is the first version in this environment: there is nothing to compare it with")
    if not _served(work):
        why = "no server answers, so there is no traffic to judge it by: the route is set and takes effect when a server comes"
        if operation.strategy == "replay":
            replay(work)
            why = "the replay is passed; no server answers: the route is set and takes effect when a server comes"
        return take_all(work, why)
    baseline(work)
    if operation.strategy == "replay":
        replay(work)
    else:
        shadow(work)
        canary(work)
    promote(work)
    return soak(work)


def _served(work: Promoting) -> bool:
    operation = work.operation
    return bool(operation.progress.get("windows")) or bool(
        servers.alive(work.database, operation.environment, timeout_seconds=servers.RESTART_SECONDS)
    )


def _copies_only(work: Promoting) -> Ended:
    if work.operation.stable is None:
        return ways.no_shadow(work, "there is no stable version in this environment")
    if not _served(work):
        return ways.no_shadow(work, "no server answers")
    baseline(work)
    shadow(work)
    return ways.shadowed(work)


def _away() -> outage.Outage:
    return outage.Outage(tell=logger().warning)


def _tell(with_all: Connections, identity: str, state: State[Any] | None) -> State[Any]:
    """Leave the story of the promotion as a page of this run."""

    def told(session: Session) -> tuple[str, str]:
        row = promotions.get(session, identity)
        page = story.as_markdown(promotions.describe(row), promotions.story(session, identity), row.policy)
        return page, artifact_key("promotion", row.model, row.version)

    page, key = outage.answered(with_all.database, told, _away())
    create_markdown_artifact(page, key=key, description=f"Promotion {identity}")
    return state if state is not None else Failed(name="Failed")
