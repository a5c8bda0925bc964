"""Every flow, block and deployment loads; and on a Prefect server a deployment with a schedule gets its runs."""

from __future__ import annotations

import importlib
import pkgutil
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import flows
from tests.e2e.harness import ROOT, box
from tests.prefect_server import ask

DECLARED: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
NAMES = [deployment["name"] for deployment in DECLARED]


def load(entrypoint: str) -> Any:
    module, _, name = entrypoint.rpartition(".")
    return getattr(importlib.import_module(module), name)


def all_flows() -> dict[str, Any]:
    """Every flow of the room, by module and name."""
    from prefect import Flow

    found = {}
    for module in pkgutil.iter_modules(flows.__path__, "flows."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if isinstance(value, Flow) and value.fn.__module__ == module.name:
                found[f"{module.name}.{name}"] = value
    return found


def test_every_flow_has_a_deployment_and_names_are_unique(prefect_api: str) -> None:
    assert sorted(all_flows()) == sorted({deployment["entrypoint"] for deployment in DECLARED})
    assert len(NAMES) == len(set(NAMES))


@pytest.mark.parametrize("deployment", DECLARED, ids=NAMES)
def test_a_deployment_loads_and_says_what_a_person_needs(prefect_api: str, deployment: dict[str, Any]) -> None:
    from prefect import Flow

    flow = load(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.name == deployment["name"]
    assert flow.description and deployment["description"].strip() and deployment["tags"]
    assert deployment["work_pool"]["name"] == "modelkeep"
    limit = deployment["concurrency_limit"]
    assert limit["limit"] >= 1 and limit["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")


@pytest.mark.parametrize("deployment", DECLARED, ids=NAMES)
def test_every_field_of_its_form_has_a_description(prefect_api: str, deployment: dict[str, Any]) -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(load(deployment["entrypoint"])).model_dump()
    models = schema["definitions"]
    assert models, "its parameters are no typed model"
    bare = [
        f"{model}.{name}"
        for model, described in models.items()
        for name, field in described["properties"].items()
        if not field.get("description")
    ]
    assert bare == []


@pytest.mark.parametrize("deployment", DECLARED, ids=NAMES)
def test_its_schedules_parse_have_slugs_and_skip_what_was_missed(prefect_api: str, deployment: dict[str, Any]) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    schedules = deployment["schedules"]
    for schedule in schedules:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        assert schedule["timezone"] == "UTC"
    slugs = [schedule["slug"] for schedule in schedules]
    assert len(slugs) == len(set(slugs)) and all(slugs)
    if schedules:
        # Else every run that was missed while no worker was up would start at once on its return.
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_every_block_loads_is_made_from_the_settings_and_hides_its_secrets(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blocks.connections import BLOCKS, save_all
    from registry.settings import load_settings

    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path))
    settings = load_settings()
    slugs = [block.get_block_type_slug() for block in BLOCKS]
    assert len(set(slugs)) == len(BLOCKS) and all(block._description for block in BLOCKS)
    assert save_all(settings) == save_all(settings) == [f"{slug}/modelkeep" for slug in slugs]
    for block in BLOCKS:
        loaded = block.load("modelkeep")
        fields = set(block.model_fields)
        assert loaded.model_dump(include=fields) == block.from_settings(settings).model_dump(include=fields)
    shown = ask("POST", f"{prefect_api}/block_documents/filter", {})
    registry = next(row for row in shown if row["block_type"]["slug"] == "modelkeep-registry")
    assert settings.database_url not in str(registry["data"])


@pytest.fixture(scope="module")
def deployed(prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    """(API, what was written) after `deploy_all`."""
    from modelkeep.deploy import deploy_all
    from registry.settings import load_settings

    with box(tmp_path_factory.mktemp("deployed")) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODELKEEP_HOME", str(made.home))
        patch.setenv("MODELKEEP_PREFECT__API_URL", prefect_api)
        return prefect_api, deploy_all(load_settings())


def post(api: str, path: str, body: dict[str, Any]) -> Any:
    return ask("POST", f"{api}{path}", body)


def test_deploying_writes_every_deployment_with_its_schedules(deployed: tuple[str, list[str]]) -> None:
    api, lines = deployed
    found = {row["name"]: row for row in post(api, "/deployments/filter", {})}
    assert sorted(found) == sorted(NAMES)
    for wanted in DECLARED:
        row = found[wanted["name"]]
        assert row["entrypoint"] == wanted["entrypoint"]
        written = {s["schedule"]["cron"]: s["parameters"] for s in row["schedules"]}
        assert written == {s["cron"]: s.get("parameters", {}) for s in wanted["schedules"]}
        assert row["concurrency_options"]["collision_strategy"] == wanted["concurrency_limit"]["collision_strategy"]
        assert row["parameter_openapi_schema"]["definitions"]
        assert any(line.startswith(f"deployment {wanted['name']}") for line in lines)


def test_a_deployment_with_a_schedule_gets_runs_in_state_scheduled(deployed: tuple[str, list[str]]) -> None:
    """SQLAlchemy 2.1 stops all of Prefect's scheduling without a word: then no run is ever made."""
    api, _ = deployed
    scheduled = {row["id"]: row["name"] for row in post(api, "/deployments/filter", {}) if row["schedules"]}
    assert scheduled
    query = {
        "deployments": {"id": {"any_": list(scheduled)}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    deadline = time.monotonic() + 60
    while True:
        runs = post(api, "/flow_runs/filter", query)
        if {run["deployment_id"] for run in runs} == set(scheduled):
            break
        assert time.monotonic() < deadline, f"runs of {scheduled}: {runs}"
        time.sleep(0.5)
    assert all(run["expected_start_time"] for run in runs)


def test_a_deployment_that_prefect_did_not_take_is_an_error(
    prefect_api: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad field only makes Prefect print "Skipping" and end with 0."""
    from modelkeep import deploy
    from registry.errors import ModelkeepError
    from registry.settings import load_settings

    document = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    bad = {**document["deployments"][2], "name": "never-taken", "entrypoint": "flows.nowhere.nothing"}
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({**document, "deployments": [bad]}))
    monkeypatch.setenv("MODELKEEP_HOME", str(tmp_path))
    monkeypatch.setenv("MODELKEEP_PREFECT__API_URL", prefect_api)
    monkeypatch.setattr(deploy, "prefect_file", lambda: file)
    with pytest.raises(ModelkeepError):
        deploy.deploy_all(load_settings())
