"""A hundred swaps of the version in traffic under sixteen connections that never pause: the slowest request against what is usual.

Mark: no request fails, no answer is wrong, the slowest is below the usual slowest + 100 ms. A swap here is one of record (forced): what it costs to
validate a version beforehand is in benchmarks/hot_swap.py. Prints one JSON document. `python -m benchmarks.swap_under_load [--swaps N]`.
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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = figures(*swapped(Path(folder), options.swaps))
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
