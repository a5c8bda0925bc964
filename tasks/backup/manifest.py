"""The manifest of a backup: its fields, its text, its signature. Format 1 is written down in docs/BACKUP_FORMAT.md."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from registry.errors import RefusedError

FORMAT = "modelkeep-backup"
FORMAT_VERSION = 1
SUFFIX = ".manifest.json"

Codec = Literal["plain", "zstd", "plain+aes-256-gcm", "zstd+aes-256-gcm"]
CODECS: tuple[Codec, ...] = ("plain", "zstd", "plain+aes-256-gcm", "zstd+aes-256-gcm")

COMPLETE, PARTIAL = "complete", "partial"
FAILED = "failed"


class ManifestError(RefusedError):
    """A manifest that cannot be believed or understood: torn, edited, of a later format, or signed by another key."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a stream, stored as one object. `size_bytes` and `sha256` are those of its own bytes; the stored ones are
    those of the object, which is compressed and encrypted as `codec` says.
    """

    object: str
    size_bytes: int
    sha256: str
    stored_bytes: int
    stored_sha256: str
    codec: Codec

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Chunk:
        if value["codec"] not in CODECS:
            raise ManifestError(f"codec {value['codec']!r} is unknown to this release: known are {', '.join(CODECS)}")
        return cls(**{name: value[name] for name in cls.__slots__})


@dataclass(frozen=True, slots=True)
class Stream:
    """Bytes as they were read, in pieces. An empty stream has none."""

    size_bytes: int
    sha256: str
    chunks: tuple[Chunk, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "chunks": [chunk.as_dict() for chunk in self.chunks],
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Stream:
        return cls(
            int(value["size_bytes"]), str(value["sha256"]), tuple(Chunk.from_dict(one) for one in value["chunks"])
        )

    @property
    def stored_bytes(self) -> int:
        return sum(chunk.stored_bytes for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in a component: a file, a dump, an export. A line of the component's index.

    `name` is a path with "/", never absolute, never with "..". Bytes that are not UTF-8 are kept by Python's surrogate escapes
    and written as `name_base64`. `facts` hold what its kind needs (mode, modified, link target, table, key …).
    """

    name: str
    kind: str = "file"
    stream: Stream | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        value: dict[str, Any] = {"kind": self.kind}
        try:
            self.name.encode("utf-8")
            value["name"] = self.name
        except UnicodeEncodeError:
            value["name_base64"] = base64.b64encode(self.name.encode("utf-8", "surrogateescape")).decode()
        if self.stream is not None:
            value["stream"] = self.stream.as_dict()
        if self.facts:
            value["facts"] = self.facts
        return json.dumps(value, sort_keys=True)

    @classmethod
    def from_line(cls, line: str | bytes) -> Entry:
        """Raises ManifestError."""
        try:
            value = json.loads(line)
            name = value.get("name")
            if name is None:
                name = base64.b64decode(value["name_base64"]).decode("utf-8", "surrogateescape")
            stream = value.get("stream")
            return cls(
                str(name),
                str(value["kind"]),
                None if stream is None else Stream.from_dict(stream),
                dict(value.get("facts", {})),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ManifestError(f"a line of an index cannot be read ({error!r}): {line[:120]!r}") from error


@dataclass(frozen=True, slots=True)
class Component:
    """What a backup has of one part of the installation. `name` is as in `--components`: "registry", "database:app",
    "models", "vectors", "queues", "files:uploads", "config".

    `kind` says who restores it ("mariadb", "sqlite", "models" …). `state` is complete or failed; one that failed has `error`.
    `facts` are what a restored copy is compared with (row counts by table, schema revision, digests …), and `snapshot` says
    how its content belongs to one moment. `index` is a stream of lines, each an Entry.
    """

    name: str
    kind: str
    state: str
    began_at: str
    ended_at: str
    entries: int = 0
    size_bytes: int = 0
    stored_bytes: int = 0
    """Of all its objects, also those that were there before."""
    new_bytes: int = 0
    """Of the objects that this backup had to store."""
    index: Stream | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    snapshot: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        value = {name: getattr(self, name) for name in self.__slots__}
        value["index"] = None if self.index is None else self.index.as_dict()
        value["warnings"] = list(self.warnings)
        return value

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Component:
        known = {name: value[name] for name in cls.__slots__ if name in value}
        known["index"] = None if known.get("index") is None else Stream.from_dict(known["index"])
        known["warnings"] = tuple(known.get("warnings", ()))
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One backup. Written last: what has no manifest is no backup. Times are text in UTC, as registry.clock writes them."""

    backup_id: str
    installation: str
    """A random id of the registry that it is of, made once; a restore keeps it."""
    state: str
    began_at: str
    ended_at: str
    requested: tuple[str, ...]
    components: tuple[Component, ...]
    programs: dict[str, str] = field(default_factory=dict)
    """Version of everything that took part: modelkeep, Python, dump programs, servers, libraries."""
    registry: dict[str, Any] | None = None
    """{"revision", "audit_head": {"seq", "hash"}, "environments": {name: {"epoch", "generation"}}}, of the very snapshot."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Without secrets."""
    system: dict[str, Any] = field(default_factory=dict)
    """{"gpu": [...] | None, "disk": {...}, "host": ...}: what was there when it was taken (S0-065)."""
    encryption: dict[str, Any] | None = None
    """{"method": "aes-256-gcm", "key_id": ...}; None: objects are readable by whoever has them."""
    reason: str = ""
    sequence: int = 0
    """One more than the highest of the manifests and states in the location when it began: the order of backups, whatever clocks say."""
    signature: dict[str, str] | None = None
    """{"method": "hmac-sha256", "key_id", "value"} over `signed_text`; without a key {"method": "sha256", "key_id": "", "value"},
    which tells damage, not malice."""

    def as_dict(self) -> dict[str, Any]:
        value: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
        value.update({name: getattr(self, name) for name in self.__slots__})
        value["requested"] = list(self.requested)
        value["components"] = [one.as_dict() for one in self.components]
        return value

    def component(self, name: str) -> Component | None:
        return next((one for one in self.components if one.name == name), None)

    def signed(self, key: bytes, key_id: str) -> Manifest:
        value = hmac.new(key, signed_text(self.as_dict()), hashlib.sha256).hexdigest()
        return replace(self, signature={"method": "hmac-sha256", "key_id": key_id, "value": value})

    def sealed(self) -> Manifest:
        """What stands in for a signature where there is no key."""
        value = hashlib.sha256(signed_text(self.as_dict())).hexdigest()
        return replace(self, signature={"method": "sha256", "key_id": "", "value": value})

    def text(self) -> bytes:
        return (json.dumps(self.as_dict(), sort_keys=True, indent=1) + "\n").encode()


def signed_text(value: Mapping[str, Any]) -> bytes:
    """What is signed: the document without its signature, keys sorted, no spaces, only ASCII."""
    return json.dumps(
        {key: one for key, one in value.items() if key != "signature"}, sort_keys=True, separators=(",", ":")
    ).encode()


def read(text: bytes, *, name: str, key: bytes | None = None) -> Manifest:
    """The manifest in `text`; `name` is for messages. With `key`, its signature must be there and right.

    Raises ManifestError: torn, edited, of a later format, unsigned where a key is given, or signed by another key.
    """
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ManifestError(f"{name} is no manifest of a backup: its format is not {FORMAT!r}")
        version = value.get("format_version")
        if version != FORMAT_VERSION:
            raise ManifestError(
                f"{name} has format version {version!r}, this modelkeep reads {FORMAT_VERSION}: use the release that wrote it "
                f"({value.get('programs', {}).get('modelkeep', 'unknown')}) or a later one"
            )
        known = {field: value[field] for field in Manifest.__slots__ if field in value}
        known["requested"] = tuple(known["requested"])
        known["components"] = tuple(Component.from_dict(one) for one in known["components"])
        found = Manifest(**known)
    except ManifestError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{name} cannot be read as a manifest ({error!r}): it is torn or was edited") from error
    if key is not None:
        check_signature(value, key, name)
    return found


def check_signature(value: Mapping[str, Any], key: bytes, name: str) -> None:
    """Raises ManifestError where the document is not signed by this key, or is not what was signed."""
    signature = value.get("signature")
    if not isinstance(signature, dict) or signature.get("method") != "hmac-sha256":
        raise ManifestError(
            f"{name} is not signed, and a backup key is set: it was written without one, or was put there"
        )
    due = hmac.new(key, signed_text(value), hashlib.sha256).hexdigest()
    if not hmac.compare_digest(due, str(signature.get("value"))):
        raise ManifestError(
            f"the signature of {name} (key {signature.get('key_id')}) does not fit: it was edited, or the key is another one"
        )


def check_digest(value: Mapping[str, Any], name: str) -> None:
    """Raises ManifestError where a document that was written without a key is not what was written."""
    signature = value.get("signature")
    if not isinstance(signature, dict):
        raise ManifestError(f"{name} has neither signature nor digest: it is damaged or was edited")
    if signature.get("method") == "hmac-sha256":
        raise ManifestError(
            f"{name} is encrypted and signed, and no key is set: name the file with the key (backup_key_file); where it is named, "
            "the location has lost its folder keys/: copy that from another location of the same backups"
        )
    due = hashlib.sha256(signed_text(value)).hexdigest()
    if signature.get("method") != "sha256" or not hmac.compare_digest(due, str(signature.get("value"))):
        raise ManifestError(f"the digest of {name} does not fit: it is damaged or was edited")
