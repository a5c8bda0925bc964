"""The names of a classifier's classes: `[labels]` in model.toml, an output each, a list or the name of a text file beside the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from registry.errors import RefusedError
from registry.signature import Signature

MAX_BYTES = 4 << 20
MAX_LISTED = 10_000
"""Of a list: longer ones belong into a file, for the list is read with every route."""


def check(labels: Mapping[str, Any], root: Path, files: Collection[str], signature: Signature | None) -> None:
    """Raises RefusedError where labels are of no output, too many, not text, or in a file that is not kept with the model."""
    outputs = {spec.name: spec for spec in signature.outputs} if signature is not None else None
    for output, said in labels.items():
        if outputs is not None and output not in outputs:
            raise RefusedError(f"[labels] {output}: the model has no such output; it has {', '.join(outputs)}")
        if isinstance(said, str):
            if said not in files:
                raise RefusedError(
                    f"[labels] {output} = {said!r}: that file does not belong to the model; put it into the model's "
                    "folder, and register the folder"
                )
            words = read_file(root / said)
        elif len(said) > MAX_LISTED:
            raise RefusedError(f"[labels] {output} has {len(said)} labels, a list has at most {MAX_LISTED}: use a file")
        else:
            words = said
            _check_words(words, f"[labels] {output}")
        classes = outputs[output].shape[-1:] if outputs is not None else ()
        if classes and -1 < classes[0] < len(words):
            raise RefusedError(f"[labels] {output} has {len(words)} labels, the output has {classes[0]} classes")


def read_file(path: Path) -> list[str]:
    """One label a line, of class 0 first; an empty line is a class without a label. Raises RefusedError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RefusedError(f"labels {path.name}: more than {MAX_BYTES} bytes; it is meant for a label a line")
        words = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"labels {path.name} cannot be read as UTF-8: {error}") from error
    _check_words([word.strip() for word in words], f"labels {path.name}")
    return [word.strip() for word in words]


def resolved(labels: Mapping[str, Any], root: Path) -> dict[str, tuple[str, ...]]:
    """The labels themselves; files are read from the artifact's folder. Raises RefusedError."""
    return {output: tuple(read_file(root / said) if isinstance(said, str) else said) for output, said in labels.items()}


def _check_words(words: list[str], where: str) -> None:
    if not any(words):
        raise RefusedError(f"{where}: no labels")
    for number, word in enumerate(words):
        if word and not word.isprintable():
            raise RefusedError(f"{where}: number {number}, {word[:40]!r}, has signs that are not printable")
