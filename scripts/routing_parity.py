"""Parity of sampler and learner for random mixtures of experts, with and without routing replay.

python scripts/routing_parity.py        (prints a row of the table in docs/howto/experts.md for each mixture; a minute)
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.batch import Batch, BatchLayout, collate
from aem_jax.envs.protocol import Task
from aem_jax.learner import LearnerConfig
from aem_jax.learner.forward import forward_config
from aem_jax.learner.passes import rows_of, token_logprobs
from aem_jax.models import Mixture, ModelConfig, Params, Policy
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory, Turn

SLOTS, PROMPT, NEW = 8, 64, 64
MIXTURES = {(8, 2): 64, (64, 8): 16, (128, 8): 16}
"""(experts, experts per token) -> width of an expert."""


def play(policy: Policy, params: Params) -> Batch:
    """Random prompts and sampled responses."""
    sampler = Sampler(policy, SamplingConfig(), [0], capacity=PROMPT + NEW, slack=NEW, records_experts=True)
    prompts = np.random.default_rng(0).integers(1, policy.config.vocab_size, (SLOTS, PROMPT)).astype(np.int32)
    state = sampler.extend(params, sampler.init(SLOTS), prompts, np.full(SLOTS, PROMPT, np.int32))
    state, decoded = sampler.decode(params, state, np.full(SLOTS, NEW, np.int32), NEW)
    decoded, turns = jax.device_get(decoded), []
    for slot, prompt in enumerate(prompts):
        count = int(decoded.counts[slot])
        experts = np.asarray(sampler.read_experts(state, slot))[: PROMPT + count]
        sampled = (values[slot, :count] for values in (decoded.tokens, decoded.logprobs, decoded.entropies))
        turns.append(Turn(prompt, *sampled, 0.0, True, experts=experts))
    trajectories = [
        Trajectory(Task("t", "t", {}), 0, i, (turn,), Ending.TERMINATED, False) for i, turn in enumerate(turns)
    ]
    width, dtype = turns[0].experts.shape[1], turns[0].experts.dtype.name
    sizes = {"max_responses": SLOTS, "max_trajectories": SLOTS, "experts": width, "experts_dtype": dtype}
    return collate(trajectories, BatchLayout(1, SLOTS, PROMPT + NEW, **sizes))


def row(mixture: Mixture, width: int, dtype: str) -> str:
    """The row of a mixture of eight layers."""
    policy = Policy(ModelConfig(512, 128, width, 8, 4, 2, 32, mixture=mixture, dtype=dtype))
    params = policy.init(jax.random.key(0))
    params = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, policy.dtypes)
    forward = forward_config(policy, LearnerConfig(), make_mesh(MeshConfig(), jax.devices()[:1]))
    compute = jax.jit(lambda batch: token_logprobs(policy, forward, params, batch))
    batch = play(policy, params)
    sampled = batch.response_ids >= 0
    both = batch, replace(batch, experts=None)
    gaps = [np.abs(np.asarray(compute(rows)) - batch.logprobs)[sampled] for rows in both]
    rows = rows_of(jax.tree.map(jnp.asarray, batch), jnp.int32(0))
    _, load = policy.hidden(params, *rows[:3], recorded=rows.experts)
    assert load is not None
    numbers = [gap.mean() for gap in gaps] + [gap.max() for gap in gaps]
    cells = [f"{mixture.experts_per_token} of {mixture.num_experts}", dtype, f"{float(load.flips / load.choices):.2%}"]
    return " | ".join(["", *cells, *(f"{number:.1e}" for number in numbers), ""]).strip()


def main() -> None:
    """Prints the table."""
    print("| experts | dtype | flips | mean, replayed | mean, not | maximum, replayed | maximum, not |")
    for (experts, k), width in MIXTURES.items():
        for dtype in ("float32", "bfloat16"):
            print(row(Mixture(experts, k), width, dtype), flush=True)


if __name__ == "__main__":
    main()
