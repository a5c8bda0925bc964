"""Backups in an S3 bucket, of any server that speaks the protocol. Retries, checks after upload, object lock. boto3 is loaded late.

Credentials come from the environment and boto3's own files only. There is no multipart upload: an object is one chunk at most
(16 MiB), and a killed upload goes on where it was, because chunks that are there are not sent again.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import email.utils
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from registry import clock
from registry.errors import ConflictError, NotFoundError, SettingsError, StorageError
from registry.redaction import redact
from tasks.backup.places import Stat, check_name, check_size, is_name

T = TypeVar("T")

ATTEMPTS = 5
PAUSE_SECONDS = 0.25
"""Before the second attempt; then twice as long each time, and up to half as much again at random."""
AGAIN_AFTER_SECONDS = 60.0
CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
CONNECTIONS = 16

_RETRIED = {
    "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout", "Throttling", "ThrottlingException",
    "TooManyRequestsException", "RequestLimitExceeded", "BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch",
    "ConditionalRequestConflict", "OperationAborted",
}  # fmt: skip
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket: make it, or correct `backups`",
    "ExpiredToken": "the credentials have expired: get new ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)",
    "TokenRefreshRequired": "the credentials have expired: get new ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN)",
    "InvalidToken": "the session token is not valid: get new credentials (AWS_SESSION_TOKEN)",
    "InvalidAccessKeyId": "the store does not know this access key: correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret key is wrong: correct AWS_SECRET_ACCESS_KEY",
    "AccessDenied": "the credentials do not allow it: reading needs s3:GetObject and s3:ListBucket, writing s3:PutObject, pruning s3:DeleteObject",
    "403": "the credentials do not allow it: reading needs s3:GetObject and s3:ListBucket, writing s3:PutObject, pruning s3:DeleteObject",
    "PermanentRedirect": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_DEFAULT_REGION",
    "QuotaExceeded": "the quota of the bucket is used up: enlarge it or prune backups",
    "XMinioStorageFull": "the store is full: enlarge it or prune backups",
    "EntityTooLarge": "the store takes no objects of 16 MiB: allow them",
}


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """One version of an object in a bucket that keeps them; `deleted`: the mark of a deletion, without content."""

    name: str
    id: str
    modified: dt.datetime
    latest: bool
    deleted: bool
    content: str
    """The store's own mark of the bytes: the same for the same bytes, put at once."""


class S3Place:
    """s3://bucket/prefix. `sleep` and the limits are for tests."""

    def __init__(
        self,
        url: str,
        *,
        endpoint_url: str | None = None,
        lock_mode: str | None = None,
        attempts: int = ATTEMPTS,
        pause_seconds: float = PAUSE_SECONDS,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme != "s3" or not parts.netloc:
            raise SettingsError(f"backups = {redact(url)!r}: s3://bucket/prefix is meant")
        self.bucket = parts.netloc
        self.prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self.shown = redact(url.rstrip("/"))
        self.endpoint_url = endpoint_url
        self.lock_mode = (lock_mode or "governance").upper()
        self._attempts = attempts
        self._pause_seconds = pause_seconds
        self._timeouts = (connect_seconds, read_seconds)
        self._sleep = sleep
        self._lock = threading.Lock()
        self._client: Any = None
        self._conditional = True
        self._lockable: bool | None = None
        self._failed_at: float | None = None

    def put(self, name: str, data: bytes, *, only_new: bool = False, keep_until: dt.datetime | None = None) -> None:
        checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
        options: dict[str, Any] = {"ChecksumSHA256": checksum}
        if keep_until is not None and self.can_lock():
            # A store refuses a locked object whose checksum it is not told the kind of.
            options |= {
                "ObjectLockMode": self.lock_mode,
                "ObjectLockRetainUntilDate": keep_until,
                "ChecksumAlgorithm": "SHA256",
            }

        ours = False  # once the store has taken it, it is ours: what is there otherwise is a damaged copy of the same

        def attempt() -> None:
            nonlocal ours
            conditional = only_new and self._conditional and not ours
            if only_new and not self._conditional and not ours and self.stat(name) is not None:
                raise _Taken
            extra = {"IfNoneMatch": "*"} if conditional else {}
            try:
                self._call("put_object", Key=self._key(name), Body=data, **options, **extra)
            except _Refused as error:
                if conditional and error.code in {"PreconditionFailed", "412"}:
                    raise _Taken from error
                if conditional and error.code in {"NotImplemented", "501"}:
                    self._conditional = False  # a store that does not know conditions: look first
                    raise _Again("the store knows no conditional writes") from error
                raise
            ours = True
            self._check_upload(name, data, checksum)

        try:
            self._retry(f"{name} could not be written to {self.shown}", attempt)
        except _Taken:
            # Ours, where the answer to an earlier attempt was lost on its way.
            if self.get(name) != data:
                raise ConflictError(f"{name} is in {self.shown} already, with other content") from None
        except StorageError:
            if ours and only_new:
                # What was not found right must not stay: a torn manifest would stop the collection of garbage.
                with contextlib.suppress(StorageError):
                    self.delete(name)
            raise

    def get(self, name: str) -> bytes:
        def attempt() -> bytes:
            answer = self._call("get_object", Key=self._key(name))
            size = int(answer["ContentLength"])
            with contextlib.closing(answer["Body"]) as body:
                check_size(name, size, self.shown)
                data: bytes = body.read()
            if len(data) != size:
                raise _Again(f"{len(data)} bytes came, and {size} were announced")
            return data

        try:
            return self._retry(f"{name} could not be read from {self.shown}", attempt)
        except _Missing as error:
            raise NotFoundError(f"{name} is not in {self.shown}") from error

    def stat(self, name: str) -> Stat | None:
        def attempt() -> Stat | None:
            try:
                answer = self._call("head_object", Key=self._key(name))
            except _Missing:
                return None
            return Stat(name, int(answer["ContentLength"]), answer["LastModified"])

        return self._retry(f"{name} could not be looked at in {self.shown}", attempt)

    def list(self, prefix: str = "") -> Iterator[Stat]:
        token: str | None = None
        while True:
            more = {} if token is None else {"ContinuationToken": token}
            page = self._retry(
                f"{self.shown} could not be listed",
                lambda more=more: self._call("list_objects_v2", Prefix=self.prefix + prefix, **more),  # type: ignore[misc]
            )
            for one in page.get("Contents", ()):
                name = one["Key"].removeprefix(self.prefix)
                if is_name(name):  # whatever else lies in the bucket is not ours
                    yield Stat(name, int(one["Size"]), one["LastModified"])
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return

    def delete(self, name: str) -> bool:
        if self.stat(name) is None:
            return False
        self._retry(
            f"{name} could not be deleted from {self.shown}", lambda: self._call("delete_object", Key=self._key(name))
        )
        return True

    def flush(self) -> None:
        """What was put is checked when it is put."""

    def can_lock(self) -> bool:
        """Whether the bucket has object lock. Raises StorageError."""
        if self._lockable is None:

            def attempt() -> bool:
                try:
                    answer = self._call("get_object_lock_configuration")
                except _Missing:
                    return False
                except _Refused as error:
                    if error.code in {
                        "ObjectLockConfigurationNotFoundError",
                        "NotImplemented",
                        "501",
                        "InvalidRequest",
                    }:
                        return False
                    raise
                return bool(answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled") == "Enabled")

            self._lockable = self._retry(f"the object lock of {self.shown} could not be asked for", attempt)
        return self._lockable

    def keep(self, name: str, until: dt.datetime) -> bool:
        """Lock what is there already for longer, never for less. False where the bucket cannot. Raises StorageError."""
        if not self.can_lock():
            return False

        def held_until() -> dt.datetime | None:
            try:
                answer = self._call("get_object_retention", Key=self._key(name))
            except _Missing:
                return None
            except _Refused as error:
                if error.code in {"NoSuchObjectLockConfiguration", "InvalidRequest"}:
                    return None
                raise
            found: dt.datetime | None = answer.get("Retention", {}).get("RetainUntilDate")
            return found

        held = self._retry(f"the lock of {name} in {self.shown} could not be read", held_until)
        if held is not None and held >= until:
            return True
        wanted = {"Mode": self.lock_mode, "RetainUntilDate": until}
        self._retry(
            f"{name} could not be locked in {self.shown}",
            lambda: self._call("put_object_retention", Key=self._key(name), Retention=wanted),
        )
        return True

    def versions(self) -> Iterator[ObjectVersion]:
        """Every version of everything, and every mark of a deletion, name by name. Raises StorageError, also where the store keeps none."""
        after: dict[str, str] = {}
        while True:
            page = self._retry(
                f"the versions in {self.shown} could not be listed",
                lambda after=after: self._call("list_object_versions", Prefix=self.prefix, **after),  # type: ignore[misc]
            )
            for deleted, kind in ((False, "Versions"), (True, "DeleteMarkers")):
                for one in page.get(kind, ()):
                    name = one["Key"].removeprefix(self.prefix)
                    if is_name(name):
                        yield ObjectVersion(
                            name,
                            one["VersionId"],
                            one["LastModified"],
                            bool(one["IsLatest"]),
                            deleted,
                            one.get("ETag", ""),
                        )
            if not page.get("IsTruncated"):
                return
            after = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}

    def put_back(self, name: str, version: str) -> None:
        """Make an older version the present one, by a copy in the store: no version is taken away. Raises StorageError."""
        source = {"Bucket": self.bucket, "Key": self._key(name), "VersionId": version}
        try:
            self._retry(
                f"{name} could not be put back in {self.shown}",
                lambda: self._call("copy_object", Key=self._key(name), CopySource=source),
            )
        except _Missing as error:
            raise StorageError(f"version {version} of {name} is not in {self.shown} any more") from error

    def _check_upload(self, name: str, data: bytes, checksum: str) -> None:
        """An answer of 200 is not yet an object. What decides (manifests, keys, notes) is always read back; an object where
        the store does not answer with the checksum that was sent."""
        try:
            if name.startswith("objects/"):
                answer = self._call("head_object", Key=self._key(name), ChecksumMode="ENABLED")
                if int(answer["ContentLength"]) != len(data):
                    raise _Again(f"{answer['ContentLength']} bytes are there, and {len(data)} were sent")
                if answer.get("ChecksumSHA256") == checksum:
                    return
            back = self._call("get_object", Key=self._key(name))
            with contextlib.closing(back["Body"]) as body:
                if int(back["ContentLength"]) != len(data) or body.read() != data:
                    raise _Again("it reads back with other bytes than were sent")
        except _Missing as error:
            raise _Again("the store took it, and does not have it") from error

    def _key(self, name: str) -> str:
        return self.prefix + check_name(name)

    def _call(self, operation: str, **arguments: Any) -> Any:
        """One request, once. Raises _Missing, _Again, _Refused."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        try:
            return getattr(self._connected(), operation)(Bucket=self.bucket, **arguments)
        except ClientError as error:
            raise _understood(error) from error
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise _Refused(
                "NoCredentials", "no credentials are set: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        except BotoCoreError as error:
            raise _Again(redact(str(error))) from error

    def _retry(self, what: str, attempt: Callable[[], T]) -> T:
        """Try, pause, try again. Raises StorageError; _Missing and _Taken pass through."""
        from botocore.exceptions import BotoCoreError

        # A store that has just failed all attempts gets one only, so that whoever asks for a hundred names does not wait for each.
        lately = self._failed_at is not None and time.monotonic() - self._failed_at < AGAIN_AFTER_SECONDS
        attempts = 1 if lately else self._attempts
        for number in range(1, attempts + 1):
            try:
                done = attempt()
                self._failed_at = None
                return done
            except _Refused as error:
                raise StorageError(f"{what}: {error}") from error
            except (_Again, BotoCoreError, OSError) as error:  # a body that breaks off raises on reading
                if number == attempts:
                    self._failed_at = time.monotonic()
                    raise StorageError(
                        f"{what} in {number} attempt{'s' if number > 1 else ''}: {redact(str(error))}; is the store at "
                        f"{redact(self.endpoint_url or 'Amazon')} well?"
                    ) from error
                pause = self._pause_seconds * 2 ** (number - 1)
                self._sleep(pause * (1 + random.random() / 2))
        raise AssertionError("at least one attempt")

    def _connected(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client(self.endpoint_url, *self._timeouts)
            return self._client


class _Missing(Exception):
    """404 of a name, not of the bucket."""


class _Taken(Exception):
    """Somebody wrote it first."""


class _Again(Exception):
    """What may be gone at the next attempt."""


class _Refused(Exception):
    """What the next attempt would not change."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def _understood(error: Any) -> Exception:
    """A ClientError of botocore in our terms."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    said = redact(str(error.response.get("Error", {}).get("Message", "")))
    facts = error.response.get("ResponseMetadata", {})
    status = int(facts.get("HTTPStatusCode", 0))
    if code in {"NoSuchKey", "404", "NotFound", "NoSuchVersion"}:
        return _Missing(code)
    if code in {"RequestTimeTooSkewed", "RequestExpired"}:
        theirs = email.utils.parsedate_to_datetime(facts["HTTPHeaders"]["date"]) if _dated(facts) else None
        apart = f" by {abs((clock.now() - theirs).total_seconds()):.0f} s" if theirs is not None else ""
        return _Refused(
            code, f"the clock of this machine and that of the store differ{apart}: set this machine's (NTP)"
        )
    # an answer to HEAD has no body: all that is known of such an error is its number
    if code in _RETRIED or code in {"400", "409"} or (status >= 500 and status != 501) or status == 429:
        return _Again(f"the store answers {status} {code} {said}".rstrip())
    if code in _REMEDIES:
        return _Refused(code, f"{_REMEDIES[code]} (the store answers {status} {code})")
    return _Refused(code or str(status), f"the store answers {status} {code}: {said}")


def _dated(facts: Any) -> bool:
    try:
        return email.utils.parsedate_to_datetime(facts["HTTPHeaders"]["date"]).tzinfo is not None
    except (KeyError, ValueError, TypeError):
        return False


def _client(endpoint_url: str | None, connect_seconds: float, read_seconds: float) -> Any:
    import boto3.session
    from botocore.config import Config

    session = boto3.session.Session()
    config = Config(
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        # Our own attempts check what was stored as well: a second counter below them would multiply the time.
        retries={"mode": "standard", "total_max_attempts": 1},
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path" if endpoint_url else "auto"},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    region = session.region_name or os.environ.get("AWS_REGION") or ("us-east-1" if endpoint_url else None)
    return session.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)
