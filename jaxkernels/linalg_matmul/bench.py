"""`python -m jaxkernels.linalg_matmul.bench`: one block product, one process."""

from __future__ import annotations

from ..timing import Figures, measure_sample, print_figures
from .api import INFO


def measure() -> Figures:
    return measure_sample(INFO, calls=20)


if __name__ == "__main__":
    print_figures(INFO, measure())
