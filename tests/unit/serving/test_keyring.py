"""What a server knows of keys: followed by a counter, kept on its disk, read again where the registry is another."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry import keys
from registry.actor import Who
from registry.database import Database
from registry.errors import UnavailableError
from registry.keys import Principal
from serving.access.keyring import Keyring
from tests.unit.registry import kit

ADDRESS = "http://127.0.0.1:8000"
ADMIN = Who("os:admin")


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return kit.prepared(tmp_path)


async def in_thread(work: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(work)


def follow(ring: Keyring, database: Database, epoch: str = "e", counter: int | None = None) -> None:
    asyncio.run(ring.follow(database, epoch, counter, in_thread))


def make(database: Database, name: str = "alice", role: str = "view", **more: Any) -> str:
    return keys.create(database, name=name, role=role, who=ADMIN, **more)[1]


def ring(folder: Path, **more: Any) -> Keyring:
    return Keyring(folder / "serving" / "keys.json", ADDRESS, **more)


def test_a_new_key_works_and_a_revoked_one_is_refused_at_the_next_pulse(database: Database, tmp_path: Path) -> None:
    held = ring(tmp_path)
    follow(held, database, counter=0)
    assert held.empty
    text = make(database)
    assert held.check(text) == "wrong"
    follow(held, database, counter=1)
    assert isinstance(held.check(text), Principal)
    assert not held.empty
    keys.revoke(database, "alice", who=ADMIN)
    follow(held, database, counter=2)
    assert held.check(text) == "revoked"
    assert held.empty


def test_a_key_that_was_right_before_still_ends(database: Database, tmp_path: Path) -> None:
    moment = dt.datetime.now(dt.UTC)
    held = ring(tmp_path, now=lambda: moment)
    text = make(database, expires_in_seconds=60)
    follow(held, database)
    assert isinstance(held.check(text), Principal)
    assert isinstance(held.check(text), Principal)
    moment += dt.timedelta(seconds=61)
    assert held.check(text) == "expired"


def test_nothing_is_read_while_the_counter_stands(database: Database, tmp_path: Path) -> None:
    held = ring(tmp_path)
    make(database)
    follow(held, database, counter=1)
    with kit.statements(database) as sent:
        follow(held, database, counter=1)
    assert sent == []
    with kit.statements(database) as sent:
        follow(held, database, epoch="another", counter=1)
    assert sent != [], "a restored registry may have other keys under the same number"
    assert held.seen == ("another", 1)


def test_the_keys_are_kept_on_the_disk_for_this_user_only_and_hold_no_secret(
    database: Database, tmp_path: Path
) -> None:
    text = make(database, expires_in_seconds=3600)
    held = ring(tmp_path)
    follow(held, database)
    assert stat.S_IMODE(held.path.stat().st_mode) == 0o600
    assert text.rpartition("_")[2] not in held.path.read_text()
    assert sorted(path.name for path in held.path.parent.iterdir()) == ["keys.json"]
    other = ring(tmp_path, now=lambda: dt.datetime.now(dt.UTC) + dt.timedelta(hours=2))
    other.recall()
    assert other.check(text) == "expired"
    again = ring(tmp_path)
    again.recall()
    assert isinstance(again.check(text), Principal)
    assert again.seen == ("e", 1)


def test_what_came_from_the_disk_is_read_anew_from_the_registry(database: Database, tmp_path: Path) -> None:
    text = make(database)
    follow(ring(tmp_path), database)
    path = ring(tmp_path).path
    document = json.loads(path.read_text())
    document["keys"][0]["role"] = "operate"
    path.write_text(json.dumps(document))
    held = ring(tmp_path)
    held.recall()
    follow(held, database, counter=1)
    found = held.check(text)
    assert isinstance(found, Principal) and found.role == "view"


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format": 2}', '{"format": 1, "epoch": "e", "counter": 1, "keys": [{}]}', "\udcff", '{"format": 1}',
     '{"format": 1, "epoch": "e", "counter": 1, "keys": [{"id": "a", "name": "n", "role": "view", "hash": "h",'
     ' "expires_at": "2026-01-01", "revoked": false}]}',
     '{"format": 1, "epoch": "e", "counter": 1, "keys": [{"id": "a", "name": "n", "role": "view", "hash": "h",'
     ' "expires_at": null, "revoked": "no"}]}'],
)  # fmt: skip
def test_a_damaged_file_opens_nothing(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = ring(tmp_path)
    held.path.parent.mkdir()
    held.path.write_bytes(content.encode(errors="surrogateescape"))
    held.recall()
    assert held.seen is None
    assert "cannot be used" in caplog.text


def test_without_a_file_nothing_is_known_yet(tmp_path: Path) -> None:
    held = ring(tmp_path)
    held.recall()
    assert held.seen is None


def test_a_registry_that_does_not_answer_takes_no_key_away(database: Database, tmp_path: Path) -> None:
    text = make(database)
    held = ring(tmp_path)
    follow(held, database)

    async def fails(_work: Callable[[], Any]) -> Any:
        raise UnavailableError("gone")

    with pytest.raises(UnavailableError):
        asyncio.run(held.follow(database, "e", 2, fails))
    assert isinstance(held.check(text), Principal)


def test_keys_that_cannot_be_kept_work_all_the_same(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = make(database)
    (tmp_path / "serving").write_text("a file where the folder should be")
    held = ring(tmp_path)
    follow(held, database)
    assert isinstance(held.check(text), Principal)
    assert "could not be kept" in caplog.text


def test_servers_that_ask_everybody_agree_on_a_key_for_our_own_processes(database: Database, tmp_path: Path) -> None:
    def agree(held: Keyring) -> None:
        follow(held, database)
        asyncio.run(held.agree(database, "box", in_thread))

    open_to_all = ring(tmp_path)
    agree(open_to_all)
    with database.read() as session:
        assert keys.internal_secret(session) is None, "nobody needs it"
    first, second = ring(tmp_path, wants_internal=True), ring(tmp_path / "b", wants_internal=True)
    agree(first)
    agree(second)
    with database.read() as session:
        secret = keys.internal_secret(session)
        assert keys.counter(session) == 1
    assert secret is not None
    shown = keys.internal_text(secret, ADDRESS)
    for held in (first, second):
        found = held.check(shown)
        assert isinstance(found, Principal) and (found.key_id, found.role) == ("internal", "infer")
        assert held.check(keys.internal_text(secret, "http://elsewhere:1")) == "wrong"
    keys.revoke(database, "internal", who=ADMIN)
    agree(first)
    assert first.check(shown) == "wrong"
    with database.read() as session:
        assert keys.internal_secret(session) not in (None, secret)


def test_a_keys_own_rate_comes_with_it_and_outlives_the_registry(database: Database, tmp_path: Path) -> None:
    text, plain = make(database, rate="600/minute"), make(database, name="bob")
    held = ring(tmp_path)
    follow(held, database)
    again = ring(tmp_path)
    again.recall()
    for one in (held, again):
        found, other = one.check(text), one.check(plain)
        assert isinstance(found, Principal) and found.rate == "600/minute"
        assert isinstance(other, Principal) and other.rate is None


def test_keys_that_an_earlier_release_kept_have_no_rate_of_their_own(database: Database, tmp_path: Path) -> None:
    text = make(database)
    held = ring(tmp_path)
    follow(held, database)
    document = json.loads(held.path.read_text())
    for row in document["keys"]:
        del row["rate"]
    held.path.write_text(json.dumps(document))
    again = ring(tmp_path)
    again.recall()
    found = again.check(text)
    assert isinstance(found, Principal) and found.rate is None
    for row in document["keys"]:
        row["rate"] = "often"
    held.path.write_text(json.dumps(document))
    wrong = ring(tmp_path)
    wrong.recall()
    assert wrong.seen is None, "what cannot be read is not half used"
