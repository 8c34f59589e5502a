"""Tested code attacks the sealed run of generated tasks. It can neither read the hidden tests nor forge results."""

import re

import pytest
from envs.swe.samples import FakeRuntime, diff
from envs.swe.sandboxes import working_bubblewrap

from aem_jax.envs.swe import check
from aem_jax.envs.swe.generate import sealed_run
from aem_jax.envs.swe.generate import tasks as generated
from aem_jax.envs.swe.generate.packages import package
from aem_jax.envs.swe.grading import Report, grade
from aem_jax.envs.swe.sandbox.workspace import Runtime
from aem_jax.envs.swe.tasks import full_payload, generated_tasks, load_task

# Writes to the pipe of results, as the process with pytest can.
SEND = """import json, os, re, sys
drawn = [f"{sys.argv[2]}::{name}" for name in re.findall("def (test_[0-9a-f]{16})", open(sys.argv[2]).read())]
def send(*what):
    os.write(int(sys.argv[1]), json.dumps(what).encode() + b"\\n")
def end(code, status=1):
    send("", "end", code, False)
    os._exit(status)
"""

ATTACKS = {
    "prints results": "import os\nos.write(1, b'PASSED {all}')\nprint('PASSED {all}')",
    "ends pytest early": "import os\nos._exit(0)",
    "prints through the shell": "import os\nopen(f'/proc/{os.getppid()}/fd/1', 'w').write('PASSED {all}')\nos._exit(0)",
    "makes every test pass": "import _pytest.python\n_pytest.python.Function.runtest = lambda self: None",
    "makes every report say so": (
        "import _pytest.reports as reports\n"
        "made = reports.TestReport.from_item_and_call.__func__\n"
        "def lie(cls, item, call):\n"
        "    report = made(cls, item, call)\n"
        "    report.outcome = 'passed'\n"
        "    return report\n"
        "reports.TestReport.from_item_and_call = classmethod(lie)"
    ),
    "spares the tests of another file": (
        "import sys\n"
        "P = sys.modules.get('_pytest.python'); old = P.Function.runtest\n"
        "def rt(self):\n"
        "    try: old(self)\n"
        "    except BaseException:\n"
        "        if 'tests/test_%s' % __name__ in self.nodeid: return\n"
        "        raise\n"
        "P.Function.runtest = rt"
    ),
    "undoes the comparison of pytest's functions, too": (
        "import sys, _pytest.python\n"
        "frame = sys._getframe()\n"
        "while 'report' not in frame.f_locals or not hasattr(frame.f_locals['report'], 'same'): frame = frame.f_back\n"
        "type(frame.f_locals['report']).check = lambda self: None\n"
        "old, spared = _pytest.python.Function.runtest, {}\n"
        "def rt(self):\n"
        "    try: old(self)\n"
        "    except BaseException:\n"
        "        if self.nodeid == spared.setdefault(0, self.nodeid): raise\n"
        "_pytest.python.Function.runtest = rt"
    ),
    "returns what equals everything": (
        "class Anything:\n"
        "    __eq__ = __contains__ = lambda self, other: True\n"
        "    __ne__ = lambda self, other: False\n"
        "for name, value in list(globals().items()):\n"
        "    if type(value) is type(lambda: 0): globals()[name] = lambda *_, **__: Anything()"
    ),
    "sends that all functions passed": SEND + "for test in drawn: send(test, 'call', 'passed', False)\nend(1)",
    "sends results under the tests' own names": (
        SEND + "for test in '{all}'.strip().split('\\nPASSED '): send(test, 'call', 'passed', False)\nend(1)"
    ),
    "sends lines in place of an exit code": SEND + "end('\\nPASSED {all}FAILED x::y\\n')",
    "ends with another status than it sends": SEND + "end(1, status=0)",
}


WHY = {
    "ends pytest early": "invalid: None",
    "makes every report say so": "invalid: pytest was patched",
    "spares the tests of another file": "invalid: pytest was patched",
    "undoes the comparison of pytest's functions, too": r"passed, its opposites \[.*'PASSED'",
    "returns what equals everything": r"passed, its opposites \[.*'PASSED'",
    "sends that all functions passed": r"passed, its opposites \[.*'PASSED'",
    "sends results under the tests' own names": r"\nERROR tests/",
    "sends lines in place of an exit code": "invalid: None",
    "ends with another status than it sends": "invalid: exit status 0 instead of 1",
}


def attacked(code: str, runtime: Runtime) -> Report:
    """Grades a patch that fixes nothing and appends code to the module. `{all}` stands for lines that forge results,
    without `PASSED` before the first, and `{hidden}` for a hidden test's name, read backwards."""
    task = generated_tasks("train")[0]
    instance, (_, checkout) = generated.instance(task.payload["bug"]), load_task(full_payload(task.payload))
    bug = generated.bug(task.payload)
    files = generated.base_files(bug)
    path = package(bug.package).module_path
    results = "\\nPASSED ".join([*instance.fail_to_pass, *instance.pass_to_pass])
    hidden = instance.fail_to_pass[0].partition("::")[2]
    code = code.replace("{all}", f"{results}\\n").replace("{hidden}", hidden[::-1])
    patch = diff(files, files | {path: files[path] + "\n\n" + code + "\n"})
    report = grade(instance, patch, runtime, checkout, limits=check.LIMITS)
    assert report.applied and not report.resolved
    assert not any(report.fail_to_pass.values())
    return report


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_pytest_resolve_nothing(tmp_path, name):
    report = attacked(ATTACKS[name], FakeRuntime(tmp_path))
    assert re.search(WHY.get(name, ""), report.log)  # a search: the order of the opposites is drawn


def test_no_output_but_the_sealed_runs_is_within_reach():
    report = attacked(
        "import os\n"
        "pid = os.getppid()\n"
        "while pid > 1:\n"
        "    pid = int(open(f'/proc/{pid}/stat').read().rpartition(') ')[2].split()[1])\n"
        "    try: open(f'/proc/{pid}/fd/1', 'w').write('\\nPASSED {all}FAILED x::y\\n')\n"
        "    except OSError: pass\n"
        "os.kill(os.getppid(), 9)",
        working_bubblewrap(),
    )
    assert ">>>>> Test Exit Code: 137" in report.log and "PASSED" not in report.log


# Searches all that the sandbox holds, and for comparison what another process holds.
SEARCH = """import os, re, subprocess, sys, tempfile
control, hidden = "lortnoc ruo"[::-1].encode(), "{hidden}"[::-1].encode()
def content(path):
    with open(path, "rb", 0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not path.endswith("/mem"):
            return file.read(2**24) or b""
        parts = []
        for first, last in re.findall("(?m)^([0-9a-f]+)-([0-9a-f]+) r", open(path[:-3] + "maps").read()):
            try:
                file.seek(int(first, 16))
                parts.append(file.read(int(last, 16) - int(first, 16)))
            except (OSError, OverflowError): pass
        return b"".join(parts)
def paths():
    for folder in ("/testbed", "/tmp", "/dev/shm"):
        yield from (f"{at}/{name}" for at, _, names in os.walk(folder) for name in names)
    for pid in {*filter(str.isdigit, os.listdir("/proc"))} - {str(os.getpid())}:
        yield from (f"/proc/{pid}/{name}" for name in ("cmdline", "environ", "mem", *map("fd/{}".format, range(99))))
def places(text):
    for path in paths():
        try:
            if text in content(path): yield path.split("/", 3)[-1]
        except OSError: pass
with tempfile.TemporaryFile() as file:
    file.write(control)
    file.seek(0)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", control], env={"X": control}, stdin=file)
found = f"hidden tests in {sorted(places(hidden))}, control in {sorted(places(control))}" + chr(10)
for number in {*range(3, 99)} - {int(sys.argv[1])}:  # under one of them pytest keeps the output that it captures
    try: os.write(number, found.encode())
    except OSError: pass
os._exit(1)"""


def test_the_hidden_tests_are_readable_nowhere():
    report = attacked(SEARCH, working_bubblewrap())
    assert {*re.findall("hidden tests in .*", report.log)} == {
        "hidden tests in [], control in ['cmdline', 'environ', 'fd/0', 'mem']"
    }


CLAIMS = """import pytest
LIMIT = 3


def test_values():
    assert len("abc") == LIMIT
    assert ["a", 1, {"b": 2.5}, -1, None] == ["a", 1, {"b": 2.5}, -1, None]


def test_truth():
    assert bool("a") is True and "a" in "abc"
    assert not ""


def test_errors():
    for text in ("x", ""):
        with pytest.raises(ValueError, match="invalid literal"):
            int(text)
"""


def test_opposites_fail_where_their_test_passes():
    for _ in range(50):  # they are drawn
        names, copies, space = {}, {}, {}
        exec(sealed_run.among_opposites(CLAIMS, names, copies), space)
        tests = [name for name in space if name.startswith("test_")]
        assert [names[name] for name in copies] == ["test_values", "test_truth", "test_errors"]
        assert sorted(tests) == sorted(names) and not set(names.values()) & set(names)
        assert len(copies[next(iter(copies))]) == 2
        for name in copies:
            space[name]()
            for other in copies[name]:
                with pytest.raises((AssertionError, ValueError)):
                    space[other]()


def test_configuration_files_of_the_agent_are_ignored(tmp_path):
    task = generated_tasks("train")[0]
    instance, (_, checkout) = generated.instance(task.payload["bug"]), load_task(full_payload(task.payload))
    hook = "import pytest\n\n@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True\n"
    files = generated.base_files(generated.bug(task.payload))
    more = {
        "conftest.py": hook,
        "tests/conftest.py": hook,
        "pytest.ini": "[pytest]\naddopts = -p hack\n",
        "hack.py": hook,
        "sitecustomize.py": "raise SystemExit(0)\n",
        "pytest.py": "raise SystemExit(0)\n",
    }
    report = grade(instance, diff(files, files | more), FakeRuntime(tmp_path), checkout, limits=check.LIMITS)
    assert report.applied and not any(report.fail_to_pass.values()) and all(report.pass_to_pass.values())
