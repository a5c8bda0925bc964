"""Look again at what is in traffic: bytes, loading, golden cases. Changes no state; what it finds is on record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from registry import replicas
from registry.database import Database
from registry.errors import ModelkeepError, UnavailableError
from registry.policy import PromotionPolicy
from registry.store import ArtifactStore
from tasks import promotion


@dataclass(frozen=True, slots=True)
class Subject:
    environment: str
    model: str
    version: str
    role: str


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    role: str
    passed: bool
    text: str


def subjects(database: Database, environment: str, model: str | None = None) -> list[Subject]:
    """The stable versions and candidates of an environment."""
    with database.read() as session:
        routes, _ = replicas.desired(session, environment)
    return [
        Subject(environment, route.model, version, role)
        for route in routes
        for version, role in ((route.stable, "stable"), (route.candidate, "candidate"))
        if version is not None and model in (None, route.model)
    ]


def check(
    database: Database,
    artifacts: ArtifactStore,
    cache: Path,
    subject: Subject,
    policy: PromotionPolicy,
    *,
    flow_run_id: str | None = None,
) -> Result:
    """Verify and run one version. A version that fails is a result; a registry that does not answer is raised."""
    name = f"{subject.model} {subject.version}"
    try:
        report = promotion.measure(
            database, artifacts, cache, model=subject.model, version=subject.version, stable=None,
            environment=subject.environment, policy=policy,
        )  # fmt: skip
        passed, text = report.passed, report.summary
    except UnavailableError:
        raise
    except ModelkeepError as error:
        passed, text = False, str(error)
    with database.write(flow_run_id=flow_run_id) as transaction:
        transaction.record(
            "version.checked",
            f"version:{subject.model}/{subject.version}",
            after={"passed": passed, "role": subject.role},
            reason=text,
        )
    return Result(name, subject.role, passed, text)


def as_markdown(environment: str, results: list[Result]) -> str:
    if not results:
        return f"# Versions in traffic in {environment}\n\nNone.\n"
    rows = [f"| {r.name} | {r.role} | {'passed' if r.passed else '**failed**'} | {r.text} |" for r in results]
    return "\n".join(
        [
            f"# Versions in traffic in {environment}",
            "",
            "| version | role | | figures |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
