"""A plan: the mesh, the programs, and their costs, memory and time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jax.sharding import AbstractMesh

from aem_jax.models import Policy
from aem_jax.models.attention import BLOCK, CPU_BLOCK
from aem_jax.models.kernels import Device, Sizes, choose
from aem_jax.models.splash import block_size
from aem_jax.plan.advice import advise
from aem_jax.plan.analytic import (
    Memory,
    decode_flops,
    demand,
    learn_flops,
    useful_flops,
)
from aem_jax.plan.analytic import memory as closed_memory
from aem_jax.plan.config import PlanConfig
from aem_jax.plan.costs import Costs
from aem_jax.plan.devices import Coordinates, Seconds, Topology, estimate
from aem_jax.plan.floors import decode_costs, decode_floor, learn_costs, update_floor
from aem_jax.plan.programs import Program, compile_programs, compiler, coordinates, set_up, simulate, target_devices
from aem_jax.plan.workload import Workload, workload
from aem_jax.sharding import AXES, DECODE, TRAIN, MeshConfig, choose_mesh, make_mesh, mesh_sizes, shardings


@dataclass(frozen=True)
class Rate:
    """Throughput, without overlap and on the roofline.

    Attributes:
        tokens: of one run of the program, on all devices.
        slowest: tokens/s without overlap.
        fastest: tokens/s on the roofline.
        slowest_mfu: useful FLOP/s (without recomputation) over the devices' peak, without overlap.
        fastest_mfu: on the roofline.
    """

    tokens: float
    slowest: float
    fastest: float
    slowest_mfu: float
    fastest_mfu: float


@dataclass(frozen=True)
class Plan:
    """The cost of a run. Mappings are by program; all numbers but rates are of one device.

    Attributes:
        topology: the target.
        mesh: its sizes, none left open.
        chosen: whether the plan chose the mesh.
        work: the run's sizes.
        units: units of one run of a program: microbatches of an update, tokens per slot of a decode; default 1.
        memory: bytes by content, in closed form.
        analytic: whether all numbers are closed forms, without compiled programs.
        compiler: the package that compiled the programs, with its version; why there is none if `analytic`.
        programs: the compiled programs.
        costs: of one run.
        closed_flops: FLOPs of one run in closed form.
        floors: bytes that one run moves at least; see `update_floor` and `decode_floor`.
        seconds: of one run.
        rates: of learning (update) and of decoding.
        phases: bytes during a program, all other arrays included.
        advice: changes that make the run fit.
    """

    topology: Topology
    mesh: MeshConfig
    chosen: bool
    work: Workload
    units: Mapping[str, float]
    memory: Memory
    analytic: bool
    compiler: str
    programs: Mapping[str, Program]
    costs: Mapping[str, Costs]
    closed_flops: Mapping[str, float]
    floors: Mapping[str, float]
    seconds: Mapping[str, Seconds]
    rates: Mapping[str, Rate]
    phases: Mapping[str, float]
    advice: Sequence[str]

    @property
    def too_large(self) -> list[str]:
        """Programs that need more memory than a device has."""
        return [name for name, size in self.phases.items() if size > self.topology.memory]

    @property
    def broken(self) -> dict[str, str]:
        """Programs that failed to compile, with the compiler's message."""
        return {name: program.broken for name, program in self.programs.items() if program.broken}

    @property
    def fits(self) -> bool:
        """Whether all programs compiled and fit into memory."""
        return not self.too_large and not self.broken

    def as_values(self) -> dict[str, Any]:
        """Plain values, for JSON; None for a size that the compiler did not report."""
        return {
            "topology": self.topology.name,
            "devices": self.topology.num_devices,
            "device_memory": self.topology.memory,
            "parameters": self.work.model.num_parameters,
            "active_parameters": self.work.model.num_active_parameters,
            "mesh": asdict(self.mesh),
            "units": self.units,
            "analytic": self.analytic,
            "compiler": self.compiler,
            "fits": self.fits,
            "advice": self.advice,
            "memory": asdict(self.memory),
            "phases": {name: size if math.isfinite(size) else None for name, size in self.phases.items()},
            "programs": {
                name: {field: value for field, value in vars(program).items() if field not in ("costs", "name")}
                for name, program in self.programs.items()
            },
            "costs": {name: asdict(costs) for name, costs in self.costs.items()},
            "closed_flops": self.closed_flops,
            "floors": self.floors,
            "seconds": {
                name: {**asdict(seconds), "roofline": seconds.roofline, "serial": seconds.serial}
                for name, seconds in self.seconds.items()
            },
            "rates": {name: asdict(rate) for name, rate in self.rates.items()},
        }


def make_plan(config: PlanConfig, topology: Topology, *, by_hand: bool) -> Plan:
    """Chooses the mesh unless it is given; compiles the programs if there is a compiler for the target.

    Args:
        config: the run.
        topology: the target.
        by_hand: whether to keep the config's mesh.

    Raises:
        ValueError: sizes that do not divide over the mesh, or a shape unknown to libtpu.
    """
    num_devices = topology.num_devices
    analytic = config.analytic or (topology.kind == "gpu" and not compiler(topology))
    simulate(topology)
    if by_hand:
        mesh = mesh_sizes(config.mesh, num_devices)
    else:
        mesh = choose_mesh(demand(workload(config)), num_devices, topology.memory)
    replicas = mesh.data * mesh.fsdp * mesh.expert
    work = workload(config, replicas)
    policy = Policy(work.model)
    for rules in (TRAIN, DECODE):  # refuses what training refuses, before anything is compiled
        abstract = AbstractMesh(tuple(getattr(mesh, axis) for axis in AXES), AXES)
        shardings(abstract, policy.axes, rules, policy.shapes)
    for name, count in (("--batch.rows", work.layout.rows), ("--rollout.num-slots (of a cohort)", work.slots)):
        if count % replicas:
            parts = f"mesh.data × mesh.fsdp × mesh.expert = {replicas}"
            raise ValueError(f"{name}: expected a multiple of {parts}, got {count}")
    memory = closed_memory(work, mesh)
    flops = {"update": _learn_flops(config, work, mesh, topology), "decode": decode_flops(work)}
    programs, where = {}, topology.positions
    if analytic:
        costs = _closed_costs(config, work, mesh, flops["update"])
        phases = {"update": memory.learning, "decode": memory.sampling}
    else:
        programs, where = _compile(config, work, mesh, topology)
        compiled = {name: program for name, program in programs.items() if not program.broken}
        others = _other_bytes(work, memory)
        phases = {
            name: math.inf if program.too_large else program.total + others[name] for name, program in compiled.items()
        }
        costs = {name: program.costs for name, program in compiled.items() if not program.too_large}
    seconds = {name: estimate(cost, topology, where) for name, cost in costs.items()}

    microbatches = float(work.rounds * config.learner.num_minibatches * config.learner.num_epochs)
    units = {"update": microbatches, "decode": float(work.decode_chunk)}
    tokens = {"update": work.microbatch_tokens * microbatches, "decode": work.slots * units["decode"]}
    useful = {"update": useful_flops(work), "decode": decode_flops(work)}
    peak = topology.peak * num_devices
    rates = {name: _rate(seconds[name], tokens[name], useful[name], peak) for name in seconds if name in tokens}
    too_large = [name for name, size in phases.items() if size > topology.memory]
    return Plan(
        topology=topology,
        mesh=mesh,
        chosen=not by_hand,
        work=work,
        units=units,
        memory=memory,
        analytic=analytic,
        compiler=_why_analytic(config) if analytic else compiler(topology),
        programs=programs,
        costs=costs,
        closed_flops={name: flops[name] * tokens[name] / num_devices for name in flops},
        floors={
            "update": update_floor(work, mesh) * config.learner.num_minibatches * config.learner.num_epochs,
            "decode": decode_floor(work, mesh) * work.decode_chunk,
        },
        seconds=seconds,
        rates=rates,
        phases=phases,
        advice=advise(config, work, mesh, topology, too_large, not by_hand) if too_large else [],
    )


def _why_analytic(config: PlanConfig) -> str:
    return (
        "as asked" if config.analytic else "compiling for a GPU takes jax's CUDA plugin: pip install 'aem_jax[cuda13]'"
    )


def _rate(seconds: Seconds, tokens: float, useful: float, peak: float) -> Rate:
    """The throughput of a program with `useful` FLOPs per token, on devices with `peak` FLOP/s together."""
    slowest, fastest = tokens / seconds.serial, tokens / seconds.roofline
    return Rate(tokens, slowest, fastest, slowest * useful / peak, fastest * useful / peak)


def _learn_flops(config: PlanConfig, work: Workload, mesh: MeshConfig, topology: Topology) -> float:
    """FLOPs of a token, with the attention that the target will choose; assumes a GPU of the Hopper generation."""
    model, length = work.model, work.layout.row_length
    sizes = Sizes(
        length, model.num_heads // mesh.tensor, model.num_kv_heads // mesh.tensor, model.head_dim, model.dtype
    )
    kernel, _ = choose(config.learner.attention, Device(topology.kind, topology.kind == "gpu", 9.0), sizes)
    blocks = {"splash": block_size(length), "xla": CPU_BLOCK if topology.kind == "cpu" else BLOCK}
    return learn_flops(work, blocks.get(kernel, BLOCK), kernel, mesh.expert)


def _closed_costs(config: PlanConfig, work: Workload, mesh: MeshConfig, flops: float) -> dict[str, Costs]:
    """Costs of the programs in closed form; learning a token takes `flops`."""
    steps = config.learner.num_minibatches * config.learner.num_epochs
    costs = {"update": Costs(), "decode": Costs()}
    costs["update"].add(learn_costs(work, mesh, flops), steps)
    costs["decode"].add(decode_costs(work, mesh), work.decode_chunk)
    return costs


def _compile(
    config: PlanConfig, work: Workload, sizes: MeshConfig, topology: Topology
) -> tuple[dict[str, Program], Coordinates]:
    """The compiled programs, and the position of each device of the mesh."""
    set_up(topology, config.runtime)
    mesh = make_mesh(sizes, target_devices(topology))
    programs = compile_programs(config, work, mesh, config.programs)
    return programs, coordinates(mesh)


def _other_bytes(work: Workload, memory: Memory) -> dict[str, float]:
    """Bytes of the arrays that exist during a program and are not its arguments."""
    learner = memory.parameters + memory.optimizer + memory.frozen * (memory.weights > 0)
    own = memory.cache * work.cohort_cache_bytes / work.all_cache_bytes  # one cohort's cache
    sampling = learner + memory.reference + memory.cache - own
    return {
        "update": memory.reference + memory.cache,
        "reshard": memory.optimizer + memory.reference + memory.cache,
        "extend": sampling,
        "decode": sampling,
    }
