"""The text that mariadb-dump and mysqldump write: cut at its tables, its rows counted as they pass, and its end looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from registry.errors import ArtifactError

TRAILER = re.compile(rb"\n-- Dump completed[^\n]*\n?$")
SANDBOX = re.compile(rb"^/\*M?!999999\\- enable the sandbox mode \*/ ?\n")
"""MariaDB's first line: MySQL's clients take it for a command that they do not have."""
_COMMENT = re.compile(rb"\n--\n-- ")
_ROWS_END = re.compile(rb"\);\n")
"""A search by a pattern takes half the time of one by bytes.find, and these two pass over all of a dump."""
_CUT = re.compile(
    rb"\n--\n-- (?:(?:Table structure for table|Sequence structure for) `(?P<table>(?:[^`\n]|``)*)`"
    rb"|Temporary table structure for view `(?P<view>(?:[^`\n]|``)*)`|(?P<rest>Dumping (?:events|routines) for database '[^\n]*'))\n"
)
_INSERT = re.compile(rb"(?:^|\n)INSERT +(?:IGNORE +)?INTO `((?:[^`\n]|``)*)`(?: \([^\n]*?\))? VALUES ?(\n?)")
_STRING = re.compile(rb"'(?:[^'\\]|\\.|'')*'", re.DOTALL)
_MARK_BYTES = 1024
"""No mark that we look for is longer, except an INSERT's list of columns."""


@dataclass(frozen=True, slots=True)
class Section:
    """A run of the dump's text: a table with its rows and triggers, or (`table` is None) what is of no table."""

    table: str | None
    pieces: Iterator[bytes]


class DumpText:
    """The text on its way. `rows` are counted by table; `finish` says whether it is whole."""

    def __init__(self, pieces: Iterable[bytes], tables: Iterable[str]) -> None:
        self.rows: Counter[str] = Counter()
        self.bytes = 0
        self.seen: set[str] = set()
        self._known = set(tables)
        self._pieces = iter(pieces)
        self._tail = b""
        self._counted = _RowCounter(self.rows)
        self._held = b"\n"  # a line break before the text, so that a mark may be its very first
        self._virgin = True
        self._over = False
        self._next: str | None = None
        self._cut = False

    def sections(self) -> Iterator[Section]:
        """One after the other, each read to its end before the next is asked for. All of them together are the text, without
        the line that MySQL's clients stumble over.
        """
        while True:
            table, self._next, self._cut = self._next, None, False
            pieces = self._until_cut(skip=table is not None or not self._virgin)
            yield Section(table, pieces)
            for _ in pieces:
                raise AssertionError("a section was left before its end")
            if not self._cut:
                return

    def finish(self) -> None:
        """Raises ArtifactError where the text lacks its end: a dump cut at a statement restores without an error."""
        if not TRAILER.search(self._tail):
            raise ArtifactError(
                f"the dump ended after {self.bytes} bytes without its last line (-- Dump completed): it is cut short"
            )

    def _until_cut(self, *, skip: bool) -> Iterator[bytes]:
        begin = 1 if skip else 0  # the mark at which a section begins is not its end
        while True:
            found = self._mark(begin)
            if found is not None:
                given, self._held, self._cut = self._held[: found.start()], self._held[found.start() :], True
                yield from self._given(given)
                return
            if self._over:
                given, self._held = self._held, b""
                yield from self._given(given)
                return
            keep = max(len(self._held) - _MARK_BYTES, 0)
            if keep:
                given, self._held, begin = self._held[:keep], self._held[keep:], 0
                yield from self._given(given)
            piece = next(self._pieces, None)
            if piece is None:
                self._over = True
                continue
            self.bytes += len(piece)
            self._tail = (self._tail + piece[-512:])[-512:]
            self._counted.take(piece)
            self._held += piece

    def _mark(self, begin: int) -> re.Match[bytes] | None:
        while (comment := _COMMENT.search(self._held, begin)) is not None:
            found = _CUT.match(self._held, comment.start())
            if found is not None:
                name = found["table"] if found["table"] is not None else found["view"]
                shown = None if name is None else _name(name)
                if found["table"] is None or (shown in self._known and shown not in self.seen):
                    if found["table"] is not None and shown is not None:
                        self._next = shown
                        self.seen.add(shown)
                    return found
            begin = comment.start() + 1
        return None

    def _given(self, piece: bytes) -> Iterator[bytes]:
        if self._virgin:
            self._virgin = False
            piece = SANDBOX.sub(b"", piece[1:])
        if piece:
            yield piece


def _name(text: bytes) -> str:
    return text.replace(b"``", b"`").decode("utf-8", "surrogateescape")


class _RowCounter:
    """Rows of INSERTs. MariaDB writes each row on a line of its own, and no line break inside of one; MySQL writes one line."""

    def __init__(self, rows: Counter[str]) -> None:
        self.rows = rows
        self._held = b"\n"
        self._table: str | None = None
        self._by_line = True

    def take(self, piece: bytes) -> None:
        self._held += piece
        while self._held:
            if self._table is None:
                found = _INSERT.search(self._held)
                if found is None:
                    # An INSERT whose line is not whole yet is kept, however long its list of columns.
                    cut = self._held.rfind(b"\n", 0, len(self._held))
                    self._held = self._held[max(cut, 0) :]
                    return
                if found.end() + 2 > len(self._held):
                    self._held = self._held[found.start() :]
                    return
                self._table = _name(found.group(1))
                self._by_line = found.group(2) == b"\n"
                self._held = self._held[found.end() - 1 :] if self._by_line else self._held[found.end() :]
            if not self._statement():
                return

    def _statement(self) -> bool:
        """Whether the statement's end was there. Complete lines are counted and let go."""
        assert self._table is not None
        if self._by_line:
            # The line break before each row is in what is held; the one after the last row is that of the statement's end.
            over = _ROWS_END.search(self._held)
            if over is None:
                self.rows[self._table] += self._held.count(b"\n", 0, -3)
                self._held = self._held[-3:]
                return False
            self.rows[self._table] += self._held.count(b"\n", 0, over.start())
            self._held = self._held[over.start() + 2 :]
        else:
            end = self._held.find(b";\n")
            while end >= 0 and _STRING.sub(b"", self._held[:end]).count(b"'"):
                end = self._held.find(b";\n", end + 1)  # inside of a string
            if end < 0:
                return False
            self.rows[self._table] += _STRING.sub(b"", self._held[:end]).count(b"),(") + 1
            self._held = self._held[end + 1 :]
        self._table = None
        return True


def begun(pieces: Iterator[bytes], told: Callable[[], None]) -> Iterator[bytes]:
    """The same pieces. `told` is called once a table's text is there, or all of it: the dump's transaction has begun by then."""
    head = b""
    waiting = True
    for piece in pieces:
        if waiting:
            head += piece
            if b"\n-- Table structure for" in head or b"\n-- Temporary table structure" in head or len(head) > 1 << 20:
                waiting = False
                told()
                yield head
                head = b""
            continue
        yield piece
    if waiting:
        told()
        if head:
            yield head
