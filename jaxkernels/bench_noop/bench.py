"""`python -m jaxkernels.bench_noop.bench`: dispatch cost of the smallest unit, one process."""

from __future__ import annotations

from ..timing import Figures, measure_sample, print_figures
from .api import INFO


def measure() -> Figures:
    return measure_sample(INFO, calls=20_000)


if __name__ == "__main__":
    print_figures(INFO, measure())
