"""How long to wait for an answer that usually comes: TCP's retransmission time-out (RFC 6298).

Smoothed time of the answers and four times their mean deviation. A loaded machine answers late, and
asking elsewhere then only adds load: on two cores with sixteen nodes a tenth of all placements was
given up after a fixed 150 ms, and came.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PATIENCE_MS_MAX: Final = 2_000  # for the answer to a placement, unless four round trips take longer


@dataclass(slots=True)
class Patience:
    smoothed_ms: float = 0.0
    deviation_ms: float = 0.0
    heard: bool = False

    def answered(self, took_ms: int) -> None:
        if self.heard:
            off_ms = abs(self.smoothed_ms - took_ms)
            self.deviation_ms += (off_ms - self.deviation_ms) / 4
            self.smoothed_ms += (took_ms - self.smoothed_ms) / 8
        else:
            self.smoothed_ms, self.deviation_ms, self.heard = took_ms, took_ms / 2, True

    def wait_ms(self, least_ms: int, lost: int) -> int:
        """After so many answers in a row that did not come, twice as long for each."""
        usual_ms = max(least_ms, int(self.smoothed_ms + 4 * self.deviation_ms))
        return max(least_ms, min(PATIENCE_MS_MAX, usual_ms << min(lost, 4)))
