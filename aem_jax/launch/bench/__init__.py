"""`bench [NAME …]`: how fast the parts are on this machine. A table for people, one JSON line for programs.

Each benchmark states what it measures, warms up, waits for the device, and gives the median of a few repetitions with
the fastest and the slowest. Shapes are given on the command line, so that numbers of two machines can be compared.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from aem_jax.launch.bench.measure import Measurement
from aem_jax.launch.config import RuntimeConfig
from aem_jax.launch.overrides import ConfigError, nearest


@dataclass(frozen=True)
class BenchConfig:
    """Shapes and repetitions."""

    model: str = "tiny"
    """Known size of the decoder (sampler, learner); its parameters are random."""
    slots: int = 8
    """Episodes that decode at once (sampler), rows of a batch (learner)."""
    prompt_tokens: int = 128
    """Tokens in the cache before decoding (sampler)."""
    new_tokens: int = 128
    """Tokens that each slot decodes (sampler)."""
    row_length: int = 512
    """Tokens of a row (learner)."""
    trajectories: int = 128
    """Episodes, eight to a group (advantage)."""
    turns: int = 50
    """Responses of an episode (advantage)."""
    sessions: int = 32
    """Environment sessions that step at once (envs)."""
    repeats: int = 5
    """Repetitions after the warm-up."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        if self.trajectories % 8:
            raise ValueError(f"expected trajectories divisible by 8, got {self.trajectories}")


Benchmark = Callable[[BenchConfig], Sequence[Measurement]]

BENCHMARKS: Mapping[str, str] = {
    "sampler": "aem_jax.launch.bench.sampler",
    "envs": "aem_jax.launch.bench.envs",
    "learner": "aem_jax.launch.bench.learner",
    "advantage": "aem_jax.launch.bench.advantage",
}
"""Name → the module whose `run(config)` measures; imported when it is asked for."""


def run(names: Sequence[str], config: BenchConfig) -> int:
    """Runs the benchmarks named (all of them by default); returns the exit status.

    Raises:
        ConfigError: an unknown benchmark or model.
    """
    known = [*BENCHMARKS, "all"]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown benchmark {name!r}{nearest(name, known) or '; known are ' + ', '.join(known)}")
    chosen = list(BENCHMARKS) if not names or "all" in names else list(dict.fromkeys(names))

    from rich.console import Console
    from rich.table import Table

    from aem_jax.launch.build import known_model
    from aem_jax.launch.runtime import set_up, versions

    known_model(config.model)
    set_up(config.runtime)
    # The device first: making the others may start environment servers, and they are not to share its first seconds.
    where = versions()
    console = Console(stderr=True)  # the JSON line has standard output to itself
    title = ", ".join(f"{name} {version}" for name, version in where.items())
    table = Table("benchmark", "what", "median", "fastest", "slowest", title=title)
    found: list[Measurement] = []
    for name in chosen:
        with console.status(f"measuring {name}"):
            measured = importlib.import_module(BENCHMARKS[name]).run(config)
        found += measured
        for each in measured:
            rates = (each.median, each.best, each.worst)
            table.add_row(each.name, each.what, *(f"{rate:,.0f} {each.unit}" for rate in rates))
    console.print(table)
    print(json.dumps({"config": asdict(config), "versions": where, "results": [asdict(each) for each in found]}))
    return 0
