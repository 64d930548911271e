"""The one error tree. A class's docstring is what the user reads; `exit_code` is the exit status.

Flow: any layer raises, `meshnode.cli` prints the docstring (or the more exact text given at the
raise) as one line on stderr and exits with the code. Codes are the contract of the CLI: 0 ok,
1 task failed, 2 usage, 3 no suitable node, 4 timeout, 5 verification, 6 budget, 7 unreachable,
8 local resource, 130 detached. `LocalProtocolError` and `RemoteProtocolError` follow h11: who
did wrong decides who must act.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class MeshError(Exception):
    """Something went wrong in the mesh."""

    exit_code: ClassVar[int] = 1

    def __init__(self, text: str | None = None) -> None:
        super().__init__(text or (type(self).__doc__ or "").strip().splitlines()[0])


class LocalProtocolError(MeshError):
    """This node broke its own protocol; that is a bug, please report it."""


class RemoteProtocolError(MeshError):
    """A peer sent something that the protocol does not allow; it was refused."""


class TaskFailed(MeshError):
    """A task failed on every car that tried it."""

    exit_code = 1


class Refused(MeshError):
    """The request was refused."""

    exit_code = 1


class ArtifactRefused(Refused):
    """The artifact was refused; `mesh artifact check FILE` says why."""

    def __init__(self, reason: IntEnum, text: str) -> None:
        """`reason` is a code of meshnode.protocol.reasons; `text` says what is wrong where."""
        super().__init__(text)
        self.reason = reason


class UsageError(MeshError):
    """The command was not understood; see --help."""

    exit_code = 2


class NoSuitableNode(MeshError):
    """No car in reach can or may run this; `mesh peers` shows who is there."""

    exit_code = 3


class TimedOut(MeshError):
    """The deadline passed before the work was done."""

    exit_code = 4


class VerificationFailed(MeshError):
    """A signature, digest or chain does not hold; do not trust this object."""

    exit_code = 5


class BudgetExceeded(MeshError):
    """The budget or the credit does not cover this."""

    exit_code = 6


class Unreachable(MeshError):
    """The peer or the bootstrap address does not answer."""

    exit_code = 7


class LocalResource(MeshError):
    """Something on this machine is in the way: a port, a disk, a locked home."""

    exit_code = 8


class Detached(MeshError):
    """Left the job running."""

    exit_code = 130
