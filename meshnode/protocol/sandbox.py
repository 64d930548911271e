"""The layers around a worker, as the bits that adverts carry and policies ask for.

Put in force by `meshnode.worker.confine`, told by the probe and by each worker, compared here with
what the owner's policy asks for. Bits are never reused; docs/explanation/sandbox.md says what each
holds.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final


class Layer(IntFlag):
    """One bit each; `sandbox_layers` and `sandbox_least` on the wire have 16."""

    NO_NEW_PRIVS = 1
    """Nothing that is executed gains privileges (prctl(2))."""
    NO_CAPABILITIES = 2
    """No capability in any set, root's child included (capabilities(7))."""
    SYSCALLS = 4
    """A seccomp allow-list over all threads (seccomp(2))."""
    FILES = 8
    """Landlock: read-only, and only what jax is made of (landlock(7), ABI 1)."""
    TCP = 16
    """Landlock: no TCP bind and connect (ABI 4)."""
    SCOPE = 32
    """Landlock: no abstract unix socket and no signal outside (ABI 6)."""
    RLIMITS = 64
    """No core, no growing file, few open files, bounded CPU time (setrlimit(2))."""
    MEMORY = 128
    """Private memory is bounded, by RLIMIT_DATA or by a memory cgroup."""
    NAMESPACES = 256
    """User, network and IPC namespaces of its own (namespaces(7)); threads are counted there."""
    OTHER_USER = 512
    """A root node's workers run as nobody."""
    CGROUP = 1024
    """A control group of its own: memory, and tasks where the controller is there."""
    NO_DEVICES = 2048
    """No device node and no ioctl: not so where an accelerator needs them."""


ALL: Final = Layer(sum(Layer))

# Without these a stranger's code could reach a file, a socket or a privilege of its owner; every
# kernel since 5.13 has them. The others make a second wall of what these hold already.
LEAST: Final = (
    Layer.NO_NEW_PRIVS | Layer.NO_CAPABILITIES | Layer.SYSCALLS | Layer.FILES | Layer.RLIMITS
)


def missing(least: int, layers: int) -> Layer:
    """What is asked for and not there; bits that this version does not know are never there."""
    return Layer(int(least) & ~int(layers))  # the complement of a Layer has known bits alone


def of_names(text: str) -> Layer:
    """`files,tcp`; ValueError names what is no layer."""
    layers = Layer(0)
    for name in filter(None, (part.strip().upper() for part in text.split(","))):
        if name not in Layer.__members__:
            known = ", ".join(layer.name.lower() for layer in Layer if layer.name)
            raise ValueError(f"{name.lower()} is no sandbox layer; there are {known}")
        layers |= Layer[name]
    return layers


def listed(layers: int) -> list[str]:
    """Names in the order of their bits; bits that this version does not know as one number."""
    known = [layer.name.lower() for layer in Layer if layer & layers and layer.name]
    unknown = layers & ~int(ALL)
    return [*known, f"bits {unknown:#x}"] if unknown else known


def names(layers: int) -> str:
    """`files, syscalls`: for a person."""
    return ", ".join(listed(layers)) or "none"
