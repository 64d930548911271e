"""What can go wrong on this side of the mesh; each class's docstring is what the user reads.

jaxkernels does not import meshnode, so `meshnode` maps these to its own tree where it calls in.
`exit_code` follows the same table (2 usage, 5 verification, 7 unreachable, 8 local resource).
"""

from __future__ import annotations

from typing import ClassVar


class KernelError(Exception):
    """Something is wrong with a kernel or its input."""

    exit_code: ClassVar[int] = 1

    def __init__(self, text: str | None = None) -> None:
        super().__init__(text or (type(self).__doc__ or "").strip().splitlines()[0])


class UnknownKernel(KernelError):
    """There is no kernel of that name; `mesh kernels` lists them."""

    exit_code = 2


class BadInput(KernelError):
    """The input does not fit the kernel."""

    exit_code = 2


class ArtifactDamaged(KernelError):
    """A kernel's bytes are not those of the release; install the package again."""

    exit_code = 5


class UnknownModel(KernelError):
    """There is no model of that name; `mesh models` lists them."""

    exit_code = 2


class ModelMissing(KernelError):
    """The model is not on this machine; get it with `mesh models get NAME`."""

    exit_code = 8


class ModelUnreachable(KernelError):
    """The model's package could not be downloaded; check the network and try again."""

    exit_code = 7


class ModelRefused(KernelError):
    """The model's bytes are not those that models.lock names; they were not installed."""

    exit_code = 5


class ModelStorage(KernelError):
    """The model could not be written; make room on the disk or choose another folder."""

    exit_code = 8
