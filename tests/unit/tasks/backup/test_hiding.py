"""Secrets of the settings never leave in a text, in whatever form they stand there."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from registry.sections import Database, QueuesSection
from registry.settings import Settings
from tasks.backup.hiding import hider


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "password").write_text("from-a-file-1\n")
    (tmp_path / "backup.key").write_text("# a comment that stays\nc2VjcmV0LWtleQ==\n")
    return Settings(
        home=tmp_path,
        database_url="postgresql+psycopg://keeper:of%20registry@db/registry",
        redis_url="redis://:of-redis@cache:6379/0",
        backup_key_file=tmp_path / "backup.key",
        api_key=SecretStr("mk_0123456789ab_ofapikey"),
        databases=[
            Database(name="a", url="mysql+pymysql://app@db/app", password=SecretStr("pass/word")),
            Database(name="b", url="mysql+pymysql://app@db/app", password_file=tmp_path / "password"),
            Database(name="c", url="mysql+pymysql://app@db/app", password_file=tmp_path / "nothing"),
        ],
        queues=QueuesSection(url="redis://:of-queues@cache:6379/1"),
    )


@pytest.mark.parametrize(
    "secret",
    [
        *("of registry", "of%20registry", "of-redis", "of-queues", "pass/word", "pass%2Fword", "from-a-file-1"),
        *("c2VjcmV0LWtleQ==", "mk_0123456789ab_ofapikey"),
    ],
)
def test_no_form_of_a_secret_is_left(settings: Settings, secret: str) -> None:
    hidden = hider(settings)(f"Access denied (using password {secret!r}) for {secret}: {secret}")
    assert secret not in hidden
    assert hidden.startswith("Access denied")


def test_secrets_of_the_environment_are_hidden_too(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of+the/bucket")
    assert "of+the/bucket" not in hider(settings)("signed with of+the/bucket")


def test_a_name_that_is_no_text_can_be_printed(settings: Settings) -> None:
    hidden = hider(settings)("the file b\udcff is a socket")
    assert hidden.encode("utf-8").decode() == "the file b\\udcff is a socket"


def test_the_rest_of_a_text_stays(settings: Settings) -> None:
    text = "table generations of database app at db: a comment that stays"
    assert hider(settings)(text) == text


def test_an_unknown_password_in_a_url_is_hidden_all_the_same(settings: Settings) -> None:
    assert "other" not in hider(settings)("mysql://app:other@db/app")
