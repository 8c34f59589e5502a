"""Devices to compile for that this machine does not need to have."""

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
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server for the TPU of this machine
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any; the compilation names its target
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so two plans may run at once
    "TPU_LOG_DIR": "disabled",
}


def set_up(topology: Topology, runtime: RuntimeConfig) -> None:
    """Sets up jax on the CPU, with as many simulated devices as a CPU topology has; compiling needs no more.

    Raises:
        ConfigError: the topology needs libtpu, which is not installed.
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
    except RuntimeError:  # jax is already initialized, as in a test or a notebook
        logging.getLogger(__name__).debug("jax was set up before")
    if simulated > jax.device_count():
        raise ConfigError(f"--topology {topology.name}: expected at most {jax.device_count()} devices in this process")


def devices(topology: Topology) -> Sequence[Any]:
    """jax's devices of a topology, for compiling only.

    Raises:
        ConfigError: libtpu does not know the topology.
    """
    import jax

    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    from jax.experimental import topologies

    try:
        target = topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--topology {topology.name}: libtpu knows no such shape ({reason})") from error
    if len(target) != topology.num_devices:
        raise ConfigError(
            f"--topology {topology.name}: expected {topology.num_devices} devices, libtpu made {len(target)} of it"
        )
    return target


def coordinates(devices: Sequence[Any]) -> list[tuple[int, ...]]:
    """Position of each device; empty for devices without one."""
    return [tuple(device.coords) for device in devices if getattr(device, "coords", None) is not None]
