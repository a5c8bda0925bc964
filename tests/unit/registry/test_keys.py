"""API keys: shown once, kept as a hash, checked at one cost, ended at once; and in whose name a command acts."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from registry import actor, clock, keys, replicas, routes
from registry.actor import Who
from registry.database import Database
from registry.errors import ConflictError, NotFoundError, RefusedError, SettingsError, UsageError
from registry.keys import Principal, StoredKey
from registry.redaction import redact
from registry.routes import Desired
from registry.schema import ApiKey, AuditEvent
from registry.settings import Settings
from tests.unit.registry import kit

ADMIN = Who("os:admin")
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


def make(database: Database, name: str = "alice", role: str = "view", **more: Any) -> tuple[str, str]:
    """(id, text)"""
    made, text = keys.create(database, name=name, role=role, who=ADMIN, **more)
    return made.id, text


def ask(database: Database, text: str) -> Principal | None:
    with database.read() as session:
        return keys.authenticate(session, text)


def counter(database: Database) -> int:
    with database.read() as session:
        return keys.counter(session)


def settings(**values: Any) -> Settings:
    return Settings(profile="cpu", **values)


def test_a_key_has_a_form_that_scanners_know_and_256_bits(database: Database) -> None:
    identity, text = make(database)
    assert re.fullmatch(r"mk_[0-9a-f]{12}_[0-9A-Za-z]{43}", text)
    assert text.startswith(f"mk_{identity}_")
    assert 62**43 > 2**256


def test_only_its_hash_is_kept_and_nothing_of_the_secret_is_on_record(database: Database) -> None:
    identity, text = make(database)
    secret = text.rpartition("_")[2]
    with database.read() as session:
        row = session.get_one(ApiKey, identity)
        events = list(session.scalars(select(AuditEvent.text)))
    assert row.hash == hashlib.sha256(secret.encode()).hexdigest()
    (event,) = events
    assert '"action":"key.created"' in event.replace(" ", "")
    assert secret not in event
    assert row.hash not in event
    with database.read() as session:
        assert secret not in str([found.as_dict() for found in keys.listed(session)])


def test_a_key_is_known_by_its_whole_text_only(database: Database) -> None:
    identity, text = make(database, role="infer")
    assert ask(database, text) == Principal(identity, "alice", "infer")
    other = make(database, "bob")[1]
    for wrong in (
        text[:-1],
        text + "0",
        text[:-1] + ("0" if text[-1] != "0" else "1"),
        text.upper(),
        f" {text}",
        f"{text}\n",
        f"mk_{identity}_",
        f"mk_{identity}_{other.rpartition('_')[2]}",
        text.replace("mk_", "mki_"),
        "",
        "é" * 60,
    ):
        assert ask(database, wrong) is None, wrong


def test_roles_hold_those_below_them() -> None:
    allowed = {(have, need) for have in keys.ROLES for need in keys.ROLES if keys.allows(have, need)}
    assert allowed == {
        ("view", "view"), ("infer", "view"), ("infer", "infer"),
        ("operate", "view"), ("operate", "infer"), ("operate", "operate"),
    }  # fmt: skip


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("text", ["mk_0123456789ab_" + "x" * 43, "mk_0123456789ab_" + "x" * 42, "nonsense", ""])
def test_every_check_compares_once_in_constant_time(text: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def compare(a: Any, b: Any) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    stored = {"0123456789ab": StoredKey("0123456789ab", "n", "view", keys.digest("y" * 43), None, False)}
    assert keys.check(text, stored if known else {}, lambda: NOW) == "wrong"
    ((a, b),) = compared
    assert len(a) == len(b) == 64


def test_why_a_key_is_refused_is_told_only_to_who_has_its_secret() -> None:
    secret, wrong = "s" * 43, "t" * 43
    over = NOW + dt.timedelta(seconds=1)
    for stored, now, said in (
        (StoredKey("a" * 12, "n", "view", keys.digest(secret), None, True), NOW, "revoked"),
        (StoredKey("a" * 12, "n", "view", keys.digest(secret), over, False), over, "expired"),
    ):
        assert keys.check(f"mk_{'a' * 12}_{secret}", {stored.id: stored}, lambda now=now: now) == said
        assert keys.check(f"mk_{'a' * 12}_{wrong}", {stored.id: stored}, lambda now=now: now) == "wrong"
    lasting = StoredKey("a" * 12, "n", "view", keys.digest(secret), over, False)
    assert isinstance(keys.check(f"mk_{'a' * 12}_{secret}", {lasting.id: lasting}, lambda: NOW), Principal)


def test_a_role_that_this_release_does_not_know_opens_nothing() -> None:
    stored = StoredKey("a" * 12, "n", "admin", keys.digest("s" * 43), None, False)
    assert keys.check(f"mk_{'a' * 12}_{'s' * 43}", {stored.id: stored}, lambda: NOW) == "wrong"


def test_an_expired_key_is_refused_and_its_name_is_free_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "now", lambda: NOW)
    _, text = make(database, expires_in_seconds=60)
    assert ask(database, text) is not None
    with pytest.raises(ConflictError, match="is called alice and is live"):
        make(database)
    monkeypatch.setattr(clock, "now", lambda: NOW + dt.timedelta(seconds=60))
    assert ask(database, text) is None
    assert ask(database, make(database)[1]) is not None


@pytest.mark.parametrize("by", [lambda i, t: i, lambda i, t: "alice", lambda i, t: t])
def test_a_key_is_revoked_by_id_name_or_text_once_and_on_record(
    database: Database, by: Callable[[str, str], str]
) -> None:
    identity, text = make(database)
    before = counter(database)
    ended = keys.revoke(database, by(identity, text), who=Who("os:eve"), reason="leaked")
    assert (ended.id, ended.state, ended.revoked_by) == (identity, "revoked", "os:eve")
    assert ask(database, text) is None
    assert counter(database) == before + 1
    events = kit.actions(database)
    assert events == ["key.created", "key.revoked"]
    assert keys.revoke(database, identity, who=ADMIN).revoked_by == "os:eve"
    assert kit.actions(database) == events, "nothing happened the second time"
    assert kit.verdict(database).holds


def test_by_its_name_the_live_key_is_meant(database: Database) -> None:
    first, _ = make(database)
    keys.revoke(database, first, who=ADMIN)
    second, text = make(database)
    assert keys.revoke(database, "alice", who=ADMIN).id == second
    assert ask(database, text) is None


def test_a_key_that_is_not_there_is_not_repeated(database: Database) -> None:
    stray = "mk_" + "a" * 12 + "_" + "s" * 30
    with pytest.raises(NotFoundError) as error:
        keys.revoke(database, stray, who=ADMIN)
    assert "s" * 10 not in str(error.value)
    with pytest.raises(NotFoundError, match=r"'nobody'.*keys list"):
        keys.revoke(database, "nobody", who=ADMIN)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"name": "a b"}, "not a name of a key"),
        ({"name": "x" * 65}, "at most 64"),
        ({"name": "internal"}, "not 'internal'"),
        ({"role": "admin"}, "there are view, infer, operate"),
        ({"role": "internal"}, "there are view, infer, operate"),
        ({"expires_in_seconds": 0}, "10 years"),
        ({"expires_in_seconds": float("nan")}, "10 years"),
        ({"expires_in_seconds": 1e12}, "10 years"),
    ],
)
def test_a_wrong_wish_is_refused_with_what_there_is(database: Database, call: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        keys.create(database, **({"name": "alice", "role": "view", "who": ADMIN} | call))
    assert counter(database) == 0


# --- what servers follow


def test_each_change_raises_the_counter_that_a_pulse_brings(database: Database) -> None:
    with database.write() as transaction:
        routes.change(transaction, kit.ENVIRONMENT, kit.MODEL, Desired(stable="1"), kind="first", reason="")

    def pulsed() -> int:
        with database.read() as session:
            pulse = replicas.pulse(session, kit.ENVIRONMENT)
        assert pulse is not None
        return pulse.keys

    assert pulsed() == 0
    identity, _ = make(database)
    assert pulsed() == 1
    keys.revoke(database, identity, who=ADMIN)
    assert pulsed() == counter(database) == 2


def test_there_is_one_internal_key_and_another_after_it_was_revoked(database: Database) -> None:
    def secret() -> str | None:
        with database.read() as session:
            return keys.internal_secret(session)

    assert secret() is None
    for _ in range(2):
        keys.ensure_internal(database, actor="replica:a")
    first = secret()
    assert first is not None and counter(database) == 1
    keys.revoke(database, "internal", who=ADMIN)
    assert secret() is None
    keys.ensure_internal(database, actor="replica:b")
    assert secret() not in (None, first)


def test_the_internal_key_is_another_for_each_address_and_none_by_its_stored_text(database: Database) -> None:
    keys.ensure_internal(database, actor="replica:a")
    with database.read() as session:
        secret, (row,) = keys.internal_secret(session), keys.stored(session)
    assert secret is not None
    here, there = keys.internal_text(secret, "http://a:1"), keys.internal_text(secret, "http://b:1")
    assert here != there
    assert secret not in here
    known = {row.id: row}
    for text in (here, secret, f"mk_{row.id}_{secret}", f"mk_{row.id}_{secret[:43]}"):
        assert keys.check(text, known, lambda: NOW) == "wrong"


# --- commands


def test_a_command_acts_as_the_key_that_it_is_given(database: Database, tmp_path: Path) -> None:
    identity, text = make(database, "carol", "operate")
    assert keys.of_command(database, settings(api_key=text)) == Who("key:carol", key_id=identity, via="command")
    file = tmp_path / "key"
    file.write_text(f"{text}\n")
    assert keys.of_command(database, settings(api_key_file=file)).key_id == identity
    assert keys.of_command(database, settings()) == Who(actor.user(), via="command")


def test_a_command_without_a_good_key_is_refused_with_the_remedy(database: Database, tmp_path: Path) -> None:
    identity, text = make(database, "carol", "view")
    with pytest.raises(RefusedError, match="has role view, this needs operate"):
        keys.of_command(database, settings(api_key=text))
    assert keys.of_command(database, settings(api_key=text), needs="view").actor == "key:carol"
    keys.revoke(database, identity, who=ADMIN)
    for wrong, said in ((text, "was revoked"), ("mk_x", "none that the registry knows")):
        with pytest.raises(RefusedError, match=said) as error:
            keys.of_command(database, settings(api_key=wrong))
        assert wrong not in str(error.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        keys.of_command(database, settings(api_key_file=tmp_path / "nothing"))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        keys.of_command(database, settings(api_key_file=tmp_path / "empty"))


def test_what_a_worker_runs_is_the_forms_whatever_key_the_process_has(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = make(database, "carol", "operate")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "run")
    assert keys.of_command(database, settings(api_key=text)) == Who("prefect-ui", via="form")


def test_a_process_that_acts_for_a_key_writes_in_its_name_or_not_at_all(database: Database) -> None:
    try:
        actor.act_as(Who("key:carol"))
        kit.add_version(database, "1")
        with database.write() as transaction:
            assert transaction.actor == "key:carol"
        actor.act_as(Who("key:carol"), refusal="it may look only")
        with pytest.raises(RefusedError, match="it may look only"), database.write():
            pass
    finally:
        actor.act_as(None)
    assert actor.current().startswith("os:")


def test_a_key_is_shown_nowhere(database: Database) -> None:
    identity, text = make(database)
    secret = text.rpartition("_")[2]
    held = settings(api_key=text)
    shown = {row["key"]: row["value"] for row in held.describe()}
    assert shown["api_key"] == "***"
    assert secret not in repr(held)
    assert redact(f"see {text}.") == f"see mk_{identity}_***."


def test_a_key_may_have_a_rate_of_its_own_which_is_on_record(database: Database) -> None:
    made, _ = keys.create(database, name="alice", role="infer", who=ADMIN, rate=" 600 / Minute ")
    assert made.rate == "600/minute" and made.as_dict()["rate"] == "600/minute"
    free, text = keys.create(database, name="bob", role="infer", who=ADMIN, rate="none")
    principal = ask(database, text)
    assert free.rate == "none" and principal is not None and principal.rate == "none"
    with database.read() as session:
        assert {row.name: row.rate for row in keys.listed(session)} == {"alice": "600/minute", "bob": "none"}
    before = counter(database)
    with pytest.raises(UsageError, match="60/minute"):
        keys.create(database, name="carol", role="infer", who=ADMIN, rate="often")
    assert counter(database) == before
