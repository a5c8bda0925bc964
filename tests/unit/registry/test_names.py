"""What models and versions may be called."""

from __future__ import annotations

import pytest

from registry.errors import UsageError
from registry.names import check_model_name, check_version


@pytest.mark.parametrize("name", ["digits", "2", "1.0.3-rc_1", "A", "x" * 128, "7b.q4"])
def test_letters_digits_dots_dashes_and_underscores_are_a_name(name: str) -> None:
    assert check_model_name(name) == name
    assert check_version(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", "a..b", ".hidden", "-x", "_x", "x" * 129, "a b", "a\n", "ä", "a\\b", "a%2fb", "a:b"]
)
def test_what_could_leave_a_folder_or_break_a_url_is_no_name(name: str) -> None:
    with pytest.raises(UsageError) as error:
        check_model_name(name)
    assert "is not a model name: it must begin with a letter or a digit" in str(error.value)
    assert repr(name)[:100].rstrip("'") in str(error.value)


def test_the_message_says_version_where_it_is_one() -> None:
    with pytest.raises(UsageError, match=r"'1/2' is not a version"):
        check_version("1/2")
