"""The catalogue: pages of versions, one in full, two side by side, tags, descriptions, the archive; and deleting what is archived."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from registry import audit, catalogue, clock, figures, points, references, removal, replicas, versions
from registry.database import Database
from registry.errors import ConflictError, IllegalMoveError, NotFoundError, RefusedError, UsageError
from registry.replicas import Report
from registry.schema import Model, Placement, Version
from registry.store import DirectoryStore
from tests.unit.registry import kit
from tests.unit.registry.kit import ENVIRONMENT, MODEL, actions, add_version, begin, canary, end, stable_by

MANY = 10_000


def page(database: Database, wanted: catalogue.Wanted | None = None, **how: Any) -> dict[str, Any]:
    with database.read() as session:
        return catalogue.page(session, wanted or catalogue.Wanted(), **how)


def names_of(found: dict[str, Any]) -> list[str]:
    return [f"{row['model']}/{row['version']}" for row in found["versions"]]


def register(
    database: Database, store: DirectoryStore, folder: Path, version: str, *, scale: float | None = None, **more: Any
) -> str:
    path = kit.onnx_file(folder / f"{version}.onnx", float(version) if scale is None else scale)
    model = more.pop("name", MODEL)
    return versions.register(database, store, path, name=model, version=version, max_bytes=1 << 20, **more).digest


# pages


@pytest.fixture
def many(database: Database) -> Database:
    """10,000 versions of 20 models, every tenth archived, every thousandth tagged, the newest of each model stable."""
    start = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    with database.write() as transaction:
        for number in range(20):
            transaction.session.add(Model(name=f"m{number}", created_at=start))
        transaction.session.flush()
        transaction.session.execute(
            insert(Version),
            [
                {
                    "model": f"m{k % 20}", "version": str(k // 20), "ordinal": k // 20, "digest": f"{k:064x}", "format": "onnx",
                    "state": "archived" if k % 10 == 0 else "validated", "size_bytes": 1, "files": [], "facts": {},
                    "tags": {"team": "vision"} if k % 1000 == 1 else {}, "created_at": start + dt.timedelta(seconds=k),
                    "created_by": "test",
                }
                for k in range(MANY)
            ],
        )  # fmt: skip
        transaction.session.execute(
            insert(Placement),
            [
                {
                    "model": f"m{number}",
                    "version": "499",
                    "environment": ENVIRONMENT,
                    "status": "stable",
                    "since": start,
                }
                for number in range(20)
            ],
        )
    return database


def test_a_page_of_ten_thousand_versions_costs_a_handful_of_questions_and_rows(many: Database) -> None:
    for number in (1, 100, 200):
        with kit.statements(many) as sent:
            found = page(many, page=number, limit=50)
        assert (len(found["versions"]), found["total"]) == (50, MANY)
        # one count, one of keys, and for each of the 20 models of the page its rows and places
        assert len(sent) <= 2 + 2 * 20 + 1, len(sent)
    with kit.statements(many) as sent:
        found = page(many, catalogue.Wanted("m3"), page=5, limit=100)
    assert (found["total"], found["next"], found["versions"][0]["version"]) == (500, None, "99")
    assert len(sent) <= 5


def test_pages_hold_each_version_once_and_the_newest_first(many: Database) -> None:
    seen: list[str] = []
    number: int | None = 1
    while number is not None:
        found = page(many, catalogue.Wanted(state="archived"), page=number, limit=300)
        seen += names_of(found)
        number = found["next"]
    assert len(seen) == len(set(seen)) == MANY // 10
    assert seen[0] == "m10/499"


def test_versions_are_found_by_model_state_tag_and_place(many: Database) -> None:
    assert page(many, catalogue.Wanted(tag=("team", "vision")))["total"] == 10
    assert page(many, catalogue.Wanted("m1", tag=("team", "vision")))["total"] == 10
    assert page(many, catalogue.Wanted(tag=("team", "speech")))["total"] == 0
    assert page(many, catalogue.Wanted(tag=("nobody", "vision")))["total"] == 0
    placed = page(many, catalogue.Wanted(environment=ENVIRONMENT))
    assert placed["total"] == 20
    assert {row["environments"][ENVIRONMENT] for row in placed["versions"]} == {"stable"}
    assert page(many, catalogue.Wanted("m0", state="archived"))["total"] == 500
    with pytest.raises(UsageError, match="'new': one of registered, validated"):
        page(many, catalogue.Wanted(state="new"))


# one, and two side by side


def test_a_version_in_full_has_its_lineage_from_registration_to_outcome(database: Database) -> None:
    for version in ("1", "2"):
        add_version(database, version)
    stable_by(database, "1")
    operation = begin(database, "2", flow_run_id="run-9")
    canary(database, operation)
    end(database, operation, "withdrawn")
    with database.read() as session:
        full = catalogue.version_in_full(session, MODEL, "2")
        one = catalogue.version_in_full(session, MODEL, "1")
        whole = catalogue.model_in_full(session, MODEL)
    (promotion,) = full["lineage"]["promotions"]
    assert (promotion["id"], promotion["state"], promotion["flow_run_id"]) == (operation.id, "withdrawn", "run-9")
    assert full["lineage"]["stable"] == []
    assert (one["lineage"]["stable"][0]["until"], one["environments"][ENVIRONMENT]) == (None, "stable")
    assert (full["measured"], full["benchmark"], full["live"]) == (None, None, None)
    assert (whole["states"], whole["routes"][ENVIRONMENT]["stable"]) == ({"validated": 2}, "1")


def test_figures_are_those_that_were_measured_and_no_others(database: Database) -> None:
    add_version(database, "1")
    with database.write() as transaction:
        row = versions.get(transaction.session, MODEL, "1")
        report = {
            "passed": True,
            "candidate": {"memory_bytes": 1000, "latency": {"p50_seconds": 0.002}, "golden": None},
        }
        versions.note_validation(transaction, row, report=report, signature=None, rows_independent=None)
        figures.note_benchmark(transaction, row, {"throughput_per_second": 90.0}, device="cpu")
    with database.read() as session:
        full = catalogue.version_in_full(session, MODEL, "1")
    assert full["measured"] == {"by": "validation", "memory_bytes": 1000, "latency_p50_seconds": 0.002}
    assert full["benchmark"]["throughput_per_second"] == 90.0 and full["benchmark"]["at"]
    assert "version.benchmarked" in actions(database)


def live_report(
    database: Database, replica: str, requests: int, errors: int, mean: float | None, p95: float | None
) -> None:
    loaded = {
        "model": MODEL, "version": "1", "memory_bytes": 5,
        "figures": {"requests": requests, "errors": errors, "mean_seconds": mean, "p95_seconds": p95},
    }  # fmt: skip
    replicas.report(
        database,
        Report(
            id=replica, environment=ENVIRONMENT, address="", boot_id="b", epoch="e", generation=1,
            serving={"loaded": [loaded]}, started_at=clock.now(),
        ),
    )  # fmt: skip


def test_live_figures_are_added_up_over_servers_and_percentiles_are_not(database: Database) -> None:
    add_version(database, "1")
    live_report(database, "r1", 30, 3, 0.010, 0.02)
    live_report(database, "r2", 10, 0, 0.030, 0.05)
    live_report(database, "r3", 0, 0, None, None)
    with database.read() as session:
        found = catalogue.version_in_full(session, MODEL, "1")["live"]
    assert (found["requests"], found["errors"], found["error_rate"]) == (40, 3, 0.075)
    assert found["mean_seconds"] == pytest.approx(0.015)
    assert found["p95_seconds_worst"] == 0.05
    assert [row["replica"] for row in found["replicas"]] == ["r1", "r2", "r3"]


def test_two_versions_are_compared_by_all_that_is_on_record(
    database: Database, store: DirectoryStore, tmp_path: Path
) -> None:
    register(database, store, tmp_path, "1", tags={"team": "a"})
    register(database, store, tmp_path, "2", tags={"team": "b"})
    with database.write() as transaction:
        for version, latency in (("1", 0.002), ("2", 0.003)):
            row = versions.get(transaction.session, MODEL, version)
            report = {"candidate": {"latency": {"p50_seconds": latency}}}
            versions.note_validation(transaction, row, report=report, signature=None, rows_independent=True)
    with database.read() as session:
        found = catalogue.compare(session, MODEL, "1", "2")
        same = catalogue.compare(session, MODEL, "1", "1")
    assert found["differences"]["tags.team"] == {"a": "a", "b": "b", "change": None}
    assert found["differences"]["measured.latency_p50_seconds"]["change"] == pytest.approx(0.5)
    assert "digest" in found["differences"] and not any(name.startswith("signature") for name in found["differences"])
    assert found["a"]["signature"]["inputs"]["x"]["datatype"] == "FP32"
    assert same["differences"] == {}


# tags, descriptions, the archive


def test_tags_are_set_and_taken_away_on_record(database: Database) -> None:
    add_version(database, "1")
    assert catalogue.tag(database, MODEL, "1", {"team": "vision", "run": "7"}) == {"team": "vision", "run": "7"}
    assert catalogue.tag(database, MODEL, "1", {"run": None, "nothing": None}) == {"team": "vision"}
    assert actions(database).count("version.tagged") == 2
    assert catalogue.tag(database, MODEL, "1", {"team": "vision"}) == {"team": "vision"}
    assert actions(database).count("version.tagged") == 2, "nothing changed, so nothing is on record"
    for key in ("", 'a"b', "-x", "a b", "x" * 64):
        with pytest.raises(UsageError, match="is no key of a tag"):
            catalogue.tag(database, MODEL, "1", {key: "1"})
    with pytest.raises(UsageError, match="characters"):
        catalogue.tag(database, MODEL, "1", {"key": "x" * 1001})
    with pytest.raises(NotFoundError):
        catalogue.tag(database, MODEL, "9", {"a": "b"})


def test_a_model_is_described_on_record(database: Database) -> None:
    add_version(database, "1")
    catalogue.describe_model(database, MODEL, description="reads digits", kind="classifier")
    assert catalogue.describe_model(database, MODEL, description="reads numbers") == {
        "model": MODEL, "description": "reads numbers", "kind": "classifier",
    }  # fmt: skip
    with pytest.raises(UsageError, match="'painter' is not one of classifier"):
        catalogue.describe_model(database, MODEL, kind="painter")
    with pytest.raises(NotFoundError, match="known are digits"):
        catalogue.describe_model(database, "letters", kind="router")
    assert actions(database).count("model.described") == 2


def test_what_a_route_or_a_promotion_names_is_not_archived(database: Database) -> None:
    for version in ("1", "2", "3"):
        add_version(database, version)
    stable_by(database, "1")
    with pytest.raises(RefusedError, match="it is the stable version in production"):
        catalogue.archive(database, MODEL, "1", reason="old")
    operation = begin(database, "2")
    with pytest.raises(RefusedError, match=f"promotion {operation.id} in production is under way"):
        catalogue.archive(database, MODEL, "2", reason="old")
    canary(database, operation)
    with pytest.raises(RefusedError, match="it is the candidate version in production"):
        catalogue.archive(database, MODEL, "2", reason="old")
    end(database, operation, "withdrawn")
    found = catalogue.archive(database, MODEL, "2", reason="it was no good", actor="ann")
    assert (found["state"], found["before"]) == ("archived", "validated")
    with pytest.raises(IllegalMoveError, match="archived versions stay archived"):
        catalogue.archive(database, MODEL, "2", reason="again")


# deleting


@pytest.fixture
def shelf(database: Database, store: DirectoryStore, tmp_path: Path) -> Iterator[tuple[Database, DirectoryStore, Path]]:
    yield database, store, tmp_path


Shelf = tuple[Database, DirectoryStore, Path]


def archived(shelf: Shelf, version: str, **more: Any) -> str:
    digest = register(*shelf, version, **more)
    catalogue.archive(shelf[0], more.get("name", MODEL), version, reason="old")
    return digest


def test_only_an_archived_version_is_deleted_and_only_with_a_reason(shelf: Shelf) -> None:
    database, store, _ = shelf
    digest = register(*shelf, "1")
    with pytest.raises(RefusedError, match="only an archived version can be deleted"):
        removal.delete(database, store, MODEL, "1", reason="space")
    catalogue.archive(database, MODEL, "1", reason="old")
    with pytest.raises(UsageError, match="needs a reason"):
        removal.delete(database, store, MODEL, "1", reason=" ")
    assert store.has(digest)


def test_the_bytes_go_and_the_record_stays(shelf: Shelf) -> None:
    database, store, folder = shelf
    digest = archived(shelf, "1", golden=kit.golden_file(folder / "g.npz"))
    found = removal.delete(database, store, MODEL, "1", reason="space", actor="ann")
    assert (found.again, found.files_removed, found.files_kept) == (False, 2, 0)
    assert not store.has(digest) and kit.stored(store.folder) == []
    with database.read() as session:
        full = catalogue.version_in_full(session, MODEL, "1")
    assert (full["state"], full["digest"], bool(full["deleted_at"])) == ("archived", digest, True)
    assert actions(database)[-2:] == ["version.deleted", "artifacts.removed"]
    assert kit.verdict(database).holds


def test_bytes_that_another_version_has_stay(shelf: Shelf) -> None:
    database, store, _ = shelf
    digest = archived(shelf, "1", scale=5.0)
    register(*shelf, "2", scale=5.0, name="letters")
    found = removal.delete(database, store, MODEL, "1", reason="space")
    assert (found.files_removed, found.files_kept, store.has(digest)) == (0, 1, True)
    catalogue.archive(database, "letters", "2", reason="old")
    assert removal.delete(database, store, "letters", "2", reason="space").files_removed == 1


def test_what_a_rollback_point_needs_is_not_deleted_until_the_point_is_gone(shelf: Shelf) -> None:
    database, store, _ = shelf
    for version in ("1", "2"):
        register(*shelf, version)
    with database.write() as transaction:
        for version in ("1", "2"):
            versions.get(transaction.session, MODEL, version).state = "validated"
    stable_by(database, "1", "2")
    assert catalogue.archive(database, MODEL, "1", reason="old")["rollback_points"] == 1
    with pytest.raises(RefusedError, match=r"rollback point \w+ needs it"):
        removal.delete(database, store, MODEL, "1", reason="space")
    with database.write() as transaction:
        for row in transaction.session.query(points.RollbackPoint).filter_by(version="1"):
            row.gone_at = clock.now()
    assert removal.delete(database, store, MODEL, "1", reason="space").files_removed == 1


def test_a_crash_between_row_and_bytes_is_mended_by_the_same_command(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, store, _ = shelf
    digest = archived(shelf, "1")
    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "remove", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            removal.delete(database, store, MODEL, "1", reason="space")
    assert store.has(digest) and actions(database)[-1] == "version.deleted"
    found = removal.delete(database, store, MODEL, "1", reason="space")
    assert (found.again, found.files_removed, store.has(digest)) == (True, 1, False)
    found = removal.delete(database, store, MODEL, "1", reason="space")
    assert (found.again, found.files_removed) == (True, 0)
    assert actions(database).count("version.deleted") == 1


def test_a_registration_of_the_same_bytes_at_that_moment_never_ends_without_them(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delete comes between the storing of the bytes and the row that refers to them."""
    _, store, _ = shelf
    digest = archived(shelf, "1", scale=3.0)
    stored_ = references.still_stored

    def meanwhile(store_: DirectoryStore, digests: list[str]) -> None:
        store_.remove(digest)
        stored_(store_, digests)

    monkeypatch.setattr(references, "still_stored", meanwhile)
    with pytest.raises(ConflictError, match="was deleted at this moment"):
        register(*shelf, "2", scale=3.0)
    monkeypatch.undo()
    register(*shelf, "2", scale=3.0)
    assert store.has(digest)


def test_a_deleted_version_is_not_registered_again_under_its_name(shelf: Shelf) -> None:
    database, store, _ = shelf
    archived(shelf, "1")
    removal.delete(database, store, MODEL, "1", reason="space")
    with pytest.raises(ConflictError, match="was deleted: register them under another version"):
        register(*shelf, "1")
    assert register(*shelf, "1b", scale=1.0)


def test_the_chain_of_events_holds_over_all_of_it(shelf: Shelf) -> None:
    database, store, _ = shelf
    archived(shelf, "1")
    catalogue.tag(database, MODEL, "1", {"a": "b"})
    removal.delete(database, store, MODEL, "1", reason="space")
    with database.read() as session:
        assert audit.verify(session, database.anchors).holds
