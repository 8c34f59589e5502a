"""Ctrl-C and SIGTERM, each in a separate process."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from aem_jax.distributed.signals import StopRequest, undone_on_interrupt
from aem_jax.models.pretrained import new_folder

ROOT = Path(__file__).resolve().parents[2]

STEPS = """
    import sys, time
    from aem_jax.distributed.signals import stop_on_signals

    with stop_on_signals() as stop:
        print("ready", flush=True)
        for step in range(200):
            time.sleep(0.05)
            if stop.look():
                print("saved", flush=True)
                break
    sys.exit(stop.exit_status)
"""

BUSY = """
    import numpy as np
    from aem_jax.distributed.signals import stop_on_signals

    with stop_on_signals():
        a = np.full((6000, 6000), 0.5)
        print("ready", flush=True)
        while True:
            a @ a  # one long call into C: no Python handler runs before it returns
"""


def start(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_completes_the_step_and_saves(number: signal.Signals, status: int):
    process = start(STEPS)
    process.send_signal(number)
    out, error = process.communicate(timeout=20)
    assert out == "saved\n" and process.returncode == status
    assert "Ctrl-C again" in error


def test_a_second_ctrl_c_quits_at_once_even_inside_a_long_call():
    process = start(BUSY)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_no_signal_requests_no_stop():
    request = StopRequest()
    assert not request.requested and not request.look() and request.exit_status == 0


INTERRUPTED = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "MODULE":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
runpy.run_module("aem_jax.launch", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module", ["aem_jax.launch.cli", "aem_jax.config.run", "jax._src.core", "aem_jax.launch.training"]
)
def test_ctrl_c_during_imports_prints_no_traceback(module: str, tmp_path: Path, user_environment):
    code = INTERRUPTED.replace("MODULE", module)
    line = [sys.executable, "-c", code, "train", "--runs-dir", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=user_environment)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_during_an_export_removes_its_files(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), undone_on_interrupt(), new_folder(tmp_path / "out") as partial:
        (partial / "part").write_text("half")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    assert list(tmp_path.iterdir()) == []


def test_signal_handlers_are_restored():
    from aem_jax.distributed.signals import stop_on_signals

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.look() and stop.exit_status == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
