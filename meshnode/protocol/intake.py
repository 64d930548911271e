"""Parts become units: in order, whole, of the promised size, each taken once.

Between `messages.Part` and the job's table of units. A part outside its run, or whose sizes do not
fit the job's outputs, ends the attempt; a part ahead of its turn is left for the car to send again;
units that came already, from this or another attempt, are skipped.
"""

from __future__ import annotations

import hashlib

from .attempt import Attempt
from .job import Job
from .messages import Part
from .outbox import Outbox
from .reasons import Reason
from .types import array_bytes


class Intake:
    def __init__(self, outbox: Outbox) -> None:
        self._out = outbox

    def take(
        self, job: Job, attempt: Attempt, part: Part
    ) -> list[tuple[int, list[bytes]]] | Reason:
        """Runs of new units `(first, outputs)`, or why the part cannot stand."""
        size = sum(array_bytes(spec) for spec in job.spec.outs)
        if part.piece is not None:
            return self._take_piece(job, attempt, part, size)
        first, end = part.first, part.first + len(part.outputs)
        if first < attempt.first or end > attempt.end:
            return Reason.BAD_FRAME
        if first > attempt.next_unit:
            return []  # one before it found a full queue; the car goes back to that one
        if any(len(output) != size for output in part.outputs):
            return Reason.MISMATCH
        skip = attempt.next_unit - first  # said again after a reconnect
        attempt.next_unit = max(attempt.next_unit, end)
        return self._keep(job, attempt, first + skip, list(part.outputs[skip:]))

    def _take_piece(
        self, job: Job, attempt: Attempt, part: Part, size: int
    ) -> list[tuple[int, list[bytes]]] | Reason:
        assert part.piece is not None
        offset, whole = part.piece
        if whole != size or len(part.outputs) != 1 or not attempt.first <= part.first < attempt.end:
            return Reason.MISMATCH
        if part.first < attempt.next_unit:
            return []
        if offset == 0:
            attempt.piece.clear()
        if part.first != attempt.next_unit or offset != len(attempt.piece):
            return []
        if offset + len(part.outputs[0]) > whole:
            return Reason.MISMATCH
        attempt.piece += part.outputs[0]
        if len(attempt.piece) < whole:
            return []
        output = bytes(attempt.piece)
        attempt.piece.clear()
        attempt.next_unit += 1
        return self._keep(job, attempt, part.first, [output])

    def _keep(
        self, job: Job, attempt: Attempt, first: int, outputs: list[bytes]
    ) -> list[tuple[int, list[bytes]]]:
        runs: list[tuple[int, list[bytes]]] = []
        for index, output in enumerate(outputs):
            unit = first + index
            if not job.take(unit, hashlib.sha256(output).digest(), attempt.source):
                self._out.counters["units_twice"] += 1  # computed, that is: by two cars
                continue
            if runs and runs[-1][0] + len(runs[-1][1]) == unit:
                runs[-1][1].append(output)
            else:
                runs.append((unit, [output]))
        return runs
