"""What a forked child does to itself before it runs anything: the sandbox, in its order.

    die_with, keep_only -> before_backend -> jax starts its threads -> after_backend -> READY

Called by `main` and `probe` right after a fork. Credentials and Landlock are each thread's own, so
they come before the backend starts threads; limits and seccomp come after, since starting needs
more than running. Every layer that the kernel has is then looked for, and a worker in which one is
not in force serves nothing: `LayerMissing`. docs/explanation/sandbox.md says what each layer holds
and what is not held.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import resource
import signal
import socket
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from meshnode.protocol.sandbox import Layer, names

from . import kernel, landlock, privileges, seccomp
from .cgroup import Group
from .profile import Profile

_PR_SET_PDEATHSIG: Final = 1

COMPILE_MB: Final = 1_024  # on top of a program's own memory: XLA and LLVM while they compile
OPEN_FILES_MAX: Final = 256  # blobs of a run, its socket, what Python opens to import
LOG_BYTES_MAX: Final = 16 << 20
CPU_DAYS_MAX: Final = 7  # a backstop: the node's wall clock ends runs
THREADS_SPARE: Final = 64  # XLA and LLVM start some at the first compile


class LayerMissing(Exception):
    """A layer that this kernel has is not in force."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(f"the sandbox layer {names(layer)} is not in force")


@dataclass(frozen=True, slots=True)
class Terms:
    """What the node asks of one child."""

    memory_mb: int
    """Of its program: arguments, results and temporaries."""
    profile: Profile
    group: Group | None = None

    @property
    def limit_bytes(self) -> int:
        return (self.memory_mb + COMPILE_MB) << 20


def die_with(parent_pid: int) -> None:
    """SIGKILL for this process when its parent ends, however it ends (prctl(2))."""
    kernel.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:  # it ended between fork and prctl
        os._exit(1)


def keep_only(*fds: int) -> None:
    """Close every other open file: a child must hold neither its siblings' nor the node's."""
    keep = {0, 1, 2, *fds}
    for name in os.listdir("/proc/self/fd"):
        fd = int(name)
        if fd not in keep:
            with contextlib.suppress(OSError):  # the listing's own is closed already
                os.close(fd)


def kernel_has(profile: Profile) -> Layer:
    """The layers that a worker of this profile must have on this kernel."""
    version = landlock.abi()
    there = Layer.NO_NEW_PRIVS | Layer.NO_CAPABILITIES | Layer.RLIMITS
    for layer, available in (
        (Layer.SYSCALLS, seccomp.available()),
        (Layer.FILES, version > 0),
        (Layer.TCP, landlock.has_net(version)),
        (Layer.SCOPE, landlock.has_scope(version)),
        (Layer.MEMORY | Layer.NO_DEVICES, not profile.devices),
    ):
        if available:
            there |= layer
    return there


def before_backend(terms: Terms) -> Layer:
    """Before any thread: who this process is and what it can name. The layers taken."""
    if threading.active_count() != 1:
        raise RuntimeError("threads run already: they would be outside")
    profile, parent = terms.profile, os.getppid()
    there, layers = kernel_has(profile), Layer(0)
    if terms.group is not None:
        terms.group.join()
        if not terms.group.holds_me():
            raise LayerMissing(Layer.CGROUP)
        layers |= Layer.CGROUP | Layer.MEMORY
    # A device's nodes are for a group of users that nobody is not in.
    if not profile.devices and privileges.become_nobody(profile.installed):
        layers |= Layer.OTHER_USER
    if privileges.enter_namespaces():
        layers |= Layer.NAMESPACES
    privileges.take_no_new_privs()
    privileges.drop_capabilities()
    privileges.refuse_tracers()
    die_with(parent)  # a change of credentials has cleared it
    if there & Layer.FILES:
        landlock.restrict(landlock.abi(), profile.readable, profile.devices or ("/dev/null",))
    layers |= _proved(there & (Layer.FILES | Layer.TCP | Layer.SCOPE))
    if profile.memory_fraction:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = profile.memory_fraction
    return layers


def after_backend(terms: Terms, layers: Layer) -> Layer:
    """With all threads started: limits, then system calls. The layers in force, each looked for;
    LayerMissing without one that this kernel has."""
    profile = terms.profile
    there = kernel_has(profile) & ~(Layer.TCP | Layer.SCOPE)  # proved while sockets were to be had
    _limit_counts()
    if not profile.devices:
        # Not RLIMIT_AS: XLA reserves address space by the gigabyte and uses little of it.
        in_use = int(privileges.status()["VmData"].split()[0]) << 10
        _limit(resource.RLIMIT_DATA, in_use + terms.limit_bytes)
    if layers & Layer.NAMESPACES:
        _limit_threads()
    if there & Layer.SYSCALLS:
        allowed = seccomp.rules(os.getpid(), devices=bool(profile.devices))
        seccomp.install(seccomp.program(allowed, platform.machine()))
    return layers | _proved(there | layers & Layer.OTHER_USER)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _limit_counts() -> None:
    # A log is the one regular file that a worker may hold open for writing.
    logs = stat.S_ISREG(os.fstat(2).st_mode)
    _limit(resource.RLIMIT_FSIZE, LOG_BYTES_MAX if logs else 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES_MAX)
    _limit(resource.RLIMIT_MSGQUEUE, 0)
    _limit(resource.RLIMIT_MEMLOCK, 0)
    cores = len(os.sched_getaffinity(0))
    _limit(resource.RLIMIT_CPU, CPU_DAYS_MAX * 86_400 * cores)


def _limit_threads() -> None:
    """Twice what there is and some. Before Linux 5.14 the count is of the user's processes
    everywhere and the limit may be passed already: then it is left away."""
    threads = int(privileges.status()["Threads"])
    limit = 2 * threads + THREADS_SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if hard != resource.RLIM_INFINITY and hard < limit:
        return
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, hard))
    try:
        trial = threading.Thread(target=int)
        trial.start()
        trial.join()
    except RuntimeError:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
    else:
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


# ------------------------------------------------------------------------------------------ proofs


def _proved(wanted: Layer) -> Layer:
    """`wanted`, if each of its layers is found in force: read back from the kernel, or tried."""
    for layer, proof in _PROOFS.items():
        if layer & wanted and not proof():
            raise LayerMissing(layer)
    return wanted


def _without_capabilities() -> bool:
    status = privileges.status()
    return not any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"))


def _refused(act: Callable[[], object], *numbers: int) -> bool:
    try:
        act()
    except OSError as error:
        return error.errno in numbers
    return False


def _bind() -> None:
    with socket.socket(socket.AF_INET) as sock:
        sock.bind(("0.0.0.0", 0))


_PROOFS: Final[dict[Layer, Callable[[], bool]]] = {
    Layer.NO_NEW_PRIVS: lambda: privileges.status()["NoNewPrivs"] == "1",
    Layer.NO_CAPABILITIES: _without_capabilities,
    Layer.OTHER_USER: lambda: os.getuid() == privileges.NOBODY,
    Layer.FILES: lambda: _refused(lambda: os.listdir("/"), errno.EACCES),
    Layer.TCP: lambda: _refused(_bind, errno.EACCES),
    Layer.SCOPE: lambda: _refused(lambda: os.kill(os.getppid(), 0), errno.EPERM),
    Layer.RLIMITS: lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[1] <= OPEN_FILES_MAX,
    Layer.MEMORY: lambda: resource.getrlimit(resource.RLIMIT_DATA)[1] != resource.RLIM_INFINITY,
    Layer.SYSCALLS: lambda: _refused(socket.socket, errno.EPERM),
}
