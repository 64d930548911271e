"""meshnode: parked electric cars as one computer.

Layout, in the order data flows: `protocol` decides and never does; `overlay`, `executor`,
`vehicle` and `ledger` do one thing each; `node` carries out what protocol decided; `client` and
`cli` are the faces. `worker` runs in a child process. docs/explanation/architecture.md has the
picture.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def connect(home: Path | str | None = None, *, join: tuple[str, ...] = ()) -> Any:
    """The mesh, by one's own node: `with meshnode.connect() as mesh: mesh.submit(fn, x)`.

    Gives a `meshnode.client.Mesh`. `home` as `mesh --home` has it; a submitter node is started in
    the background where none runs. Raises Unreachable, or UsageError for a home that `mesh init`
    has not made.
    """
    # By name: everything imports this module, and this one must not know what is above it.
    background = importlib.import_module("meshnode.client.background")
    homes = importlib.import_module("meshnode.node.home")
    chosen = homes.home_path() if home is None else Path(home).expanduser().absolute()
    mesh, _ = background.connect_or_start(chosen, join=join)
    return mesh
