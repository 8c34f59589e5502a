"""Runs this project and its peers in turn on one machine; writes a results file, from which docs/benchmarks.md is made.

    python -m benchmarks.peers decode --peer transformers=hf/bin/python:hf_generate.py \\
        --peer Tunix=peer/bin/python:tunix_single_turn.py --rounds 5 --out benchmarks/results/decode-b8.json 8 64 128

Each program runs in a separate process with its own environment's python, gets the same arguments, and prints a JSON
line. In every round all programs run one after the other, and the first program changes from round to round. A ratio
compares two numbers of one round; the result is the median of the rounds' ratios.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

OWN = "aem_jax"
REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "google-tunix")


@dataclass(frozen=True)
class Comparison:
    """A comparison of programs by one number.

    Attributes:
        module: this project's program.
        field: dotted name of the number in the JSON lines.
        unit: unit of the number.
        seconds: whether less is better; in both cases, a ratio above 1 means that this project is faster.
    """

    module: str
    field: str
    unit: str
    seconds: bool = False


COMPARISONS: Mapping[str, Comparison] = {
    "depth": Comparison("benchmarks.depth", "decode_tokens_per_s.median", "tokens/s"),
    "decode": Comparison("benchmarks.sampler", "decode_tokens_per_s.median", "tokens/s"),
    "learner": Comparison("benchmarks.learner", "train_step_s.median", "s", seconds=True),
    "multi-turn": Comparison("benchmarks.multi_turn", "warm_episodes_per_s", "episodes/s"),
}


@dataclass(frozen=True)
class Program:
    """A measured program.

    Attributes:
        name: its name in the results.
        python: the interpreter of its environment.
        words: the interpreter's first arguments: a script, or -m and a module.
    """

    name: str
    python: str
    words: tuple[str, ...]

    def command(self, arguments: Sequence[str]) -> str:
        """Returns the command as a reader would type it, without folders of this machine."""
        return " ".join(["python", *(Path(word).name for word in (*self.words, *arguments))])


class PeerError(RuntimeError):
    """A program failed, or did not print its measurement."""


def parse_peer(text: str) -> Program:
    """Parses NAME=PYTHON:SCRIPT.

    Raises:
        ValueError: the text has another form, or names a file that does not exist.
    """
    name, equals, rest = text.partition("=")
    python, colon, script = rest.rpartition(":")
    if not (name and equals and python and colon and script):
        raise ValueError(f"expected --peer NAME=PYTHON:SCRIPT, got {text!r}")
    if name == OWN:
        raise ValueError(f"expected another name than {OWN!r} for a peer, which is this project's")
    for path in (python, script):
        if not Path(path).is_file():
            raise ValueError(f"expected the files of --peer {name} to exist, got {path}")
    # absolute, but not resolved: a venv's python is a symbolic link
    return Program(name, os.path.abspath(python), (os.path.abspath(script),))


def compare(
    programs: Sequence[Program], arguments: Sequence[str], comparison: Comparison, rounds: int, timeout_s: float
) -> dict[str, Any]:
    """Runs all programs `rounds` times.

    Args:
        programs: the programs; this project's is the first.
        arguments: arguments of every program.
        comparison: the compared number of their JSON lines.
        rounds: number of rounds.
        timeout_s: time limit of one run, seconds.

    Returns:
        rounds (JSON lines by name), values, medians, ratios (of this project to each peer, by round), median_ratios.

    Raises:
        PeerError: a program failed, or printed no such number.
    """
    lines: list[dict[str, Any]] = []
    for number in range(rounds):
        first = number % len(programs)  # the first program runs on the coolest machine
        order = [*programs[first:], *programs[:first]]
        printed = {program.name: _run(program, arguments, timeout_s) for program in order}
        lines.append({program.name: printed[program.name] for program in programs})
        shown = {name: value_of(line, comparison.field, name) for name, line in lines[-1].items()}
        print(f"round {number + 1} of {rounds}: {shown}", file=sys.stderr)
    names = [program.name for program in programs]
    values = {name: [value_of(line[name], comparison.field, name) for line in lines] for name in names}
    own, *others = values
    faster = (lambda a, b: b / a) if comparison.seconds else (lambda a, b: a / b)
    ratios = {name: [round(faster(a, b), 4) for a, b in zip(values[own], values[name])] for name in others}
    return {
        "rounds": lines,
        "values": values,
        "medians": {name: statistics.median(numbers) for name, numbers in values.items()},
        "ratios": ratios,
        "median_ratios": {name: statistics.median(numbers) for name, numbers in ratios.items()},
    }


def value_of(line: Mapping[str, Any], field: str, name: str) -> float:
    """Returns a number of a JSON line by its dotted name.

    Raises:
        PeerError: there is no such number.
    """
    value: Any = line
    for part in field.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, (int, float)) or not value > 0:
        raise PeerError(f"expected a positive {field} from {name}, got {value!r} in {line!r:.300}")
    return float(value)


def _run(program: Program, arguments: Sequence[str], timeout_s: float) -> dict[str, Any]:
    """Runs a program; returns the last JSON line that it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if program.name == OWN:
        environment["PYTHONPATH"] = str(REPOSITORY)
    command = [program.python, *program.words, *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"expected {program.name} to end within {timeout_s:g} s; raise --timeout") from None
    if done.returncode:
        raise PeerError(f"{program.name} ended with status {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise PeerError(f"expected a JSON line from {program.name}, got {done.stdout.strip()[-300:]!r}")


def print_measurement(num_parameters: int, **numbers: Any) -> None:
    """Prints the JSON line of one of this project's programs."""
    import jax

    versions = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(json.dumps({"system": OWN, **versions, "params": num_parameters, **numbers}))


def versions_of(python: str) -> dict[str, str]:
    """Returns the versions of Python and of the `PACKAGES` that are installed in an environment."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "versions = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: versions[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(versions))"
    )
    done = subprocess.run([python, "-c", code, *PACKAGES], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def machine() -> dict[str, Any]:
    """Describes this machine."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text(encoding="utf-8").splitlines()
            if line.startswith("model n")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="This project and its peers, in turn."
    )
    parser.add_argument("comparison", choices=list(COMPARISONS))
    parser.add_argument("arguments", nargs="*", help="of every program: [MODEL] B P G, or the number of steps")
    parser.add_argument("--peer", action="append", required=True, help="NAME=PYTHON:SCRIPT; may be given several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one run may take")
    parser.add_argument("--title", default="", help="of the table in docs/benchmarks.md")
    parser.add_argument("--note", default="", help="what a reader should know, e.g. what else the machine did")
    parser.add_argument("--out", type=Path, help="results file; by default only printed")
    options = parser.parse_intermixed_args(argv)
    if options.rounds < 1:
        parser.error(f"expected --rounds of at least 1, got {options.rounds}")
    comparison = COMPARISONS[options.comparison]
    try:
        peers = [parse_peer(text) for text in options.peer]
    except ValueError as error:
        parser.error(str(error))
    programs = [Program(OWN, sys.executable, ("-m", comparison.module)), *peers]
    try:
        measured = compare(programs, options.arguments, comparison, options.rounds, options.timeout)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result = {
        "kind": "peers",
        "comparison": options.comparison,
        "title": options.title or " ".join([options.comparison, *options.arguments]),
        "note": options.note,
        "field": comparison.field,
        "unit": comparison.unit,
        "date": date.today().isoformat(),
        "machine": machine(),
        "seeds": "fixed in each script",
        "commands": {program.name: program.command(options.arguments) for program in programs},
        "versions": {program.name: versions_of(program.python) for program in programs},
        **measured,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    summary = ", ".join(f"{ratio:.2f} × {name}" for name, ratio in measured["median_ratios"].items())
    print(f"{options.comparison}: {summary} (medians of {options.rounds} rounds)", file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
