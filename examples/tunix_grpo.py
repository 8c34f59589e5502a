"""AEM in Tunix's GRPO learner, through its registry of policy losses. Written for google-tunix 0.1.7.

    pip install google-tunix==0.1.7          # in addition to aem_jax
    python examples/tunix_grpo.py            # a tiny Qwen3 with random weights learns to write letters before "n"

Another Tunix program needs only `aem_grpo_loss` below and `GRPOConfig(policy_loss_fn="aem_grpo")`.

AEM is in the loss because Tunix's advantage estimators get only rewards, and its rollout returns no entropies. A loss
has access to the model. With one update per rollout (`num_iterations=1`, Tunix's default) the updated policy is the one
that sampled, so its logits give the entropies that α needs. A microbatch contains complete groups, because Tunix counts
its sizes in prompts. The cost is one more forward pass in the update, because Tunix's own loss does not return its
logits.

With `num_iterations` above 1 the policy changes between sampling and loss, and packed sequences mix groups: this loss
refuses both. In these cases, compute the entropies where Tunix computes its old logprobs (a subclass of `GRPOLearner`
that extends `_generate_and_compute_advantage`) and call the same `aem_scale`.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen3 import model as qwen3
from tunix.rl import algo_core, common, function_registry, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from aem_jax.advantage import aem_scale, token_statistics

STRENGTH = 1.0  # λ; 0 gives Tunix's GRPO unchanged


@function_registry.register_policy_loss_fn("aem_grpo")
def aem_grpo_loss(model, train_example, algo_config, pad_id, eos_id, **options):
    """Tunix's GRPO loss with advantages scaled by AEM (arXiv 2605.00425): A = α · A_base.

    Args:
        model: the policy, an nnx module.
        train_example: Tunix's, of complete groups: rows i·G … i·G + G − 1 answer one prompt, G = `num_generations`.
        algo_config: Tunix's GRPOConfig.
        pad_id: the tokenizer's.
        eos_id: the tokenizer's.
        options: further options that Tunix passes to its own loss.

    Returns:
        (loss, aux) as Tunix's `grpo_loss_fn`; aux also holds "aem/minimum" and "aem/maximum", of α.

    Raises:
        ValueError: the policy may have changed since sampling, or sequences are packed.
    """
    if train_example.old_per_token_logps is not None:
        raise ValueError("expected num_iterations=1, got several updates for a rollout: α needs entropies as sampled")
    if train_example.segment_ids is not None:
        raise ValueError("expected one response a row, got packed sequences; leave max_seq_token_per_tpu unset")
    completions, mask = train_example.completion_ids, train_example.completion_mask.astype(bool)
    _, logits = common.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=train_example.prompt_ids,
        completion_tokens=completions,
        pad_id=pad_id,
        eos_id=eos_id,
        return_logits=True,
        temperature=algo_config.temperature,
    )
    _, entropies = token_statistics(logits, completions)
    rows, size = len(completions), algo_config.num_generations
    groups = jnp.arange(rows) // size
    alpha = aem_scale(jnp.ones(rows), entropies, mask, groups, rows // size, strength=STRENGTH)
    scaled = dataclasses.replace(train_example, advantages=alpha * train_example.advantages)
    loss, aux = algo_core.grpo_loss_fn(model, scaled, algo_config, pad_id, eos_id, **options)
    return loss, aux | {"aem/minimum": alpha.min(), "aem/maximum": alpha.max()}


class Letters:
    """A tokenizer of 26 letters and the three ids that Tunix requires."""

    def encode(self, text, **_):
        return [ord(letter) - ord("a") + 3 for letter in text]

    def decode(self, ids, **_):
        return "".join(chr(int(i) + ord("a") - 3) for i in ids if i >= 3)

    def pad_id(self):
        return 0

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2


def share_of_early_letters(prompts, completions, **_):
    """Reward: number of letters before "n" in the alphabet, divided by 8, the maximum length."""
    return [sum(letter < "n" for letter in completion) / 8 for completion in completions]


def tiny_qwen3():
    """Returns a very small policy with random weights."""
    heads = {"num_heads": 2, "head_dim": 16, "num_kv_heads": 1, "rope_theta": 10_000, "norm_eps": 1e-6}
    sizes = {"num_layers": 2, "vocab_size": 29, "embed_dim": 32, "hidden_dim": 64, "use_tied_embedding": False}
    return qwen3.Qwen3(qwen3.ModelConfig(**sizes, **heads), rngs=nnx.Rngs(0))


def train(steps=20, policy_loss="aem_grpo", learning_rate=1e-2):
    """Trains a tiny Qwen3 on two prompts, 8 responses each; returns each step's mean reward and the range of α."""
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=8, max_prompt_length=4, kv_cache_size=16, temperature=1.0
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(learning_rate), eval_every_n_steps=10**9, max_steps=steps
    )
    roles = dict.fromkeys((rl_cluster.Role.ACTOR, rl_cluster.Role.REFERENCE, rl_cluster.Role.ROLLOUT), mesh)
    config = rl_cluster.ClusterConfig(role_to_mesh=roles, training_config=training, rollout_config=rollout)
    history = []

    def watch(prompts, completions, rewards, advantages, **_):
        history.append({"reward": float(np.mean(rewards))})
        return {}

    with mesh:
        cluster = rl_cluster.RLCluster(actor=tiny_qwen3(), tokenizer=Letters(), cluster_config=config)
        algorithm = grpo_learner.GRPOConfig(num_generations=8, beta=0.0, policy_loss_fn=policy_loss)
        learner = grpo_learner.GRPOLearner(cluster, algorithm, share_of_early_letters, metric_fns=[watch])
        names = ("aem/minimum", "aem/maximum") if policy_loss == "aem_grpo" else ()
        cluster.actor_trainer.with_rl_metrics_to_log(dict.fromkeys(names, np.mean))
        learner.train([{"prompts": np.array(["bc", "de"])} for _ in range(steps)])
    for name in names:
        values = cluster.actor_trainer.metrics_logger.get_metric_history("actor", name, "train")
        history = [line | {name: float(value)} for line, value in zip(history, values, strict=True)]
    return history


if __name__ == "__main__":
    for number, line in enumerate(train()):
        print(json.dumps({"step": number} | line))
