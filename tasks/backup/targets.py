"""Where each component of a backup belongs: the places that the settings name, or below a folder that somebody wants to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from registry.errors import SettingsError, UsageError
from registry.settings import Settings
from tasks.backup.components import Target
from tasks.backup.selection import Chosen

FOLDERS = {"models": "artifacts", "vectors": "chroma", "config": "config"}
_SERVERS: Mapping[str, tuple[str, ...]] = {
    "mysql": ("mariadb", "mysql", "registry"),
    "mariadb": ("mariadb", "mysql", "registry"),
    "postgresql": ("postgresql", "registry"),
    "sqlite": ("sqlite", "registry"),
    "redis": ("queues",),
    "rediss": ("queues",),
    "http": ("vectors",),
    "https": ("vectors",),
}
"""By the scheme of a URL, the kinds of components that can be put there."""
_PORTS = {"mysql": 3306, "mariadb": 3306, "postgresql": 5432}


def live(chosen: Chosen, settings: Settings, *, force: bool, backup_id: str) -> Target:
    """The place that the settings name. Raises SettingsError where they name none: then the component can only go elsewhere."""
    group, _, name = chosen.component.name.partition(":")
    options = {"environment": settings.environment, "backup_id": backup_id}
    match group:
        case "registry":
            return Target(settings.database_url, settings.home, chosen.only, force, options)
        case "models":
            told = {**options, "registry_url": settings.database_url, "home": settings.home}
            return Target(None, _folder(settings.artifacts, "artifacts"), chosen.only, force, told)
        case "config":
            return Target(None, settings.home, chosen.only, force, options)
        case "vectors":
            url = settings.vectors.url or settings.chroma
            return Target(_set(url, "[vectors] url, or chroma", chosen), None, chosen.only, force, options)
        case "queues":
            url = settings.queues.url or settings.redis_url
            return Target(_set(url, "[queues] url, or redis_url", chosen), None, chosen.only, force, options)
        case "database":
            database = next((one for one in settings.databases if one.name == name), None)
            url = None if database is None else database.connection_url()
            return Target(_set(url, f'[[databases]] with name = "{name}"', chosen), None, chosen.only, force, options)
        case _:
            files = next((one for one in settings.files if one.name == name), None)
            path = None if files is None else str(files.path)
            return Target(
                None, Path(_set(path, f'[[files]] with name = "{name}"', chosen)), chosen.only, force, options
            )


def into(chosen: Chosen, place: str, *, backup_id: str, environment: str) -> Target | None:
    """A place of its own, beside what is live. None where the component needs a server and `place` is a folder: then its
    content is written there as files. Raises UsageError for a URL that the component does not belong to.
    """
    group, _, name = chosen.component.name.partition(":")
    kind = chosen.component.kind
    options = {"environment": environment, "backup_id": backup_id, "aside": True}
    if "://" in place:
        scheme = urlsplit(place).scheme.partition("+")[0]
        if kind not in _SERVERS.get(scheme, ()):
            raise UsageError(f"--into {scheme}://…: {chosen.component.name} is of kind {kind}, which does not go there")
        return Target(place, None, chosen.only, False, options)
    folder = Path(place)
    if group == "registry":
        return Target(f"sqlite:///{folder / 'registry.db'}", folder, chosen.only, False, options)
    if group == "vectors":
        return Target(str(folder / FOLDERS[group]), None, chosen.only, False, options)
    if group in FOLDERS:
        return Target(None, folder / FOLDERS[group], chosen.only, False, options)
    if group == "files":
        return Target(None, folder / "files" / name, chosen.only, False, options)
    if kind == "sqlite":
        return Target(f"sqlite:///{folder / 'databases' / name}.db", None, chosen.only, False, options)
    return None


def with_known_password(place: str, settings: Settings) -> str:
    """`place` with the password that [[databases]] has for that user of that server, where it names none: a password in a
    command's arguments is seen by everybody on the machine, and kept by the shell.
    """
    wanted = _account(place)
    if wanted is None or urlsplit(place).password is not None:
        return place
    for database in settings.databases:
        if _account(database.url) != wanted:
            continue
        secret = urlsplit(database.connection_url()).password
        if secret is not None:
            parts = urlsplit(place)
            user, _, host = parts.netloc.rpartition("@")
            return urlunsplit(parts._replace(netloc=f"{user}:{quote(unquote(secret), safe='')}@{host}"))
    return place


def _account(url: str) -> tuple[str, str, int, str] | None:
    """(kind of server, host, port, user) of a URL; None where it names no server or no user."""
    parts = urlsplit(url)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _PORTS or not parts.hostname or not parts.username:
        return None
    try:
        port = parts.port or _PORTS[scheme]
    except ValueError:  # it is said by what connects, which names the place
        return None
    return scheme.replace("mariadb", "mysql"), parts.hostname, port, unquote(parts.username)


def _set(value: str | None, setting: str, chosen: Chosen) -> str:
    if value is None:
        raise SettingsError(
            f"{chosen.component.name} has no place in the settings: add {setting}, or give --into to put it elsewhere, "
            "or leave it out by --components"
        )
    return value


def _folder(location: str, setting: str) -> Path:
    if "://" in location and not location.startswith("file://"):
        raise SettingsError(f"{setting} = {location!r}: this release keeps artifacts in a directory only")
    return Path(location.removeprefix("file://")).expanduser()
