"""What to change when a run does not fit: each way in the words of the command line, with what it would save."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from aem_jax.config import components
from aem_jax.config.run import RunConfig
from aem_jax.plan.analytic import Memory, memory
from aem_jax.plan.devices import GIB, Topology
from aem_jax.plan.workload import Workload, workload
from aem_jax.sharding import MEMORY_SHARE, MeshConfig

_LEAST = 0.02
"""Ways that save less than this share of a device's memory are not worth naming."""


def advise(
    config: RunConfig, work: Workload, mesh: MeshConfig, topology: Topology, too_large: Sequence[str]
) -> list[str]:
    """Ways to fit, those that save most first; the estimates are closed forms.

    Args:
        config: the run's.
        work: its sizes.
        mesh: over which it does not fit.
        topology: the target.
        too_large: programs during which memory does not suffice.
    """
    learning = any(name in ("update", "reshard") for name in too_large)
    need: Callable[[Memory], float] = (lambda each: each.total) if learning else (lambda each: each.resident)
    now = need(memory(work, mesh))
    ways = []
    for text, changed, shape in _ways(config, mesh):
        saved = now - need(memory(workload(changed, shape.data * shape.fsdp), shape))
        if saved > _LEAST * topology.memory:
            ways.append((saved, f"{text} (saves about {saved / GIB:.1f} GiB a device)"))
    if "extend" in too_large and len(config.rollout.extend_buckets) > 1:
        shorter = " ".join(map(str, sorted(config.rollout.extend_buckets)[:-1]))
        ways.append((0.0, f"--rollout.extend-buckets {shorter} (smaller chunks of observations)"))
    found = [text for _, text in sorted(ways, reverse=True)]
    return [*found, _more_chips(work, mesh, topology, need)]


def _ways(config: RunConfig, mesh: MeshConfig) -> Iterator[tuple[str, RunConfig, MeshConfig]]:
    """(what to write, the config then, the mesh then)."""
    replicas = mesh.data * mesh.fsdp
    learner, batch, rollout = config.learner, config.batch, config.rollout
    if learner.remat != "layers":
        yield "--learner.remat layers", replace(config, learner=replace(learner, remat="layers")), mesh
    if learner.moments != "bfloat16":
        yield "--learner.moments bfloat16", replace(config, learner=replace(learner, moments="bfloat16")), mesh
    if not config.lora.rank:
        adapters = replace(config, lora=replace(config.lora, rank=16))
        yield "--lora.rank 16 (adapters alone are trained)", adapters, mesh
    if config.sampling.weights == "model" and (config.lora.merge or not config.lora.rank):
        narrow = replace(config, sampling=replace(config.sampling, weights="int8"))
        yield "--sampling.weights int8", narrow, mesh
    if config.sampling.cache == "model":
        narrow = replace(config, sampling=replace(config.sampling, cache="int8"))
        yield "--sampling.cache int8", narrow, mesh
    if components.microbatch_rows(config) > replicas:
        fewer = replace(config, batch=replace(batch, rows=replicas, tokens_per_microbatch=0))
        yield f"--batch.rows {replicas}", fewer, mesh
    if batch.row_length > rollout.context_tokens:
        shorter = replace(config, batch=replace(batch, row_length=0))
        yield f"--batch.row-length 0 (that is {rollout.context_tokens})", shorter, mesh
    fewer = rollout.num_slots // 2
    if fewer % (replicas * rollout.num_cohorts) == 0 and fewer:
        yield f"--rollout.num-slots {fewer}", replace(config, rollout=replace(rollout, num_slots=fewer)), mesh
    if learner.kl_coefficient:
        without = replace(config, learner=replace(learner, kl_coefficient=0.0))
        yield "--learner.kl-coefficient 0 (no reference policy)", without, mesh
    if mesh.data > 1:
        spread = MeshConfig(1, replicas, mesh.tensor)
        yield f"--mesh.data 1 --mesh.fsdp {replicas} --mesh.tensor {mesh.tensor}", config, spread
    kv_heads = workload(config).model.num_kv_heads
    if replicas % 2 == 0 and kv_heads % (2 * mesh.tensor) == 0:
        data, fsdp = (mesh.data // 2, mesh.fsdp) if mesh.data % 2 == 0 else (mesh.data, mesh.fsdp // 2)
        more = MeshConfig(data, fsdp, 2 * mesh.tensor)
        yield f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.tensor {more.tensor}", config, more


def _more_chips(work: Workload, mesh: MeshConfig, topology: Topology, need: Callable[[Memory], float]) -> str:
    """How many chips would do as things are, if fsdp grew with them and rows and slots did not."""
    chips, fsdp = topology.num_chips, mesh.fsdp
    while chips < 4096:
        chips, fsdp = 2 * chips, 2 * fsdp
        if need(memory(work, MeshConfig(mesh.data, fsdp, mesh.tensor))) <= MEMORY_SHARE * topology.memory:
            return f"{chips} chips instead of {topology.num_chips}"
    return "devices with more memory"
