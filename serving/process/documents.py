"""What this server keeps on its disk as JSON: replaced in one step, so that a kill leaves the old or the new one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def replace(path: Path, document: dict[str, Any]) -> None:
    """Replace a file by this JSON in one step; only this user may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as target:
            json.dump(document, target)
            target.flush()
            os.fsync(target.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
