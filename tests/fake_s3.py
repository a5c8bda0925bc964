"""An S3 server of our own, in this process: small, exact where backups need it, and able to fail in each way that stores fail.

It keeps every version of every object. A fault is set for the requests that it fits, so often as it says, and then is gone.
"""

from __future__ import annotations

import base64
import datetime as dt
import email.utils
import hashlib
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

EVER = 1 << 30

ERRORS: dict[str, tuple[int, str]] = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "502 without words": (502, ""),
    "429": (429, "TooManyRequestsException"),
    "request timeout": (400, "RequestTimeout"),
    "bad digest": (400, "BadDigest"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
    "unknown key": (403, "InvalidAccessKeyId"),
    "wrong secret": (403, "SignatureDoesNotMatch"),
    "skew": (403, "RequestTimeTooSkewed"),
    "no bucket": (404, "NoSuchBucket"),
    "full": (507, "XMinioStorageFull"),
    "quota": (403, "QuotaExceeded"),
    "redirect": (301, "PermanentRedirect"),
    "not implemented": (501, "NotImplemented"),
    "conflict": (409, "ConditionalRequestConflict"),
}


@dataclass
class Fault:
    """`kind` is one of ERRORS, or of those that `Store` names. `name` is a pattern for the object's key."""

    kind: str
    operation: str = "PUT"
    """PUT, GET, HEAD, LIST, DELETE or LOCK."""
    name: str = ".*"
    times: int = EVER
    after: int = 0
    """So many requests that fit are answered well before."""
    seen: int = 0


@dataclass
class Version:
    data: bytes
    checksum: str | None
    modified: float
    retention: tuple[str, str] | None = None
    deleted: bool = False
    """A delete marker: in a bucket with versions that is all that a DELETE leaves."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Store:
    """The buckets. Kinds of faults beside ERRORS: reset, reset in the body, silence, drop, garble, truncate, other bytes,
    old version, longer, shorter, listed longer, hidden, answer lost.
    """

    buckets: dict[str, dict[str, list[Version]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    conditional: bool = True
    """Whether it knows If-None-Match."""
    checksums: bool = True
    """Whether it tells the checksum that it was sent."""
    locks: bool = False
    versions: bool = False
    """Whether a DELETE without a version leaves all versions below a marker, as every bucket with object lock does it."""
    page: int = 1000
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)

    def fault(self, operation: str, key: str) -> str | None:
        with self.lock:
            self.requests.append((operation, key))
            for one in self.faults:
                if one.operation == operation and one.times > 0 and re.fullmatch(one.name, key):
                    one.seen += 1
                    if one.seen > one.after:
                        one.times -= 1
                        return one.kind
        return None

    def names(self, bucket: str) -> list[str]:
        return sorted(name for name, found in self.buckets[bucket].items() if _there(found))


def _there(versions: list[Version] | None) -> bool:
    return versions is not None and len(versions) > 0 and not versions[-1].deleted


def flipped(data: bytes) -> bytes:
    """One bit in the middle is another; nothing becomes something."""
    if not data:
        return b"\x01"
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


class Server:
    """`with Server() as server:` `server.url` is the endpoint, `server.store` what it holds."""

    def __init__(self) -> None:
        self.store = Store()
        store = self.store

        class Bound(_Handler):
            pass

        Bound.store = store
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(10)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body go out together: in two parts each answer would wait 40 ms for an acknowledgement
    store: Store

    def handle_expect_100(self) -> bool:
        done = super().handle_expect_100()
        self.wfile.flush()
        return done

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # the client has gone, or a fault has closed the socket
            self.close_connection = True

    def do_PUT(self) -> None:
        self._serve("PUT")

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        parts = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(parts.query, keep_blank_values=True).items()}
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = "LIST" if method == "GET" and not key and "object-lock" not in query else method
        if "object-lock" in query or "retention" in query:
            operation = "LOCK"
        kind = self.store.fault(operation, key or query.get("prefix", ""))
        if kind in ERRORS:
            return self._error(*ERRORS[kind], skewed=kind == "skew")
        if kind == "reset":
            return self._reset()
        if kind == "silence":
            self.store.closing.wait(30)
            return self._reset()
        if bucket not in self.store.buckets:
            return self._error(404, "NoSuchBucket")
        with self.store.lock:
            objects = self.store.buckets[bucket]
            act: Callable[..., None] = {
                "PUT": self._put, "GET": self._get, "HEAD": self._get, "DELETE": self._delete, "LIST": self._list,
                "LOCK": self._retention,
            }[operation]  # fmt: skip
            act(objects, key, body, query, kind)
        return None

    def _put(self, objects: dict[str, list[Version]], key: str, body: bytes, query: Any, kind: str | None) -> None:
        copied = self.headers.get("x-amz-copy-source")
        if copied is not None:
            self._copy(objects, key, copied)
            return None
        sent = self.headers.get("x-amz-checksum-sha256")
        if sent is not None and base64.b64decode(sent) != hashlib.sha256(body).digest():
            return self._error(400, "BadDigest")
        if self.headers.get("If-None-Match") == "*":
            if not self.store.conditional:
                return self._error(501, "NotImplemented")
            if _there(objects.get(key)):
                return self._error(412, "PreconditionFailed")
        until = self.headers.get("x-amz-object-lock-retain-until-date")
        if until is not None and not self.store.locks:
            return self._error(400, "InvalidRequest")
        kept = None if until is None else (self.headers["x-amz-object-lock-mode"], until)
        if kind == "garble":
            body = flipped(body)
        if kind == "truncate":
            body = body[: len(body) // 2]
        if kind != "drop":
            objects.setdefault(key, []).append(Version(body, sent if self.store.checksums else None, time.time(), kept))
        if kind == "answer lost":
            return self._reset()
        return self._answer(200, b"", {"ETag": '"x"'})

    def _copy(self, objects: dict[str, list[Version]], key: str, source: str) -> None:
        name, _, wanted = unquote(source).lstrip("/").partition("/")[2].partition("?versionId=")
        found = [one for one in objects.get(name, ()) if one.id == wanted and not one.deleted]
        if not found:
            return self._error(404, "NoSuchVersion")
        objects[key].append(Version(found[0].data, found[0].checksum, time.time()))
        text = (
            '<CopyObjectResult><ETag>"x"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></CopyObjectResult>'
        )
        return self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _get(self, objects: dict[str, list[Version]], key: str, body: bytes, query: Any, kind: str | None) -> None:
        versions = objects.get(key)
        if versions is None or not _there(versions) or kind == "hidden":
            return self._error(404, "NoSuchKey")
        found = versions[-1]
        data = found.data
        if kind == "old version" and len(versions) > 1:
            data = versions[-2].data
        if kind == "other bytes":
            data = flipped(data)
        if kind == "truncate":
            data = data[: len(data) // 2]
        headers = {"Last-Modified": email.utils.formatdate(found.modified, usegmt=True), "ETag": '"x"'}
        if found.checksum and self.headers.get("x-amz-checksum-mode"):
            headers["x-amz-checksum-sha256"] = found.checksum
        announced = len(data) + {"longer": 1, "shorter": -1, "huge": 1 << 40}.get(kind or "", 0)
        if kind == "reset in the body":
            self._head(200, announced, headers)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            return self._reset()
        self._head(200, announced, headers)
        if self.command != "HEAD":
            self.wfile.write(data[:announced])
            if announced > len(data):
                self.close_connection = True
        return None

    def _delete(self, objects: dict[str, list[Version]], key: str, body: bytes, query: Any, kind: str | None) -> None:
        versions = objects.get(key)
        if self.store.versions:
            wanted = query.get("versionId")
            if wanted is None:
                objects.setdefault(key, []).append(Version(b"", None, time.time(), deleted=True))
                return self._answer(204, b"", {})
            if any(one.retention is not None for one in versions or () if one.id == wanted):
                return self._error(403, "AccessDenied")
            objects[key] = [one for one in versions or () if one.id != wanted]
            return self._answer(204, b"", {})
        if versions and versions[-1].retention is not None:
            return self._error(403, "AccessDenied")
        if kind != "drop":
            objects.pop(key, None)
        return self._answer(204, b"", {})

    def _list(self, objects: dict[str, list[Version]], key: str, body: bytes, query: Any, kind: str | None) -> None:
        if "versions" in query:
            return self._versions(objects, query)
        prefix, start = query.get("prefix", ""), query.get("continuation-token", "")
        names = sorted(
            name for name, found in objects.items() if _there(found) and name.startswith(prefix) and name > start
        )
        if kind == "hidden":
            names = []
        page, more = names[: self.store.page], len(names) > self.store.page
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(objects[name][-1].data) + (kind == 'listed longer')}</Size>"
            f"<LastModified>{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(objects[name][-1].modified))}</LastModified>"
            "</Contents>"
            for name in page
        )
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        text = f"<ListBucketResult><IsTruncated>{'true' if more else 'false'}</IsTruncated>{token}{rows}</ListBucketResult>"
        return self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _versions(self, objects: dict[str, list[Version]], query: Any) -> None:
        """Newest first of each name; a page may end between two versions of one."""
        every = [
            (name, one, one is objects[name][-1])
            for name in sorted(objects)
            if name.startswith(query.get("prefix", ""))
            for one in reversed(objects[name])
        ]
        marks = [(name, one.id) for name, one, _ in every]
        marker = (query.get("key-marker", ""), query.get("version-id-marker", ""))
        start = marks.index(marker) + 1 if marker in marks else 0
        page = every[start : start + self.store.page]
        rows = ""
        for name, one, latest in page:
            kind = "DeleteMarker" if one.deleted else "Version"
            at = (
                dt.datetime.fromtimestamp(one.modified, dt.UTC)
                .isoformat(timespec="milliseconds")
                .replace("+00:00", "Z")
            )
            size = (
                "" if one.deleted else f"<Size>{len(one.data)}</Size><ETag>{hashlib.md5(one.data).hexdigest()}</ETag>"
            )
            rows += (
                f"<{kind}><Key>{escape(name)}</Key><VersionId>{one.id}</VersionId><IsLatest>{str(latest).lower()}</IsLatest>"
                f"<LastModified>{at}</LastModified>{size}</{kind}>"
            )
        more = start + len(page) < len(every)
        after = (
            f"<NextKeyMarker>{escape(page[-1][0])}</NextKeyMarker><NextVersionIdMarker>{page[-1][1].id}</NextVersionIdMarker>"
            if more
            else ""
        )
        text = f"<ListVersionsResult><IsTruncated>{str(more).lower()}</IsTruncated>{after}{rows}</ListVersionsResult>"
        return self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _retention(
        self, objects: dict[str, list[Version]], key: str, body: bytes, query: Any, kind: str | None
    ) -> None:
        if not self.store.locks:
            return self._error(404, "ObjectLockConfigurationNotFoundError")
        if not key:
            text = "<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled></ObjectLockConfiguration>"
            return self._answer(200, text.encode(), {})
        version = objects[key][-1]
        if self.command == "PUT":
            found = re.search(
                rb"<Mode>(\w+)</Mode>.*?<RetainUntilDate>([^<]+)<|<RetainUntilDate>([^<]+)<.*?<Mode>(\w+)<", body
            )
            assert found is not None
            version.retention = ((found[1] or found[4]).decode(), (found[2] or found[3]).decode())
            return self._answer(200, b"", {})
        if version.retention is None:
            return self._error(404, "NoSuchObjectLockConfiguration")
        mode, until = version.retention
        text = f"<Retention><Mode>{mode}</Mode><RetainUntilDate>{until}</RetainUntilDate></Retention>"
        return self._answer(200, text.encode(), {})

    def _error(self, status: int, code: str, *, skewed: bool = False) -> None:
        text = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>" if code else ""
        return self._answer(status, text.encode(), {}, date=time.time() - 3600 if skewed else None)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, date: float | None = None) -> None:
        self._head(status, len(body), headers, date=date)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str], *, date: float | None = None) -> None:
        self.send_response_only(status)
        self.send_header("Date", email.utils.formatdate(time.time() if date is None else date, usegmt=True))
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
