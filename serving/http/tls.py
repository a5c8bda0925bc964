"""https by certificate files: read at the start, and again when they change, without a restart."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from registry.access import ServerSection
from registry.errors import SettingsError

log = logging.getLogger("modelkeep.tls")

LOOK_SECONDS = 5.0
HANDSHAKE_SECONDS = 10.0
"""Who has not agreed on a cipher by then is cut off."""


class Certificates:
    """A server's certificate, its key, and the CA of its clients where they must show certificates. `context` stays the same object:
    connections that are made after a renewal get the new certificate. Raises SettingsError, which names the file.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self.certificate, self.key, self.client_ca = certificate, key, client_ca
        self.renewals = 0
        self.context = _context(certificate, key, client_ca)
        self._seen = self._stamps()

    def renew(self) -> bool:
        """Take the files where they have changed. What cannot be used is said in the log, and the old ones go on.

        A new client CA is trusted beside the one before, until the next start.
        """
        found = self._stamps()
        if found == self._seen:
            return False
        try:
            _context(self.certificate, self.key, self.client_ca)  # both files may be in the middle of their exchange
            self.context.load_cert_chain(self.certificate, self.key, password=_no_password)
            if self.client_ca is not None:
                self.context.load_verify_locations(self.client_ca)
        except (SettingsError, ssl.SSLError, OSError, ValueError) as error:
            if self._stamps() == found:
                self._seen = found
                log.error("the certificate is not renewed, the one before goes on: %s", error)
            return False
        self._seen = found
        self.renewals += 1
        log.info("the certificate was renewed from %s", self.certificate)
        return True

    async def follow(self, *, every_seconds: float = LOOK_SECONDS) -> None:
        """Look every few seconds."""
        while True:
            await asyncio.sleep(every_seconds)
            self.renew()

    def _stamps(self) -> tuple[tuple[int, int, int] | None, ...]:
        files = [self.certificate, self.key, *([self.client_ca] if self.client_ca is not None else [])]
        return tuple(_stamp(path) for path in files)


def certificates(server: ServerSection) -> Certificates | None:
    """As the settings want it; None where they want no TLS. Raises SettingsError, which names setting and file."""
    if server.tls_certificate is None or server.tls_key is None:
        return None
    return Certificates(server.tls_certificate, server.tls_key, server.tls_client_ca)


def _context(certificate: Path, key: Path, client_ca: Path | None) -> ssl.SSLContext:
    for name, path in (("tls_certificate", certificate), ("tls_key", key), ("tls_client_ca", client_ca)):
        if path is None:
            continue
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            raise SettingsError(f"server.{name} = {path}: {error.strerror or error}") from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Asked for a password a server without a terminal would wait for ever.
        context.load_cert_chain(certificate, key, password=_no_password)
    except ssl.SSLError as error:
        raise SettingsError(_words(certificate, key, error)) from error
    except ValueError as error:
        raise SettingsError(f"server.tls_key = {key}: it has a password; give a key without one") from error
    if client_ca is not None:
        try:
            context.load_verify_locations(client_ca)
        except ssl.SSLError as error:
            raise SettingsError(f"server.tls_client_ca = {client_ca}: holds no certificate in PEM") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _words(certificate: Path, key: Path, error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"server.tls_key = {key} is not the key of server.tls_certificate = {certificate}"
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        probe.load_verify_locations(certificate)
    except ssl.SSLError:
        return f"server.tls_certificate = {certificate}: holds no certificate in PEM"
    return f"server.tls_key = {key}: holds no private key in PEM that can be used ({error.reason or error})"


def _no_password() -> str:
    raise ValueError("a password is asked for")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
