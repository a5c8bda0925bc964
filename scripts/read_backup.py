"""Read a backup (docs/BACKUP_FORMAT.md) without modelkeep: [KEY_FILE=…] python read_backup.py MANIFEST [COMPONENT [FOLDER to write it to]]"""

import base64
import hmac
import json
import os
import sys
from hashlib import sha256
from pathlib import Path

import zstandard


def derived(key: bytes, purpose: str) -> bytes:
    return hmac.digest(hmac.digest(bytes(32), key, "sha256"), f"modelkeep backup {purpose}\x01".encode(), "sha256")


def said(value: dict, but: str) -> bytes:
    return json.dumps({k: v for k, v in value.items() if k != but}, sort_keys=True, separators=(",", ":")).encode()


def pieces(stream: dict):
    for chunk in stream["chunks"]:
        name = chunk["object"]
        plain = data = (location / "objects" / name[:2] / name).read_bytes()
        if cipher:
            plain = data = cipher.decrypt(data[:12], data[12:], name.encode())
        if sha256(plain).hexdigest() != chunk["sha256"]:
            plain = zstandard.decompress(data, 16 << 20)
        if sha256(plain).hexdigest() != chunk["sha256"]:
            sys.exit(f"object {name} is damaged")
        yield plain


manifest, location, cipher = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[1]).parent, None
seal = sha256(said(manifest, "signature")).hexdigest()
if manifest["encryption"]:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    text = next(line for line in Path(os.environ["KEY_FILE"]).read_text().splitlines() if line.strip("# ") == line)
    secret = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text)
    key_id = hmac.new(secret, b"modelkeep backup key id", "sha256").hexdigest()[:16]
    key = json.loads((location / f"keys/{key_id}.json").read_bytes())
    nonce, wrapped = base64.b64decode(key["wrapped"])[:12], base64.b64decode(key["wrapped"])[12:]
    data_key = AESGCM(secret).decrypt(nonce, wrapped, said(key, "wrapped"))
    cipher = AESGCM(derived(data_key, "objects"))
    seal = hmac.new(derived(data_key, "signature"), said(manifest, "signature"), "sha256").hexdigest()
if manifest["format_version"] != 1 or seal != manifest["signature"]["value"]:
    sys.exit(f"{sys.argv[1]} is damaged, was edited, or has another format version than 1")
for component in manifest["components"] if len(sys.argv) == 2 else ():
    print(component["name"], component["kind"], component["state"], component["entries"], component["size_bytes"])
wanted = [component["index"] for component in manifest["components"] if component["name"] in sys.argv[2:3]]
for entry in (json.loads(line) for index in wanted for line in b"".join(pieces(index)).splitlines()):
    name = entry["name"] if "name" in entry else os.fsdecode(base64.b64decode(entry["name_base64"]))
    print(entry["kind"], ascii(name), entry.get("stream", {}).get("size_bytes", ""))
    if len(sys.argv) > 3 and "stream" in entry:
        target = Path(sys.argv[3], Path(sys.argv[3], name).resolve().relative_to(Path(sys.argv[3]).resolve()))
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.writelines(pieces(entry["stream"]))
