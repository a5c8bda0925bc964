"""Runs the benchmarks one after another, each in its own process; they print figures and assert nothing.

A benchmark is a module of benchmarks/ that runs as a program; its name begins with `gpu_` if it needs a device.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from devices import device_names

ROOT = Path(__file__).resolve().parent.parent


def find_benchmarks(*, gpu: bool) -> list[str]:
    """Names of the benchmarks of one kind; a leading underscore marks a helper."""
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))
    return [name for name in names if name.startswith("gpu_") == gpu]


def main() -> int:
    """Exit 0 when every benchmark ran to its end, 1 otherwise; --gpu without a device is a loud skip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="those that need an NVIDIA device, instead of the others")
    parser.add_argument("names", nargs="*", help="only these")
    arguments = parser.parse_args()
    known = find_benchmarks(gpu=arguments.gpu)
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(known) or 'none'}")
    if arguments.gpu and not device_names():
        print("SKIPPED all GPU benchmarks: this machine has no NVIDIA device that its driver answers for")
        return 0
    if not known:
        print("SKIPPED: there are no benchmarks of this kind yet")
        return 0
    failed = []
    for name in arguments.names or known:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
