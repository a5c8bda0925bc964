"""Requests that the cache answers: ours against Triton's local cache, in turns of one run; the cases that `serving_compare` has too, alone.

`python -m benchmarks.cache_hits [--rounds 7] [--seconds 2]` prints a Markdown table of requests a second (p99 in
milliseconds; microseconds of CPU a request) and the ratio of each round. Each server on the first core, wrk on the last.
"""

from __future__ import annotations

import sys
from itertools import product

from benchmarks import _servers as servers
from benchmarks._report import KINDS, SHOWN
from benchmarks._turns import Turn, rates_table, ratios

CASES = {
    f"cache hit, {SHOWN[kind]}, {servers.side_of(model)}x{servers.side_of(model)}, {connections}": (
        model,
        kind,
        connections,
    )
    for model, kind, connections in product(servers.CACHED, KINDS, (16, 64))
}


def shown(found: dict[str, dict[str, list[Turn]]]) -> str:
    lines = [rates_table(found, ("modelkeep", "Triton"))]
    for case, turns in found.items():
        ratio = ratios(turns["modelkeep"], turns["Triton"], "requests_per_second")
        lines.append(f"{case}: {ratio.median:.2f} of Triton's rate ({ratio.low:.2f} to {ratio.high:.2f})")
    return "\n\n".join(lines)


if __name__ == "__main__":
    sys.exit(
        servers.beside_triton_main(
            __doc__, lambda folder: servers.write_models(folder, servers.CACHED), CASES, shown, rounds=7, seconds=2.0
        )
    )
