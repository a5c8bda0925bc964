"""`max_batch` of a version: said in model.toml or by an option, a number of rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.errors import UsageError
from registry.modeltoml import given, parse_model_toml


def test_the_most_rows_are_a_fact_of_the_version(tmp_path: Path) -> None:
    assert given({}, {"max_batch": "8"}) == {"max_batch": 8}
    (tmp_path / "model.toml").write_text("max_batch = 24\n")
    assert parse_model_toml(tmp_path / "model.toml").facts == {"max_batch": 24}
    (tmp_path / "model.toml").write_text("")
    assert "max_batch" not in parse_model_toml(tmp_path / "model.toml").facts


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "²"])
def test_what_is_no_number_of_rows_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_batch"):
        given({}, {"max_batch": value})
    (tmp_path / "model.toml").write_text(f"max_batch = {value if value in ('0', '-1') else repr(value)}\n")
    with pytest.raises(UsageError, match="max_batch"):
        parse_model_toml(tmp_path / "model.toml")
