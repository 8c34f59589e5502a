"""`plan`: what a run would take on devices that need not be there: memory, FLOPs, collectives, time.

The programs that training runs (update, reshard, extend, decode) are compiled ahead of time, for a TPU by libtpu, from
shapes alone; what they take is read out of them. GPUs cannot be compiled for without one: there the numbers are closed
forms, and say so.
"""

import json
from collections.abc import Collection
from dataclasses import replace

from aem_jax.errors import ConfigError
from aem_jax.models.config import ModelChoice
from aem_jax.plan.config import PlanConfig
from aem_jax.sharding import MeshConfig


def run(config: PlanConfig, given: Collection[str] = ()) -> int:
    """Makes a plan and prints it; returns the exit status: 0 if the run fits, 1 if it does not.

    Args:
        config: the run and the target.
        given: dotted names of the fields that the command line sets; a mesh that is not given is chosen.

    Raises:
        ConfigError: what cannot be planned.
    """
    from aem_jax.plan.devices import parse_topology
    from aem_jax.plan.make import make_plan
    from aem_jax.plan.page import print_plan

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
