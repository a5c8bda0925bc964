"""Small JSON documents of a repository that are signed like a manifest: the notes of states, the index of shipped logs."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from tasks.backup.keyring import Keyring
from tasks.backup.manifest import ManifestError, check_digest, check_signature, signed_text

STATE = "modelkeep-backup-state"
INTENT = "modelkeep-backup-intent"
LOG = "modelkeep-log"
LOG_HEAD = "modelkeep-log-head"
VERSION = 1


def text(value: Mapping[str, Any], keyring: Keyring | None) -> bytes:
    """The document, with its signature where there is a key."""
    whole = dict(value)
    if keyring is None:
        digest = hashlib.sha256(signed_text(whole)).hexdigest()
        whole["signature"] = {"method": "sha256", "key_id": "", "value": digest}
    else:
        signed = hmac.new(keyring.signing_key, signed_text(whole), hashlib.sha256).hexdigest()
        whole["signature"] = {"method": "hmac-sha256", "key_id": keyring.data_key_id, "value": signed}
    return (json.dumps(whole, sort_keys=True, indent=1) + "\n").encode()


def read(
    text: bytes, format: str, name: str, keyring: Keyring | None, identity: str, *, field: str = "backup_id"
) -> dict[str, Any]:
    """Raises ManifestError: torn, edited, of another format, not signed by the key, or with another `identity` in its `field`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ManifestError(f"{name} cannot be read ({error}): it is torn or was edited") from error
    if not isinstance(value, dict) or value.get("format") != format or value.get("format_version") != VERSION:
        raise ManifestError(f"{name} is no {format!r} of version {VERSION}")
    if keyring is None:
        check_digest(value, name)
    else:
        check_signature(value, keyring.signing_key, name)
    if value.get(field) != identity:
        raise ManifestError(f"{name} is of {field.removesuffix('_id')} {value.get(field)!r}")
    return value
