"""`python -m jaxkernels.embed_minilm.bench`: sentences per second of one process.

Time does not depend on the weights' values, so the sample's random ones do.
"""

from __future__ import annotations

from ..timing import Figures, measure_sample, print_figures
from .api import BATCH, INFO


def measure() -> Figures:
    figures = measure_sample(INFO, calls=20)
    return {**figures, "sentences_per_s": figures["units_per_s"] * BATCH}


if __name__ == "__main__":
    print_figures(INFO, measure())
