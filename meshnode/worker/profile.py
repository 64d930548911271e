"""What a worker may see of the machine, by the accelerator that jax will find here.

Computed once in `zygote`, before it forks, and put in force by `confine`. The CUDA profile follows
NVIDIA's documentation of its device nodes; it has been tested without a GPU only.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import site
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import meshnode

# Whose folders are read at run time: lazily imported modules, shared objects, CPU libraries.
_PACKAGES: Final = ("jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "cbor2")
_SYSTEM: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc/ld.so.cache",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/sys/devices/system/cpu",
    "/sys/devices/system/node",
    "/dev/urandom",
)
_CUDA_PLUGINS: Final = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_CUDA_NODES: Final = ("/dev/nvidia*", "/dev/nvidia-caps/*")
_CUDA_READABLE: Final = (
    "/proc/driver/nvidia",
    "/proc/devices",
    "/sys/bus/pci",
    "/sys/devices",
    "/sys/module/nvidia",
)


@dataclass(frozen=True, slots=True)
class Profile:
    """`devices` empty: no ioctl, nothing opened for writing, and a limit on private memory."""

    name: str
    system: tuple[str, ...]
    installed: tuple[str, ...]
    devices: tuple[str, ...] = ()
    memory_fraction: str = ""
    """XLA_PYTHON_CLIENT_MEM_FRACTION: the most of a device that one worker takes."""

    @property
    def readable(self) -> tuple[str, ...]:
        return (*self.system, *self.installed)


def installation() -> tuple[str, ...]:
    """Folders of Python, jax and this package's own code; never a source tree around it."""
    paths = sysconfig.get_paths()
    folders = {paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.add(sysconfig.get_config_var("LIBDIR") or "")
    folders.update(meshnode.__path__)
    if site.ENABLE_USER_SITE and site.USER_SITE:
        folders.add(site.USER_SITE)
    for package in _PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            # With its neighbours: shared objects lie in `numpy.libs` beside `numpy`.
            folders.update(
                str(Path(place).parent)
                for place in found.submodule_search_locations
                if Path(place).parent.name in ("site-packages", "dist-packages")
            )
            folders.update(found.submodule_search_locations)
    return tuple(sorted(os.path.realpath(folder) for folder in folders if folder))


def without_devices() -> Profile:
    return Profile("cpu", _SYSTEM, installation())


@cache
def detect() -> Profile:
    """The profile of this machine; `JAX_PLATFORMS=cpu` says that no accelerator is meant."""
    plain = without_devices()
    if os.environ.get("JAX_PLATFORMS", "") != "cpu" and any(map(_installed, _CUDA_PLUGINS)):
        nodes = existing(_CUDA_NODES)
        if nodes:
            # Without preallocation XLA grows to what is asked; the rest is the driver's own.
            system = (*_SYSTEM, *_CUDA_READABLE)
            return Profile("cuda", system, plain.installed, ("/dev/null", *nodes), "0.80")
    return plain


def existing(patterns: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(path for pattern in patterns for path in glob.glob(pattern)))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is not there either
        return False
