"""How commands and flows check servers that speak https: by the CA of the settings, else by the system's own."""

from __future__ import annotations

import os
import ssl
from collections.abc import Mapping
from pathlib import Path

from registry.access import ClientSection
from registry.errors import SettingsError

_VARIABLES = {
    "ca": "MODELKEEP_CLIENT__CA",
    "certificate": "MODELKEEP_CLIENT__CERTIFICATE",
    "key": "MODELKEEP_CLIENT__KEY",
}
_contexts: dict[tuple[str | None, ...], ssl.SSLContext] = {}


def publish(client: ClientSection, environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Let this process and those that it starts know: what reaches servers has only their address."""
    for name, variable in _VARIABLES.items():
        path: Path | None = getattr(client, name)
        if path is not None:
            environ[variable] = str(path)


def verify(address: str, environ: Mapping[str, str] = os.environ) -> ssl.SSLContext | bool:
    """What httpx wants as `verify` for a server at this address. Raises SettingsError, which names the file."""
    if not address.startswith("https://"):
        return True
    ca, certificate, key = (environ.get(variable) or None for variable in _VARIABLES.values())
    stamps = tuple(_stamp(path) for path in (ca, certificate, key))
    context = _contexts.get(stamps)
    if context is None:
        _contexts.clear()
        context = _contexts[stamps] = _context(ca, certificate, key)
    return context


def _context(ca: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"client.ca = {ca}: holds no certificate that can be read ({error})") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"client.certificate = {certificate}, client.key = {key}: cannot be used ({error})"
            ) from error
    return context


def _stamp(path: str | None) -> str | None:
    """A name that changes with the file, so that a renewed one is read."""
    if path is None:
        return None
    try:
        found = Path(path).stat()
    except OSError:
        return path
    return f"{path}:{found.st_mtime_ns}:{found.st_size}"
