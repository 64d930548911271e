"""Whether two models of one fleet say the same: the one comparison for every pair of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from testnet.sim.result import Result

TOLERANCE: Final[Mapping[float, float]] = {0.5: 0.10, 0.99: 0.15}
"""Of which quantile of the times from submit to start, how far apart the two may be, relatively.
For loads up to 80 %; above, the tails of one model under two seeds differ by a factor of two."""


def quantile_us(results: Sequence[Result], share: float) -> float:
    """The median over runs of several seeds: one seed's tail is one metro's luck."""
    return float(np.median([result.quantile_us(share) for result in results]))


def disagreements(
    model: Sequence[Result],
    reference: Sequence[Result],
    tolerance: Mapping[float, float] = TOLERANCE,
) -> list[str]:
    """One line for each quantile at which the model is too far from the reference."""
    told = []
    for share, most in tolerance.items():
        ours, theirs = (quantile_us(results, share) for results in (model, reference))
        apart = abs(ours / theirs - 1.0)
        if apart > most:
            told.append(
                f"p{share * 100:g}: {ours / 1_000:.1f} ms, the reference {theirs / 1_000:.1f} ms: "
                f"{apart:.0%} apart, at most {most:.0%} allowed"
            )
    return told
