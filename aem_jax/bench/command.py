"""`bench [NAME …]`: measures the speed of the components on this machine; prints a table and one JSON line.

Each benchmark warms up, waits for the device, and reports the median of several repetitions with the fastest, the
slowest and the quartiles, and its share of the roofline (`measure.py`). Shapes are options of the command line, so that
two machines can measure the same. `--compare FILE` shows ratios to an earlier JSON line.
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
    "sampler": "sampler:measure_sampler",
    "context": "sampler:measure_context",
    "rollout": "rollout:measure_rollout",
    "carry": "carry:measure_carry",
    "gateway": "gateway:measure_gateway",
    "envs": "envs:measure_envs",
    "load": "envs:measure_load",
    "sandboxes": "sandboxes:measure_sandboxes",
    "learner": "learner:measure_update",
    "advantage": "learner:measure_credit",
}
"""Name -> module and function, in order. A module is imported only before its benchmark runs."""


def run(names: Sequence[str], config: BenchConfig) -> int:
    """Runs the named benchmarks (by default all); returns the exit status.

    Raises:
        ConfigError: an unknown benchmark or model, or a file to compare with that has no results.
    """
    known = [*BENCHMARKS, "all"]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown benchmark {name!r}{nearest(name, known) or '; known are ' + ', '.join(known)}")
    chosen = list(BENCHMARKS) if not names or "all" in names else list(dict.fromkeys(names))

    from rich.console import Console

    from aem_jax.bench.page import print_facts, print_rates, print_ratios, read_earlier
    from aem_jax.config.components import known_model
    from aem_jax.distributed.runtime import set_up, versions

    earlier = read_earlier(config.compare) if config.compare else None  # before minutes of measurements
    known_model(config.model, "--model")
    set_up(config.runtime)
    # Initializes the device first: environment servers that start later would take time from its initialization.
    now_versions = versions()
    # Standard output has the JSON line alone. A file does not have the width of a terminal.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 140)
    results: list[Measurement] = []
    for name in chosen:
        module, _, function = BENCHMARKS[name].partition(":")
        with console.status(f"measuring {name}"):
            benchmark: Benchmark = getattr(importlib.import_module(f"aem_jax.bench.{module}"), function)
            results += benchmark(config)
    now = {
        "kind": "bench",
        "date": date.today().isoformat(),
        "commands": {"aem_jax": _command(chosen, config)},
        "seeds": str(config.seed),
        "config": asdict(config),
        "versions": now_versions,
        "results": [asdict(result) for result in results],
    }
    print_rates(console, results, now_versions)
    print_facts(console, results)
    if earlier:
        print_ratios(console, now, earlier)
    print(json.dumps(now))
    return 0


def _command(names: Sequence[str], config: BenchConfig) -> str:
    """The command line of the same measurement: all options that differ from their defaults and affect the numbers."""
    defaults = as_values(BenchConfig())
    words = ["python -m aem_jax.launch bench", *([] if len(names) == len(BENCHMARKS) else names)]
    for name, value in as_values(config).items():
        if value != defaults[name] and name != "compare" and not name.startswith("runtime."):
            values = value if isinstance(value, tuple) else (value,)
            words.append(" ".join([flag(name), *map(str, values)]))
    return " ".join(words)
