"""The commands of a page and their results: read, and compared so that a wrong word is found."""

from __future__ import annotations

import pytest

from tests import printed
from tests.printed import Call

PAGE = """# Page

Text with `modelkeep status`.

## First look

```console
$ modelkeep status
environment production, generation 13
model    stable  candidate  share
numbers  2       3          5%

$ modelkeep promotions show ID
numbers 3 in production: running
02:58:40  validate  numbers 3 passed the validation  passed 10 checks in 1.3 s,
        and nothing to note
promotion 8fb02a03bbde
```

```
modelkeep up
```

### Refused

```console
$ modelkeep promote numbers 3
modelkeep: model:production/numbers is locked
[exit 4]
$ modelkeep promotions show ID
…
waits for a person
```
"""

STATUS, SHOW, PROMOTE, AGAIN = printed.calls(PAGE)
STATUS_NOW = [
    "environment production, generation 13",
    "model     stable  candidate  share",
    "numbers   2       3          5%  ",
]
SHOW_NOW = [
    "numbers 3 in production: running",
    "11:01:02  validate  numbers 3 passed the validation  passed 10 checks in 0.7 s, and nothing to note",
    "promotion 17cba4093182",
]


def test_commands_are_read_with_their_section_and_their_result() -> None:
    assert [(call.section, call.command) for call in printed.calls(PAGE)] == [
        ("First look", "modelkeep status"),
        ("First look", "modelkeep promotions show ID"),
        ("Refused", "modelkeep promote numbers 3"),
        ("Refused", "modelkeep promotions show ID"),
    ]
    assert SHOW.printed[1].endswith("passed 10 checks in 1.3 s, and nothing to note")
    assert PROMOTE.printed == ("modelkeep: model:production/numbers is locked", "[exit 4]")
    assert printed.others(PAGE) == ["modelkeep up"]


def test_ids_times_counts_and_blanks_may_differ() -> None:
    assert printed.differences(STATUS, STATUS_NOW) == []
    assert printed.differences(SHOW, SHOW_NOW) == []


@pytest.mark.parametrize(
    ("word", "other"),
    [
        ("generation 13", "generation 14"),
        ("numbers", "letters"),
        ("5%", "25%"),
        ("stable", "stabel"),
        ("share", "share  errors"),
    ],
)
def test_a_changed_word_of_the_page_is_found(word: str, other: str) -> None:
    assert word in PAGE
    changed = printed.calls(PAGE.replace(word, other))[0]
    found = printed.differences(changed, STATUS_NOW)
    assert any(line.startswith("-") and other.split()[0] in line for line in found), found


@pytest.mark.parametrize(
    ("word", "other"),
    [("running", "soaking"), ("10 checks", "9 checks"), ("passed the", "failed the"), ("nothing to note", "1 to note")],
)
def test_a_changed_word_of_what_is_printed_is_found(word: str, other: str) -> None:
    assert printed.differences(SHOW, [line.replace(word, other) for line in SHOW_NOW]) != []


def test_a_line_too_many_or_too_few_and_another_exit_code_are_found() -> None:
    assert printed.differences(SHOW, [*SHOW_NOW, "waits for its validation"]) != []
    assert printed.differences(SHOW, SHOW_NOW[:-1]) != []
    told = "modelkeep: model:production/numbers is locked"
    assert printed.differences(PROMOTE, printed.lines("", f"{told}\n12:00 INFO a log\n", 4)) == []
    assert printed.differences(PROMOTE, printed.lines("", told, 1)) != []


def test_lines_are_left_out_only_where_they_were_printed_before() -> None:
    now = [*SHOW_NOW, "waits for a person"]
    assert printed.differences(AGAIN, now, earlier=SHOW_NOW) == []
    assert printed.differences(AGAIN, now) != []
    assert printed.differences(AGAIN, [*SHOW_NOW, "a new line", "waits for a person"], earlier=SHOW_NOW) != []


def test_a_block_that_begins_with_no_command_is_refused() -> None:
    with pytest.raises(ValueError, match="line 2"):
        printed.calls("```console\nnumbers 2\n```\n")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("since 2026-11-21T11:32:38.992358Z (promotion 8fb02a03bbde)", "since <time> (promotion <hex>)"),
        ("196  2026-11-21T11:37:53  os:root", "<event> <time> <person>"),
        ("errors 24/126 (19.0%) against 0/183", "errors <counts> (<share>) against <counts>"),
        ("errors 24/126 (19.0%), worth 12.5 events against", "errors <counts> (<share>) against"),
        ("error   6/35  0/613   387       200", "error <counts> <counts> <number> 200"),
        ("The highest e-value is 1 (slow answers) of the 200", "The highest e-value is <number> (<stream>) of the 200"),
        ("answers 25% of the requests, generation 18", "answers 25% of the requests, generation 18"),
    ],
)
def test_only_what_differs_from_run_to_run_is_taken_out(text: str, normal: str) -> None:
    assert printed.normal(text) == normal


def test_a_command_is_split_as_a_shell_does() -> None:
    assert Call("", 'modelkeep reject ID --note "not now"', (), 1).words == [
        "modelkeep",
        "reject",
        "ID",
        "--note",
        "not now",
    ]
