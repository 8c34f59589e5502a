"""One trial: which tests of a package fail when its module reads otherwise.

It runs in a process of its own with limited time and memory. That process comes from a fork server that has loaded
pytest and nothing else: a fork of the caller, which may hold JAX's threads and address space, could hang, or be over
its memory limit before it has begun.
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

_CPU_SECONDS, _SECONDS = 1.5, 60  # an endless loop shall not cost much, nor a busy machine pass for one
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|(?<=\.\.\.)[0-9a-f]{8,}(?=>)")  # another one every time
_CLEAN = multiprocessing.get_context("forkserver")
_CLEAN.set_forkserver_preload([__name__])  # pytest with it: a process then starts at once


def broken_tests(package: Package, source: str) -> Mapping[str, str] | None:
    """Tests that fail with another source of the module, and what pytest says about each.

    Returns:
        Test function -> message; None where the tests did not come to an end.
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
    """In a process of its own: runs the tests of a folder and sends what failed."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)  # its signal ends the process
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
    """What failed and how: the last statement that pytest marks, and its explanation."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if line.startswith(">")]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    first = lines[marks[0]][1:].strip() if marks else ""
    found = "\n".join([first, *(f"E  {each}" for each in errors[:3])])
    return _ADDRESS.sub("0x...", found)[:400]
