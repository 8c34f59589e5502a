"""Peer: Tunix's policy update (GRPO, AdamW) on a small Qwen3 with random weights; counterpart of benchmarks/learner.py.

  python -m venv peer && peer/bin/pip install google-tunix==0.1.7 jax==0.10.2 flax==0.12.8
  peer/bin/python tunix_learner.py [B P G]

A step is one call of its trainer on B rows of P prompt and G completion tokens, without a reference policy and without
logprobs of an old policy, until the new parameters are available. Two calls warm up, ten are timed. The script prints
one JSON line.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as q3
from tunix.rl import rl_cluster as rc
from tunix.rl.grpo import grpo_learner as gl
from tunix.rl.rollout import base_rollout


class NoTokenizer:
    """A tokenizer, which the trainer requires; only the three ids are used."""

    def encode(self, text, **_):
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids, **_):
        return ""

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


LAYERS, VOCAB, DIM, HEADS, KV, CALLS = 4, 4096, 256, 8, 4, 10
B, P, G = (int(word) for word in (sys.argv[1:4] or (16, 64, 128)))
sizes = {"num_heads": HEADS, "head_dim": DIM // HEADS, "num_kv_heads": KV, "rope_theta": 1_000_000, "norm_eps": 1e-6}
config = q3.ModelConfig(
    num_layers=LAYERS, vocab_size=VOCAB, embed_dim=DIM, hidden_dim=3 * DIM, use_tied_embedding=True, **sizes
)
mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
roles = dict.fromkeys((rc.Role.ACTOR, rc.Role.REFERENCE, rc.Role.ROLLOUT), mesh)
training = rc.RLTrainingConfig(actor_optimizer=optax.adamw(1e-6), eval_every_n_steps=10**9, max_steps=100)
rollout = base_rollout.RolloutConfig(max_tokens_to_generate=G, max_prompt_length=P, kv_cache_size=P + G + 8)
cluster = rc.ClusterConfig(
    role_to_mesh=roles, rollout_engine="vanilla", offload_to_cpu=False, training_config=training, rollout_config=rollout
)
with mesh:
    model = q3.Qwen3(config, rngs=nnx.Rngs(0))
    # The name depends on the version.
    make = getattr(rc, "RLEngine", None) or rc.RLCluster
    engine = make(actor=model, tokenizer=NoTokenizer(), cluster_config=cluster)
    gl.GRPOLearner(engine, gl.GRPOConfig(num_generations=4, beta=0.0), lambda prompts, completions, **_: [0.0])
    rng = np.random.default_rng(0)
    example = gl.TrainExample(
        prompt_ids=jnp.array(rng.integers(3, VOCAB, (B, P))),
        prompt_mask=jnp.ones((B, P), bool),
        completion_ids=jnp.array(rng.integers(3, VOCAB, (B, G))),
        completion_mask=jnp.ones((B, G), jnp.int32),
        advantages=jnp.array(rng.standard_normal(B).astype("f")),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    seconds = []
    for _ in range(CALLS + 2):
        start = time.perf_counter()
        engine.update_actor([example], None, False)
        jax.block_until_ready(jax.tree.leaves(nnx.state(engine.actor_trainer.model, nnx.Param)))
        seconds.append(time.perf_counter() - start)
line = {"peer": "tunix", "params": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))}
line |= {"batch": B, "prompt": P, "new_tokens": G}
line["train_step_s"] = {"best": min(seconds[2:]), "median": statistics.median(seconds[2:])}
print(json.dumps(line))
