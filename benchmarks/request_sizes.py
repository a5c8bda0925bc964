"""What a request costs as it grows: images of 8x8 to 224x224 numbers for a model that hardly computes, ours against Triton with its batcher.

`python -m benchmarks.request_sizes [--rounds 5] [--seconds 1]` prints a Markdown table. Each server has the first core, wrk the last, with 16
connections; ratios are those of two turns of one round.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from benchmarks import _servers as servers
from benchmarks._report import KINDS, SHOWN
from benchmarks._turns import Turn, ratios, spread, table

SIDES = (8, 28, 64, 128, 224)
CONNECTIONS = 16
CASES = {
    f"{SHOWN[kind]}, {side}x{side} ({len(servers.v2_target('', '', kind, side=side).body) / 1000:,.1f} kB)": (
        f"flat-{side}",
        kind,
        CONNECTIONS,
    )
    for kind, side in product(KINDS, SIDES)
}


def models(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    return {f"flat-{side}": servers.conv_model(folder / f"flat-{side}.onnx", (), side) for side in SIDES}


def shown(found: dict[str, dict[str, list[Turn]]]) -> str:
    rows = []
    for case, turns in found.items():
        row = [case]
        for name in ("modelkeep", "Triton"):
            rate = spread([turn.requests_per_second for turn in turns[name]]).median
            p99 = spread([1e3 * turn.p99_seconds for turn in turns[name]]).median
            row.append(f"{rate:,.0f} ({p99:.1f})")
        ratio = ratios(turns["modelkeep"], turns["Triton"], "requests_per_second")
        rows.append((*row, f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"))
    return table(("16 connections", "modelkeep", "Triton, batcher", "rate, ours of Triton's"), rows)


if __name__ == "__main__":
    sys.exit(servers.beside_triton_main(__doc__, models, CASES, shown, rounds=5, seconds=1.0))
