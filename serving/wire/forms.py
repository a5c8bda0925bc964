"""What comes to an alias: a JSON document, the parts of a multipart form (RFC 7578), and values in them by their path."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

from serving.wire.tensors import InputError, brief, json_type

_MOST_PARTS = 200
_MOST_PART_HEADERS = 8
_SHOWN_NAMES = 10


@dataclass(slots=True)
class Form:
    """`values`: what is no file, as JSON where it is JSON, else as text; `texts`: as it was sent.
    `files`: (name of the part, bytes), in their order."""

    values: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    files: list[tuple[str, bytes]] = field(default_factory=list)


def is_form(content_type: bytes | None) -> bool:
    return content_type is not None and content_type[:19].lower() == b"multipart/form-data"


def document_of(body: bytes) -> Any:
    """The JSON of a body. Raises InputError."""
    if not body.strip():
        raise InputError("the body is empty; this path takes JSON")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"the request is not valid JSON: {error}") from error


def form_of(body: bytes, content_type: bytes) -> Form:
    """The parts of a form. Raises InputError where it is none, is cut off, or has too many parts."""
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InputError("Content-Type multipart/form-data names no boundary; let the client library write this header")
    reader = _Reader()
    callbacks: Any = {
        "on_part_begin": reader.begin,
        "on_part_data": reader.data,
        "on_part_end": reader.end,
        "on_header_field": reader.header_name,
        "on_header_value": reader.header_value,
        "on_header_end": reader.header_end,
    }
    try:
        parser = MultipartParser(boundary, callbacks, max_header_count=_MOST_PART_HEADERS)
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise InputError(f"the form cannot be read: {error}") from error
    if reader.open:
        raise InputError("the form is cut off: its last part has no end")
    return reader.form


class _Reader:
    """Gathers what the parser finds."""

    def __init__(self) -> None:
        self.form = Form()
        self.open = False
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._name = self._value = b""
        self._chunks: list[bytes] = []

    def begin(self) -> None:
        self._parts += 1
        if self._parts > _MOST_PARTS:
            raise InputError(f"the form has more than {_MOST_PARTS} parts")
        self.open = True
        self._headers, self._chunks = {}, []

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        self._chunks.append(data[start:end])

    def end(self) -> None:
        from python_multipart.multipart import parse_options_header

        self.open = False
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if (raw := options.get(b"name")) is None:
            raise InputError("a part of the form has no name (Content-Disposition: form-data; name=…)")
        name, content = raw.decode("utf-8", "replace"), b"".join(self._chunks)
        if b"filename" in options or self._headers.get(b"content-type", b"").lower().startswith(b"image/"):
            self.form.files.append((name, content))
            return
        if name in self.form.values:
            raise InputError(f"the form has '{brief_name(name)}' twice")
        try:
            self.form.texts[name] = self.form.values[name] = content.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the part '{brief_name(name)}' of the form is neither text nor a file") from error
        with suppress(orjson.JSONDecodeError):
            self.form.values[name] = orjson.loads(content)


def brief_name(name: str) -> str:
    return name if len(name) <= 60 else name[:59] + "…"


MISSING: Any = object()


def find(document: Any, path: str) -> Any:
    """The value at a path: names of objects, places of lists, `*` for a list of what is in each; "." is the document.

    MISSING where an object on the way has no such name. Raises InputError where there is something else than the path says.
    """
    return document if path == "." else _find(document, path.split("."), 0)


def _find(value: Any, parts: list[str], at: int) -> Any:
    for position in range(at, len(parts)):
        part = parts[position]
        if type(value) is dict and part != "*":
            if part not in value:
                return MISSING
            value = value[part]
        elif type(value) is list and part == "*":
            found = [_find(item, parts, position + 1) for item in value]
            for place, item in enumerate(found):
                if item is MISSING:
                    where = ".".join((*parts[:position], str(place), *parts[position + 1 :]))
                    raise InputError(f"the request has no '{where}'")
            return found
        elif type(value) is list and part.isascii() and part.isdigit():
            if int(part) >= len(value):
                return MISSING
            value = value[int(part)]
        else:
            where = f"'{'.'.join(parts[:position])}'" if position else "the request"
            want = "a list" if part == "*" or part.isdigit() else "an object"
            raise InputError(f"{where} must be {want} to have '{'.'.join(parts)}', it is {json_type(value)}")
    return value


def missing(document: Any, path: str) -> InputError:
    """What to say of a field that is not there."""
    names = [brief_name(name) for name in document][:_SHOWN_NAMES] if type(document) is dict else []
    has = f"; it has {', '.join(map(repr, names))}" if names else ""
    return InputError(f"the request has no '{path}'{has}" if path != "." else f"the request is {brief(document)}")
