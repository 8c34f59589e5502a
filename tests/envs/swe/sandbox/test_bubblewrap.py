"""The guarantees of a workspace, except isolation, which test_escape.py tests."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from envs.swe.sandboxes import CHECKOUT, FILES, INSTANCE, QUICK, sandboxed_processes, working_bubblewrap

import aem_jax
from aem_jax.envs.swe.sandbox import archives, bubblewrap, choose, launcher
from aem_jax.envs.swe.sandbox.bubblewrap import BubblewrapConfig
from aem_jax.envs.swe.sandbox.init_process import Cut, joined
from aem_jax.envs.swe.sandbox.launcher import bubblewrap_arguments
from aem_jax.envs.swe.sandbox.mounts import host_view
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError, WorkspaceError


@pytest.fixture(scope="module")
def runtime():
    return working_bubblewrap()


@pytest.fixture(scope="module")
def workspace(runtime):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    yield workspace
    workspace.close()


def test_files_persist_and_processes_and_variables_do_not(workspace):
    assert workspace.run("cat calc.py").output == FILES["calc.py"]
    workspace.run("cd /tmp; export A=1; sleep 60 & echo kept > /testbed/kept")
    assert (
        workspace.run("pwd; echo $A; cat /testbed/kept; jobs; set -- /proc/[0-9]*; echo $#").output
        == "/testbed\n\nkept\n2\n"
    )


def test_exit_codes_and_order_of_output(workspace):
    assert workspace.run("exit 7").exit_code == 7
    assert workspace.run("kill -TERM $$").exit_code == 128 + 15
    assert workspace.run("echo a; echo b >&2; echo c").output == "a\nb\nc\n"
    late = workspace.run("echo before; sleep 9; echo after", limits=replace(QUICK, seconds=0.3))
    assert (late.exit_code, late.timed_out, late.output) == (None, True, "before\n")
    assert late.notice == "killed: not done after 0.3 s"


def test_standard_input_and_long_scripts(workspace):
    assert workspace.run("cat", stdin=b"\x00\xff").output == "\x00�"
    script = f"x={'y' * 200_000}; echo ${{#x}}; cat"  # longer than the maximum length of an argument
    assert workspace.run(script, stdin=b"input").output == "200000\ninput"
    assert workspace.run("echo 'a\ud800\0b'").output == "a?b\n"


def test_files_are_written_and_read_as_bytes(workspace):
    data = bytes(range(256)) * 5000
    workspace.write("new folder/-file", data)
    assert workspace.read("new folder/-file") == data
    assert workspace.read("/testbed/new folder/-file") == data
    for path in ("nothing", "/testbed", "/etc/shadow", ""):
        with pytest.raises(WorkspaceError, match="could not read"):
            workspace.read(path)
    with pytest.raises(WorkspaceError, match="Read-only"):
        workspace.write("/usr/x", b"")
    workspace.run(
        "truncate -s 8M large; echo x >> large; mkfifo fifo; dd if=/dev/zero of=l2 bs=1M count=8; cat l2 >> l2"
    )
    with pytest.raises(WorkspaceError, match="expected a file of at most 8 MiB|could not read"):
        workspace.read("/dev/zero")


def test_python_and_pytest_are_available(workspace):
    outcome = workspace.run("python -m pytest -q test_calc.py; pytest --version; python -c 'import numpy'")
    assert "1 passed" in outcome.output and "pytest 9" in outcome.output.replace("pytest 8", "pytest 9")
    assert "No module named 'numpy'" in outcome.output


def test_an_endless_loop_ends_at_the_limit_on_processor_time(runtime):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=replace(QUICK, cpu_seconds=1))
    try:
        assert workspace.run("python -c 'while True: pass'").exit_code == 128 + 9
        assert workspace.run("sleep 1.2; echo there").output == "there\n"  # waiting uses no processor time
    finally:
        workspace.close()


def test_workspaces_are_separate(runtime):
    with ThreadPoolExecutor(4) as pool:
        spaces = list(pool.map(lambda i: runtime.open(INSTANCE, CHECKOUT, limits=QUICK), range(4)))
        list(pool.map(lambda i: spaces[i].run(f"echo {i} > mine; sleep 0.1"), range(4)))
        seen = list(pool.map(lambda space: space.run("cat mine; ls").output.split(), spaces))
    assert seen == [[str(i), *sorted([*FILES, "mine"])] for i in range(4)]
    users = {Path(f"/proc/{space._process.pid}").stat().st_uid for space in spaces}
    assert len(users) == (4 if os.geteuid() == 0 else 1)
    assert os.geteuid() != 0 or 0 not in users
    for space in spaces:
        space.close()


def test_a_workspace_may_outlive_the_thread_that_opened_it(runtime):
    spaces = []
    thread = threading.Thread(target=lambda: spaces.append(runtime.open(INSTANCE, CHECKOUT, limits=QUICK)))
    thread.start()
    thread.join()
    time.sleep(0.05)
    assert spaces[0].run("echo here").output == "here\n"
    spaces[0].close()


def test_closing_ends_all_processes(runtime):
    before = sandboxed_processes()
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    assert sandboxed_processes() > before
    workspace.close()
    workspace.close()
    assert sandboxed_processes() == before
    outcome = workspace.run("echo x")
    assert (outcome.exit_code, outcome.output, outcome.notice) == (None, "", "closed")


def test_a_sandbox_that_dies_is_an_outcome_not_an_error(runtime):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    threading.Timer(0.3, workspace._process.kill).start()
    outcome = workspace.run("sleep 9")
    assert outcome.exit_code is None and not outcome.timed_out
    assert outcome.notice == "the sandbox was ended by what ran in it"
    with pytest.raises(WorkspaceError, match="ended by what ran in it"):
        workspace.read("calc.py")
    workspace.close()


def test_oversized_replies_end_the_sandbox(runtime):
    workspace = runtime.open(INSTANCE, CHECKOUT, limits=QUICK)
    real, workspace._control = workspace._control, _Forged(b"\x00\x00\x00\x02\xff\xff\xff\xff{}")
    assert "ended by what ran in it" in workspace.run("true").notice
    real.close()
    workspace.close()


class _Forged:
    """A control socket with the answers that a compromised process 1 might send."""

    def __init__(self, data: bytes):
        self.data = data

    def recv(self, count: int) -> bytes:
        taken, self.data = self.data[:count], self.data[count:]
        return taken

    def sendmsg(self, frames, ancillary) -> int:
        return len(frames[0])

    def sendall(self, data: bytes) -> None: ...

    def settimeout(self, seconds: float) -> None: ...

    def close(self) -> None: ...


def test_a_repository_that_does_not_fit_is_refused(runtime):
    def large(instance, folder):
        (folder / "large").write_bytes(bytes(30 * 2**20))

    with pytest.raises(SandboxError, match="disk_mib large enough"):
        runtime.open(INSTANCE, large, limits=QUICK)


def test_a_checkout_is_called_once_and_leaves_no_files(runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asked = []

    def checkout(instance, folder):
        asked.append(folder)
        (folder / "x").write_text("x")

    for _ in range(3):
        runtime.open(INSTANCE, checkout, limits=QUICK).close()
    assert len(asked) == 1
    assert list(tmp_path.iterdir()) == []

    def fails(instance, folder):
        raise ValueError("no such commit")

    with pytest.raises(ValueError, match="no such commit"):
        runtime.open(INSTANCE, fails, limits=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f"aem-swe-{gone.stdout.strip()}-abc" / "testbed").mkdir(parents=True)
    (tmp_path / f"aem-swe-{os.getpid()}-abc").mkdir()
    (tmp_path / "other").mkdir()
    archives.Archives()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"aem-swe-{os.getpid()}-abc", "other"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_or_file_outlives_a_killed_server(runtime, how, tmp_path):
    """The kill comes during a command with children that ignore signals."""
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import tempfile; tempfile.tempdir = {str(tmp_path)!r}
from envs.swe.sandboxes import *
w = working_bubblewrap().open(INSTANCE, CHECKOUT, limits=QUICK)
print(w._process.pid, flush=True)
w.run("trap '' TERM; setsid bash -c 'trap \\"\\" TERM HUP; sleep 61' & sleep 62")
"""
    others = sandboxed_processes()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        outer = server.stdout.readline().strip()
        deadline = time.monotonic() + 20
        while len(sandboxed_processes() - others) < 6 and time.monotonic() < deadline:
            time.sleep(0.02)
        ours = sandboxed_processes() - others - {server.pid}
        assert int(outer) in ours and len(ours) >= 5
        server.send_signal(how)
        server.wait(20)
    deadline = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in ours) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in ours if os.path.exists(f"/proc/{pid}")]
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_isolates_and_bounds_every_file_system():
    """Checks the visible paths, and that every writable file system has a size limit."""
    view = host_view(("pytest",))
    words = bubblewrap_arguments(view, Limits(disk_mib=64), [("/usr", "/usr")], {"/etc/passwd": 9}, 8)
    assert not {"--bind", "--dev-bind", "--share-net", "--cap-add", "--userns"} & set(words)
    for flag in (
        "--unshare-user",
        "--unshare-net",
        "--unshare-pid",
        "--unshare-ipc",
        "--die-with-parent",
        "--clearenv",
    ):
        assert flag in words
    text = " ".join(words)
    assert "--ro-bind / " not in text and "--seccomp 8" in text and "--cap-drop ALL" in text
    for at, word in enumerate(words):
        if word == "--tmpfs" and words[at + 1] not in view.hidden:
            assert words[at - 4] == "--size" and int(words[at - 3]) <= 48 * 2**20, words[at : at + 2]
    assert text.endswith("--remount-ro / --chdir /testbed --seccomp 8 --")
    assert text.index("--remount-ro /dev") > text.index("--tmpfs /dev/shm")


def test_this_package_is_hidden_if_it_would_be_visible(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "aem_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(aem_jax, "__file__", str(package / "__init__.py"))
    assert host_view((), read_only=(str(tmp_path / "lib"),)).hidden == (str(package),)
    (tmp_path / "lib" / "pyproject.toml").touch()  # a checkout: all of it
    assert host_view((), read_only=(str(tmp_path / "lib"),)).hidden == (str(tmp_path / "lib"),)
    assert host_view(()).hidden == ()


def test_hidden_and_read_only_paths(tmp_path):
    working_bubblewrap()
    (tmp_path / "seen" / "unseen").mkdir(parents=True)
    (tmp_path / "seen" / "a").write_text("a")
    (tmp_path / "seen" / "unseen" / "b").write_text("b")
    seen, unseen = str(tmp_path / "seen"), str(tmp_path / "seen" / "unseen")
    config = BubblewrapConfig(packages=(), read_only=(seen,), hidden=(unseen,))
    workspace = bubblewrap.Bubblewrap(config).open_empty(QUICK)
    outcome = workspace.run(f"cd {tmp_path}/seen; cat a; ls unseen; touch x unseen/x a; python -c 'import pytest'")
    workspace.close()
    assert outcome.output.startswith("a") and outcome.output.count("cannot touch") == 3
    assert "unseen/b" not in outcome.output and "No module named 'pytest'" in outcome.output


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="expected the package 'no-such-thing' beside aem_jax"):
        host_view(("no-such-thing",))
    with pytest.raises(ValueError, match="expected existing absolute paths in read_only, got 'relative'"):
        host_view((), read_only=("relative",))
    with pytest.raises(ValueError, match="expected the limit seconds above 0, got 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="expected the limit memory_mib of at least 64, got 1"):
        Limits(memory_mib=1)
    with pytest.raises(ValueError, match="cpu_seconds of at least 0, got -1"):
        Limits(cpu_seconds=-1)


def test_without_a_working_sandbox_nothing_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = BubblewrapConfig(hidden=("/nothing-1",))  # new, since results are cached by configuration
    with pytest.raises(SandboxError, match=r"bubblewrap: there is no `bwrap` on the PATH.*apt install bubblewrap"):
        choose.choose_runtime("bubblewrap", config)
    with pytest.raises(ValueError, match="expected a runtime of auto, bubblewrap, .*, kubernetes, got 'none'"):
        choose.choose_runtime("none")


def test_a_bubblewrap_that_does_not_work_is_not_chosen(monkeypatch):
    working_bubblewrap()
    with tempfile.TemporaryDirectory() as folder:  # not pytest's folder, which only its user may enter
        fake = Path(folder) / "bwrap"
        fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
        fake.chmod(0o755)
        Path(folder).chmod(0o755)
        monkeypatch.setitem(launcher.OWN_ENVIRONMENT, "PATH", f"{folder}:/usr/bin:/bin")
        config = BubblewrapConfig(hidden=("/nothing-2",))
        with pytest.raises(SandboxError, match="did not start: bwrap: No permissions to create new namespace"):
            choose.choose_runtime("bubblewrap", config)


@pytest.mark.parametrize("pieces", [[b"abcdef"], [b"a", b"bcd", b"ef"], [b"abcdefghij"], [b"abc", b"defghijkl", b"m"]])
def test_cut_keeps_the_ends(pieces):
    data = b"".join(pieces)
    cut = Cut(7)  # 4 at the start, 3 at the end
    for piece in pieces:
        cut.add(piece)
    expected = data if len(data) <= 7 else data[:4] + data[-3:]
    assert (bytes(cut.head + cut.tail), cut.total) == (expected, len(data))
    notice = f"\n[... {len(data) - 7} bytes of output cut out here ...]\n"
    text = data.decode() if len(data) <= 7 else notice.join([data[:4].decode(), data[-3:].decode()])
    assert joined(bytes(cut.head), bytes(cut.tail), cut.total) == text
