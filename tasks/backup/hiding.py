"""Texts without the secrets of this installation: not only what looks like one, but every secret value that the settings hold."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from urllib.parse import quote, unquote, urlsplit

from registry.errors import SettingsError
from registry.redaction import HIDDEN, redact
from registry.settings import Settings

_ENVIRONMENT = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MODELKEEP_API_KEY", "PGPASSWORD", "MYSQL_PWD")
_SHORTEST = 4
"""A secret of less letters would take half of every sentence away."""


def hider(settings: Settings) -> Callable[[str], str]:
    """A function that takes secrets out of a text. Make it when a run begins: it reads password and key files once."""
    found = sorted({form for one in _secrets(settings) for form in _forms(one)}, key=len, reverse=True)

    def hide(text: str) -> str:
        for secret in found:
            text = text.replace(secret, HIDDEN)
        # names of files may be no UTF-8, and what is shown has to be
        return redact(text).encode("utf-8", "backslashreplace").decode("utf-8")

    return hide


def _forms(secret: str) -> Iterator[str]:
    for form in (secret, quote(secret, safe=""), quote(secret), repr(secret)[1:-1]):
        if len(form) >= _SHORTEST:
            yield form


def _secrets(settings: Settings) -> Iterator[str]:
    urls = [settings.database_url, settings.s3_endpoint_url, settings.redis_url, settings.chroma]
    urls += [settings.queues.url, settings.vectors.url]
    for database in settings.databases:
        try:
            urls.append(database.connection_url())
        except SettingsError:  # its password cannot be read: then nobody can write it anywhere
            urls.append(database.url)
    for url in urls:
        if url is not None and "://" in url:
            yield from _password(url)
    if settings.api_key is not None:
        yield settings.api_key.get_secret_value()
    for path in (settings.api_key_file, settings.backup_key_file):
        try:
            text = "" if path is None else path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        yield from (line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    yield from (os.environ[name] for name in _ENVIRONMENT if os.environ.get(name))


def _password(url: str) -> Iterator[str]:
    try:
        password = urlsplit(url).password
    except ValueError:
        return
    if password:
        yield password
        yield unquote(password)
