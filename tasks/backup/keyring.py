"""Keys of backups: the key file of a person, the data key of a repository that it wraps, and what is derived from that."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import clock
from registry.errors import ConflictError, NotFoundError, RefusedError, SettingsError, StorageError
from tasks.backup.manifest import SUFFIX
from tasks.backup.places import Place

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FORMAT = "modelkeep-backup-key"
FORMAT_VERSION = 1
KEY_BYTES = 32
NONCE_BYTES = 12
METHOD = "aes-256-gcm"
PREFIX = "keys/"


class BackupKeyError(RefusedError):
    """A backup key that is missing, of another repository, or whose wrapped data key is damaged."""


@dataclass(frozen=True, slots=True)
class FileKey:
    """The key of a key file. `key_id` follows from it, so that a file needs nothing but the key."""

    key_id: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class Keyring:
    """The data key of a repository, and the id of the file key that opened it. Never written anywhere as it is."""

    key_id: str
    data_key: bytes = field(repr=False)

    @cached_property
    def data_key_id(self) -> str:
        """Names the data key in manifests: it stays when the file key is rotated."""
        return derive(self.data_key, "id")[:8].hex()

    @cached_property
    def address_key(self) -> bytes:
        return derive(self.data_key, "address")

    @cached_property
    def signing_key(self) -> bytes:
        return derive(self.data_key, "signature")

    @cached_property
    def cipher(self) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(derive(self.data_key, "objects"))


def derive(data_key: bytes, purpose: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt: 32 bytes for one purpose."""
    extracted = hmac.new(bytes(32), data_key, hashlib.sha256).digest()
    return hmac.new(extracted, f"modelkeep backup {purpose}".encode() + b"\x01", hashlib.sha256).digest()


def new_key(path: Path) -> FileKey:
    """Write a new random key to a file that only its owner can read. Raises ConflictError where there is a file."""
    secret = secrets.token_bytes(KEY_BYTES)
    key = FileKey(_key_id(secret), secret)
    text = (
        f"# modelkeep backup key {key.key_id}, made {clock.text(clock.now())}. Without it the backups cannot be read:\n"
        f"# keep a copy where neither this machine nor the backups are.\n{base64.b64encode(secret).decode()}\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as target:
            target.write(text)
            target.flush()
            os.fsync(target.fileno())
    except FileExistsError as error:
        raise ConflictError(f"{path} exists already: a key is never overwritten; name another file") from error
    except OSError as error:
        raise StorageError(f"the key could not be written to {path}: {error.strerror or error}") from error
    return key


def read_key(path: Path) -> FileKey:
    """The key of a file: 32 bytes in base64 or hexadecimal digits; lines that begin with # do not count.

    Raises SettingsError: no such file, another content, or others than its owner can read it.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(4096)
    except OSError as error:
        raise SettingsError(
            f"backup_key_file = {path} cannot be read: {error.strerror or error}; "
            "without this key encrypted backups can neither be written nor read"
        ) from error
    if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SettingsError(f"backup_key_file = {path} can be read by others than its owner: chmod 600 {path}")
    words = [line for line in text.split(b"\n") if line.strip() and not line.lstrip().startswith(b"#")]
    secret = _decoded(b"".join(words[0].split())) if len(words) == 1 else None
    if secret is None:
        raise SettingsError(
            f"backup_key_file = {path} holds no key: one line of 32 bytes in base64 or hexadecimal digits is meant; "
            "`modelkeep backups new-key PATH` makes one"
        )
    return FileKey(_key_id(secret), secret)


def wrap(key: FileKey, data_key: bytes) -> bytes:
    """The text of keys/<key_id>.json."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    value = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "key_id": key.key_id,
        "method": METHOD,
        "data_key_id": derive(data_key, "id")[:8].hex(),
        "made_at": clock.text(clock.now()),
    }
    nonce = secrets.token_bytes(NONCE_BYTES)
    wrapped = AESGCM(key.secret).encrypt(nonce, data_key, _bound_to(value))
    value["wrapped"] = base64.b64encode(nonce + wrapped).decode()
    return (json.dumps(value, sort_keys=True, indent=1) + "\n").encode()


def unwrap(key: FileKey, text: bytes, *, name: str) -> Keyring:
    """Raises BackupKeyError: damaged, edited, of a later format, or wrapped by another key."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        value: dict[str, Any] = json.loads(text)
        if value["format"] != FORMAT or value["format_version"] != FORMAT_VERSION or value["method"] != METHOD:
            raise BackupKeyError(
                f"{name} has format {value['format']!r} version {value['format_version']!r} with {value['method']!r}: "
                f"this modelkeep reads {FORMAT!r} version {FORMAT_VERSION} with {METHOD!r}"
            )
        wrapped = base64.b64decode(value["wrapped"], validate=True)
        data_key = AESGCM(key.secret).decrypt(wrapped[:NONCE_BYTES], wrapped[NONCE_BYTES:], _bound_to(value))
    except InvalidTag as error:
        raise BackupKeyError(
            f"{name} cannot be opened with key {key.key_id}: it is damaged, or was put there by somebody else; "
            "take the same file of another backup location"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackupKeyError(
            f"{name} cannot be read ({error!r}): it is torn or was edited; take the same file of another location"
        ) from error
    return Keyring(key.key_id, data_key)


def key_ids(place: Place) -> list[str]:
    """The ids of the file keys that open a location. Empty: it is not encrypted. Raises StorageError."""
    return [one.name.removeprefix(PREFIX).removesuffix(".json") for one in place.list(PREFIX)]


def open_keyring(places: Sequence[Place], key: FileKey | None, *, create: bool = False) -> Keyring | None:
    """The keyring of a repository; None where it is not encrypted and no key is set. A place without the keys gets them.

    With `create`, a repository that has nothing yet gets a data key: only where every place answers, since one that does
    not may have another. Raises BackupKeyError with the id of the key that is needed, StorageError.
    """
    silent: list[StorageError] = []
    holding: dict[int, list[str]] = {}
    for number, place in enumerate(places):
        try:
            holding[number] = key_ids(place)
        except StorageError as error:
            silent.append(error)
    wanted = sorted({one for found in holding.values() for one in found})
    if key is None:
        if wanted:
            raise BackupKeyError(
                f"the backups in {_shown(places)} are encrypted with key {' or '.join(wanted)}, and no key is set: "
                "name the file with that key (backup_key_file)"
            )
        return None
    if key.key_id in wanted:
        return _opened(places, key, holding, create=create)
    if wanted:
        raise BackupKeyError(
            f"the backups in {_shown(places)} are encrypted with key {' or '.join(wanted)}, and backup_key_file holds "
            f"{key.key_id}: set the file with that key"
        )
    if silent:
        raise silent[0]
    if not create:
        # Whoever may write to the location could take its keys away and put backups of his own there, which nobody has signed.
        if plain := [place.shown for place in places if _holds_backups(place)]:
            raise BackupKeyError(
                f"{' and '.join(plain)} holds backups and no keys/, and backup_key_file holds key {key.key_id}: none of them is believed; "
                "copy keys/ from another location of the same backups, or, where they were made without a key, unset backup_key_file"
            )
        return None
    return _created(places, key)


def rotate(places: Sequence[Place], old: FileKey, new: FileKey, *, drop_old: bool = True) -> Keyring:
    """Wrap the data key with a new file key; then the old one opens nothing that is stored here any more.

    No data is rewritten, and every signature stays good. The old file is dropped only when every place has the new one and it
    was read back. Raises BackupKeyError, StorageError; killed in between, both keys open it and the call can be repeated.
    """
    keyring = open_keyring(places, old)
    if keyring is None:
        raise BackupKeyError(f"the backups in {_shown(places)} are not encrypted: there is no key to rotate")
    text = wrap(new, keyring.data_key)
    name = f"{PREFIX}{new.key_id}.json"
    for place in places:
        if place.stat(name) is None:
            place.put(name, text, only_new=True)
            place.flush()
    for place in places:
        if unwrap(new, place.get(name), name=f"{name} in {place.shown}").data_key != keyring.data_key:
            raise BackupKeyError(f"{name} in {place.shown} wraps another data key: it was put there by somebody else")
    if drop_old and old.key_id != new.key_id:
        for place in places:
            place.delete(f"{PREFIX}{old.key_id}.json")
    return Keyring(new.key_id, keyring.data_key)


def set_aside(spool: Path, key: FileKey) -> Path | None:
    """Where the folder for what no place takes holds nothing but keys of other key files, it is of earlier settings, and would keep
    new ones from being used: it gets another name, which is returned. Raises StorageError.
    """
    held = {path.relative_to(spool).as_posix() for path in spool.rglob("*") if path.is_file()}
    if not held or f"{PREFIX}{key.key_id}.json" in held or not all(name.startswith(PREFIX) for name in held):
        return None
    kept = spool.with_name(f"{spool.name}.before-{clock.now():%Y%m%dT%H%M%S%fZ}")
    try:
        spool.rename(kept)
    except OSError as error:
        raise StorageError(f"{spool} could not be renamed: {error.strerror or error}") from error
    return kept


def _opened(places: Sequence[Place], key: FileKey, holding: dict[int, list[str]], *, create: bool) -> Keyring:
    name = f"{PREFIX}{key.key_id}.json"
    found: Keyring | None = None
    text = b""
    problems: list[Exception] = []
    for number, ids in holding.items():
        if key.key_id not in ids:
            continue
        try:
            read = places[number].get(name)
            keyring = unwrap(key, read, name=f"{name} in {places[number].shown}")
        except (BackupKeyError, NotFoundError, StorageError) as error:
            problems.append(error)
            continue
        if found is not None and found.data_key != keyring.data_key:
            raise BackupKeyError(
                f"{_shown(places)} are two repositories with different data keys: back up to one of them and to a fresh location"
            )
        found, text = keyring, read
    if found is None:
        raise problems[0] if len(problems) == 1 else BackupKeyError("; ".join(map(str, problems)))
    if create:
        for number, ids in holding.items():
            if not ids:
                _refuse_plain(places[number])
                places[number].put(name, text, only_new=True)
    return found


def _created(places: Sequence[Place], key: FileKey) -> Keyring:
    for place in places:
        _refuse_plain(place)
    name = f"{PREFIX}{key.key_id}.json"
    text = wrap(key, secrets.token_bytes(KEY_BYTES))
    for place in places:
        try:
            place.put(name, text, only_new=True)
        except ConflictError:
            text = place.get(name)  # another process made it a moment ago: its data key counts
        place.flush()
    kept = {unwrap(key, place.get(name), name=f"{name} in {place.shown}").data_key for place in places}
    if len(kept) != 1:
        raise BackupKeyError(f"{_shown(places)} got different data keys from two processes at once: start one again")
    return Keyring(key.key_id, kept.pop())


def _refuse_plain(place: Place) -> None:
    if _holds_backups(place):
        raise BackupKeyError(
            f"{place.shown} holds backups that were made without a key: give the encrypted ones another location (backups)"
        )


def _holds_backups(place: Place) -> bool:
    # ids begin with the year: a longer list would go through every object of a bucket
    return any(one.name.endswith(SUFFIX) and "/" not in one.name for one in place.list("2"))


def _key_id(secret: bytes) -> str:
    return hmac.new(secret, b"modelkeep backup key id", hashlib.sha256).hexdigest()[:16]


def _bound_to(value: dict[str, Any]) -> bytes:
    """Everything that the file says besides the wrapped key: none of it can be changed unseen."""
    said = {name: one for name, one in value.items() if name != "wrapped"}
    return json.dumps(said, sort_keys=True, separators=(",", ":")).encode()


def _decoded(text: bytes) -> bytes | None:
    try:
        found = bytes.fromhex(text.decode()) if len(text) == 2 * KEY_BYTES else base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        return None
    return found if len(found) == KEY_BYTES else None


def _shown(places: Sequence[Place]) -> str:
    return " and ".join(place.shown for place in places)
