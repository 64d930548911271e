"""`python -m tests.bench NAME [--quick]`: one bench; its last line is one JSON object."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHES = (
    "overhead",
    "minilm",
    "footprint",
    "validator",
    "warm",
    "kernels",
    "sandbox",
    "placement",
    "recall",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("name", choices=BENCHES)
    parser.add_argument("--quick", action="store_true", help="fewer units; figures are rougher")
    options = parser.parse_args()
    module = importlib.import_module(f"tests.bench.{options.name}")
    code: int = module.run(options.quick)
    return code


if __name__ == "__main__":
    sys.exit(main())
