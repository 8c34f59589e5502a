"""System call filter for untrusted code: a classic BPF program for `bwrap --seccomp`, built without a library.

The filter allows the calls that ordinary programs need (compilers, interpreters, test suites, git). It blocks calls
that are often used to escape a sandbox, and calls that take kernel memory outside all limits:

- Calls newer than `NEWEST` do not exist (ENOSYS), so new calls of newer kernels are not allowed by default.
- Calls with another architecture's numbers (32-bit, x32) end the process, because the table below does not cover them.
- Some calls are allowed only with certain arguments. `clone` may not create a process in a new namespace. Sockets are
  limited to AF_UNIX, AF_INET, AF_INET6 and NETLINK_ROUTE: AF_VSOCK reaches the hypervisor in any network namespace, and
  AF_ALG and others reach rarely used kernel code. `ioctl` may not type into a terminal (TIOCSTI, TIOCLINUX). The
  personality may not change. Limits, priorities and processors of other processes may not change, because the
  sandbox's supervisor has the same user id as the code that it supervises.

The filter is one of several layers of protection: no call listed here is known to break out of the sandbox's namespaces
by itself.
"""

import errno
import struct
import sys
from collections.abc import Mapping, Sequence

Instruction = tuple[int, int, int, int]
"""A `struct sock_filter`: code, jump if true, jump if false, constant."""

ARCHITECTURES: Mapping[str, int] = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> AUDIT_ARCH value that the kernel passes with each call. Both machines are little-endian."""

NEWEST = 450
"""Number of the newest call in this table, on both machines (numbers are shared from 424 on)."""


def _table(text: str) -> Mapping[str, tuple[int | None, int | None]]:
    """Parses `name number-on-x86_64 number-on-aarch64, …`; `-` means that the machine has no such call."""
    rows = (row.split() for row in text.split(",") if row.strip())
    return {name: (None if x == "-" else int(x), None if a == "-" else int(a)) for name, x, a in rows}


FORBIDDEN = _table(
    # other processes' memory and descriptors; mounts and namespaces; the kernel's modules, programs, keys, profiling;
    # clocks and names; ports and segments; memory policy; pages given to a pipe
    """
    ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, process_madvise 440 440,
    process_mrelease 448 448, pidfd_getfd 438 438,
    mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, open_tree 428 428, move_mount 429 429,
    fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, quotactl 179 60,
    quotactl_fd 443 443, swapon 167 224, swapoff 168 225, unshare 272 97, setns 308 268, name_to_handle_at 303 264,
    open_by_handle_at 304 265,
    bpf 321 280, perf_event_open 298 241, keyctl 250 219, add_key 248 217, request_key 249 218, kexec_load 246 104,
    kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106, create_module 174 -,
    query_module 178 -, get_kernel_syms 177 -, nfsservctl 180 42, reboot 169 142, acct 163 89, syslog 103 116,
    vhangup 153 58, fanotify_init 300 262, fanotify_mark 301 263, lookup_dcookie 212 18, uselib 134 -, ustat 136 -,
    sysfs 139 -, _sysctl 156 -, seccomp 317 277,
    settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161,
    setdomainname 171 162, iopl 172 -, ioperm 173 -, modify_ldt 154 -, move_pages 279 239, migrate_pages 256 238,
    mbind 237 235, set_mempolicy 238 237, set_mempolicy_home_node 450 450, ioprio_set 251 30,
    vmsplice 278 75,
    """
)
"""Calls that are not permitted (EPERM)."""

ABSENT = _table(
    # large attack surfaces that ordinary programs do not need; memory that belongs to no process and would outlive a
    # command; clone3, whose flags are in memory that a filter cannot read (C libraries then use clone)
    """
    userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427, io_setup 206 0,
    io_submit 209 2, io_destroy 207 1, io_cancel 210 3, io_getevents 208 4, io_pgetevents 333 292,
    shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197, semget 64 190, semop 65 193, semctl 66 191,
    semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180,
    mq_unlink 241 181, mq_timedsend 242 182, mq_timedreceive 243 183, mq_notify 244 184, mq_getsetattr 245 185,
    memfd_create 319 279, memfd_secret 447 447,
    clone3 435 435,
    """
)
"""Calls that do not exist (ENOSYS), so that programs use their fallback."""

# struct seccomp_data { int nr; u32 arch; u64 instruction_pointer; u64 args[6]; }
_NR, _ARCH = 0, 4
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET; clone does not support CLONE_NEWTIME."""
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C


def _low(argument: int) -> Instruction:
    """Loads the low half of an argument; the kernel reads only this half of the arguments checked here."""
    return (_LOAD, 0, 0, 16 + 8 * argument)


def _allow() -> Instruction:
    return (_RETURN, 0, 0, _ALLOW)


def _refuse(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERRNO | number)


def _one_of(argument: int, values: Sequence[int], refusal: int) -> list[Instruction]:
    """Allows the values and refuses all others."""
    tests = [(_EQUAL, len(values) - i, 0, value & 0xFFFFFFFF) for i, value in enumerate(values)]
    return [_low(argument), *tests, _refuse(refusal), _allow()]


def _none_of(argument: int, values: Sequence[int], refusal: int) -> list[Instruction]:
    """Refuses the values and allows all others."""
    tests = [(_EQUAL, len(values) - i, 0, value & 0xFFFFFFFF) for i, value in enumerate(values)]
    return [_low(argument), *tests, _allow(), _refuse(refusal)]


def _no_bits(argument: int, bits: int, refusal: int) -> list[Instruction]:
    return [_low(argument), (_ANY_BIT, 0, 1, bits), _refuse(refusal), _allow()]


def _socket(pair: bool) -> list[Instruction]:
    """Checks the family, and for netlink the protocol: only the one that host name resolution needs."""
    families = [_AF_UNIX] if pair else [_AF_UNIX, _AF_INET, _AF_INET6]
    netlink = [] if pair else [(_EQUAL, 0, 3, _AF_NETLINK), _low(2), (_EQUAL, 0, 1, 0), _allow()]
    tests = [(_EQUAL, 0, 1, family) for family in families]
    allowed = [instruction for test in tests for instruction in (test, _allow())]
    return [_low(0), *allowed, *netlink, _refuse(errno.EAFNOSUPPORT)]


# Name -> ((number on x86_64, number on aarch64), instructions that decide). Process id 0 is the caller itself.
JUDGED: Mapping[str, tuple[tuple[int, int], list[Instruction]]] = {
    "clone": ((56, 220), _no_bits(0, _NEW_NAMESPACES, errno.EPERM)),
    "socket": ((41, 198), _socket(pair=False)),
    "socketpair": ((53, 199), _socket(pair=True)),
    "ioctl": ((16, 29), _none_of(1, [_TIOCSTI, _TIOCLINUX], errno.EPERM)),
    "personality": ((135, 92), _one_of(0, [0, 0xFFFFFFFF], errno.EPERM)),
    "prlimit64": ((302, 261), _one_of(0, [0], errno.EPERM)),
    "sched_setaffinity": ((203, 122), _one_of(0, [0], errno.EPERM)),
    "sched_setscheduler": ((144, 119), _one_of(0, [0], errno.EPERM)),
    "sched_setparam": ((142, 118), _one_of(0, [0], errno.EPERM)),
    "sched_setattr": ((314, 274), _one_of(0, [0], errno.EPERM)),
    # setpriority(which, who): PRIO_PROCESS is 0; a group or a user could include other processes
    "setpriority": (
        (141, 140),
        [_low(0), (_EQUAL, 0, 3, 0), _low(1), (_EQUAL, 0, 1, 0), _allow(), _refuse(errno.EPERM)],
    ),
}
"""Calls that are allowed or refused by their arguments."""


def filter_instructions(machine: str) -> list[Instruction]:
    """Returns the filter's instructions.

    Args:
        machine: `x86_64` or `aarch64`, as in `os.uname().machine`.

    Raises:
        ValueError: unsupported machine.
    """
    if machine not in ARCHITECTURES:
        raise ValueError(
            f"expected a machine of {', '.join(ARCHITECTURES)} for the system call filter, got {machine!r}; "
            "add its numbers to seccomp.py, or use docker or podman, which bring their own filter"
        )
    column = list(ARCHITECTURES).index(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
    ]
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL_PROCESS)]
    program += [(_AT_LEAST, 0, 1, NEWEST + 1), _refuse(errno.ENOSYS)]
    for table, refusal in ((FORBIDDEN, errno.EPERM), (ABSENT, errno.ENOSYS)):
        for numbers in table.values():
            number = numbers[column]
            program += [] if number is None else [(_EQUAL, 0, 1, number), _refuse(refusal)]
    for numbers, body in JUDGED.values():
        program += [(_EQUAL, 0, len(body), numbers[column]), *body]
    return [*program, _allow()]


def filter_program(machine: str) -> bytes:
    """Returns the filter as the bytes that `bwrap --seccomp` reads: an array of `struct sock_filter`.

    Raises:
        ValueError: the machine has no table, or its byte order differs from the table's.
    """
    if sys.byteorder != "little":
        raise ValueError(f"expected a little-endian machine, got {sys.byteorder}-endian {machine}")
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in filter_instructions(machine))
