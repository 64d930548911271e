"""The system call filter, run by a small interpreter of classic BPF: each machine, each rule."""

from __future__ import annotations

import struct

import pytest

from meshnode.worker import kernel, seccomp
from meshnode.worker.seccomp import ABSENT, ALLOW, DENY, KILL_PROCESS, Instruction

PID = 4242
X86, ARM = kernel.MACHINES


def decide(
    program: list[Instruction], machine: str, which: int, *arguments: int, arch: int | None = None
) -> int:
    """What the kernel would do: bpf(4)'s instructions as far as a filter uses them."""
    words = [*arguments, *[0] * (6 - len(arguments))]
    arch = kernel.AUDIT_ARCH[machine] if arch is None else arch
    packed = struct.pack("=IIQ6Q", which, arch, 0, *(word % (1 << 64) for word in words))
    accumulator = at = 0
    while True:
        code, if_true, if_false, operand = program[at]
        at += 1
        match code:
            case seccomp.LD_ABS:
                (accumulator,) = struct.unpack_from("=I", packed, operand)
            case seccomp.AND:
                accumulator &= operand
            case seccomp.JEQ:
                at += if_true if accumulator == operand else if_false
            case seccomp.JGE:
                at += if_true if accumulator >= operand else if_false
            case seccomp.RET:
                return operand
            case _:
                raise AssertionError(f"instruction {code:#x}")


class Filter:
    def __init__(self, machine: str, devices: bool = False) -> None:
        self.machine = machine
        self.rules = seccomp.rules(PID, devices=devices)
        self.program = seccomp.program(self.rules, machine)

    def __call__(self, name: str, *arguments: int) -> int:
        which = kernel.number(name, self.machine)
        assert which is not None
        return decide(self.program, self.machine, which, *arguments)


@pytest.fixture(params=kernel.MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_is_listed_and_nothing_else_is_let_through(machine: str) -> None:
    made = Filter(machine)
    listed = {kernel.number(name, machine) for name in made.rules}
    conditional = {"mmap", "openat", "ioctl", "clone", "fcntl", "prctl", "prlimit64", "tgkill"}
    for name in made.rules.keys() - conditional:
        if kernel.number(name, machine) is not None:
            assert made(name) == ALLOW, name
    for which in set(range(1024)) - listed - {kernel.number("clone3", machine)}:
        assert decide(made.program, machine, which) == DENY, which


@pytest.mark.parametrize("name", ["seccomp", "unshare", "capset", "landlock_restrict_self"])
def test_what_built_the_sandbox_is_out_of_reach_in_it(machine: str, name: str) -> None:
    for devices in (False, True):
        assert Filter(machine, devices)(name) == DENY


def test_the_worst_calls_are_not_listed() -> None:
    """By their x86_64 numbers: socket, connect, execve, execveat, fork, vfork, ptrace, kill, tkill,
    bpf, io_uring_setup, mount, keyctl, process_vm_readv, userfaultfd, perf_event_open,
    open_by_handle_at, setns."""
    numbers = (41, 42, 59, 322, 57, 58, 101, 62, 200, 321, 425, 165, 250, 310, 323, 298, 304, 308)
    program = Filter(X86, devices=True).program
    assert {decide(program, X86, which) for which in numbers} == {DENY}


def test_calls_by_another_architectures_numbers_kill(machine: str) -> None:
    made = Filter(machine)
    other = kernel.AUDIT_ARCH[ARM if machine == X86 else X86]
    i386 = 0x40000003
    for arch in (other, i386):
        assert decide(made.program, machine, 0, arch=arch) == KILL_PROCESS
    if machine == X86:
        assert decide(made.program, machine, kernel.X32_SYSCALL_BIT | 39) == KILL_PROCESS


def test_threads_start_and_processes_do_not(machine: str) -> None:
    made = Filter(machine)
    assert made("clone3", 1) == ABSENT  # so that the C library falls back to clone
    thread = 0x3D0F00  # glibc's pthread_create
    assert made("clone", thread) == ALLOW
    assert made("clone", 17) == DENY  # fork: SIGCHLD
    assert made("clone", 0x4111) == DENY  # vfork
    assert made("clone", thread | 0x10000000) == DENY  # with a user namespace
    assert made("clone", thread & ~0x10000) == DENY


def test_memory_that_no_limit_counts_is_not_to_be_had(machine: str) -> None:
    made = Filter(machine)

    def mmap(flags: int) -> int:
        return made("mmap", 0, 1 << 34, 3, flags)

    private, shared, anonymous, stack, huge = 2, 1, 0x20, 0x100, 0x40000
    assert mmap(private) == mmap(private | anonymous) == mmap(shared) == ALLOW
    assert mmap(private | anonymous | 0x4022) == ALLOW  # NORESERVE is only a promise
    for flags in (shared | anonymous, 3 | anonymous, private | anonymous | stack, private | huge):
        assert mmap(flags) == DENY, hex(flags)


def test_files_open_for_reading_only(machine: str) -> None:
    made, device = Filter(machine), Filter(machine, devices=True)
    assert made("openat", 0, 0, 0o2000000) == ALLOW  # O_CLOEXEC
    for flags in (1, 2, 0o100, 0o1000):
        assert made("openat", 0, 0, flags) == DENY
        assert device("openat", 0, 0, flags) == ALLOW  # there Landlock alone says which


def test_arguments_that_reach_other_processes_are_refused(machine: str) -> None:
    made = Filter(machine)
    assert made("tgkill", PID, 1, 6) == ALLOW
    assert made("tgkill", PID + 1, 1, 6) == DENY
    assert made("prlimit64", 0, 7, 0, 1 << 40) == ALLOW
    assert made("prlimit64", 0, 7, 1 << 40) == DENY  # a pointer whose low word is zero
    assert made("prlimit64", PID, 7, 0) == DENY
    assert made("fcntl", 2, 1030) == ALLOW
    assert made("fcntl", 2, 8) == DENY  # F_SETOWN
    assert made("prctl", 15) == ALLOW
    assert made("prctl", 4) == made("prctl", 1) == DENY  # DUMPABLE, PDEATHSIG
    assert made("ioctl", 0, 0x5401) == ALLOW
    assert made("ioctl", 0, 0x5412) == DENY  # TIOCSTI
    assert Filter(machine, devices=True)("ioctl", 0, 0xC0104600) == ALLOW


def test_no_jump_is_longer_than_its_field(machine: str) -> None:
    for one in Filter(machine, devices=True).program:
        assert one.if_true < 256 and one.if_false < 256
        seccomp.INSTRUCTION.pack(*one)
