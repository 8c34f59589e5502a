"""Changes that make a run fit: options of the command line, with the memory that each saves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aem_jax.config import components
from aem_jax.config.run import RunConfig
from aem_jax.overrides import flag, override
from aem_jax.plan.analytic import Memory, memory
from aem_jax.plan.devices import GIB, Topology
from aem_jax.plan.workload import Workload, workload
from aem_jax.sharding import MEMORY_SHARE, MeshConfig

_LEAST = 0.02
"""Changes that save less than this fraction of a device's memory are left out."""


def advise(
    config: RunConfig, work: Workload, mesh: MeshConfig, topology: Topology, too_large: Sequence[str]
) -> list[str]:
    """Changes that make a run fit, the largest saving first; the estimates are closed forms.

    The saving of a change is the largest of its savings in the programs that are too large.

    Args:
        config: the run's.
        work: its sizes.
        mesh: the mesh on which it does not fit.
        topology: the target.
        too_large: programs that need more memory than there is.
    """
    needs = lambda memory: [memory.learning if name == "update" else memory.sampling for name in too_large]
    now, lines = needs(memory(work, mesh)), []
    for values, note in _changes(config, work, mesh):
        changed = override(replace(config, mesh=mesh), values)
        options = " ".join(f"{flag(name)} {value}" for name, value in values.items() if name not in _HIDDEN)
        replicas = changed.mesh.data * changed.mesh.fsdp * changed.mesh.expert
        then = needs(memory(workload(changed, replicas), changed.mesh))
        saved = max(before - after for before, after in zip(now, then, strict=True))
        if saved > _LEAST * topology.memory:
            lines.append((saved, f"{options}{note} (saves about {saved / GIB:.1f} GiB a device)"))
    if "extend" in too_large and len(config.rollout.extend_buckets) > 1:
        shorter = " ".join(map(str, sorted(config.rollout.extend_buckets)[:-1]))
        lines.append((0.0, f"--rollout.extend-buckets {shorter} (smaller chunks of observations)"))
    more_chips = _more_chips(work, mesh, topology, lambda memory: max(needs(memory)))
    return [*(text for _, text in sorted(lines, reverse=True)), more_chips]


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


def _more_chips(work: Workload, mesh: MeshConfig, topology: Topology, need: Callable[[Memory], float]) -> str:
    """The number of chips that suffice without other changes, if fsdp grows with them and rows and slots do not."""
    chips, fsdp = topology.num_chips, mesh.fsdp
    while chips < 4096:
        chips, fsdp = 2 * chips, 2 * fsdp
        if need(memory(work, replace(mesh, fsdp=fsdp))) <= MEMORY_SHARE * topology.memory:
            return f"{chips} chips instead of {topology.num_chips}"
    return "devices with more memory"
