"""Certificates: what is wrong with them is said with the file, and a renewed one is taken without a restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import pytest

from registry import client_tls
from registry.access import ClientSection, ServerSection
from registry.errors import SettingsError
from serving.http import tls
from serving.http.tls import Certificates, certificates
from tests.certificates import Authority


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def test_without_files_there_is_no_tls() -> None:
    assert certificates(ServerSection()) is None


def test_only_new_protocols_are_spoken(authority: Authority) -> None:
    made = certificates(ServerSection(**_section(authority)))
    assert made is not None and made.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert made.context.verify_mode == ssl.CERT_NONE
    asking = Certificates(authority.certificate, authority.key, authority.ca)
    assert asking.context.verify_mode == ssl.CERT_REQUIRED


def _section(authority: Authority, **more: Any) -> dict[str, Any]:
    return {"tls_certificate": authority.certificate, "tls_key": authority.key, **more}


@pytest.mark.parametrize(
    ("which", "content", "words"),
    [
        ("tls_certificate", None, "server.tls_certificate = .*wrong.pem: No such file"),
        ("tls_certificate", b"nothing", "server.tls_certificate = .*wrong.pem: holds no certificate"),
        ("tls_certificate", b"", "server.tls_certificate = .*wrong.pem: holds no certificate"),
        ("tls_key", None, "server.tls_key = .*wrong.pem: No such file"),
        ("tls_key", b"nothing", "server.tls_key = .*wrong.pem: holds no private key"),
        ("tls_key", "other", "server.tls_key = .*wrong.pem is not the key of server.tls_certificate"),
        ("tls_key", "locked", "server.tls_key = .*wrong.pem: it has a password"),
        ("tls_client_ca", None, "server.tls_client_ca = .*wrong.pem: No such file"),
        ("tls_client_ca", b"nothing", "server.tls_client_ca = .*wrong.pem: holds no certificate"),
    ],
)
def test_what_is_wrong_is_said_with_setting_and_file(
    authority: Authority, tmp_path: Path, which: str, content: bytes | str | None, words: str
) -> None:
    wrong = tmp_path / "wrong.pem"
    if content == "other":
        content = Authority(tmp_path / "ca").key.read_bytes()
    elif content == "locked":
        content = authority.locked_key()
    if isinstance(content, bytes):
        wrong.write_bytes(content)
    with pytest.raises(SettingsError, match=words):
        certificates(ServerSection(**_section(authority, **{which: wrong})))


def test_a_folder_in_place_of_a_file_is_said_too(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"server.tls_key = .*Is a directory"):
        certificates(ServerSection(**_section(authority, tls_key=tmp_path)))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tls_certificate": "a.pem"}, "go together"),
        ({"tls_key": "a.pem"}, "go together"),
        ({"tls_client_ca": "a.pem"}, "needs tls_certificate"),
        ({"tls_certificate": "a", "tls_key": "b", "address": "http://box:8000"}, "https"),
    ],
)
def test_settings_that_make_no_whole_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServerSection(**values)


def test_a_renewed_certificate_is_taken_and_a_bad_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = Authority(tmp_path)
    made = Certificates(authority.certificate, authority.key)
    before = _serial(made, authority)
    assert not made.renew()
    authority.issue()
    assert made.renew() and made.renewals == 1
    after = _serial(made, authority)
    assert after != before

    good = authority.key.read_bytes()
    authority.key.write_bytes(b"half of a k")
    with caplog.at_level(logging.ERROR):
        assert not made.renew()
        assert not made.renew()
    assert len(caplog.records) == 1, "said once"
    assert _serial(made, authority) == after
    authority.key.unlink()
    assert not made.renew()
    authority.key.write_bytes(good)
    assert made.renew()


def _serial(made: Certificates, authority: Authority) -> str:
    """The number of the certificate that a client is shown, over a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = made.context.wrap_bio(to_server, to_client, server_side=True)
    context = ssl.create_default_context(cafile=str(authority.ca))
    client = context.wrap_bio(to_client, to_server, server_hostname="localhost")
    for _ in range(10):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    shown = client.getpeercert()
    assert shown is not None
    return str(shown["serialNumber"])


def test_commands_check_servers_by_the_ca_of_the_settings(authority: Authority, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    assert client_tls.verify("http://127.0.0.1:8000", environ) is True
    client_tls.publish(ClientSection(), environ)
    assert environ == {}
    section = ClientSection(ca=authority.ca, certificate=authority.certificate, key=authority.key)
    client_tls.publish(section, environ)
    context = client_tls.verify("https://127.0.0.1:8000", environ)
    assert isinstance(context, ssl.SSLContext) and context.verify_mode == ssl.CERT_REQUIRED
    assert client_tls.verify("https://127.0.0.1:8001", environ) is context, "made once"
    for name in ("CA", "CERTIFICATE"):
        with pytest.raises(SettingsError, match=f"client.{name.lower()} = .*missing.pem"):
            client_tls.verify("https://a", environ | {f"MODELKEEP_CLIENT__{name}": str(tmp_path / "missing.pem")})


def test_who_speaks_no_tls_gets_no_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    from serving import entry

    class Loop:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def default_exception_handler(self, context: Any) -> None:
            self.seen.append(context)

    loop = Loop()
    for error in (ssl.SSLError(1, "HTTP_REQUEST"), ConnectionResetError(), TimeoutError()):
        entry.quiet_handshakes(loop, {"exception": error, "message": "SSL handshake failed"})  # type: ignore[arg-type]
    assert loop.seen == [] and caplog.records == []
    entry.quiet_handshakes(loop, {"exception": ValueError("a fault")})  # type: ignore[arg-type]
    assert len(loop.seen) == 1
    assert tls.LOOK_SECONDS < 60
