"""`mesh run` of a long job: what it shows as it goes on, on stdout; which car has it, on stderr.

The watched arrays come with each slice; the kernel's host side turns them into text. Each arrival
replaces the one before, so nothing is printed twice, whichever car goes on with the unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import frame
from .watching import Leases, reason_text

if TYPE_CHECKING:
    from jaxkernels.host import Context
    from jaxkernels.spec import KernelInfo
    from meshnode.client import Mesh

Watched = list[Any]


class Streamed:
    """The text of one unit so far."""

    def __init__(self, kernel: KernelInfo, context: Context) -> None:
        self.kernel = kernel
        self.text = ""
        self._context = context
        self._last: Watched | None = None

    def take(self, values: bytes) -> str:
        """What the watched arrays add to the text."""
        from jaxkernels import host

        watched = watched_arrays(self.kernel, values)
        added = host.stream(self.kernel.spec, self._last, watched, self._context)
        self._last = watched
        self.text += added
        return added


def watched_arrays(kernel: KernelInfo, values: bytes) -> Watched:
    import numpy as np

    assert kernel.stepped is not None
    arrays, at = [], 0
    for index in kernel.stepped.watch:
        spec = kernel.state[index]
        flat = np.frombuffer(values, np.dtype(spec.dtype).newbyteorder("<"), offset=at, count=-1)
        size = spec.unit_bytes // flat.itemsize
        arrays.append(flat[:size].reshape(spec.shape))
        at += spec.unit_bytes
    return arrays


def stream(mesh: Mesh, job_id: bytes, shown: Streamed | None) -> None:
    """Until the job has ended; `shown` None for several units, whose texts would mix."""
    tell = _Tell()
    for notice in mesh.watch(job_id):
        fields = notice.fields
        if notice.kind == "watch":
            if shown is not None and fields["unit"] == 0:
                added = shown.take(fields["values"])
                if added:
                    click.echo(added, nl=False)
                    tell.line_open = True
        elif notice.kind == "attempt":
            tell.attempt(fields)


class _Tell:
    """Which car has the job, and from which step it goes on."""

    def __init__(self) -> None:
        self.line_open = False
        self._leases = Leases()

    def attempt(self, fields: dict[str, Any]) -> None:
        car = frame.ident(fields["peer"])[-8:] if fields.get("peer") else "?"
        if self._leases.lost(fields):
            self._say(f"{car}: lost, {reason_text(fields.get('reason'))}")
        elif fields.get("state") == "leased" and fields.get("step"):
            self._say(f"{car}: goes on from step {fields['step']}")

    def _say(self, text: str) -> None:
        if self.line_open:
            frame.talk("")  # not into the line that is being written
        frame.talk(text)
