"""Shared helpers for the sandbox tests: a working sandbox, a repository, and the remaining processes."""

import os
from functools import lru_cache
from pathlib import Path

import pytest

from aem_jax.envs.swe.instance import END_MARKER, START_MARKER, SweBenchInstance
from aem_jax.envs.swe.repos import commit_id, files_checkout
from aem_jax.envs.swe.sandbox import bubblewrap
from aem_jax.envs.swe.sandbox.workspace import Limits

_why_not = lru_cache(bubblewrap.probe)


def working_bubblewrap() -> bubblewrap.Bubblewrap:
    """Returns the runtime; skips the test if bubblewrap does not work."""
    if reason := _why_not():
        pytest.skip(f"bubblewrap does not work here: {reason:.300}")
    return bubblewrap.Bubblewrap()


# Deadlines that should never expire are long: a machine may be busy.
QUICK = Limits(seconds=60, memory_mib=256, processes=32, file_mib=8, disk_mib=32, output_bytes=4096)

FILES = {
    "calc.py": "def mean(xs):\n    return sum(xs) / (len(xs) - 1)\n",
    "test_calc.py": "import calc\n\n\ndef test_one():\n    assert calc.mean([0, 0]) == 0\n",
}
GOLD = """\
diff --git a/calc.py b/calc.py
--- a/calc.py
+++ b/calc.py
@@ -1,2 +1,2 @@
 def mean(xs):
-    return sum(xs) / (len(xs) - 1)
+    return sum(xs) / len(xs)
"""
# The blank context line is written so that no editor removes its space.
TEST_PATCH = """\
diff --git a/test_calc.py b/test_calc.py
--- a/test_calc.py
+++ b/test_calc.py
@@ -3,3 +3,7 @@
\x20
 def test_one():
     assert calc.mean([0, 0]) == 0
+
+
+def test_mean():
+    assert calc.mean([1, 2, 3]) == 2
"""
EVAL_SCRIPT = f"""\
#!/bin/bash
set -uxo pipefail
cd /testbed
git apply -v - <<'EOF_114329324912'
{TEST_PATCH}EOF_114329324912
: '{START_MARKER}'
pytest -rA -p no:cacheprovider test_calc.py
: '{END_MARKER}'
"""

INSTANCE = SweBenchInstance(
    instance_id="own__calc-1",
    repo="own/calc",
    base_commit=commit_id(FILES),
    patch=GOLD,
    test_patch=TEST_PATCH,
    problem_statement="mean() is wrong.",
    fail_to_pass=("test_calc.py::test_mean",),
    pass_to_pass=("test_calc.py::test_one",),
    version="1.0",
    environment_setup_commit=commit_id(FILES),
    image="",
    log_parser="parse_log_pytest",
    eval_type="pass_and_fail",
    eval_script=EVAL_SCRIPT,
)
CHECKOUT = files_checkout(FILES)


def sandboxed_processes() -> set[int]:
    """Processes of this machine that descend from this process and run in a sandbox, or set one up.

    The fork server of Python's multiprocessing, left by other tests of this process, does not count.
    """
    parents, words = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            rest = (folder / "stat").read_text().rpartition(") ")[2]
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # ended meanwhile
        pid = int(folder.name)
        parents[pid], words[pid] = int(rest.split()[1]), command
    ours = set()
    for pid in parents:
        at = pid
        while at in parents and at not in (0, os.getpid()):
            at = parents[at]
        if at == os.getpid() and pid != at:
            ours.add(pid)
    return {pid for pid in ours if b"multiprocessing." not in words[pid]}
