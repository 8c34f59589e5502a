import errno
import re
import struct
from pathlib import Path

import pytest

from aem_jax.envs.swe.sandbox.seccomp import (
    ABSENT,
    ARCHITECTURES,
    FORBIDDEN,
    JUDGED,
    NEWEST,
    filter_instructions,
    filter_program,
)

ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS, EAFNOSUPPORT = (0x50000 | e for e in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT))
MACHINES = list(ARCHITECTURES)


def verdict(machine: str, number: int, *arguments: int, arch: int | None = None) -> int:
    """The verdict of classic BPF on one call, by an independent interpreter of the program's bytes."""
    program = list(struct.iter_unpack("<HBBI", filter_program(machine)))
    arguments += (0,) * (6 - len(arguments))
    data = struct.pack("<iIQ6Q", number, ARCHITECTURES[machine] if arch is None else arch, 0, *arguments)
    at = accumulator = 0
    while True:
        code, jump_true, jump_false, constant = program[at]
        at += 1
        if code == 0x06:  # BPF_RET | BPF_K
            return constant
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            accumulator = struct.unpack_from("<I", data, constant)[0]
        else:  # BPF_JMP | BPF_K and: JEQ 0x10, JGE 0x30, JSET 0x40
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: accumulator & constant}[code]
            at += jump_true if holds else jump_false


@pytest.mark.parametrize("machine", MACHINES)
def test_ordinary_calls_are_allowed_and_listed_ones_refused(machine):
    column = MACHINES.index(machine)
    listed = {row[column]: EPERM for row in FORBIDDEN.values()} | {row[column]: ENOSYS for row in ABSENT.values()}
    judged = {numbers[column] for numbers, _ in JUDGED.values()}
    for number in range(NEWEST + 1):
        if number not in judged:
            assert verdict(machine, number) == listed.get(number, ALLOW), number


@pytest.mark.parametrize("machine", MACHINES)
def test_unknown_calls_are_enosys_and_foreign_ones_kill(machine):
    assert verdict(machine, NEWEST + 1) == ENOSYS
    assert verdict(machine, 0, arch=0x40000003) == KILL  # AUDIT_ARCH_I386
    assert verdict(machine, 0x40000000) == (KILL if machine == "x86_64" else ENOSYS)  # x32's first


JUDGEMENTS = [
    ("clone", (17,), ALLOW),  # SIGCHLD: fork
    ("clone", (0x3D0F00,), ALLOW),  # flags of glibc's threads
    *(("clone", (1 << bit | 17,), EPERM) for bit in (17, 25, 26, 27, 28, 29, 30)),
    ("socket", (1, 1, 0), ALLOW),
    ("socket", (2, 1, 0), ALLOW),
    ("socket", (10, 2, 0), ALLOW),
    ("socket", (16, 3, 0), ALLOW),  # NETLINK_ROUTE
    ("socket", (16, 3, 12), EAFNOSUPPORT),  # NETLINK_NETFILTER
    ("socket", (40, 1, 0), EAFNOSUPPORT),  # AF_VSOCK
    ("socket", (38, 5, 0), EAFNOSUPPORT),  # AF_ALG
    ("socket", (17, 3, 0), EAFNOSUPPORT),  # AF_PACKET
    ("socketpair", (1, 1, 0), ALLOW),
    ("socketpair", (2, 1, 0), EAFNOSUPPORT),
    ("ioctl", (0, 0x5401), ALLOW),  # TCGETS
    ("ioctl", (0, 0x5412), EPERM),  # TIOCSTI
    ("ioctl", (0, 0x1_0000_5412), EPERM),  # the kernel reads only the low half of the request
    ("ioctl", (0, 0x541C), EPERM),  # TIOCLINUX
    ("personality", (0xFFFFFFFF,), ALLOW),  # a query
    ("personality", (0x0040000,), EPERM),  # ADDR_NO_RANDOMIZE
    ("prlimit64", (0, 7), ALLOW),
    ("prlimit64", (1, 7), EPERM),
    ("sched_setaffinity", (0,), ALLOW),
    ("sched_setaffinity", (1,), EPERM),
    ("setpriority", (0, 0), ALLOW),
    ("setpriority", (0, 1), EPERM),
    ("setpriority", (1, 0), EPERM),  # PRIO_PGRP
    ("setpriority", (2, 0), EPERM),  # PRIO_USER
]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("name", "arguments", "expected"), JUDGEMENTS)
def test_some_calls_are_judged_by_their_arguments(machine, name, arguments, expected):
    assert verdict(machine, JUDGED[name][0][MACHINES.index(machine)], *arguments) == expected


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_agree_with_the_kernels_headers(machine, header):
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} is not here (Debian: linux-libc-dev)")
    numbers = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())}
    rows = {**FORBIDDEN, **ABSENT, **{name: numbers for name, (numbers, _) in JUDGED.items()}}
    ours = {name: row[MACHINES.index(machine)] for name, row in rows.items()}
    assert {name: number for name, number in ours.items() if number is not None} == {
        name: numbers[name] for name in ours if name in numbers
    }


def test_the_kernel_accepts_the_program():
    for machine in MACHINES:
        program = filter_instructions(machine)
        assert len(program) < 4096  # BPF_MAXINSNS
        for at, (code, jump_true, jump_false, _) in enumerate(program):
            if code not in (0x06, 0x20):
                assert max(jump_true, jump_false) + at + 1 < len(program)


def test_other_machines_are_refused():
    with pytest.raises(ValueError, match="expected a machine of x86_64, aarch64"):
        filter_program("riscv64")
