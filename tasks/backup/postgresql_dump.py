"""The text that pg_dump writes: cut at the rows of its tables, which are counted as they pass, and its end looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from registry.errors import ArtifactError

TRAILER = b"\n-- PostgreSQL database dump complete\n"
_COMMENT = b"\n-- Data for Name: "
_COPY = re.compile(
    rb"\n-- Data for Name: [^\n]*; Type: TABLE DATA; Schema: [^\n]*\n--\n\n"
    rb"COPY (?P<name>(?:\"(?:[^\"]|\"\")*\"|[^\s.\"(]+)\.(?:\"(?:[^\"]|\"\")*\"|[^\s.\"(]+)) [^\n]*FROM stdin;\n"
)
_END = b"\n\\.\n"
_MARK_BYTES = 1 << 16
"""No statement that begins a table's rows is longer: 1,600 columns of 63 letters at most are looked for whole."""
_TAIL_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Section:
    """A run of the dump's text: the rows of a table, or (`table` is None) what is between them."""

    table: str | None
    pieces: Iterator[bytes]


class DumpText:
    """The text on its way. `rows` are counted by table (names as they are quoted), `finish` says whether it is whole."""

    def __init__(self, pieces: Iterable[bytes], tables: Iterable[str]) -> None:
        self.rows: Counter[str] = Counter()
        self.bytes = 0
        self.seen: set[str] = set()
        self._known = {_plain(name): name for name in tables}
        self._pieces = iter(pieces)
        self._tail = b""
        self._held = b""
        self._over = False
        self._next: str | None = None
        self._cut = False

    def sections(self) -> Iterator[Section]:
        """One after the other, each read to its end before the next is asked for. All of them together are the text."""
        while True:
            table, self._next, self._cut = self._next, None, False
            pieces = self._between() if table is None else self._rows_of(table)
            yield Section(table, pieces)
            for _ in pieces:
                raise AssertionError("a section was left before its end")
            if not self._cut:
                return

    def finish(self) -> None:
        """Raises ArtifactError where the text lacks its end: a dump cut at a statement restores without an error."""
        if TRAILER not in self._tail:
            raise ArtifactError(f"the dump ended after {self.bytes} bytes without its last line: it is cut short")

    def _between(self) -> Iterator[bytes]:
        while True:
            found = self._copy()
            if found is not None:
                # The comment before it stays with what is before; the rows begin with their COPY.
                given, self._held, self._cut = (
                    self._held[: found.start("name") - 5],
                    self._held[found.start("name") - 5 :],
                    True,
                )
                yield given
                return
            if self._over:
                given, self._held = self._held, b""
                if given:
                    yield given
                return
            yield from self._more(_MARK_BYTES)

    def _rows_of(self, table: str) -> Iterator[bytes]:
        """COPY … FROM stdin, the rows, and the line that ends them. A row is one line: breaks inside of values are escaped."""
        self.rows[table] = -1  # the line of COPY itself
        while True:
            place = self._held.find(_END)
            if place >= 0:
                given, self._held, self._cut = self._held[: place + len(_END)], self._held[place + len(_END) :], True
                self.rows[table] += given.count(b"\n") - 1
                yield given
                return
            if self._over:
                given, self._held = self._held, b""
                self.rows[table] += given.count(b"\n")
                if given:
                    yield given
                return
            for given in self._more(len(_END)):
                self.rows[table] += given.count(b"\n")
                yield given

    def _more(self, kept_bytes: int) -> Iterator[bytes]:
        """The next piece is read; what is longer than may hold a mark is given away."""
        keep = max(len(self._held) - kept_bytes, 0)
        if keep:
            given, self._held = self._held[:keep], self._held[keep:]
            yield given
        piece = next(self._pieces, None)
        if piece is None:
            self._over = True
            return
        self.bytes += len(piece)
        self._tail = (self._tail + piece[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        self._held += piece

    def _copy(self) -> re.Match[bytes] | None:
        place = self._held.find(_COMMENT)
        while place >= 0:
            found = _COPY.match(self._held, place)
            if found is not None:
                name = self._known.get(_plain(found["name"].decode("utf-8", "surrogateescape")))
                if name is not None and name not in self.seen:  # else: words in the body of a function
                    self._next = name
                    self.seen.add(name)
                    return found
            place = self._held.find(_COMMENT, place + 1)
        return None


def _plain(name: str) -> str:
    """schema.table without the quotes that are not always there."""
    return ".".join(
        part[1:-1].replace('""', '"') if part.startswith('"') else part
        for part in re.findall(r'"(?:[^"]|"")*"|[^."]+', name)
    )
