"""The programs of a training step, compiled from shapes alone for devices that this machine does not need to have."""

import importlib.metadata
import importlib.util
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from aem_jax.advantage import ValueTargets
from aem_jax.batch import abstract_batch, packed_sharding
from aem_jax.config import components
from aem_jax.config.run import RunConfig
from aem_jax.distributed import runtime as machine
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError
from aem_jax.learner import abstract_state, make_update
from aem_jax.models import Policy
from aem_jax.models.decoder import window_shares
from aem_jax.models.exchange import EXPERT_AXIS, buffer_rows
from aem_jax.plan.analytic import copies
from aem_jax.plan.costs import Costs, costs
from aem_jax.plan.devices import Coordinates, Topology
from aem_jax.plan.gpu_target import target_config
from aem_jax.plan.hlo import Module, parse
from aem_jax.plan.workload import Workload
from aem_jax.sampler import Sampler
from aem_jax.sampler.reshard import abstract_sampled, make_reshard
from aem_jax.sharding import replicated

_TPU_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # asks no metadata server for the TPU of this machine
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any; the compilation names its target
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is opened, so two plans may run at once
    "TPU_LOG_DIR": "disabled",
}


_PLUGINS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda12-plugin"), "cpu": ("jaxlib",)}
"""Kind of topology -> packages that bring a compiler for it; the first that is installed compiles."""


def compiler(topology: Topology) -> str:
    """The package that compiles for a topology, with its version; empty if none is installed."""
    for package in _PLUGINS[topology.kind]:
        if importlib.util.find_spec(package.replace("-", "_")) is not None:
            return f"{package} {importlib.metadata.version(package)}"
    return ""


def simulate(topology: Topology) -> None:
    """Chooses the CPU, with at least as many simulated devices as a CPU topology has; compiling needs no more.

    Before the first use of jax. On its own, jax would look for a GPU's driver if the CUDA plugin is installed.
    """
    jax.config.update("jax_platforms", "cpu")
    if topology.kind == "cpu" and topology.num_devices > jax.config.values["jax_num_cpu_devices"]:
        try:
            jax.config.update("jax_num_cpu_devices", topology.num_devices)
        except RuntimeError:  # jax is already initialized, as in a test or a notebook
            logging.getLogger(__name__).debug("jax was set up before")


def set_up(topology: Topology, runtime: RuntimeConfig) -> None:
    """Sets up jax for compiling, after `simulate`.

    Raises:
        ConfigError: the topology needs libtpu, which is not installed.
    """
    if topology.kind == "tpu":
        if not compiler(topology):
            raise ConfigError(
                f"--topology {topology.name}: compiling for a TPU takes libtpu; pip install 'aem_jax[plan]', "
                "or add --analytic for an estimate without compiling"
            )
        for name, value in _TPU_SETTINGS.items():
            os.environ.setdefault(name, value)
    machine.set_up(replace(runtime, platform="cpu", cpu_devices=0, compilation_cache="off"))
    if topology.kind == "cpu" and topology.num_devices > jax.device_count():
        raise ConfigError(f"--topology {topology.name}: expected at most {jax.device_count()} devices in this process")


def target_devices(topology: Topology) -> Sequence[Any]:
    """jax's devices of a topology, for compiling only.

    Raises:
        ConfigError: the compiler does not know the topology.
    """
    if topology.kind == "cpu":
        return jax.devices("cpu")[: topology.num_devices]
    try:
        devices = _gpus(topology) if topology.kind == "gpu" else _tpus(topology)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--topology {topology.name}: {compiler(topology)} cannot compile for it ({reason}); another topology, or "
            "--analytic for an estimate without compiling"
        ) from error
    if len(devices) != topology.num_devices:
        raise ConfigError(
            f"--topology {topology.name}: expected {topology.num_devices} devices, {compiler(topology)} made "
            f"{len(devices)} of it"
        )
    return devices


def _tpus(topology: Topology) -> Sequence[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices


def _gpus(topology: Topology) -> Sequence[Any]:
    hosts, gpus = topology.sizes
    return topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=target_config(topology.model),
        topology=f"1x{hosts}x{gpus}",  # partitions of NVLink's network, hosts of each, GPUs of each
    ).devices


def coordinates(mesh: Mesh) -> Coordinates:
    """Position of each device of the mesh: on the torus, or host and number (GPUs); empty for devices without one."""
    devices = list(mesh.devices.flat)
    if devices[0].platform == "gpu":
        return [(device.process_index, device.id) for device in devices]
    return [tuple(device.coords) for device in devices if getattr(device, "coords", None) is not None]


@dataclass(frozen=True)
class Program:
    """One compiled program, on one device.

    Attributes:
        name: one of `config.PROGRAMS`.
        arguments: bytes that it is given.
        outputs: bytes of results in memory of their own, without donated arguments that are reused.
        temporaries: largest number of other bytes.
        compiled_in: seconds.
        costs: of one call.
        too_large: the compiler's message if the program does not fit; then all other fields are 0.
        broken: the compiler's message if it failed for another reason; then all other fields are 0.
    """

    name: str
    arguments: float
    outputs: float
    temporaries: float
    compiled_in: float
    costs: Costs
    too_large: str = ""
    broken: str = ""

    @property
    def total(self) -> float:
        """Bytes of memory while it runs."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def temporary_share(self) -> float:
        """Temporaries over arguments: of decode, over weights and cache."""
        return self.temporaries / self.arguments if self.arguments else 0.0


def compile_programs(config: RunConfig, work: Workload, mesh: Mesh, names: tuple[str, ...]) -> dict[str, Program]:
    """Compiles the named programs, at the same time: a compiler uses one core for most of its work.

    Args:
        config: the run's.
        work: its sizes.
        mesh: over the target's devices.
        names: of `config.PROGRAMS`.

    Raises:
        ValueError: sizes that do not divide over the mesh.
    """
    lowerings = _lowerings(config, work, mesh)
    jobs = {}
    with ThreadPoolExecutor(max_workers=max(len(lowerings), 1)) as threads:
        for name in (name for name in names if name in lowerings):
            # A loop of unknown length is the update's, over microbatches, or the decoder's, over tokens.
            rounds = {"update": work.rounds, "decode": work.decode_chunk}.get(name, 1)
            share = routed_share(work, mesh, name)
            count = partial(costs, rounds=rounds, window_shares=window_shares(work.model), routed_share=share)
            jobs[name] = threads.submit(_compile, name, lowerings[name](), count)
        return {name: job.result() for name, job in jobs.items()}


def routed_share(work: Workload, mesh: Mesh, name: str) -> float:
    """The share of rows of experts' products that hold a token, in a program, if all experts get as many tokens.

    Args:
        work: the run's sizes.
        mesh: over the target's devices.
        name: of the program, one of `config.PROGRAMS`.
    """
    tokens = {"update": work.microbatch_tokens, "extend": work.slots * work.extend_chunk}.get(name, work.slots)
    shards = mesh.shape[EXPERT_AXIS]
    rows = max(tokens * copies(work.model) * mesh.shape["tensor"] // mesh.size, 1)
    return rows / buffer_rows(rows, shards)


def _lowerings(config: RunConfig, work: Workload, mesh: Mesh) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Functions that lower the programs. With LoRA several small programs reshard, so "reshard" is left out."""
    policy = Policy(work.model, work.lora if work.lora.rank else None, work.value)
    state = abstract_state(policy, config.learner, mesh)
    sampled = components.sampled_policy(config.sampling, policy)
    params = abstract_sampled(sampled, mesh)
    sampler = Sampler(
        sampled,
        config.sampling,
        [0],
        capacity=work.capacity,
        slack=work.slack,
        mesh=mesh,
        grows=config.rollout.context == "append",
        records_experts=work.layout.experts > 0,
    )
    layout = work.layout
    shape = (layout.num_microbatches, layout.rows, layout.row_length)
    packed = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=packed_sharding(mesh))
    table: Any = jax.ShapeDtypeStruct((layout.max_responses,), jnp.float32, sharding=replicated(mesh))

    def update() -> jax.stages.Lowered:
        step = make_update(policy, components.learner(config), mesh)
        reference = packed if config.learner.kl_coefficient else None
        values = ValueTargets(table, table) if policy.value else None
        return step.lower(state, abstract_batch(layout, mesh), packed, reference, values)

    def reshard() -> jax.stages.Lowered:
        program: Any = make_reshard(policy, mesh, int8=config.sampling.weights == "int8")
        return program.lower(state.params)

    return {
        "update": update,
        **({} if policy.lora else {"reshard": reshard}),
        "extend": lambda: sampler.lower_extend(params, sampler.abstract(work.slots), work.extend_chunk),
        "decode": lambda: sampler.lower_decode(params, sampler.abstract(work.slots), work.decode_chunk),
    }


def _compile(name: str, lowered: jax.stages.Lowered, count: Callable[[Module], Costs]) -> Program:
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
        text = compiled.as_text() or ""  # a libtpu newer than jax may write what this jax cannot read
    except jax.errors.JaxRuntimeError as error:
        seconds, reason = time.perf_counter() - start, _reason(str(error))
        why = {"too_large": reason} if "RESOURCE_EXHAUSTED" in str(error) else {"broken": reason}
        return Program(name, 0, 0, 0, seconds, Costs(), **why)
    seconds = time.perf_counter() - start
    memory, program_costs = compiled.memory_analysis(), count(parse(text))
    if memory is None:
        raise ValueError(f"expected the compiler to say how much memory {name} takes, got nothing")
    own = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    return Program(name, memory.argument_size_in_bytes, own, memory.temp_size_in_bytes, seconds, program_costs)


def _reason(message: str) -> str:
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    return f"it takes {match[1]} of {match[2]}" if match else message.strip().partition("\n")[0][:200]
