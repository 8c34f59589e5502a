"""Runs pytest so that tested code cannot forge results by printing or patching. Part of each task's eval script.

Usage: `python -I - <test file>… < this file`. This process never loads tested code; it starts pytest in a second
process. Everything that the tests print is marked with `| `, so only this process writes lines that begin like pytest's
summary. It is not dumpable: the other process can neither read its memory nor trace it, and cannot write to its output.

Results come back through a pipe. Code in the second process can write to it as pytest can, so nothing from it is
printed, and the only secret stays here: which of the functions in the rewritten test file are the tests.

Two measures detect code that patches pytest:

- The functions through which pytest runs tests are compared, after each test, with those before tested code was loaded.
- The test file is rewritten for each run. Each test stands among copies that fail where it passes, because they assert
  the opposite or another value (`opposites`). Names and order are random. A run in which a copy passes together with
  its test has no results. So code that makes a test pass must know which of the copies is the test. The original file
  is in this process alone: `grading` ends all processes that had it before this one starts.

pytest runs isolated: without configuration of the repository, conftest.py, plugin discovery, PYTHONPATH or cache. Byte
code beside the tests is used only if pytest considers it valid.

The remaining risk: tests and tested code share a process. Code can forge results if it reads the rewritten file and
tells each test from its copies.
"""

import ast
import contextlib
import copy
import ctypes
import json
import os
import random
import re
import secrets
import subprocess
import sys
import threading
from pathlib import Path

CHILD = """
import json, os, sys

def run(dumps=json.dumps):
    results = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    import pytest

    guarded = [module for name, module in sys.modules.items() if name.startswith(("_pytest.", "pluggy."))]
    guarded = [module for module in guarded if module.__name__.rpartition(".")[2] in (
        "python", "runner", "reports", "nodes", "main", "raises", "skipping", "fixtures", "unraisableexception",
        "threadexception", "_execution", "_caller", "_manager", "_impl", "_result")]
    guarded += [value for module in guarded for value in vars(module).values()
                if isinstance(value, type) and value.__module__ == module.__name__]

    def path(hooks):
        seen = []
        for owner in guarded:
            for value in vars(owner).values():
                value = getattr(value, "__func__", value.fget if isinstance(value, property) else value)
                if hasattr(value, "__code__"):
                    seen += [value, value.__code__]
        for hook in vars(hooks).values():
            seen += [hook, *(impl.function for impl in hook.get_hookimpls())]
        return seen

    def send(*what):
        results.write(dumps(what) + chr(10))
        results.flush()

    class Report:
        def pytest_sessionstart(self, session):
            self.hooks, self.same = session.config.pluginmanager.hook, True
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection(self):
            self.path = path(self.hooks)
        @pytest.hookimpl(tryfirst=True)
        def pytest_sessionfinish(self):
            self.check()
        def check(self):
            now = path(self.hooks)
            self.same &= len(now) == len(self.path) and all(a is b for a, b in zip(now, self.path))
        def pytest_runtest_logreport(self, report):
            if report.when == "teardown":
                self.check()
            send(report.nodeid, report.when, report.outcome, hasattr(report, "wasxfail"))
        def pytest_collectreport(self, report):
            if report.failed:
                send(report.nodeid, "collect", "failed", False)

    options = "-q -c /dev/null -p no:cacheprovider --noconftest --import-mode=importlib --continue-on-collection-errors"
    here = ["--rootdir", os.getcwd(), "-o", "pythonpath=" + os.getcwd(), "--tb=no"]
    report = Report()
    code = pytest.main([*options.split(), *here, *sys.argv[2:]], plugins=[report])
    send("", "end" if report.same else "patched", int(code), False)
    return int(code)

sys.exit(run())
"""

DRAW = random.SystemRandom()
OPPOSITE = "opposite of"
CONTRARY = {ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn}
CONTRARY |= {after: before for before, after in CONTRARY.items()}
OTHER_ERRORS = ("AttributeError", "BufferError", "EOFError", "ImportError", "NameError", "ReferenceError")


def main(files: list[str]) -> int:
    """Runs the tests of some files; prints pytest's output, then one line for each test.

    Returns:
        0 if all tests passed, 1 if one failed, 2 if the run is invalid.
    """
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no process can read this one's memory or open its files
    names: dict[str, str] = {}
    copies: dict[str, dict[str, list[str]]] = {file: {} for file in files}
    with contextlib.ExitStack() as after:
        for file in files:
            path = Path(file)
            text = path.read_text(encoding="utf-8")
            after.callback(path.write_text, text, encoding="utf-8")
            path.write_text(among_opposites(text, names, copies[file]), encoding="utf-8")
        lines, exit_status = run(files, names)
        outcomes, code = read(lines)
    if code == 1 and exit_status != 1:
        code = f"exit status {exit_status} instead of 1"
    results = {}
    for file, tests in copies.items():
        for name, opposed in tests.items():
            status = outcomes.get(f"{file}::{name}", "ERROR")
            others = [outcomes.get(f"{file}::{other}") for other in opposed]
            if status == "PASSED" and code == 1 and any(other != "FAILED" for other in others):
                code = f"{names[name]} passed, its opposites {others}"
            results[f"{file}::{names[name]}"] = status
    if code != 1:  # opposites fail in every valid run
        print(f"the run is invalid: {code}")
        return 2
    for test, status in results.items():
        print(f"{status} {test}")
    return int(any(status in ("FAILED", "ERROR") for status in results.values()))


def among_opposites(text: str, names: dict[str, str], copies: dict[str, list[str]]) -> str:
    """Returns a test file in which each test stands among its opposites, under random names and in random order.

    The tests keep their order, so state that one test leaves behind reaches the next one as before.

    Args:
        text: the test file.
        names: receives random name -> readable name.
        copies: receives random name of a test -> random names of its opposites.
    """
    tree = ast.parse(text)
    body: list[ast.stmt] = []
    for node in tree.body:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            body.append(node)
            continue
        block = [node, *opposites(node)]
        drawn = [f"test_{secrets.token_hex(8)}" for _ in block]
        names |= dict.fromkeys(drawn, f"{OPPOSITE} {node.name}") | {drawn[0]: node.name}
        copies[drawn[0]] = drawn[1:]
        for function, name in zip(block, drawn, strict=True):
            function.name = name
        body += DRAW.sample(block, len(block))
    tree.body = body
    return ast.unparse(ast.fix_missing_locations(tree))


def opposites(test: ast.FunctionDef) -> list[ast.FunctionDef]:
    """Returns copies of a test that fail where it passes: one claim of each copy is negated, or has another value.

    If the test fails, a copy may pass or fail. Copies have the test's structure and fail in the same way: by an
    assertion about the returned value, or by the exception that the tested code raised.
    """
    changed: dict[str, ast.FunctionDef] = {}
    for change in (negate, alter):
        other = copy.deepcopy(test)
        claims = [node for node in ast.walk(other) if isinstance(node, (ast.Assert, ast.With))]
        if any(change(claim) for claim in DRAW.sample(claims, len(claims))):  # changes the first that allows it
            changed[ast.unparse(other)] = other
    return list(changed.values())


def negate(claim: ast.Assert | ast.With) -> bool:
    """Negates a claim, for example `a == b` to `a != b`; returns False if this is impossible."""
    if isinstance(claim, ast.With):
        return alter(claim)
    match claim.test:
        case ast.UnaryOp(op=ast.Not()):
            claim.test = claim.test.operand
        case ast.Compare(ops=[op]) if type(op) in CONTRARY:
            claim.test.ops = [CONTRARY[type(op)]()]
        case _:
            claim.test = ast.UnaryOp(ast.Not(), claim.test)
    return True


def alter(claim: ast.Assert | ast.With) -> bool:
    """Changes an expected value, for example `a == 12` to `a == 17`, or exception; returns False if there is none."""
    match claim:
        case ast.With(
            items=[ast.withitem(context_expr=ast.Call(func=ast.Attribute(attr="raises"), args=[_]) as raises)]
        ):
            raises.args = [ast.Name(DRAW.choice(OTHER_ERRORS), ast.Load())]
            return True
        case ast.Assert(test=ast.Compare(ops=[ast.Eq()], comparators=[expected])):
            try:
                ast.literal_eval(expected)
            except ValueError:
                return False
            values = [node for node in ast.walk(expected) if isinstance(node, ast.Constant) and node.value is not None]
            if values:
                value = DRAW.choice(values)
                value.value = another(value.value)
            return bool(values)
    return False


def another(value):
    """Returns a different value of the same type: a number close by, a text with one more character."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        place = DRAW.randrange(len(value) + 1)
        return value[:place] + DRAW.choice(value or "a") + value[place:]
    return value + DRAW.choice([-3, -2, -1, 1, 2, 3, 4]) if isinstance(value, (int, float)) else None


def run(files: list[str], names: dict[str, str]) -> tuple[list[bytes], int]:
    """Runs pytest in a separate process and prints its output.

    Returns:
        The lines that came through the pipe, and the exit status.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", CHILD, str(writer), *files],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=(writer,),
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""},
    )
    os.close(writer)
    assert process.stdout
    lines: list[bytes] = []
    collect = threading.Thread(target=lambda: lines.extend(os.fdopen(reader, "rb")), daemon=True)
    collect.start()
    for line in process.stdout:
        text = re.sub("test_[0-9a-f]{16}", lambda name: names.get(name[0], name[0]), line.decode(errors="replace"))
        if OPPOSITE not in text:
            sys.stdout.write("| " + text.rstrip("\n") + "\n")
    process.wait()
    collect.join(timeout=5)
    return lines, process.returncode


def read(lines: list[bytes]) -> tuple[dict[str, str], object]:
    """Returns the results, test -> status, and pytest's exit code; None if it did not finish."""
    outcomes: dict[str, str] = {}
    code: object = None
    for line in lines:
        try:
            test, when, outcome, expected = json.loads(line)
        except ValueError:
            continue
        if when == "end":
            code = outcome if isinstance(outcome, int) else None  # it is printed, and tested code may have sent it
        elif when == "patched":
            code = "pytest was patched"
        elif outcome == "failed":
            outcomes[test] = "FAILED" if when == "call" else "ERROR"
        elif outcome == "skipped":
            outcomes[test] = "XFAIL" if expected else "SKIPPED"
        elif when == "call":
            outcomes[test] = "PASSED"
    return outcomes, code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
