"""What the cost of a feature is measured against: a server from which something was really taken out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks._features import WITHOUT
from tests.own_environment import ROOT


@pytest.mark.parametrize("feature", WITHOUT)
def test_what_a_feature_is_taken_out_of_is_where_it_was(feature: str) -> None:
    code = f"from benchmarks._features import take_out; take_out({feature!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
