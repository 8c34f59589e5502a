"""`plan`: what a run would take on devices that need not be there: memory, FLOPs, collectives, time.

The programs that training runs (update, reshard, extend, decode) are compiled ahead of time, for a TPU by libtpu, from
shapes alone; what they take is read out of them. GPUs cannot be compiled for without one: there the numbers are closed
forms, and say so.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass, replace

from aem_jax.launch.config import ModelChoice, RunConfig
from aem_jax.launch.overrides import ConfigError, nearest
from aem_jax.sharding import MeshConfig

PROGRAMS = ("update", "reshard", "extend", "decode")


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """A run, and where it is to go."""

    topology: str = "v5p:2x2x1"
    """Devices: v4, v5e, v5p, v6e or tpu7x and its chips (v5p:4x4x8), gpu:MODEL:COUNT (gpu:h100:8), or cpu:COUNT."""
    analytic: bool = False
    """Closed forms alone: nothing is compiled, no libtpu needed."""
    programs: tuple[str, ...] = PROGRAMS
    """What is compiled, of update, reshard, extend and decode; each takes from seconds to a few minutes."""
    json: bool = False
    """One JSON line instead of tables."""

    def __post_init__(self) -> None:
        for name in self.programs:
            if name not in PROGRAMS:
                hint = nearest(name, PROGRAMS) or f"; there are {', '.join(PROGRAMS)}"
                raise ValueError(f"expected programs to be compiled, got {name!r}{hint}")


def plan_config(run: RunConfig) -> PlanConfig:
    """The plan of a run, all else default."""
    return PlanConfig(**vars(run))


def run(config: PlanConfig, given: Collection[str] = ()) -> int:
    """Makes a plan and prints it; returns the exit status: 0 if the run fits, 1 if it does not.

    Args:
        config: the run and the target.
        given: dotted names of the fields that the command line sets; a mesh that is not given is chosen.

    Raises:
        ConfigError: what cannot be planned.
    """
    from aem_jax.launch.plan.devices import parse_topology
    from aem_jax.launch.plan.make import make_plan
    from aem_jax.launch.plan.page import print_plan

    if "model.name" in given and "model.path" not in given:  # another model: nothing of the preset's is left of it
        kept = {name: value for name, value in vars(config.model).items() if f"model.{name}" in given}
        config = replace(config, model=ModelChoice(**kept))
    topology = parse_topology(config.topology)
    by_hand = config.mesh != MeshConfig() or any(name.startswith("mesh.") for name in given)
    try:
        plan = make_plan(config, topology, by_hand=by_hand)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.json:
        print(json.dumps(plan.as_values()))
    else:
        print_plan(plan)
    return 0 if plan.fits else 1
