"""One trial: runs a package's tests against a changed module and reports which fail.

A trial runs in a separate process with limited time and memory. A fork server that has loaded only pytest starts that
process. A fork of the caller could hang, because the caller may hold JAX's threads, or exceed the memory limit at once,
because it may hold JAX's address space.
"""

import multiprocessing
import os
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from aem_jax.envs.swe.generate.packages import Package

_CPU_SECONDS, _SECONDS = 1.5, 60  # CPU time stops endless loops early; wall time tolerates busy machines
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|(?<=\.\.\.)[0-9a-f]{8,}(?=>)")  # differs in every run
_CLEAN = multiprocessing.get_context("forkserver")
_CLEAN.set_forkserver_preload([__name__])  # this also preloads pytest, so a process starts quickly


def broken_tests(package: Package, source: str) -> Mapping[str, str] | None:
    """Returns the tests that fail with a different source of the module, and pytest's message for each.

    Returns:
        Test function -> message; None if the tests did not finish.
    """
    receiver, sender = _CLEAN.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        for path, text in package.files(source, package.tests).items():
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_text(text, encoding="utf-8")
        child = _CLEAN.Process(target=_run, args=(folder, sender))
        child.start()
        sender.close()
        try:
            return receiver.recv() if receiver.poll(_SECONDS) else None
        except EOFError:
            return None
        finally:
            child.kill()
            child.join()


def _run(folder: str, sender) -> None:
    """Runs the tests of a folder and sends the failures; runs in a separate process."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)  # the signal terminates the process
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    sys.dont_write_bytecode = True
    found: dict[str, str] = {}

    class Collect:
        def pytest_runtest_logreport(self, report) -> None:
            if report.failed:
                found[report.nodeid.split("::")[-1]] = _message(report.longreprtext)

    os.chdir(folder)
    sys.path.insert(0, folder)
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    code = pytest.main(["-q", "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider"], plugins=[Collect()])
    hungry = any("MemoryError" in message for message in found.values())
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hungry:
        sender.send(found)
    sender.close()


def _message(text: str) -> str:
    """Returns the failure: the last statement that pytest marks, and its explanation."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if line.startswith(">")]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    first = lines[marks[0]][1:].strip() if marks else ""
    found = "\n".join([first, *(f"E  {each}" for each in errors[:3])])
    return _ADDRESS.sub("0x...", found)[:400]
