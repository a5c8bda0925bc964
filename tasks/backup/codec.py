"""A chunk as it is stored: compressed where that saves something, encrypted where there is a key, named by its content."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
from dataclasses import dataclass
from typing import cast

import zstandard

from registry.errors import ArtifactError
from tasks.backup.keyring import Keyring
from tasks.backup.manifest import Chunk, Codec

CHUNK_BYTES = 16 << 20
LEVEL = 1
WORTH = 0.95
"""Compressed it must be at most this share of the plain size, else it is kept plain."""
NONCE_BYTES = 12
PREFIX = "objects/"
ENCRYPTED = "+aes-256-gcm"

_local = threading.local()


@dataclass(frozen=True, slots=True)
class Encoded:
    chunk: Chunk
    data: bytes


def address(digest: bytes, keyring: Keyring | None) -> str:
    """The name of the object of a chunk, by the SHA-256 of its plain bytes: 64 hexadecimal digits."""
    if keyring is None:
        return digest.hex()
    return hmac.new(keyring.address_key, digest, hashlib.sha256).hexdigest()


def object_name(object_id: str) -> str:
    """Where an object is in a location."""
    return f"{PREFIX}{object_id[:2]}/{object_id}"


def encode(plain: bytes, digest: bytes, keyring: Keyring | None, *, compress: bool = True) -> Encoded:
    """The object for a chunk whose SHA-256 is `digest`."""
    name = address(digest, keyring)
    payload, codec = plain, "plain"
    if compress:
        smaller = _compressor().compress(plain)
        if len(smaller) <= len(plain) * WORTH:
            payload, codec = smaller, "zstd"
    if keyring is not None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        payload = nonce + keyring.cipher.encrypt(nonce, payload, name.encode())
        codec += ENCRYPTED
    stored = hashlib.sha256(payload).hexdigest()
    chunk = Chunk(name, len(plain), digest.hex(), len(payload), stored, cast(Codec, codec))
    return Encoded(chunk, payload)


def decode(data: bytes, chunk: Chunk, keyring: Keyring | None) -> bytes:
    """The plain bytes of a chunk. Raises ArtifactError where `data` is not its object.

    The plain SHA-256 decides. Stored bytes other than the manifest's are right as well where they hold the same: a damaged
    object that a later backup wrote again has another nonce, and may be compressed otherwise.
    """
    compressed = chunk.codec.startswith("zstd")
    if chunk.codec.endswith(ENCRYPTED):
        if keyring is None:
            raise ArtifactError(f"object {chunk.object} is encrypted, and no backup key is set (backup_key_file)")
        data = decrypt(data, chunk.object, keyring)
    for as_zstd in (compressed, not compressed):
        plain = expand(data, chunk.size_bytes) if as_zstd else data
        if plain is not None and len(plain) == chunk.size_bytes and hashlib.sha256(plain).hexdigest() == chunk.sha256:
            return plain
    raise ArtifactError(
        f"object {chunk.object} is damaged: its content does not have SHA-256 {chunk.sha256} and {chunk.size_bytes} bytes"
    )


def recognise(data: bytes, object_id: str, keyring: Keyring | None) -> Chunk:
    """What an object is that no manifest knows, by nothing but its bytes and its name. Raises ArtifactError: it is damaged."""
    payload = data if keyring is None else decrypt(data, object_id, keyring)
    suffix = "" if keyring is None else ENCRYPTED
    for codec in ("plain", "zstd"):
        plain = payload if codec == "plain" else expand(payload, CHUNK_BYTES)
        if plain is None:
            continue
        digest = hashlib.sha256(plain)
        if hmac.compare_digest(address(digest.digest(), keyring), object_id):
            stored = hashlib.sha256(data).hexdigest()
            return Chunk(object_id, len(plain), digest.hexdigest(), len(data), stored, cast(Codec, codec + suffix))
    raise ArtifactError(f"object {object_id} is damaged: its content does not have the name that it is stored under")


def decrypt(data: bytes, object_id: str, keyring: Keyring) -> bytes:
    """Raises ArtifactError: not a bit of it is other than it was written, under this name and this key, or it is refused."""
    from cryptography.exceptions import InvalidTag

    try:
        return keyring.cipher.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], object_id.encode())
    except (InvalidTag, ValueError) as error:
        raise ArtifactError(
            f"object {object_id} cannot be decrypted: it is damaged, has another object's bytes, or is of another key"
        ) from error


def expand(data: bytes, at_most: int) -> bytes | None:
    """Decompressed; None where it is no zstd frame, or one of more bytes than `at_most` (a bomb is not unpacked)."""
    try:
        parameters = zstandard.get_frame_parameters(data)
        if parameters.content_size > at_most:
            return None
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=at_most, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


def _compressor() -> zstandard.ZstdCompressor:
    """One a thread: it may not be used by two at once."""
    found: zstandard.ZstdCompressor | None = getattr(_local, "compressor", None)
    if found is None:
        found = _local.compressor = zstandard.ZstdCompressor(level=LEVEL)
    return found
