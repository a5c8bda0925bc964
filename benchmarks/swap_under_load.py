"""A hundred swaps of the version in traffic under sixteen connections that never pause: the slowest request against what is usual.

Mark: no request fails, no answer is wrong, the slowest is below the usual slowest + 100 ms. A swap here is one of record (forced): what it costs to
validate a version beforehand is in benchmarks/hot_swap.py. Prints one JSON document. `python -m benchmarks.swap_under_load [--swaps N]
[--mb SIZE --budget-mb BUDGET]`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.e2e.test_swaps import figures, swapped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--mb", type=int, default=0, help="weights of the model")
    parser.add_argument(
        "--budget-mb", type=int, default=2048, help="memory for models; below twice the weights: drain and swap"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(swapped(Path(folder), options.swaps, ballast_mb=options.mb, budget_mb=options.budget_mb))
    over = found["slowest_seconds"] - found["usual_slowest_seconds"]
    print(
        json.dumps(
            {"benchmark": "swap_under_load", **found, "over_usual_seconds": round(over, 4), "mark_seconds": 0.1},
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
