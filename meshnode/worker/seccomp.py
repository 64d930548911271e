"""The system calls a worker may make, as a classic BPF program over `struct seccomp_data`.

A layer of `confine`, put in force last, over all threads (TSYNC). What is not listed gets EPERM;
a call by another architecture's numbers (32-bit, x32) kills the process, since no list here means
anything for it. Measured with jax 0.10 on XLA's CPU backend: compiling and running needs what is
listed and nothing more. XLA's JIT maps its code writable and executable at once, so W^X cannot be
asked for. Instruction encodings: linux/bpf_common.h; actions: linux/seccomp.h.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from . import kernel

ALLOW: Final = 0x7FFF0000
ERRNO: Final = 0x00050000
KILL_PROCESS: Final = 0x80000000
DENY: Final = ERRNO | errno.EPERM
ABSENT: Final = ERRNO | errno.ENOSYS

LD_ABS: Final = 0x20  # load a word of seccomp_data
JEQ: Final = 0x15
JGE: Final = 0x35
JSET: Final = 0x45
AND: Final = 0x54
RET: Final = 0x06
_NR_AT: Final = 0
_ARCH_AT: Final = 4
_ARGS_AT: Final = 16
INSTRUCTION: Final = struct.Struct("=HBBI")
_PROGRAM: Final = struct.Struct("HxxxxxxQ")  # sock_fprog: length, pointer

_SET_MODE_FILTER: Final = 1
_TSYNC: Final = 1

_CLONE_THREAD: Final = 0x10000
# What glibc and musl pass to start a thread; no bit of a new process or namespace is among them.
_CLONE_FLAGS: Final = 0x7D0F00
_MAP_TYPE: Final = 0x0F
_MAP_PRIVATE: Final = 0x02
_MAP_ANONYMOUS: Final = 0x20
_MAP_GROWSDOWN: Final = 0x100
_MAP_HUGETLB: Final = 0x40000
_OPEN_WRITES: Final = 0o1 | 0o2 | 0o100 | 0o1000  # WRONLY, RDWR, CREAT, TRUNC: equal on both
_TCGETS: Final = 0x5401  # Python asks of each file whether it is a terminal
_FCNTL: Final = (0, 1, 2, 3, 1030)  # DUPFD, GETFD, SETFD, GETFL, DUPFD_CLOEXEC: none names a pid
_PRCTL: Final = (15, 16, 0x53564D41)  # SET_NAME, GET_NAME, SET_VMA: of the calling thread


class Instruction(NamedTuple):
    code: int
    if_true: int
    if_false: int
    operand: int


@dataclass(frozen=True, slots=True)
class OneOf:
    """A 32-bit argument: the kernel reads no more of it than its low word."""

    argument: int
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Zero:
    """A whole 64-bit argument."""

    argument: int


@dataclass(frozen=True, slots=True)
class Masked:
    """(argument & mask) == value, low word."""

    argument: int
    mask: int
    value: int


Condition = OneOf | Zero | Masked
# Any alternative whose conditions all hold lets the call through; () always holds.
Rule = tuple[tuple[Condition, ...], ...]
_ALWAYS: Final[Rule] = ((),)

_MEMORY: Final = ("brk", "get_mempolicy", "madvise", "mincore", "mprotect", "mremap", "munmap")
_READING: Final = ("close", "getdents64", "lseek", "pread64", "read", "readv")
_LOOKING: Final = (
    *("access", "faccessat", "faccessat2", "fstat", "getcwd", "lstat", "newfstatat"),
    *("readlink", "readlinkat", "stat", "statx"),
)
_SPEAKING: Final = (  # over the one socket; none can be made
    *("poll", "ppoll", "pselect6", "recvfrom", "recvmsg", "select", "sendmsg", "sendto"),
    *("write", "writev"),
)
_THREADS: Final = (
    *("exit", "exit_group", "futex", "membarrier", "rseq", "sched_getaffinity", "sched_getparam"),
    *("sched_getscheduler", "sched_yield", "set_robust_list", "set_tid_address"),
)
_SIGNALS: Final = (
    *("restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
)
_CLOCKS: Final = (
    *("clock_getres", "clock_gettime", "clock_nanosleep", "gettimeofday", "nanosleep", "times"),
)
_ASKING: Final = (
    *("getcpu", "getegid", "geteuid", "getgid", "getpid", "getppid", "getrandom", "getrusage"),
    *("gettid", "getuid", "sysinfo", "uname"),
)
_PLAIN: Final = (
    *(*_MEMORY, *_READING, *_LOOKING, *_SPEAKING, *_THREADS, *_SIGNALS, *_CLOCKS, *_ASKING),
)
# What a driver's library calls between launches: the device's own calls are ioctls on its nodes.
_DEVICE: Final = (
    *("epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_wait", "eventfd2", "memfd_create"),
    *("mlock", "pipe2"),
)


def rules(pid: int, *, devices: bool = False) -> dict[str, Rule]:
    """By name of the call. `devices`: ioctl, files opened for writing (Landlock says which),
    shared memory and what else an accelerator's driver needs."""
    plain: dict[str, Rule] = dict.fromkeys(_PLAIN, _ALWAYS)
    if devices:
        plain |= dict.fromkeys((*_DEVICE, "ioctl", "mmap", "openat"), _ALWAYS)
    else:
        # RLIMIT_DATA counts private writable memory: what it does not count is not to be had.
        plain["mmap"] = (
            (Masked(3, _MAP_GROWSDOWN | _MAP_HUGETLB | _MAP_ANONYMOUS, 0),),
            (
                Masked(3, _MAP_GROWSDOWN | _MAP_HUGETLB, 0),
                Masked(3, _MAP_TYPE, _MAP_PRIVATE),
            ),
        )
        plain["openat"] = ((Masked(2, _OPEN_WRITES, 0),),)
        plain["ioctl"] = ((OneOf(1, (_TCGETS,)),),)
    return plain | {
        # glibc takes ENOSYS of clone3 for an older kernel and calls clone, whose flags show.
        "clone": ((Masked(0, 0xFFFFFFFF & ~_CLONE_FLAGS, 0), Masked(0, _CLONE_THREAD, 0x10000)),),
        "fcntl": ((OneOf(1, _FCNTL),),),
        "prctl": ((OneOf(0, _PRCTL),),),
        "prlimit64": ((OneOf(0, (0,)), Zero(2)),),  # read one's own, set nothing
        "tgkill": ((OneOf(0, (pid,)),),),  # abort(3)
    }


def program(allowed: dict[str, Rule], machine: str) -> list[Instruction]:
    """The filter for `machine`: architecture, then one block a call, then EPERM."""
    made = [
        Instruction(LD_ABS, 0, 0, _ARCH_AT),
        Instruction(JEQ, 1, 0, kernel.AUDIT_ARCH[machine]),
        Instruction(RET, 0, 0, KILL_PROCESS),
        Instruction(LD_ABS, 0, 0, _NR_AT),
    ]
    if machine == "x86_64":
        made += [
            Instruction(JGE, 0, 1, kernel.X32_SYSCALL_BIT),
            Instruction(RET, 0, 0, KILL_PROCESS),
        ]
    clone3 = kernel.number("clone3", machine)
    assert clone3 is not None
    made += [Instruction(JEQ, 0, 1, clone3), Instruction(RET, 0, 0, ABSENT)]
    for name, rule in sorted(allowed.items(), key=lambda item: item[1] != _ALWAYS):
        which = kernel.number(name, machine)
        if which is not None:
            block = _block(rule)
            made += [Instruction(JEQ, 0, len(block), which), *block]
    made.append(Instruction(RET, 0, 0, DENY))
    return made


def _block(rule: Rule) -> list[Instruction]:
    if rule == _ALWAYS:
        return [Instruction(RET, 0, 0, ALLOW)]
    block: list[Instruction] = []
    for alternative in rule:
        # Built from the end: a failed test jumps behind the alternative's own ALLOW.
        tests = [Instruction(RET, 0, 0, ALLOW)]
        for condition in reversed(alternative):
            tests = _test(condition, len(tests)) + tests
        block += tests
    return [*block, Instruction(RET, 0, 0, DENY)]


def _test(condition: Condition, rest: int) -> list[Instruction]:
    """Falls through to the next `rest` instructions if it holds, and jumps over them if not."""
    low = _ARGS_AT + 8 * condition.argument  # both machines are little-endian
    match condition:
        case OneOf(_, values):
            last = len(values) - 1
            return [Instruction(LD_ABS, 0, 0, low)] + [
                Instruction(JEQ, last - at, rest if at == last else 0, value)
                for at, value in enumerate(values)
            ]
        case Zero():
            return [
                Instruction(LD_ABS, 0, 0, low),
                Instruction(JEQ, 0, rest + 2, 0),
                Instruction(LD_ABS, 0, 0, low + 4),
                Instruction(JEQ, 0, rest, 0),
            ]
        case Masked(_, mask, value):
            return [
                Instruction(LD_ABS, 0, 0, low),
                Instruction(AND, 0, 0, mask),
                Instruction(JEQ, 0, rest, value),
            ]


def install(made: Sequence[Instruction]) -> None:
    """Over all threads of this process, for good. Needs no_new_privs; OSError if it fails."""
    code = ctypes.create_string_buffer(b"".join(INSTRUCTION.pack(*one) for one in made))
    descriptor = _PROGRAM.pack(len(made), ctypes.addressof(code))
    thread = kernel.call("seccomp", _SET_MODE_FILTER, _TSYNC, descriptor)
    if thread:
        raise OSError(errno.ESRCH, f"seccomp: thread {thread} could not be brought along")


def available() -> bool:
    """Whether this kernel filters system calls at all."""
    if not kernel.known_machine():
        return False
    try:
        # GET_ACTION_AVAIL: asks and changes nothing.
        kernel.call("seccomp", 2, 0, struct.pack("=I", KILL_PROCESS))
    except OSError as error:
        return error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
    return True
