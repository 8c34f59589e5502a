"""Devices to compile for that need not be there."""

import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError
from aem_jax.plan.devices import Topology

_TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server is asked which TPU this is
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any will do: what is compiled for is said by name
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is opened, so two plans may be made at once
    "TPU_LOG_DIR": "disabled",
}


def set_up(topology: Topology, runtime: RuntimeConfig) -> None:
    """jax on the CPU, with as many simulated devices as a CPU topology has: what compiling takes.

    Raises:
        ConfigError: libtpu is needed and not there.
    """
    import jax

    from aem_jax.distributed import runtime as machine

    if topology.kind == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise ConfigError(
                f"--topology {topology.name}: compiling for a TPU takes libtpu; pip install 'aem_jax[plan]', "
                "or add --analytic for an estimate without compiling"
            )
        for name, value in _TPU_SETTINGS.items():
            os.environ.setdefault(name, value)
    simulated = topology.num_devices if topology.kind == "cpu" else 0
    quiet = replace(runtime, platform="cpu", cpu_devices=simulated, compilation_cache="off")
    try:
        machine.set_up(quiet)
    except RuntimeError:  # jax is up already, as in a test or a notebook: what there is must do
        logging.getLogger(__name__).debug("jax was set up before")
    if simulated > jax.device_count():
        raise ConfigError(f"--topology {topology.name}: expected at most {jax.device_count()} devices in this process")


def devices(topology: Topology) -> Sequence[Any]:
    """jax's devices of a topology, to compile for alone.

    Raises:
        ConfigError: libtpu knows no such topology.
    """
    import jax

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--topology {topology.name}: libtpu knows no such shape ({reason})") from error
    if len(found) != topology.num_devices:
        raise ConfigError(
            f"--topology {topology.name}: expected {topology.num_devices} devices, libtpu made {len(found)} of it"
        )
    return found


def coordinates(devices: Sequence[Any]) -> list[tuple[int, ...]]:
    """Where each device stands; empty where devices stand nowhere."""
    return [tuple(each.coords) for each in devices if getattr(each, "coords", None) is not None]
