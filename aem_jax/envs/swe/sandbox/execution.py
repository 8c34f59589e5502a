"""Operations that all runtimes share: running scripts, reading and writing files, and setting up repositories.

They use programs inside the sandbox. A runtime only implements `Execute`, which runs one program.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from aem_jax.envs.swe.patches import patched_files
from aem_jax.envs.swe.sandbox.init_process import joined
from aem_jax.envs.swe.sandbox.workspace import TESTBED, Limits, Outcome, Repository, SandboxError, WorkspaceError

FILE_S = 20.0
"""Time limit for short operations, such as reading or writing a file, seconds."""
UNPACK_S = 600.0
"""Time limit for unpacking a repository, seconds."""
LONGEST_ARGUMENT = 100_000
"""In bytes; the kernel limits one argument of a program to 128 KiB."""

# Tracked files stay tracked, even if .gitignore names them now.
FORGET = r"""
set -e
cd /testbed
comm -z -23 <(git ls-files -z | sort -z) <(git ls-files -z --deleted | sort -z) > /tmp/tracked
rm -rf .git
git init --quiet .
git add --force --pathspec-from-file=/tmp/tracked --pathspec-file-nul
git -c user.name=base -c user.email=base@example.invalid commit --quiet --message=base
if [[ "$1" =~ ^[0-9a-f]{40}$ ]]; then git update-ref "refs/replace/$1" HEAD; fi
rm /tmp/tracked
"""
MAKE_BUG = """
set -e
cd /testbed
git apply --whitespace=nowarn -
for name in "$@"; do if [ -e "$name" ]; then git add --force -- "$name"; fi; done
"""


@dataclass(frozen=True)
class Execution:
    """The result of a program.

    Attributes:
        exit_code: see `Outcome`.
        timed_out: see `Outcome`.
        seconds: see `Outcome`.
        notice: see `Outcome`.
        head: the first bytes of the output.
        tail: the last bytes of the output.
        total: length of the output, of which `head` and `tail` are kept.
        errors: the end of stderr, if it is separate from the output.
    """

    exit_code: int | None
    timed_out: bool
    seconds: float
    notice: str
    head: bytes = b""
    tail: bytes = b""
    total: int = 0
    errors: str = ""

    def expect_success(self, what: str) -> None:
        """Raises WorkspaceError, with the reason, if the program failed."""
        if self.exit_code != 0:
            reason = self.notice or self.errors.strip() or f"exit code {self.exit_code}"
            raise WorkspaceError(f"{what}: {reason:.500}")


class Execute(Protocol):
    """Runs one program in `/testbed` as a new process tree, and kills the whole tree afterwards.

    Args:
        argv: the program and its arguments.
        limits: limits on it.
        stdin: descriptor of its standard input; None for an empty one.
        split: whether stderr is separate from the output.
    """

    def __call__(self, argv: Sequence[str], limits: Limits, stdin: int | None, *, split: bool = True) -> Execution: ...


def run_script(execute: Execute, script: str, limits: Limits, stdin: bytes) -> Outcome:
    """Runs `bash -c script`. A script that is too long for an argument is passed at the start of the standard input."""
    script = _argument(script)
    if len(script.encode()) > LONGEST_ARGUMENT:
        script, stdin = "IFS= read -r -d '' script; eval \"$script\"", script.encode() + b"\0" + stdin
    with as_descriptor(stdin) as descriptor:
        result = execute(["bash", "-c", script], limits, descriptor, split=False)
    output = joined(result.head, result.tail, result.total)
    return Outcome(result.exit_code, output, result.timed_out, result.seconds, result.notice)


def read_file(execute: Execute, path: str, limits: Limits) -> bytes:
    """Returns the bytes of a regular file of at most `limits.file_mib`.

    Raises:
        WorkspaceError: the file cannot be read, or is larger.
    """
    most = limits.file_mib * 2**20
    limits = replace(limits, seconds=FILE_S, output_bytes=2 * most + 2)
    result = execute(["head", "-c", str(most + 1), "--", _argument(path)], limits, None)
    result.expect_success(f"could not read {path!r:.200}")
    data = result.head + result.tail
    if len(data) > most:
        raise WorkspaceError(f"expected a file of at most {limits.file_mib} MiB, got a larger one: {path!r}")
    return data


def write_file(execute: Execute, path: str, data: bytes, limits: Limits) -> None:
    """Writes a file and creates its parent folders.

    Raises:
        WorkspaceError: the file cannot be written.
    """
    script = 'mkdir -p -- "$(dirname -- "$1")" && cat > "$1"'
    with as_descriptor(data) as descriptor:
        argv = ["bash", "-c", script, "write", _argument(path)]
        execute(argv, replace(limits, seconds=FILE_S), descriptor).expect_success(f"could not write {path!r:.200}")


def unpack(execute: Execute, archive: int, limits: Limits) -> None:
    """Fills `/testbed` from the tar file behind a descriptor.

    Raises:
        SandboxError: the files do not fit, or it is not a tar file.
    """
    command = ["tar", "--extract", "--file=-", "--no-same-owner", "--directory", TESTBED]
    result = execute(command, replace(limits, seconds=UNPACK_S, file_mib=limits.disk_mib), archive)
    try:
        result.expect_success("could not unpack the repository (is disk_mib large enough?)")
    except WorkspaceError as error:
        raise SandboxError(str(error)) from None


def make_bug(execute: Execute, instance: Repository, limits: Limits) -> None:
    """Applies the patch that makes an instance's bug, if it has one.

    Raises:
        SandboxError: it does not apply.
    """
    if not instance.bug_patch:
        return
    with as_descriptor(instance.bug_patch.encode(errors="surrogateescape")) as patch:
        result = execute(["bash", "-c", MAKE_BUG, "make-bug", *patched_files(instance.bug_patch)], limits, patch)
    if result.exit_code != 0:
        raise SandboxError(
            f"expected the patch that makes the bug of {instance.instance_id} to apply in its image, got: "
            f"{result.notice or result.errors:.500}"
        )


def forget_history(execute: Execute, base_commit: str, limits: Limits) -> None:
    """Replaces an image's git history, which may contain the fix, by one commit.

    The base commit's name refers to the new commit.

    Raises:
        SandboxError: git failed.
    """
    result = execute(["bash", "-c", FORGET, "forget", base_commit], limits, None)
    if result.exit_code != 0:
        raise SandboxError(f"the image's history could not be removed: {result.notice or result.errors:.500}")


def _argument(text: str) -> str:
    """Makes a text valid as a program argument: removes NUL, replaces unpaired surrogates."""
    return text.replace("\0", "").encode(errors="replace").decode()


@contextlib.contextmanager
def as_descriptor(data: bytes) -> Iterator[int]:
    """Yields a descriptor for reading the bytes. It is sealed, so its receiver cannot change memory of this process."""
    descriptor = os.memfd_create("data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, 0x1 | 0x2 | 0x4 | 0x8)  # no more seals, shrinking, growing, writing
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)
