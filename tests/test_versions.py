"""The version ranges of pyproject.toml, and the choice of a Python by the scripts."""

import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DEPENDENCIES = [Requirement(requirement) for requirement in PROJECT["dependencies"]]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


def pins(python: str) -> dict[str, Version]:
    """Name -> version that constraints.txt has for a Python."""
    pinned: dict[str, Version] = {}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name.lower() not in pinned, f"two pins of {pin.name} for Python {python}"
            (one,) = pin.specifier
            pinned[pin.name.lower()] = Version(one.version)
    return pinned


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_has_one_pin_of_each_dependency_within_its_bounds(python: str):
    pinned = pins(python)
    for need in DEPENDENCIES:
        assert pinned[need.name.lower()] in need.specifier, need
    assert pinned["jax"] == pinned["jaxlib"] and f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


def test_no_dependency_has_an_upper_bound():
    """Only releases known to break are excluded, by number. All others are allowed, so that installing stays easy."""
    extras = [Requirement(requirement) for extra in PROJECT["optional-dependencies"].values() for requirement in extra]
    assert {one.operator for need in (*DEPENDENCIES, *extras) for one in need.specifier} <= {">=", "!="}


def test_deprecations_in_our_own_code_are_errors_and_those_of_others_are_not():
    for module in ("aem_jax", "aem_jax.models.decoder"):
        with pytest.raises(DeprecationWarning):
            warnings.warn_explicit("going", DeprecationWarning, "there.py", 1, module)
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("going", DeprecationWarning, "there.py", 1, "aem_jax_of_another")


def fake_python(folder: Path, name: str, version: str) -> Path:
    """A program that answers like a Python of this version; its `venv` records which program created it."""
    minor = version.removeprefix("3.")
    program = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    program.write_text(
        f"""#!/bin/bash
case "$*" in
    --version) echo Python {version} ;;
    *"sys.exit(sys.version_info < (3, "*) oldest=${{2##*(3, }}; [ {minor} -ge "${{oldest%%)*}}" ] ;;
    *print*) echo {version} ;;
    -m\\ venv*) mkdir -p "${{@: -1}}" ;;
esac
"""
    )
    program.chmod(0o755)
    return program


@pytest.mark.parametrize(
    ("there", "arguments", "chosen"),
    [
        (["bin/python3 3.11", "bin/python3.13 3.13"], [], "bin/python3 (Python 3.11)"),
        (["bin/python3 3.9", "bin/python3.13 3.13"], [], "bin/python3.13 (Python 3.13)"),
        (["bin/python3 3.9", "bin/python3.14 3.14"], [], "bin/python3.14 (Python 3.14)"),
        (["bin/python3 3.11", "bin/python3.12 3.12"], ["--newest"], "bin/python3.12 (Python 3.12)"),
        (
            ["bin/python3.12 3.12", "pyenv/versions/3.13.0/bin/python 3.13"],
            ["--newest"],
            "pyenv/versions/3.13.0/bin/python (Python 3.13)",
        ),
        (["bin/python3 3.9"], [], "expected Python 3.11 or newer, got python3: Python 3.9"),
        (["bin/python3 3.11"], ["--newest"], "expected Python 3.12 or newer, got python3: Python 3.11"),
        ([], [], "expected Python 3.11 or newer, got python3, which is not a program"),
    ],
)
def test_the_python_of_an_environment(there: list[str], arguments: list[str], chosen: str, tmp_path: Path):
    for program in there:
        path, version = program.split()
        fake_python(tmp_path / Path(path).parent, Path(path).name, version)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "head", "mkdir", "env"):
        (tools / name).symlink_to(Path("/usr/bin") / name)
    environment = {"PATH": f"{tmp_path / 'bin'}:{tools}", "PYENV_ROOT": str(tmp_path / "pyenv"), "HOME": str(tmp_path)}
    script = ["/bin/bash", str(ROOT / "scripts" / "make_venv.sh"), *arguments, str(tmp_path / "venv")]
    done = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert chosen in done.stdout + done.stderr
    assert done.returncode == (3 if "expected" in chosen else 0)
    assert (tmp_path / "venv").is_dir() == (done.returncode == 0)
