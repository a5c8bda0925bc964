"""Zip archives from strangers: opened only where every reader sees the same members, read within limits, never unpacked."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path, PurePosixPath

from registry.errors import RefusedError

MAX_MEMBERS = 100_000
MAX_TEXT_BYTES = 32 << 20
"""Of one member that is read whole, unpacked. Weights are members of their own."""
MAX_RATIO = 200
"""Unpacked bytes a packed byte, over the whole archive: torch packs code only, and that ten times at most."""

_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_LOCAL_HEADER_BYTES = 30


def open_archive(path: Path) -> zipfile.ZipFile:
    """An archive of which torch's reader and Python's see the same directory. Raises RefusedError."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise RefusedError(f"{path} is a damaged or truncated archive ({error}): copy or export it again") from error
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        if len(archive.filelist) > MAX_MEMBERS:
            raise RefusedError(f"{path} has {len(archive.filelist)} members, more than {MAX_MEMBERS}")
        if why := _ambiguous(path, archive):
            raise RefusedError(f"{path} {why}, so that two readers may see two models: export it again")
    except BaseException:
        archive.close()
        raise
    return archive


def _ambiguous(path: Path, archive: zipfile.ZipFile) -> str | None:
    """Why two readers of this archive could see two directories of it; None where they cannot.

    Python looks for the end of the directory backwards and shifts every offset by what it finds before the archive;
    torch's reader goes by the offsets. They agree where the records lie one after the other up to the last byte.
    """
    size = path.stat().st_size
    with path.open("rb") as source:
        source.seek(max(0, size - _END.size - _LOCATOR.size - _END64.size))
        tail = source.read()
    signature, *disks, here, entries, length, offset, comment = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6" or comment or any(disks):
        return "has something after the end of its directory"
    end = size - _END.size
    locator = tail[-_END.size - _LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\6\7":
        _, _, at, _ = _LOCATOR.unpack(locator)
        record = tail[: _END64.size]
        if len(tail) < _END.size + _LOCATOR.size + _END64.size or at != end - _LOCATOR.size - _END64.size:
            return "has a second directory"
        wide = _END64.unpack(record)
        if wide[0] != b"PK\6\6":
            return "has a second directory"
        for plain, full, unset in (
            (here, wide[6], 0xFFFF),
            (length, wide[8], 0xFFFFFFFF),
            (offset, wide[9], 0xFFFFFFFF),
        ):
            if plain not in (full, unset):
                return "has two directories that differ"
        entries, length, offset, end = wide[7], wide[8], wide[9], at
    if offset + length != end or entries != len(archive.filelist):
        return "has a directory that is not where it says"
    free = 0
    for info in sorted(archive.filelist, key=lambda info: info.header_offset):
        if info.header_offset < free:
            return "has members that overlap"
        free = info.header_offset + _LOCAL_HEADER_BYTES + len(info.orig_filename.encode()) + info.compress_size
    return "has members that reach into its directory" if free > offset else None


def check_members(path: Path, infos: list[zipfile.ZipInfo], max_bytes: int, *, writer: str) -> None:
    """Refuse names, sizes and flags that `writer` ("torch.jit.save") never writes. Raises RefusedError."""
    names = [info.filename for info in infos]
    if len({name.lower() for name in names}) != len(names):  # torch looks members up without regard to case
        raise RefusedError(
            f"{path} has members of the same name, so that two readers may see two models: export it again"
        )
    roots = {name.partition("/")[0] for name in names}
    if len(roots) != 1 or any(".." in PurePosixPath(name).parts or name.startswith("/") for name in names):
        raise RefusedError(f"{path} has members outside its one folder: not what {writer} writes")
    for info in infos:
        if info.filename != info.orig_filename or "\\" in info.filename or not info.filename.isprintable():
            raise RefusedError(f"{path} has a member of the name {info.orig_filename!r}: not what {writer} writes")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError(f"{path}: the member {info.filename} is packed in a way that {writer} never uses")
    if any(info.flag_bits & 0x1 for info in infos):
        raise RefusedError(f"{path} is encrypted: not what {writer} writes")
    unpacked, packed = sum(i.file_size for i in infos), sum(i.compress_size for i in infos)
    if unpacked > max_bytes:
        raise RefusedError(f"{path} unpacks to {unpacked} bytes, more than the {max_bytes} that are allowed")
    if unpacked > MAX_RATIO * max(packed, 1) and unpacked > (1 << 20):
        raise RefusedError(f"{path} unpacks to {unpacked} bytes from {packed}: a zip bomb, not a model")


def read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member of at most MAX_TEXT_BYTES, its checksum verified. Raises RefusedError."""
    if info.file_size > MAX_TEXT_BYTES:
        raise RefusedError(f"{path}: the member {info.filename} has {info.file_size} bytes, more than {MAX_TEXT_BYTES}")
    try:
        with archive.open(info) as source:
            content = source.read(MAX_TEXT_BYTES + 1)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        raise RefusedError(
            f"{path}: the member {info.filename} is damaged ({error}): copy or export it again"
        ) from error
    except Exception as error:  # zlib.error and lzma.LZMAError have no base in common but this
        raise RefusedError(f"{path}: the member {info.filename} does not unpack ({error}): export it again") from error
    if len(content) > MAX_TEXT_BYTES:
        raise RefusedError(f"{path}: the member {info.filename} unpacks to more than {MAX_TEXT_BYTES} bytes")
    return content
