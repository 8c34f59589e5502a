"""One update of the policy: forward, backward and AdamW over full rows, half of whose tokens were sampled."""

import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aem_jax.batch import BatchConfig, BatchLayout, collate, place
from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.roofline import read, roofline
from aem_jax.bench.trace import profile
from aem_jax.config.components import known_model
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.models.kernels import Sizes, choose, device_of
from aem_jax.plan.analytic import head_parameters, memory, token_flops
from aem_jax.plan.costs import costs
from aem_jax.plan.workload import workload
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sharding import AXES, MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Task, Trajectory, Turn


def run(config: BenchConfig) -> list[Measurement]:
    """Tokens per second, of observations and responses; memory of a device, measured and as `plan` estimates it.

    Raises:
        ConfigError: an attention that this device does not have.
    """
    rows, length = config.slots, config.row_length
    policy, mesh, learner = Policy(known_model(config.model)), make_mesh(MeshConfig()), config.learner
    state = init_state(policy, learner, mesh, jax.random.key(0))
    layout = BatchLayout(1, rows, length, rows, rows)
    batch = place(collate([_episode(n, length, policy.config.vocab_size) for n in range(rows)], layout), mesh)
    advantages = jax.device_put(np.where(np.asarray(batch.response_ids) >= 0, 1.0, 0.0).astype(np.float32))

    try:
        choose(learner.attention, device_of(mesh), Sizes(length, 1, 1, 128, "bfloat16"))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    update = make_update(policy, learner, mesh).lower(state, batch, advantages, None).compile()

    def step() -> None:
        nonlocal state
        state, stats = update(state, state.frozen, batch, advantages, None)
        jax.block_until_ready((state, stats))

    seconds = timed(step, repeats=config.repeats)
    if config.trace:
        print(profile(step, config.trace, "learner-update"), file=sys.stderr, flush=True)
    model, work = policy.config, rows * length
    # Observation tokens need no head: the learner computes it for response tokens alone.
    unsaid = work - int(np.sum(batch.response_tokens))
    useful = token_flops(model, length) * work - 6.0 * head_parameters(model) * unsaid
    line = roofline(costs(read(update)), ceilings(model.dtype), useful=useful / jax.device_count())
    shape = f"{config.model}, {rows} rows × {length}"
    usual = LearnerConfig()
    for name in ("remat", "attention"):
        if getattr(learner, name) != getattr(usual, name):
            shape += f", {name} {getattr(learner, name)}"
    facts = _memory(update, model, config, mesh)
    return [summarise("learner", "update", shape, "tokens/s", work, seconds, roofline=line, facts=facts)]


def _memory(update: jax.stages.Compiled, model: ModelConfig, config: BenchConfig, mesh: Mesh) -> dict[str, float]:
    """GiB of a device: what the compiled update takes, and what `plan` estimates of the same parts."""
    found: Any = update.memory_analysis()
    taken = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    work = workload(_as_run(config), model=model)
    planned = memory(work, MeshConfig(*(mesh.shape[axis] for axis in AXES)))
    parts = planned.parameters + planned.optimizer + planned.gradients + planned.working
    return {"memory_gib": (taken + found.temp_size_in_bytes) / 2**30, "planned_gib": parts / 2**30}


def _as_run(config: BenchConfig) -> RunConfig:
    """A run whose microbatches are this batch."""
    half = max(config.row_length // 2, 1)
    rollout = RolloutConfig(
        groups_per_step=config.slots,
        group_size=1,
        num_slots=config.slots,
        max_turns=1,
        response_tokens=half,
        context_tokens=2 * half,
        prompt_tokens=half,
    )
    batch = BatchConfig(rows=config.slots, row_length=config.row_length)
    return RunConfig(rollout=rollout, batch=batch, learner=config.learner)


def _episode(seed: int, length: int, vocab_size: int) -> Trajectory:
    """One turn that fills a row: half observation, half response."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, length).astype(np.int32)
    half = max(length // 2, 1)
    said = np.full(length - half, np.log(1 / vocab_size), np.float32)
    turn = Turn(ids[:half], ids[half:], said, -said, 0.0, True)
    return Trajectory(Task(f"bench-{seed}", "bench", {}), 0, seed, (turn,), Ending.TERMINATED, False)
