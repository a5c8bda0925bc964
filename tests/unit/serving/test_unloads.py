"""Load and unload by the V2 protocol: holds of one server, on its disk and on record."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry.actor import Who
from registry.database import Database
from registry.errors import RefusedError, UnavailableError
from registry.schema import AuditEvent, Reach
from serving.follow.emergency import Emergency
from serving.follow.unloads import Order, Unloads
from tasks.servers import Following
from tests.unit.serving.boxes import Box, Run
from tests.unit.serving.helpers import until
from tests.unit.serving.rounds import stable


@pytest.fixture
def run(run: Run) -> Run:
    """With room for all."""
    return partial(run, models={})


def events(database: Database) -> list[tuple[str, dict[str, Any]]]:
    with database.read() as session:
        rows = session.scalars(
            select(AuditEvent).where(AuditEvent.action.in_(["model.unloaded", "model.loaded"])).order_by(AuditEvent.seq)
        )
        return [(row.action, json.loads(row.text)) for row in rows]


def test_an_unloaded_model_is_served_no_more_and_a_load_brings_it_back(run: Run, database: Database) -> None:
    async def test(box: Box) -> None:
        serving = box.reconciler.serving
        document = {"parameters": {"unload_dependents": True, "reason": "it eats the memory"}}
        answer = await box.order("unload", "a", document)
        assert answer.status == 200 and answer.json()["state"] == "UNAVAILABLE" and answer.json()["recorded"]
        asked = await box.ask("a")
        assert asked.status == 503 and "it eats the memory" in asked.error and asked.headers["retry-after"]
        assert "unloaded on this server" in (await box.server.get("/v2/models/a/ready")).error
        assert (await box.server.get("/v2/models/a/versions/1")).status == 503
        assert sorted(model for model, _ in serving.loaded) == ["b", "c"] and (await box.ask("b")).status == 200
        await box.reconciler.once()
        await box.reconciler.again()
        assert "a" not in {model for model, _ in serving.loaded}, "the registry still names it"
        index = (await box.server.post("/v2/repository/index", None)).json()
        assert "eats the memory" in next(one["reason"] for one in index if one["name"] == "a")
        assert [one["model"] for one in box.reconciler.info()["unloaded"]] == ["a"]
        assert (await box.order("unload", "a")).status == 200, "it is so already"
        answer = await box.order("load", "a")
        assert answer.status == 200 and answer.json()["versions"] == ["1"], answer.body
        assert (await box.ask("a")).status == 200
        assert (await box.order("load", "a")).status == 200, "it is so already"
        assert [action for action, _ in events(database)] == ["model.unloaded", "model.loaded"]
        assert events(database)[0][1]["reason"] == "it eats the memory"
        await box.reconciler.once()
        assert box.reconciler.info()["errors"] == {}

    run(test)


def test_who_is_being_answered_is_answered(run: Run) -> None:
    async def test(box: Box) -> None:
        busy = box.reconciler.serving.loaded["a", "1"]
        busy.acquire()
        assert (await box.order("unload", "a")).status == 200
        assert busy in box.reconciler._leaving.versions
        busy.release()
        await until(lambda: busy not in box.reconciler._leaving.versions)

    run(test)


def test_an_unload_outlives_the_process(run: Run) -> None:
    async def unload(box: Box) -> None:
        await box.order("unload", "b", {"parameters": {"reason": "for the night"}})

    async def after(box: Box) -> None:
        assert sorted(model for model, _ in box.reconciler.serving.loaded) == ["a", "c"]
        assert "for the night" in (await box.ask("b")).error
        assert (await box.order("load", "b")).status == 200
        assert (await box.ask("b")).status == 200

    run(unload)
    run(after)


def test_orders_reach_the_record_when_the_registry_is_back_and_once(run: Run, database: Database) -> None:
    async def test(box: Box) -> None:
        reconciler = box.reconciler
        reconciler.registry_error = "gone"
        answer = await box.order("unload", "a")
        assert answer.status == 200 and not answer.json()["recorded"]
        assert (await box.ask("a")).status == 503 and events(database) == []
        await reconciler.once()
        assert [action for action, _ in events(database)] == ["model.unloaded"]
        assert reconciler.info()["unloaded"][0]["recorded"]
        # Killed between the record and the note of it on the disk:
        reconciler.unloads.untold.append(reconciler.unloads.by_model["a"])
        await reconciler.once()
        assert [action for action, _ in events(database)] == ["model.unloaded"] and reconciler.unloads.untold == []

    run(test)


def test_a_promotion_meets_an_unloaded_model_and_the_server_says_why_it_does_not_follow(
    run: Run, database: Database
) -> None:
    async def test(box: Box) -> None:
        await box.order("unload", "c", {"parameters": {"reason": "its owner said so"}})
        stable(database, "c", "2")
        await box.reconciler.once()
        with database.read() as session:
            newest = session.scalars(select(Reach).order_by(Reach.generation.desc())).first()
            assert newest is not None and newest.behind == ["c"]
            unloadable = session.scalars(select(AuditEvent.text).where(AuditEvent.action == "version.unloadable")).all()
        assert any("c is unloaded on this server" in text and "its owner said so" in text for text in unloadable)
        info = box.reconciler.info()
        assert "its owner said so" in info["errors"]["c/2"]
        (told,) = Following(errors={"r1": info["errors"]}).errors_of("c", "2")
        assert "c is unloaded on this server" in told, "by that a promotion of it ends, with the reason"
        assert (await box.order("load", "c")).json()["versions"] == ["2"]
        await box.reconciler.once()
        with database.read() as session:
            newest = session.scalars(select(Reach).order_by(Reach.generation.desc())).first()
            assert newest is not None and newest.behind is None

    run(test)


def test_an_emergency_does_not_go_around_an_unload(run: Run) -> None:
    async def test(box: Box) -> None:
        await box.order("unload", "a")
        box.reconciler.registry_error = "gone"
        emergency = Emergency(box.reconciler, box.reconciler.database)
        with pytest.raises(RefusedError, match="load it first"):
            await emergency.roll_back(
                "a", "1", who=Who("somebody"), reason="", emergency=True, ttl_seconds=30.0
            )  # fmt: skip

    run(test)


@pytest.mark.parametrize("action", ["load", "unload"])
def test_what_is_not_known_is_404(run: Run, action: str) -> None:
    async def test(box: Box) -> None:
        answer = await box.order(action, "none")
        assert answer.status == 404 and "'none' is not known" in answer.error

    run(test)


@pytest.mark.parametrize(
    ("action", "document", "words"),
    [
        ("load", {"parameters": {"config": "{}"}}, "come from the registry"),
        ("load", {"parameters": {"file:1/model.onnx": "AAAA"}}, "come from the registry"),
        ("load", {"parameters": {"unload_dependents": True}}, "is no parameter of load"),
        ("unload", {"parameters": {"unload_dependents": 1}}, "must be true or false"),
        ("unload", {"parameters": {"reason": "a\nb"}}, "printable"),
        ("unload", {"parameters": []}, None),
        ("unload", {"parameters": [1]}, "must be an object"),
        ("unload", [], "must be a JSON object"),
    ],
)
def test_parameters_get_a_clear_answer(run: Run, action: str, document: Any, words: str | None) -> None:
    async def test(box: Box) -> None:
        answer = await box.order(action, "a", document)
        assert answer.status == (200 if words is None else 400)
        assert words is None or words in answer.error

    run(test)


def test_a_damaged_file_of_unloads_is_said_and_all_is_served(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "unloaded.json"
    path.write_text('{"format": 1, "unloaded": [{"model": 1}], "untold": []}')
    unloads = Unloads(path, environment="production", replica_id="r")
    unloads.recall()
    assert unloads.by_model == {} and "cannot be read" in caplog.text


def test_a_disk_that_is_full_is_told_and_the_order_is_in_force(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "folder").write_text("no folder")
        unloads = Unloads(tmp_path / "folder" / "unloaded.json", environment="production", replica_id="r")
        unloads.put(Order.now("model.unloaded", "a", Who("somebody"), ""))
        assert "could not be written" in str(await unloads.save())
        assert list(unloads.reasons()) == ["a"]

    asyncio.run(test())


def test_a_registry_that_does_not_answer_keeps_what_it_was_not_told(tmp_path: Path, database: Database) -> None:
    async def test() -> None:
        unloads = Unloads(tmp_path / "unloaded.json", environment="production", replica_id="r")
        unloads.put(Order.now("model.unloaded", "a", Who("somebody"), ""))

        async def gone(work: Any) -> None:
            raise UnavailableError("gone")

        with pytest.raises(UnavailableError):
            await unloads.tell(database, gone)
        await unloads.save()
        again = Unloads(tmp_path / "unloaded.json", environment="production", replica_id="r")
        again.recall()
        assert again.untold == unloads.untold and again.by_model == unloads.by_model

    asyncio.run(test())
