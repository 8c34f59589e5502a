"""Changes that make a run fit: options of the command line, with the memory that each saves."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aem_jax.config import components
from aem_jax.config.run import RunConfig
from aem_jax.overrides import flag, override
from aem_jax.plan.analytic import Memory, demand, memory
from aem_jax.plan.devices import GIB, Topology
from aem_jax.plan.workload import Workload, workload
from aem_jax.sharding import MEMORY_SHARE, MeshConfig, choose_mesh

_LEAST = 0.02
"""Changes that save less than this fraction of a device's memory are left out."""


def advise(
    config: RunConfig,
    work: Workload,
    mesh: MeshConfig,
    topology: Topology,
    too_large: Sequence[str],
    chosen: bool = False,
) -> list[str]:
    """Changes that make a run fit, the largest saving first; the estimates are closed forms.

    Each change is planned again: it is left out if no mesh divides the changed sizes, or if another program would then
    need more memory than there is. The saving of a change is the largest of its savings in the programs that are too
    large.

    Args:
        config: the run's.
        work: its sizes.
        mesh: the mesh on which it does not fit.
        topology: the target.
        too_large: programs that need more memory than there is.
        chosen: whether the mesh was chosen, and so is again for changed sizes.
    """
    now, lines = memory(work, mesh), []
    needed = [name == "update" for name in too_large]
    for values, note in _changes(config, work, mesh):
        changed = override(replace(config, mesh=mesh), values)
        try:
            then = _planned(changed, topology, chosen and changed.mesh == mesh)
        except ValueError:
            continue
        if _spoils(now, then, MEMORY_SHARE * topology.memory):
            continue
        options = " ".join(f"{flag(name)} {value}" for name, value in values.items() if name not in _HIDDEN)
        saved = max(now.learning - then.learning if learns else now.sampling - then.sampling for learns in needed)
        if saved > _LEAST * topology.memory:
            lines.append((saved, f"{options}{note} (saves about {saved / GIB:.1f} GiB a device)"))
    if "extend" in too_large and len(config.rollout.extend_buckets) > 1:
        shorter = " ".join(map(str, sorted(config.rollout.extend_buckets)[:-1]))
        lines.append((0.0, f"--rollout.extend-buckets {shorter} (smaller chunks of observations)"))
    return [*(text for _, text in sorted(lines, reverse=True)), _more_chips(config, work, topology)]


def _planned(config: RunConfig, topology: Topology, chosen: bool) -> Memory:
    """The memory of a run on its mesh, or on the one that is chosen for it.

    Raises:
        ValueError: the mesh does not divide its rows or slots, or no mesh does.
    """
    mesh = config.mesh
    if chosen:
        mesh = choose_mesh(demand(workload(config)), topology.num_devices, topology.memory)
    replicas = mesh.data * mesh.fsdp * mesh.expert
    work = workload(config, replicas)
    if work.layout.rows % replicas or work.slots % replicas:
        raise ValueError(f"expected rows and slots in multiples of {replicas}")
    return memory(work, mesh)


def _spoils(now: Memory, then: Memory, limit: float) -> bool:
    """Whether a program needs more than before and more than there is."""
    programs = ((now.learning, then.learning), (now.sampling, then.sampling))
    return any(after > max(before, limit) for before, after in programs)


_HIDDEN = ("batch.tokens_per_microbatch",)
"""Fields that `_changes` resets because they take precedence over another one; left out of the text."""


def _changes(config: RunConfig, work: Workload, mesh: MeshConfig) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields (changed fields by dotted name, a note in parentheses or nothing)."""
    shards, tensor = mesh.fsdp * mesh.expert, mesh.tensor
    replicas = mesh.data * shards
    learner, batch, rollout = config.learner, config.batch, config.rollout
    if learner.remat != "layers":
        yield {"learner.remat": "layers"}, ""
    if learner.moments != "bfloat16":
        yield {"learner.moments": "bfloat16"}, ""
    if not config.lora.rank:
        yield {"lora.rank": 16}, " (adapters alone are trained)"
    if config.sampling.weights == "model" and (config.lora.merge or not config.lora.rank):
        yield {"sampling.weights": "int8"}, ""
    if config.sampling.cache == "model":
        yield {"sampling.cache": "int8"}, ""
    if components.microbatch_rows(config) > replicas:
        yield {"batch.rows": replicas, "batch.tokens_per_microbatch": 0}, ""
    if batch.row_length > rollout.context_tokens:
        yield {"batch.row_length": 0}, f" (that is {rollout.context_tokens})"
    fewer = rollout.num_slots // 2
    if fewer % (replicas * rollout.num_cohorts) == 0 and fewer:
        yield {"rollout.num_slots": fewer}, ""
    if learner.kl_coefficient:
        yield {"learner.kl_coefficient": 0}, " (no reference policy)"
    if mesh.data > 1:
        yield {"mesh.data": 1, "mesh.fsdp": replicas // mesh.expert, "mesh.tensor": tensor}, ""
    mixture = work.model.mixture
    if mixture and mesh.fsdp % 2 == 0 and mixture.num_experts % (2 * mesh.expert) == 0:
        yield {"mesh.data": mesh.data, "mesh.fsdp": mesh.fsdp // 2, "mesh.expert": 2 * mesh.expert}, ""
    if mesh.data * mesh.fsdp % 2 == 0 and work.model.num_kv_heads % (2 * tensor) == 0:
        data, fsdp = (mesh.data // 2, mesh.fsdp) if mesh.data % 2 == 0 else (mesh.data, mesh.fsdp // 2)
        yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": 2 * tensor}, ""


def _more_chips(config: RunConfig, work: Workload, topology: Topology) -> str:
    """The number of chips that suffice on the mesh that is chosen for them, with more rows and slots where so many
    devices need them."""
    chips, rows = topology.num_chips, components.microbatch_rows(config)
    while chips < 4096:
        chips *= 2
        for factor in (1, 2, 4, 8, 16):
            values = {"batch.rows": factor * rows, "batch.tokens_per_microbatch": 0}
            slots = config.rollout.num_slots * max(1, factor * rows // work.slots)
            changed = override(config, values | {"rollout.num_slots": slots}) if factor > 1 else config
            try:
                wanted = demand(workload(changed))
                mesh = choose_mesh(wanted, chips * topology.chip.cores, topology.memory)
            except ValueError:
                continue
            if wanted.bytes_of(mesh) <= MEMORY_SHARE * topology.memory:
                options = f" with --batch.rows {factor * rows}" if factor > 1 else ""
                options += f" --rollout.num-slots {slots}" if slots != config.rollout.num_slots else ""
                return f"{chips} chips instead of {topology.num_chips}{options}"
            break
    return "devices with more memory"
