"""`bench [NAME …]`: how fast the parts are on this machine. A table for people, one JSON line for programs.

Each benchmark states what it measures, warms up, waits for the device, and gives the median of a few repetitions with
the fastest, the slowest and the quartiles, and how near that comes to what the device could do: FLOPs and bytes counted
in the compiled program over a matrix product's and a copy's speed in the same run. Shapes are given on the command
line, so that numbers of two machines can be compared; `--compare FILE` shows ratios to an earlier JSON line.
"""

import importlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import TYPE_CHECKING

from aem_jax.bench.config import BenchConfig
from aem_jax.errors import ConfigError
from aem_jax.overrides import as_values, flag, nearest

if TYPE_CHECKING:
    from aem_jax.bench.measure import Measurement

Benchmark = Callable[[BenchConfig], Sequence["Measurement"]]

BENCHMARKS: Mapping[str, str] = {
    "sampler": "aem_jax.bench.sampler",
    "context": "aem_jax.bench.context",
    "rollout": "aem_jax.bench.rollout",
    "envs": "aem_jax.bench.envs",
    "load": "aem_jax.bench.load",
    "learner": "aem_jax.bench.learner",
    "advantage": "aem_jax.bench.advantage",
}
"""Name → the module whose `run(config)` measures; imported when it is asked for."""


def run(names: Sequence[str], config: BenchConfig) -> int:
    """Runs the benchmarks named (all of them by default); returns the exit status.

    Raises:
        ConfigError: an unknown benchmark or model, or a file to compare with that is none.
    """
    known = [*BENCHMARKS, "all"]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown benchmark {name!r}{nearest(name, known) or '; known are ' + ', '.join(known)}")
    chosen = list(BENCHMARKS) if not names or "all" in names else list(dict.fromkeys(names))

    from rich.console import Console

    from aem_jax.bench.compare import read_earlier
    from aem_jax.bench.page import print_facts, print_rates, print_ratios
    from aem_jax.config.components import known_model
    from aem_jax.distributed.runtime import set_up, versions

    earlier = read_earlier(config.compare) if config.compare else None  # before minutes are spent
    known_model(config.model)
    set_up(config.runtime)
    # The device first: making the others may start environment servers, and they are not to share its first seconds.
    where = versions()
    # The JSON line has standard output to itself. What is written to a file need not fit a terminal.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    found: list[Measurement] = []
    for name in chosen:
        with console.status(f"measuring {name}"):
            found += importlib.import_module(BENCHMARKS[name]).run(config)
    now = {
        "kind": "bench",
        "date": date.today().isoformat(),
        "commands": {"aem_jax": _command(chosen, config)},
        "seeds": str(config.seed),
        "config": asdict(config),
        "versions": where,
        "results": [asdict(each) for each in found],
    }
    print_rates(console, found, where)
    print_facts(console, found)
    if earlier:
        print_ratios(console, now, earlier)
    print(json.dumps(now))
    return 0


def _command(names: Sequence[str], config: BenchConfig) -> str:
    """What to type to measure the same: all that is not as by default, but for what does not change the numbers."""
    usual = as_values(BenchConfig())
    words = ["python -m aem_jax.launch bench", *([] if len(names) == len(BENCHMARKS) else names)]
    for name, value in as_values(config).items():
        if value != usual[name] and name != "compare" and not name.startswith("runtime."):
            each = value if isinstance(value, tuple) else (value,)
            words.append(" ".join([flag(name), *map(str, each)]))
    return " ".join(words)
