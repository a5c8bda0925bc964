"""Commands that a page prints with their results: read them out of it, and compare with what the commands print now.

In a page, a block of kind `console` has commands behind `$ `, and below each what it prints. `ID` in a command is the promotion
that the section is about, `TIME` a moment; whoever runs the page puts them in.
    [exit 1]    the command ends so; without it, with 0
    …           lines that an earlier command of the page has printed already
    a line that begins with eight blanks goes on with the line before it
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ELSEWHERE = "…"
CONTINUED = " " * 8

VARIABLE: tuple[tuple[str, str], ...] = (
    (r"\s+", " "),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?", "<time>"),
    (r"#\d{6} \d{1,2}:\d\d:\d\d\b", "#<time>"),
    (r"\b\d\d:\d\d:\d\d\b", "<time>"),
    (r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b", "<id>"),
    (r"\b[0-9a-f]{32}\b", "<id>"),
    (r"\b[0-9a-f]{12,16}(…|\b)", "<hex>"),
    (r"^\d+ (?=<time>)", "<event> "),
    (r"127\.0\.0\.1:\d+", "<address>"),
    (r"\bos:[\w.-]+", "<person>"),
    # backups: their names, what was counted in them, what was put back
    (r"\b\d{8}T\d{6}Z-[0-9a-f]{6}\b", "<backup>"),
    (r"\b(tables|rows|events|artifacts|bytes|files|settings|names|file|golden_cases) \d+\b", r"\1 <number>"),
    (r"\b\d+ (names looked at|deleted ones|overwritten ones)", r"<number> \1"),
    (r"\b(\d+ h )?\d+ (min|days)\b", "<seconds>"),
    # what a database's server wrote to its log, as its own programs show it
    (r"\bend_log_pos \d+ CRC32 0x[0-9a-f]+", "end_log_pos <number>"),
    (r"\b(thread_id|exec_time|xid)=\d+", r"\1=<number>"),
    (r"^(\w+\.\d{6}) \d+$", r"\1 <size>"),
    (r"\b\d+ transactions?\b", "<number> transactions"),
    (r"\b[0-9A-F]{24}\b", "<segment>"),
    (r"\bbase/\d+/\d+( base/\d+/\d+)*", "<files>"),
    # how long something took or lasts, and sizes
    (r"\b\d+(\.\d+)? (ms|s)\b", "<seconds>"),
    (r"\b\d+(\.\d+)? (B|KB|MB|GB)\b", "<size>"),
    # counts of requests, and what is computed from them
    (r"\b\d+/\d+\b", "<counts>"),
    (r"\b\d+ (of \d+ )?(requests|copies|cases)\b", "<counts>"),
    (r"\b\d+ of \d+\b", "<counts>"),
    (r"\b\d+ (events|anchors|rows)\b", r"<number> \1"),
    (r'"seq": \d+', '"seq": <number>'),
    (r"schema revision \d{4}\b", "schema revision <number>"),
    (r"\b\d+\.\d+ ?%", "<share>"),
    # evidence: as a number of a few digits, and in which stream it is highest
    (r"evidence of (over a million|\S+)", "evidence of <number>"),
    (r"e-value is \S+ \((errors|slow answers)\)", "e-value is <number> (<stream>)"),
    (r"^(\w+ <counts> <counts>) \S+ (?=\d+$)", r"\1 <number> "),
    (r"(?<=<share>\)), worth \S+ events", ""),
    (r"\b\d+(\.\d+)?e[+-]?\d+\b|\b\d+\.\d+\b", "<number>"),
)
"""What differs from run to run, in the order in which it is looked for. Blanks count once: a table is as wide as what is in it."""


@dataclass(frozen=True, slots=True)
class Call:
    """A command of a page, its section, and what it prints there."""

    section: str
    command: str
    printed: tuple[str, ...]
    line: int

    @property
    def words(self) -> list[str]:
        return shlex.split(self.command)


def calls(page: str) -> list[Call]:
    """The commands of all console blocks, in order. Raises ValueError for a block that does not begin with a command."""
    found: list[Call] = []
    section, kind = "", None
    for number, text in enumerate(page.splitlines(), start=1):
        if text.startswith("```"):
            kind = text[3:].strip() if kind is None else None
            fresh = True
        elif kind is None:
            section = text.lstrip("#").strip() if text.startswith("#") else section
        elif kind == "console":
            if text.startswith("$ "):
                found.append(Call(section, text[2:], (), number))
            elif fresh:
                raise ValueError(f"line {number}: a console block begins with `$ `, not with {text!r}")
            elif text.startswith(CONTINUED):
                *before, last = found[-1].printed
                found[-1] = _with(found[-1], (*before, f"{last} {text.strip()}"))
            else:
                found[-1] = _with(found[-1], (*found[-1].printed, text))
            fresh = False
    return found


def others(page: str) -> list[str]:
    """The lines of all blocks that are not console blocks: nothing runs them."""
    return [
        line
        for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
        if kind != "console"
        for line in block.splitlines()
    ]


def normal(text: str) -> str:
    """A line without what differs from run to run."""
    for pattern, word in VARIABLE:
        text = re.sub(pattern, word, text)
    return text.strip()


def lines(stdout: str, stderr: str, code: int) -> list[str]:
    """What a person sees of a command: its output, its own messages (logs are left out), its exit code where that is not 0."""
    said = [*stdout.splitlines(), *(line for line in stderr.splitlines() if line.startswith("modelkeep: "))]
    return [*(line for line in said if line.strip()), *([f"[exit {code}]"] if code else [])]


def differences(call: Call, printed: Sequence[str], *, earlier: Iterable[str] = ()) -> list[str]:
    """What the page says otherwise than the command, as a diff; empty where they agree. `earlier` is what the page's commands printed before."""
    seen = {normal(line) for line in earlier}
    wanted = [normal(line) for line in call.printed if line.strip()]
    now = [normal(line) for line in printed]
    if ELSEWHERE in wanted:
        now = _elided(wanted, now, seen)
    return list(difflib.unified_diff(wanted, now, f"line {call.line} of the page", call.command, lineterm="", n=1))


def _elided(wanted: Sequence[str], now: Sequence[str], seen: set[str]) -> list[str]:
    """What is printed, with `…` for the run of lines in the place of the page's `…`, where an earlier command has printed all of them."""
    place = list(wanted).index(ELSEWHERE)
    after = len(wanted) - place - 1
    left_out = now[place : len(now) - after]
    if not left_out or any(line not in seen for line in left_out):
        return list(now)
    return [*now[:place], ELSEWHERE, *now[len(now) - after :]]


def _with(call: Call, printed: tuple[str, ...]) -> Call:
    return Call(call.section, call.command, printed, call.line)
