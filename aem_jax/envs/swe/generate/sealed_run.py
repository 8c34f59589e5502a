"""Runs pytest so that what tested code prints is never taken for a result. Part of each generated task's eval script.

Run as `python -I - <test file>… < this file`. Two processes: this one, which never loads tested code, starts pytest in
another. Results come back through a pipe, each with a key that was drawn for this run; whatever the tests print comes
out marked with `| `, and only lines that this process writes begin as pytest's summary does. It cannot be read or
traced by the other (not dumpable), so nothing can be put into its output either.

Two tests of its own run among the others: one that must pass and one that must fail. Code that makes every test pass,
or ends pytest early, gives itself away by them, and then there are no results at all.

pytest runs isolated: no configuration of the repository's, no conftest.py, no plugin that is found by itself, no
PYTHONPATH, no cache; byte code that lies beside the tests is used only where pytest itself finds it to be theirs.

What it cannot keep out: the tests and the code that they test share a process, so code that looks for the key in that
process's memory, and knows all this, can forge a result.
"""

import ctypes
import json
import os
import secrets
import subprocess
import sys
import threading

CHILD = """
import json, os, sys

def run():
    key = sys.stdin.readline().strip()
    results = os.fdopen(int(sys.argv[1]), "w")
    import pytest

    def send(*what):
        results.write(json.dumps([key, *what]) + chr(10))
        results.flush()

    class Report:
        def pytest_runtest_logreport(self, report):
            send(report.nodeid, report.when, report.outcome, hasattr(report, "wasxfail"))
        def pytest_collectreport(self, report):
            if report.failed:
                send(report.nodeid, "collect", "failed", False)

    options = "-q -c /dev/null -p no:cacheprovider --noconftest --import-mode=importlib --continue-on-collection-errors"
    here = ["--rootdir", os.getcwd(), "-o", "pythonpath=" + os.getcwd()]
    code = pytest.main([*options.split(), *here, *sys.argv[2:]], plugins=[Report()])
    send("", "end", int(code), False)

run()
"""


def main(files: list[str]) -> int:
    """Runs the tests of some files; prints what pytest says, then one line for each test.

    Returns:
        0 if all tests passed, 1 if one failed, 2 if the run is not to be believed.
    """
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: nobody reads this process or opens its files
    key, name = secrets.token_hex(16), f"test_{secrets.token_hex(8)}"
    own = os.path.join(os.path.dirname(files[0]), f"{name}.py")
    with open(own, "w") as file:
        file.write(f"def {name}_a():\n    assert 1 == 1\n\n\ndef {name}_b():\n    assert 1 == 2\n")
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", CHILD, str(writer), *files, own],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writer,),
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    os.close(writer)
    assert process.stdin and process.stdout
    process.stdin.write(key.encode() + b"\n")
    process.stdin.close()
    lines: list[bytes] = []
    collect = threading.Thread(target=lambda: lines.extend(os.fdopen(reader, "rb")), daemon=True)
    collect.start()
    for line in process.stdout:
        sys.stdout.write("| " + line.decode(errors="replace").rstrip("\n") + "\n")
    process.wait()
    collect.join(timeout=5)
    os.remove(own)
    outcomes, code = read(lines, key)
    base = own.replace(os.sep, "/")
    passed, failed = (outcomes.pop(f"{base}::{name}_{letter}", None) for letter in "ab")
    if (passed, failed, code) != ("PASSED", "FAILED", 1):
        print(f"the run is not to be believed: own tests {passed} and {failed}, pytest ended with {code}")
        return 2
    for test, status in outcomes.items():
        print(f"{status} {test}")
    return int(any(status in ("FAILED", "ERROR") for status in outcomes.values()))


def read(lines: list[bytes], key: str) -> tuple[dict[str, str], object]:
    """Results that carry the key: test -> status, and pytest's exit code (None: it never came to its end)."""
    outcomes: dict[str, str] = {}
    code = None
    for line in lines:
        try:
            said, test, when, outcome, expected = json.loads(line)
        except ValueError:
            continue
        if said != key:
            continue
        if when == "end":
            code = outcome
        elif outcome == "failed":
            outcomes[test] = "FAILED" if when == "call" else "ERROR"
        elif outcome == "skipped":
            outcomes[test] = "XFAIL" if expected else "SKIPPED"
        elif when == "call":
            outcomes[test] = "PASSED"
    return outcomes, code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
