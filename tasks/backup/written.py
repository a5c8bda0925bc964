"""The content of a component as plain files, where it needs a server and none is named: to be looked at."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from registry.errors import ConflictError, StorageError
from tasks.backup.components import Source


def write_files(source: Source, folder: Path) -> dict[str, Any]:
    """The streams of a component as files, for whoever wants to look at them. Raises ConflictError for names that lead out
    of the folder, StorageError.
    """
    count = size = 0
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # dumps are nobody else's to read
        for entry in source.entries():
            if entry.stream is None:
                continue
            path = folder / entry.name
            if ".." in path.parts or not path.is_relative_to(folder):
                raise ConflictError(f"{entry.name!r} leads out of {folder}: it is not written")
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f".{path.name}.new")
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                for piece in source.open(entry.stream):
                    file.write(piece)
            fresh.replace(path)
            count, size = count + 1, size + entry.stream.size_bytes
    except OSError as error:
        raise StorageError(f"{folder} cannot be written: {error.strerror or error}") from error
    return {"files": count, "bytes": size}
