"""`plan`: memory, FLOPs, collectives and time of a run on devices that this machine does not need to have.

The programs of training (update, reshard, extend, decode) are compiled ahead of time from shapes alone, for a TPU by
libtpu, for a GPU by jax's CUDA plugin; their costs are read from the compiled programs. Where the plugin is not
installed, a GPU's numbers are closed forms, marked as such.
"""

import json
from collections.abc import Collection
from dataclasses import replace

from aem_jax.config import components
from aem_jax.config.validate import check
from aem_jax.errors import ConfigError
from aem_jax.plan.config import PlanConfig
from aem_jax.sharding import MeshConfig


def run(config: PlanConfig, given: Collection[str] = ()) -> int:
    """Makes a plan and prints it; returns the exit status: 0 if the run fits, 1 if it does not.

    Args:
        config: the run and the target.
        given: dotted names of the fields that the command line sets; a mesh is chosen unless it is given.

    Raises:
        ConfigError: the run cannot be planned.
    """
    from aem_jax.plan.devices import parse_topology
    from aem_jax.plan.make import make_plan
    from aem_jax.plan.page import print_plan

    components.check_sizes(config.model)
    topology = parse_topology(config.topology)
    # Refuses what a run refuses, but for a package that this machine may lack.
    check(replace(config, metrics=replace(config.metrics, wandb_project="")), processes=topology.processes)
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
