"""Finds which edits break which tests, and writes the catalogue of bugs: `python scripts/survey_bugs.py`.

Maintainers run it after a change of a package in `aem_jax/envs/swe/generate/code`. Each edit is tried in a separate
process with limited time and memory, but without a sandbox, because it is code of this repository with one sign
changed. The survey takes half a minute and always gives the same catalogue. Tasks are then made from the catalogue
without running code.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

import aem_jax.envs.swe.generate
from aem_jax.envs.swe.generate.mutate import Edit, apply, edits
from aem_jax.envs.swe.generate.packages import Package, packages

CATALOGUE = Path(aem_jax.envs.swe.generate.__file__).with_name("catalogue.json")
TRIED, KEPT, COMBINED = 40, 10, 3
"""Maximum numbers per package: edits tried, bugs kept, and combinations of bugs."""

_SHARE = 0.4  # a bug that breaks a larger fraction of the tests needs no search
_CPU_SECONDS, _SECONDS = 1.5, 60  # CPU time stops endless loops early; wall time tolerates busy machines
_ADDRESS = re.compile(r"0x[0-9a-f]{6,}|(?<=\.\.\.)[0-9a-f]{8,}(?=>)")  # differs in every run
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["pytest"])  # so a trial starts quickly


def survey(package: Package, seed: int = 0) -> list[dict]:
    """Returns the bugs of a package: sets of one to three edits and the tests that they break."""
    rng = random.Random(f"survey/{seed}/{package.name}")
    singles: list[tuple[Edit, Mapping[str, str]]] = []
    spans: set[tuple[int, int]] = set()
    for edit in _varied(edits(package.source), rng)[:TRIED]:
        broken = broken_tests(package, apply(package.source, [edit]))
        if broken and _searchable(package, broken) and (edit.start, edit.end) not in spans:
            singles.append((edit, broken))
            spans.add((edit.start, edit.end))
        if len(singles) == KEPT:
            break
    bugs = [_bug([edit], broken) for edit, broken in singles]
    for attempt in range(4 * COMBINED):
        several = rng.sample(singles, min(2 + attempt % 2, len(singles)))
        chosen = [edit for edit, _ in several]
        union = {test for _, broken in several for test in broken}
        apart = len({edit.function for edit in chosen}) == len(chosen)
        if not apart or len(union) < sum(len(broken) for _, broken in several):
            continue
        broken = broken_tests(package, apply(package.source, chosen))
        bug = _bug(chosen, broken or {})
        if broken and set(broken) == union and bug not in bugs:
            bugs.append(bug)
        if len(bugs) == len(singles) + COMBINED:
            break
    return bugs


def _varied(candidates: Sequence[Edit], rng: random.Random) -> list[Edit]:
    """Returns the edits in a random order that alternates between kinds."""
    by_kind: dict[str, list[Edit]] = {}
    for edit in candidates:
        by_kind.setdefault(edit.kind, []).append(edit)
    ordered = []
    for kind in sorted(by_kind):
        rng.shuffle(by_kind[kind])
        ordered += [(place / len(by_kind[kind]) ** 0.5, kind, edit) for place, edit in enumerate(by_kind[kind])]
    return [edit for _, _, edit in sorted(ordered, key=lambda item: item[:2])]


def _searchable(package: Package, broken: Mapping[str, str]) -> bool:
    return len(broken) <= max(1, _SHARE * package.tests.count("\ndef test_"))


def _bug(chosen: Sequence[Edit], broken: Mapping[str, str]) -> dict:
    return {"edits": [asdict(edit) for edit in sorted(chosen)], "broken": dict(sorted(broken.items()))}


def checked_survey(package: Package) -> list[dict]:
    """Calls `survey` after checking that the package passes its own tests.

    Raises:
        ValueError: the package fails its own tests.
    """
    broken = None
    for _ in range(2):  # the first run also loads modules, which are loaded in the second
        broken = broken_tests(package, package.source)
        if broken == {}:
            return survey(package)
    raise ValueError(f"expected {package.name} to pass its own tests, got {broken}")


def broken_tests(package: Package, source: str) -> Mapping[str, str] | None:
    """Runs a package's tests with a different source of its module.

    The tests run in a separate process with limited time and memory, which a fork server starts. A fork of this process
    could hang, or exceed the memory limit at once, because the caller may have JAX's threads and address space.

    Returns:
        Test function that fails -> pytest's message; None if the tests did not finish.
    """
    receiver, sender = _FORKSERVER.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        for path, text in package.files(source, package.tests).items():
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_text(text, encoding="utf-8")
        child = _FORKSERVER.Process(target=_run, args=(folder, sender))
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
    """Runs the tests of a folder and sends the failures; called in a separate process."""
    signal.setitimer(signal.ITIMER_VIRTUAL, _CPU_SECONDS)  # the signal terminates the process
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    sys.dont_write_bytecode = True
    failures: dict[str, str] = {}

    class Collect:
        def pytest_runtest_logreport(self, report) -> None:
            if report.failed:
                failures[report.nodeid.split("::")[-1]] = _message(report.longreprtext)

    os.chdir(folder)
    sys.path.insert(0, folder)
    with open(os.devnull, "w", encoding="utf-8") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    code = pytest.main(["-q", "-c", os.devnull, "--rootdir", folder, "-p", "no:cacheprovider"], plugins=[Collect()])
    hungry = any("MemoryError" in message for message in failures.values())
    if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not hungry:
        sender.send(failures)
    sender.close()


def _message(text: str) -> str:
    """Returns the failure: the last statement that pytest marks, and its explanation."""
    lines = text.split("\n")
    marks = [i for i, line in enumerate(lines) if line.startswith(">")]
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    first = lines[marks[0]][1:].strip() if marks else ""
    text = "\n".join([first, *(f"E  {error}" for error in errors[:3])])
    return _ADDRESS.sub("0x...", text)[:400]


def main() -> None:
    """Writes the catalogue of all packages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="packages at a time")
    catalogue = {}
    with ProcessPoolExecutor(parser.parse_args().jobs) as pool:
        for package, bugs in zip(packages(), pool.map(checked_survey, packages())):
            catalogue[package.name] = {"digest": package.digest, "bugs": bugs}
            print(f"{package.name}: {len(bugs)} bugs", flush=True)
    CATALOGUE.write_text(json.dumps(catalogue, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
