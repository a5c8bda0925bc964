"""The promotion policy: every number that decides how a version goes up. Its field descriptions are the form in the UI."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from registry.errors import UsageError

if TYPE_CHECKING:
    from registry.settings import Settings

METRICS = ("accuracy", "exact_match", "mean_absolute_error")
"""What the golden cases can be scored by (serving/compute/golden.py); the first is the usual one."""


class PromotionPolicy(BaseModel):
    """How a candidate is validated, staged, judged and watched. Durations are seconds, shares are fractions of 1."""

    model_config = ConfigDict(extra="forbid")

    stages: list[float] = Field(
        default=[0.05, 0.25, 0.5, 1.0],
        description="Share of the live requests that the candidate answers, stage by stage; rising, the last is 1.",
    )
    dwell_seconds: float = Field(default=60.0, ge=0, description="The least time that each stage lasts.")
    minimum_requests: int = Field(
        default=300, ge=1, description="Requests that the candidate must have answered before a stage can be passed."
    )
    margin: float = Field(
        default=0.25,
        ge=0,
        le=10,
        description="How much worse than the stable version's the candidate's rate of bad requests may be (0.25: a quarter more).",
    )
    evidence: float = Field(
        default=100.0,
        gt=1,
        description="The e-value, per stream, at which the candidate is withdrawn (100: a good one is withdrawn less than once in 100).",
    )
    sudden_requests: int = Field(
        default=20, ge=1, description="From this many candidate requests on, the share below stops the canary at once."
    )
    sudden_share: float = Field(
        default=0.5, gt=0, le=1, description="Share of bad requests that stops the canary at once."
    )
    slow_factor: float = Field(
        default=1.25,
        ge=1,
        le=100,
        description="An answer is slow when it takes longer than this many times the stable version's p95, frozen before the candidate came.",
    )
    deadline_seconds: float = Field(
        default=3600.0, gt=0, description="A stage without enough requests by then is held: no decision without data."
    )
    baseline_seconds: float = Field(
        default=30.0,
        ge=0,
        description="How long the stable version is measured alone, to freeze its p95, before the candidate is loaded.",
    )
    shadow_seconds: float = Field(
        default=60.0, ge=0, description="How long the candidate sees copies of live requests before it answers any."
    )
    shadow_requests: int = Field(
        default=300,
        ge=0,
        description="Copies that it should have seen by the end of the shadow stage; fewer are reported, not held against it.",
    )
    shadow_gate: bool = Field(
        default=True,
        description="Withdraw a candidate that fails or is slow on copies already, before it answers anyone.",
    )
    soak_seconds: float = Field(
        default=300.0,
        ge=0,
        description="How long the new stable version is watched after the promotion, and taken back if it is bad.",
    )
    accuracy_margin: float = Field(
        default=0.02,
        ge=0,
        description="How much of the metric on the golden cases the candidate may lose against the stable version, in the metric's own units.",
    )
    latency_ratio: float = Field(
        default=2.0,
        gt=0,
        description="The candidate's median latency may be this many times the stable version's (measured interleaved).",
    )
    memory_ratio: float = Field(
        default=4.0, gt=0, description="The candidate's memory may be this many times the stable version's."
    )
    metric: str = Field(
        default="accuracy",
        description="What is compared on the golden cases: accuracy (of their labels; or what the golden file names), exact_match, mean_absolute_error.",
    )
    tolerances: dict[str, float] = Field(
        default={},
        description="How far each output may be from the golden file's (output name: absolute difference); outputs that are not named are not held to it.",
    )
    required_tags: list[str] = Field(
        default=[], description="Tags that a version must carry to be promoted: KEY, or KEY=VALUE."
    )
    fits_profile: bool = Field(
        default=True,
        description="Refuse a version that, beside the stable one, does not fit the memory budget of the hardware profile.",
    )
    shadow_share: float = Field(
        default=1.0, gt=0, le=1, description="Share of the live requests that the candidate sees copies of."
    )
    agreement: Literal["exact", "tolerance", "top"] = Field(
        default="top",
        description="When two answers agree: equal to the bit, within tolerance, or with the same top class.",
    )
    shadow_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Least share of the shadow's copies (or of the replay's requests) on which both must agree; empty: reported only.",
    )
    replay_inputs: Literal["auto", "captured", "golden"] = Field(
        default="auto",
        description="What a replay sends through both versions: captured requests, golden inputs, or (auto) the captured ones where there are enough.",
    )
    replay_requests: int = Field(
        default=1000, ge=1, description="How many of them, at most; of captured ones the newest."
    )
    approval: bool = Field(default=False, description="Ask a person before the candidate takes any traffic.")
    four_eyes: bool = Field(
        default=False,
        description="Two approvals with two different keys are needed; an approval without a key, or from a form, does not count.",
    )
    approval_deadline_seconds: float = Field(
        default=86400.0, gt=0, description="An approval that has not come by then is a refusal."
    )
    validation_timeout_seconds: float = Field(default=300.0, gt=0, description="Time that the validation may take.")
    validation_memory_mb: int = Field(default=4096, ge=256, description="Memory that the validation may take, in MB.")

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str) -> str:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not known; known are {', '.join(METRICS)}")
        return metric

    @field_validator("tolerances")
    @classmethod
    def _distances(cls, tolerances: dict[str, float]) -> dict[str, float]:
        if wrong := {name: value for name, value in tolerances.items() if not 0 <= value < float("inf")}:
            raise ValueError(f"tolerances {wrong}: an absolute difference is a number of at least 0")
        return tolerances

    @field_validator("stages")
    @classmethod
    def _rising_to_one(cls, stages: list[float]) -> list[float]:
        if not stages or stages[-1] != 1.0:
            raise ValueError(f"stages {stages}: the last stage must be 1.0 (all of the traffic)")
        if any(not 0 < share <= 1 for share in stages) or any(a >= b for a, b in pairwise(stages)):
            raise ValueError(f"stages {stages}: shares must rise, each above 0 and at most 1")
        return stages


def resolve(settings: Settings, model: str, changes: Mapping[str, Any] | None = None) -> PromotionPolicy:
    """The policy of one promotion: `promotion` of the settings, under what `policies` has for the model, under `changes`.

    Raises UsageError for a field that does not exist, with the nearest one, and for a value that is not allowed.
    """
    return resolved(settings, model, changes)[0]


def resolved(
    settings: Settings, model: str, changes: Mapping[str, Any] | None = None, *, whole: PromotionPolicy | None = None
) -> tuple[PromotionPolicy, dict[str, str]]:
    """The policy as in `resolve`, and where each field that is not at its default comes from.

    `whole` is a policy given with the run: it stands for the two layers of the settings.
    """
    usual = PromotionPolicy()
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if whole is not None:
        layers.append(("this run", whole.model_dump()))
    else:
        layers.append(("settings", settings.promotion.model_dump()))
        layers += [(f"policies.{found.model}", fields) for found, fields in _of_model(settings, model)]
    layers.append(("this run", _checked(changes or {})))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, layer in layers:
        values |= layer
        for field, value in layer.items():
            if name == "settings":
                source = settings.source(f"promotion.{field}") if value != getattr(usual, field) else None
            elif name == "this run":
                source = name if layer is not layers[0][1] or value != getattr(usual, field) else None
            else:
                source = f"{name}.{field}: {settings.source(f'{name}.{field}')}"
            if source is not None:
                sources[field] = source
    try:
        return PromotionPolicy.model_validate(values), sources
    except ValidationError as error:
        words = "; ".join(f"{part['loc'][0] if part['loc'] else 'policy'}: {part['msg']}" for part in error.errors())
        raise UsageError(f"the policy of this run: {words}") from error


def parsed(assignments: Sequence[str]) -> dict[str, Any]:
    """The changes that FIELD=VALUE texts stand for; a list is written with commas or as JSON, a table as JSON. Raises UsageError."""
    from registry.layers import decode

    changes: dict[str, Any] = {}
    for text in assignments:
        field, mark, value = text.partition("=")
        field = field.strip()
        if not mark:
            raise UsageError(f"--set {text}: write FIELD=VALUE, as in --set soak_seconds=60")
        _checked({field: None})
        annotation = PromotionPolicy.model_fields[field].annotation
        try:
            decoded = decode(annotation, value.strip())
        except ValueError as error:
            raise UsageError(f"--set {text}: {error}") from error
        changes[field] = None if decoded == "none" and annotation == float | None else decoded
    return changes


def _of_model(settings: Settings, model: str) -> list[tuple[Any, dict[str, Any]]]:
    from registry.layers import slug

    return [
        (found, {name: getattr(found, name) for name in PromotionPolicy.model_fields if name in found.model_fields_set})
        for found in settings.policies
        if slug(found.model) == slug(model)
    ]


def _checked(changes: Mapping[str, Any]) -> Mapping[str, Any]:
    for field in changes:
        if field not in PromotionPolicy.model_fields:
            near = difflib.get_close_matches(field, list(PromotionPolicy.model_fields), n=1)
            raise UsageError(f"{field!r} is no field of the policy" + (f"; did you mean {near[0]!r}?" if near else ""))
    return changes
