"""The update of the policy, and the credit before it.

The update is forward, backward and AdamW over full rows, in which half of the tokens were sampled. Credit is GRPO with
AEM's coefficient and the broadcast to tokens.
"""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.advantage import aem_coefficients, grpo, over_trajectories, response_entropy, token_advantages
from aem_jax.batch import BatchConfig, BatchLayout, collate, place
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement, summarise, timed
from aem_jax.bench.trace import profile
from aem_jax.config.components import known_model
from aem_jax.config.run import RunConfig
from aem_jax.envs.protocol import Task
from aem_jax.errors import ConfigError
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.models.kernels import Sizes, choose, device_of
from aem_jax.plan.analytic import head_parameters, memory, token_flops
from aem_jax.plan.costs import costs
from aem_jax.plan.hlo import read
from aem_jax.plan.workload import workload
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sharding import AXES, MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory, Turn

RESPONSE_TOKENS = 64
"""Tokens of a response in the benchmark of credit."""


def measure_update(config: BenchConfig) -> list[Measurement]:
    """Tokens per second, of observations and responses; memory of a device, as compiled and as `plan` estimates it.

    The roofline counts the head at all tokens, although the program skips chunks without a response: 8 % of the FLOPs
    at 1.5B, 16 % at 0.5B. The MFU does not.

    Raises:
        ConfigError: this device has no such attention.
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
    # The learner computes the head for response tokens alone.
    observed = work - int(np.sum(batch.response_tokens))
    useful = token_flops(model, length) * work - 6.0 * head_parameters(model) * observed
    shape = f"{config.model}, {rows} rows × {length}"
    default = LearnerConfig()
    for name in ("remat", "attention"):
        if getattr(learner, name) != getattr(default, name):
            shape += f", {name} {getattr(learner, name)}"
    return [
        summarise(
            "learner",
            "update",
            shape,
            "tokens/s",
            work,
            seconds,
            cost=costs(read(update)),
            dtype=model.dtype,
            useful=useful / jax.device_count(),
            facts=_memory(update, model, config, mesh),
        )
    ]


def _memory(update: jax.stages.Compiled, model: ModelConfig, config: BenchConfig, mesh: Mesh) -> dict[str, float]:
    """GiB of a device that the compiled update takes, and the estimate of `plan` for the same parts."""
    sizes: Any = update.memory_analysis()
    taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    work = workload(_as_run(config), model=model)
    planned = memory(work, MeshConfig(*(mesh.shape[axis] for axis in AXES)))
    parts = planned.parameters + planned.optimizer + planned.gradients + planned.working
    return {"memory_gib": (taken + sizes.temp_size_in_bytes) / 2**30, "planned_gib": parts / 2**30}


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
    logprobs = np.full(length - half, np.log(1 / vocab_size), np.float32)
    turn = Turn(ids[:half], ids[half:], logprobs, -logprobs, 0.0, True)
    return Trajectory(Task(f"bench-{seed}", "bench", {}), 0, seed, (turn,), Ending.TERMINATED, False)


def measure_credit(config: BenchConfig) -> list[Measurement]:
    """Tokens per second, without and with AEM."""
    trajectories, turns = config.trajectories, config.turns
    num_groups, responses = trajectories // 8, trajectories * turns
    returns = jax.random.bernoulli(jax.random.key(0), 0.5, (trajectories,)).astype(jnp.float32)
    entropies = jax.random.uniform(jax.random.key(1), (trajectories, turns * RESPONSE_TOKENS))
    ids = jnp.arange(responses).repeat(RESPONSE_TOKENS).reshape(trajectories, turns * RESPONSE_TOKENS)
    groups = jnp.arange(trajectories) // 8
    trajectory_ids = jnp.arange(responses) // turns
    shape = f"{trajectories} episodes × {turns} turns × {RESPONSE_TOKENS} tokens"

    @partial(jax.jit, static_argnames="with_aem")
    def credit(returns, entropies, *, with_aem: bool):
        advantages = over_trajectories(grpo, returns, groups, num_groups, trajectory_ids)
        if with_aem:
            entropy = response_entropy(entropies, ids, responses)
            advantages = advantages * aem_coefficients(entropy, groups[trajectory_ids], num_groups)
        return token_advantages(advantages, ids)

    def measure(label: str, with_aem: bool) -> Measurement:
        call = lambda: credit(returns, entropies, with_aem=with_aem).block_until_ready()
        seconds = timed(call, repeats=config.repeats)
        cost = costs(read(credit.lower(returns, entropies, with_aem=with_aem).compile()))
        return summarise("advantage", label, shape, "tokens/s", responses * RESPONSE_TOKENS, seconds, cost=cost)

    return [measure("GRPO", False), measure("GRPO + AEM", True)]
