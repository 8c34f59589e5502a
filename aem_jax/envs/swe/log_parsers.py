"""Test results out of a log: the pytest family of SWE-bench's parsers, by their published names and behaviour.

The names are data: an instance says which of them reads its log. What is not here (Django, SymPy, other languages) is
taken from `swebench` where that is installed. Held to the originals, line by line, in tests that run where it is.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from aem_jax.envs.swe.instance import Instance, to_row

Statuses = Mapping[str, str]
"""Test name -> PASSED, FAILED, ERROR, SKIPPED or XFAIL."""

STATUSES = ("FAILED", "PASSED", "SKIPPED", "ERROR", "XFAIL")

_SKIP_COUNT = re.compile(r"\[\d+\]")
_PARAMETERS = re.compile(r"(.*?)\[(.*)\]")
_COLOUR = re.compile(r"\[\d+m")
_CONTROL = dict.fromkeys(range(1, 32))


def parser(instance: Instance) -> Callable[[str], Statuses]:
    """The function that reads the log of an instance.

    Most of these parsers change a test's name: they cut it at white space, or shorten a path in it. Published instances
    hold names that are changed so. Others (SWE-rebench's, SWE-smith's) hold whole names, as `t.py::test[a b]`, which
    the parser never returns. Such a name is looked up in the log as it is.

    Raises:
        ValueError: nobody knows a parser of this name.
        ModuleNotFoundError: the parser is one of `swebench`'s, which is not installed.
    """
    name = instance.log_parser
    if name in _OWN:
        parse, names = _OWN[name], {*instance.fail_to_pass, *instance.pass_to_pass}
        whole = _changed(parse, names)
        return (lambda log: {**parse(log), **_whole_names(log, whole)}) if whole else parse
    try:
        from swebench.harness.log_parsers import PARSER_REGISTRY  # pyright: ignore[reportMissingImports]
        from swebench.harness.utils import make_test_spec  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{instance.instance_id} needs the log parser {name!r}; built in are {', '.join(_OWN)}, for the others "
            "install swebench: pip install 'aem_jax[swe]'"
        ) from None
    if name not in PARSER_REGISTRY:
        raise ValueError(f"expected the log parser of {instance.instance_id} among swebench's, got {name!r}")
    specification: Any = make_test_spec(to_row(instance))
    return lambda log: PARSER_REGISTRY[name](log, specification)


def parse_pytest(log: str) -> Statuses:
    """Lines `<STATUS> <test> …` of pytest's short summary (`-rA`); the last line about a test counts."""
    return dict(_summary(log))


def parse_pytest_options(log: str) -> Statuses:
    """As `parse_pytest`; a parameter that is an absolute path is cut down to its last part.

    Checkouts lie in different folders, so such a path is no stable name. URLs (`//…`) and globs stay as they are.
    """
    found = {}
    for name, status in _summary(log):
        parameters = _PARAMETERS.search(name)
        if parameters:
            test, option = parameters.groups()
            if option.startswith("/") and not option.startswith("//") and "*" not in option:
                option = "/" + option.rsplit("/", 1)[-1]
            name = f"{test}[{option}]"
        found[name] = status
    return found


def parse_pytest_v2(log: str) -> Statuses:
    """Names may hold spaces and colours, and the status may stand at the end of a line (`-v` of older versions)."""
    found = {}
    for line in log.split("\n"):
        line = _COLOUR.sub("", line).translate(_CONTROL)
        if line.startswith(STATUSES):
            if line.startswith("FAILED"):
                line = line.split(" - ", 1)[0]
            words = line.split()
            if len(words) > 1 and not _is_skip_count(words):
                found[" ".join(words[1:])] = words[0]
        elif line.endswith(STATUSES):
            words = line.split()
            if len(words) > 1:
                found[" ".join(words[:-1])] = words[-1]
    return found


def parse_matplotlib(log: str) -> Statuses:
    """As `parse_pytest`, after mouse buttons that print differently between Python versions are made numbers."""
    return parse_pytest(log.replace("MouseButton.LEFT", "1").replace("MouseButton.RIGHT", "3"))


def _changed(parse: Callable[[str], Statuses], names: Collection[str]) -> set[str]:
    """The names that a parser changes, in a line of success or of failure.

    A name that a changed one becomes (`t[a b]` of `t[a  b]`) is among them, since the parser confuses the two. A name
    that is cut inside its parameters (`t[a`) is not: no line of a log holds it.
    """
    changed, become = set(), set()
    for name in names:
        read = [parse(line) for line in (f"PASSED {name}", f"FAILED {name} - reason")]
        if not all(name in statuses for statuses in read):
            changed.add(name)
            become.update(key for key in read[0] if key.count("[") <= key.count("]"))
    return changed | (become & set(names))


def _whole_names(log: str, names: Collection[str]) -> Statuses:
    """Results of tests under their whole names; the last line about a test counts.

    Behind a name, ` - ` and a reason may follow, except where the test has passed. Of several names that a line could
    begin with, the longest is meant. White space at the ends of a name is not significant.
    """
    wanted: dict[str, list[str]] = {}
    for name in names:
        wanted.setdefault(name.strip(), []).append(name)
    found = {}
    for line in log.split("\n"):
        line = _COLOUR.sub("", line).replace("\x1b", "") if "\x1b" in line else line
        status, _, rest = line.partition(" ")
        if status not in STATUSES:
            continue
        ends = [] if status == "PASSED" else [reason.start() for reason in re.finditer("(?= - )", rest)]
        for end in (len(rest), *reversed(ends)):
            if (name := rest[:end].strip()) in wanted:
                found |= dict.fromkeys(wanted[name], status)
                break
    return found


def _summary(log: str) -> Iterator[tuple[str, str]]:
    for line in log.split("\n"):
        if not line.startswith(STATUSES):
            continue
        if line.startswith("FAILED"):
            line = line.replace(" - ", " ")
        words = line.split()
        if len(words) > 1 and not _is_skip_count(words):
            yield words[1], words[0]


def _is_skip_count(words: list[str]) -> bool:
    """`SKIPPED [3] path:line: reason` counts skips, and names no test."""
    return words[0] == "SKIPPED" and _SKIP_COUNT.fullmatch(words[1]) is not None


_OWN: Mapping[str, Callable[[str], Statuses]] = {
    "parse_log_pytest": parse_pytest,
    "parse_log_astroid": parse_pytest,
    "parse_log_flask": parse_pytest,
    "parse_log_marshmallow": parse_pytest,
    "parse_log_pvlib": parse_pytest,
    "parse_log_pyvista": parse_pytest,
    "parse_log_sqlfluff": parse_pytest,
    "parse_log_xarray": parse_pytest,
    "parse_log_pytest_options": parse_pytest_options,
    "parse_log_pydicom": parse_pytest_options,
    "parse_log_requests": parse_pytest_options,
    "parse_log_pylint": parse_pytest_options,
    "parse_log_pytest_v2": parse_pytest_v2,
    "parse_log_astropy": parse_pytest_v2,
    "parse_log_scikit": parse_pytest_v2,
    "parse_log_sphinx": parse_pytest_v2,
    "parse_log_matplotlib": parse_matplotlib,
}
