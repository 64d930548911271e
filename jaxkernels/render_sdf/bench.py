"""`python -m jaxkernels.render_sdf.bench`: pixels per second of one process, in a busy tile."""

from __future__ import annotations

from ..timing import Figures, measure_sample, print_figures
from .api import INFO, TILE


def measure() -> Figures:
    figures = measure_sample(INFO, calls=50)
    return {**figures, "pixels_per_s": figures["units_per_s"] * TILE * TILE}


if __name__ == "__main__":
    print_figures(INFO, measure())
