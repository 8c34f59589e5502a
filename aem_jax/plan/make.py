"""A plan: the mesh, the programs, and their costs, memory and time."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from aem_jax.models.attention import BLOCK, CPU_BLOCK
from aem_jax.models.kernels import Device, Sizes, choose
from aem_jax.models.splash import block_size
from aem_jax.plan.advice import advise
from aem_jax.plan.analytic import (
    Memory,
    decode_costs,
    decode_flops,
    demand,
    learn_costs,
    learn_flops,
    useful_flops,
)
from aem_jax.plan.analytic import memory as closed_memory
from aem_jax.plan.config import PlanConfig
from aem_jax.plan.costs import Costs
from aem_jax.plan.devices import Seconds, Topology, estimate
from aem_jax.plan.programs import Program, compile_programs
from aem_jax.plan.targets import coordinates, devices, set_up
from aem_jax.plan.workload import Workload, workload
from aem_jax.sharding import MeshConfig, choose_mesh, make_mesh, mesh_sizes


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
        programs: the compiled programs.
        costs: of one run.
        closed_flops: FLOPs of one run in closed form.
        seconds: of one run.
        rates: of learning (update) and of decoding.
        phases: bytes during a program, all other arrays included.
        advice: changes that make the run fit.
    """

    topology: Topology
    mesh: MeshConfig
    chosen: bool
    work: Workload
    units: dict[str, float]
    memory: Memory
    analytic: bool
    programs: dict[str, Program] = field(default_factory=dict)
    costs: dict[str, Costs] = field(default_factory=dict)
    closed_flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, Seconds] = field(default_factory=dict)
    rates: dict[str, Rate] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

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
            "mesh": asdict(self.mesh),
            "units": self.units,
            "analytic": self.analytic,
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
    if by_hand:
        mesh = MeshConfig(*mesh_sizes(config.mesh, topology.num_devices))
    else:
        mesh = choose_mesh(demand(workload(config)), topology.num_devices, topology.memory)
    replicas = mesh.data * mesh.fsdp
    work = workload(config, replicas)
    for name, count in (("--batch.rows", work.layout.rows), ("--rollout.num-slots (of a cohort)", work.slots)):
        if count % replicas:
            raise ValueError(f"{name}: expected a multiple of mesh.data × mesh.fsdp = {replicas}, got {count}")
    closed = config.analytic or topology.kind == "gpu"
    microbatches = float(work.rounds * config.learner.num_minibatches * config.learner.num_epochs)
    units = {"update": microbatches, "decode": float(work.decode_chunk)}
    plan = Plan(topology, mesh, not by_hand, work, units, closed_memory(work, mesh), closed)
    tokens = {"update": work.microbatch_tokens * microbatches, "decode": work.slots * units["decode"]}
    useful = {"update": useful_flops(work), "decode": decode_flops(work)}
    flops = {"update": _learn_flops(config, work, mesh, topology), "decode": decode_flops(work)}
    plan.closed_flops.update({name: flops[name] * tokens[name] / topology.num_devices for name in flops})
    (_estimate if closed else _compile)(plan, config)
    for name, seconds in plan.seconds.items():
        if name in tokens:
            rates = [tokens[name] / time for time in (seconds.serial, seconds.roofline)]
            mfus = [rate * useful[name] / (topology.peak * topology.num_devices) for rate in rates]
            plan.rates[name] = Rate(tokens[name], *rates, *mfus)
    if plan.too_large:
        plan.advice.extend(advise(config, work, mesh, topology, plan.too_large))
    return plan


def _learn_flops(config: PlanConfig, work: Workload, mesh: MeshConfig, topology: Topology) -> float:
    """FLOPs of a token, with the attention that the target will choose; assumes a GPU of the Hopper generation."""
    model, length = work.model, work.layout.row_length
    sizes = Sizes(
        length, model.num_heads // mesh.tensor, model.num_kv_heads // mesh.tensor, model.head_dim, model.dtype
    )
    kernel, _ = choose(config.learner.attention, Device(topology.kind, topology.kind == "gpu", 9.0), sizes)
    blocks = {"splash": block_size(length), "xla": CPU_BLOCK if topology.kind == "cpu" else BLOCK}
    return learn_flops(work, blocks.get(kernel, BLOCK), kernel)


def _estimate(plan: Plan, config: PlanConfig) -> None:
    """Uses closed forms instead of programs."""
    work, steps = plan.work, config.learner.num_minibatches * config.learner.num_epochs
    costs = {
        "update": (learn_costs(work, plan.mesh, _learn_flops(config, work, plan.mesh, plan.topology)), steps),
        "decode": (decode_costs(work, plan.mesh), work.decode_chunk),
    }
    for name, (cost, times) in costs.items():
        plan.costs[name] = Costs()
        plan.costs[name].add(cost, times)
        plan.seconds[name] = estimate(plan.costs[name], plan.topology)
    plan.phases["update"] = plan.memory.total
    plan.phases["decode"] = plan.memory.resident


def _compile(plan: Plan, config: PlanConfig) -> None:
    set_up(plan.topology, config.runtime)
    mesh, others = make_mesh(plan.mesh, devices(plan.topology)), _other_bytes(plan)
    where = coordinates(list(mesh.devices.flat))
    for program in compile_programs(config, plan.work, mesh, config.programs):
        name = program.name
        plan.programs[name] = program
        if program.broken:
            continue
        plan.phases[name] = math.inf if program.too_large else program.total + others[name]
        if not program.too_large:
            plan.costs[name] = program.costs
            plan.seconds[name] = estimate(program.costs, plan.topology, where)


def _other_bytes(plan: Plan) -> dict[str, float]:
    """Bytes of the arrays that exist during a program and are not its arguments."""
    memory, work = plan.memory, plan.work
    learner = memory.parameters + memory.optimizer + memory.frozen * (memory.weights > 0)
    own = memory.cache * work.slots * (work.capacity + work.slack) / work.cached_tokens  # one cohort's cache
    sampling = learner + memory.reference + memory.cache - own
    return {
        "update": memory.reference + memory.weights + memory.cache,
        "reshard": memory.optimizer + memory.reference + memory.cache,
        "extend": sampling,
        "decode": sampling,
    }
