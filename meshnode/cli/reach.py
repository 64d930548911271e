"""How a command reaches the node of its home, and starts one where none runs.

A car's node is the owner's to start (`meshnode run`); a submitter's is started in the background
and ends by itself when it has been idle. Its unfinished jobs go on then, and the command says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from meshnode.errors import Unreachable, UsageError

from . import frame

if TYPE_CHECKING:
    from meshnode.client import Mesh


@contextmanager
def connected(home: Path, join: tuple[str, ...] = ()) -> Iterator[Mesh]:
    """A connection to the node of `home`; jobs go on when it closes."""
    from meshnode.client import connect

    try:
        mesh = connect(home)
    except Unreachable:
        mesh = _start(home, join)
    else:
        if join:
            mesh.close()
            raise UsageError(f"the node of {home} runs already; --join is for its start")
    with mesh:
        yield mesh


def _start(home: Path, join: tuple[str, ...]) -> Mesh:
    from meshnode.client import background
    from meshnode.node.firstrun import standing

    stands = standing(home)
    if stands.car:
        raise Unreachable(f"no node runs on {home}; start it: meshnode run --home {home}")
    mesh, started = background.connect_or_start(home, join=join)
    if started:
        left = sum(job["state"] == "running" for job in mesh.jobs())
        goes_on = f"; {left} unfinished jobs go on" if left else ""
        frame.talk(f"started a node of {stands.network.genesis.name} in the background{goes_on}")
    return mesh
