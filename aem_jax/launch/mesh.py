"""The mesh of a run: as it is set, or chosen from the model, the devices and their memory."""

import logging
import math

import jax
from jax.sharding import Mesh

from aem_jax.config.run import RunConfig
from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup
from aem_jax.models import ModelConfig
from aem_jax.plan.analytic import demand
from aem_jax.plan.workload import workload
from aem_jax.sharding import MeshConfig, choose_mesh, make_mesh

log = logging.getLogger(__name__)


def open_mesh(config: RunConfig, model: ModelConfig, processes: ProcessGroup = SINGLE_PROCESS) -> Mesh:
    """The run's mesh over all devices; with `config.mesh` left as it is by default, `choose_mesh` says its sizes.

    Args:
        config: the run's.
        model: sizes of its decoder.
        processes: the run's processes, which all choose by the least memory that one of them sees. Collective.

    Raises:
        ValueError: sizes that don't multiply to the number of devices, or that divide no rows and slots.
    """
    devices = jax.devices()
    if config.mesh != MeshConfig() or len(devices) == 1:
        return make_mesh(config.mesh)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)  # a CPU's is not told
    memory = min(processes.gather_json(limit))
    chosen = choose_mesh(demand(workload(config, model=model)), len(devices), memory)
    if processes.is_first:
        log.info(
            "mesh of %d devices: data %d x fsdp %d x tensor %d (chosen; --mesh.* sets it)",
            len(devices),
            chosen.data,
            chosen.fsdp,
            chosen.tensor,
        )
    return make_mesh(chosen)
