"""The submitter's Python API over the control socket of one's own node.

`connect(home)` gives a blocking `Mesh`; `meshnode.client.aio.connect` the trio-native twin;
`connect_or_start` of `meshnode.client.background` and of `aio` start a submitter node where none
runs. Importing this package loads numpy and neither trio, libp2p nor jax.
"""

from __future__ import annotations

from meshnode.node.failures import error_of_reason

from .blocking import Mesh, connect
from .job import Job, Notice, as_completed
from .orders import Note, Terms
from .programs import Foreign

__all__ = [
    "Foreign",
    "Job",
    "Mesh",
    "Note",
    "Notice",
    "Terms",
    "as_completed",
    "connect",
    "error_of_reason",
]
