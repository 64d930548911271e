"""`python -m jaxkernels.vec_knn.bench`: 8 queries against 4,096 vectors, one process."""

from __future__ import annotations

from ..timing import Figures, measure_sample, print_figures
from .api import INFO, ROWS


def measure() -> Figures:
    figures = measure_sample(INFO, calls=300)
    return {**figures, "rows_per_s": figures["units_per_s"] * ROWS}


if __name__ == "__main__":
    print_figures(INFO, measure())
