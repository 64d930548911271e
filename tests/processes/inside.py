"""`python -m tests.processes.inside HOME`: what a worker's child can do, with and without confine.

Imports jax once as the zygote does, then forks a child for each act: the child confines itself as
a worker does (or not, or with a layer taken away, or broken), does the act and tells how it went.
One JSON object on stdout: {mode: {act: outcome}}, an outcome being "done", an errno's name, an
exception's name, or "killed by SIGNAL".
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from meshnode.protocol.sandbox import names
from meshnode.worker import confine, kernel, landlock, privileges, profile, seccomp, zygote

HUGE_BYTES = 16 << 30
THREADS = 600
MEMORY_MB = 512
OUTCOME_BYTES_MAX = 4096
MAP_PRIVATE_NORESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000

Act = Callable[[Path], object]


# ------------------------------------------------------------------------------------------- acts


def connect_control(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(home / "control.sock"))


def bind_tcp(_: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))


def connect_abstract(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"\0{home}")


def make_socket(_: Path) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()


def spawn(_: Path) -> None:
    # Not os.fork: its hooks may find a lock that another thread of XLA's held.
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)


def fork(_: Path) -> None:
    pid = kernel.call("clone", int(signal.SIGCHLD), 0, 0, 0, 0)
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def be_traced(_: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(0, 0, 0, 0):  # PTRACE_TRACEME
        raise OSError(ctypes.get_errno(), "ptrace")


def many_threads(_: Path) -> None:
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, daemon=True) for _ in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
    finally:
        over.set()


def write(path: Path) -> None:
    with open(path, "w") as file:
        file.write("x")


def memfd(_: Path) -> None:
    os.ftruncate(os.memfd_create("x"), 1)


def other_numbers(_: Path) -> None:
    ctypes.CDLL(None).syscall(ctypes.c_long(kernel.X32_SYSCALL_BIT | 39))


ACTS: dict[str, Act] = {
    "make a socket": make_socket,
    "make a socket pair": lambda _: socket.socketpair(),
    "bind a TCP port": bind_tcp,
    "reach the control socket": connect_control,
    "reach an abstract socket": connect_abstract,
    "execute a program": lambda _: os.execv("/bin/true", ["true"]),
    "spawn a program": spawn,
    "fork": fork,
    "be traced": be_traced,
    "signal its parent": lambda _: os.kill(os.getppid(), signal.SIGURG),
    "signal its parent by pidfd": lambda _: signal.pidfd_send_signal(
        os.pidfd_open(os.getppid()), signal.SIGURG
    ),
    "have signals sent by a file": lambda _: fcntl.fcntl(2, fcntl.F_SETOWN, os.getppid()),
    "read the node's key": lambda home: (home / "node.key").read_bytes(),
    "list the home": os.listdir,
    "read passwd": lambda _: Path("/etc/passwd").read_bytes(),
    "read its parent's environment": lambda _: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
    "write a new file": lambda home: write(home / "new"),
    "write over a file": lambda home: write(home / "old"),
    "change a file's mode": lambda home: os.chmod(home / "old", 0o640),
    "make a folder": lambda home: os.mkdir(home / f"folder-{os.getpid()}"),
    "make a link": lambda home: os.symlink("/", home / f"link-{os.getpid()}"),
    "rename a file": lambda home: os.rename(home / "old", home / "old"),
    "write to shared memory": lambda _: tempfile.TemporaryFile(dir="/dev/shm").close(),
    "make a memory file": memfd,
    "make a pipe": lambda _: os.pipe(),
    "make 16 GB of memory": lambda _: mmap.mmap(-1, HUGE_BYTES, MAP_PRIVATE_NORESERVE),
    "make 16 GB of shared memory": lambda _: mmap.mmap(-1, HUGE_BYTES),
    "start many threads": many_threads,
    "ask a device": lambda _: fcntl.ioctl(2, 0x5451),  # FIOCLEX, which any file answers
    "let itself be dumped": lambda _: kernel.prctl(4, 1),
    "set its own limits": lambda _: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
}


def compute(_: Path) -> None:
    """What jobs do, compiled and run with every layer in force; checked against numpy."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    x = np.random.default_rng(3).standard_normal((128, 128)).astype(np.float32)
    large = np.random.default_rng(4).standard_normal((1500, 1500)).astype(np.float32)

    def near(got: object, want: object) -> None:
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=2e-3, atol=2e-3)

    near(jax.jit(lambda a: jnp.linalg.svd(a)[1])(x), np.linalg.svd(x)[1])
    near(jax.jit(lambda a: jnp.linalg.eigvalsh(a @ a.T))(x), np.linalg.eigvalsh(x @ x.T))
    near(jax.jit(jnp.sort)(x), np.sort(x))
    near(jax.jit(lambda a: jnp.abs(jnp.fft.fft(a)))(x), np.abs(np.fft.fft(x)))
    near(jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))(large), large @ large)
    image, filters = x.reshape(1, 1, 128, 128), np.ones((1, 1, 3, 3), np.float32)
    convolved = jax.jit(lambda a, b: jax.lax.conv(a, b, (1, 1), "VALID"))(image, filters)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3))
    near(convolved[0, 0], windows.sum((2, 3)))
    draw = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (10_000,)))(7)
    assert abs(float(draw.mean())) < 0.1
    near(jax.lax.fori_loop(0, 10, lambda i, v: v + i, 0.0), 45.0)
    bits = jax.jit(lambda seed: jax.random.bits(jax.random.key(seed, impl="rbg"), (8,)))(7)
    assert len(set(np.asarray(bits).tolist())) == 8


def small_reads(_: Path) -> None:
    """What is meant to go on working beside that."""
    Path("/proc/self/status").read_text()
    Path("/proc/cpuinfo").read_bytes()
    os.urandom(8)
    threading.Thread(target=int).start()
    importlib.import_module("wsgiref.util")  # read from disk now: no worker has it loaded


# ------------------------------------------------------------------------------------------- modes


def whole() -> None:
    """As every worker is confined."""


def without_syscalls() -> None:
    seccomp.available = lambda: False


def without_files() -> None:
    landlock.abi = lambda: 0


def landlock_broken() -> None:
    landlock.restrict = lambda *_: None


def seccomp_broken() -> None:
    seccomp.install = lambda made: None


def privileges_kept() -> None:
    privileges.drop_capabilities = lambda: None
    privileges.become_nobody = lambda needed: False


FEW = (
    *("fork", "read the node's key", "list the home", "write a new file", "bind a TCP port"),
    *("reach an abstract socket", "signal its parent", "execute a program"),
)


def as_device() -> None:
    """As with an accelerator, /dev/zero being its node."""
    plain = profile.detect()
    nodes = ("/dev/null", "/dev/zero")
    made = profile.Profile("cuda", plain.system, plain.installed, nodes, "0.80")
    profile.detect = lambda: made  # type: ignore[assignment]


def open_device(_: Path) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    mmap.mmap(fd, mmap.PAGESIZE).close()
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.80"


MODES: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "whole": (whole, tuple(ACTS)),
    "without syscalls": (without_syscalls, FEW),
    "without files": (without_files, FEW),
    "landlock broken": (landlock_broken, ("fork",)),
    "seccomp broken": (seccomp_broken, ("fork",)),
    "privileges kept": (privileges_kept, ("fork",)),
    "device": (as_device, (*FEW, "ask a device", "write over a file")),
}


def confined(act: Act, mode: Callable[[], None] | None, home: Path) -> str:
    import jax

    if mode is not None:
        mode()
        terms = confine.Terms(MEMORY_MB, profile.detect())
        taken = confine.before_backend(terms)
        jax.devices()
        layers = confine.after_backend(terms, taken)
        if act is tell_layers:
            return names(layers)
    act(home)
    return "done"


def tell_layers(_: Path) -> None:
    """`confined` answers with the layers' names instead."""


def attempt(act: Act, mode: Callable[[], None] | None, home: Path) -> str:
    """In a child of its own."""
    parent = os.getpid()
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            confine.die_with(parent)
            confine.keep_only(writing)
            text = confined(act, mode, home)
        except OSError as error:
            text = errno.errorcode.get(error.errno or 0, "?")
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the outcome
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode())
        os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read(OUTCOME_BYTES_MAX).decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if told:
        return told
    # An act that replaced the process by a program that went well tells nothing.
    return "done" if code == 0 else f"killed by {signal.Signals(-code).name}"


def main() -> None:
    home = Path(sys.argv[1])
    (home / "node.key").write_bytes(b"secret")
    (home / "node.key").chmod(0o600)
    (home / "old").write_bytes(b"old")
    control, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    control.bind(str(home / "control.sock"))
    abstract.bind(f"\0{home}")
    control.listen()
    abstract.listen()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as the zygote's main does, before numpy is imported
    zygote.import_jax()
    found: dict[str, dict[str, str]] = {"bare": {}}
    for name, act in ACTS.items():
        found["bare"][name] = attempt(act, None, home)
    for mode, (prepare, acts) in MODES.items():
        found[mode] = {name: attempt(ACTS[name], prepare, home) for name in acts}
    found["whole"]["compute"] = attempt(compute, whole, home)
    found["whole"]["small reads"] = attempt(small_reads, whole, home)
    found["whole"]["layers"] = attempt(tell_layers, whole, home)
    found["device"]["open a device"] = attempt(open_device, as_device, home)
    found["device"]["layers"] = attempt(tell_layers, as_device, home)
    found["whole"]["open a device"] = attempt(open_device, whole, home)
    found["whole"]["other numbers"] = attempt(other_numbers, whole, home)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
