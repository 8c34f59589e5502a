"""One forward pass over packed rows: log-probabilities and entropies of sampled tokens, a loss of them, and values.

Only sampled tokens need logits, and most tokens of an agent's row are observations. So the positions that predict a
sampled token are moved to the front of their row, and chunks of positions without one are skipped. With a vocabulary of
150k and one token in five sampled, this saves four fifths of the head's cost.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.head import HeadLayout, head_loss, head_statistics
from aem_jax.learner.objective import Objective, Stats, Tokens
from aem_jax.learner.state import TrainablePolicy
from aem_jax.learner.value import ValueObjective, ValueTokens
from aem_jax.models import Params
from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.experts import PRODUCT, Experts, Load
from aem_jax.models.kernels import make_row_attention
from aem_jax.sharding import TRAIN, partition, slot_shards

REMAT: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "layers": jax.checkpoint_policies.nothing_saveable,
    # By name: the matrix products define their own gradients, and policies by operation do not look inside those.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
"""Name → the part of a layer that `jax.checkpoint` keeps; None keeps everything."""


class Rows(NamedTuple):
    """The rows of one microbatch, i32[b, T] each; see `Batch`.

    Attributes:
        experts: integers [b, T, E], recorded experts; None to route by the policy's own router.
    """

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    response_ids: jax.Array
    experts: Any = None


@dataclass(frozen=True)
class ForwardConfig:
    """Settings of a forward pass; by default on one device.

    Attributes:
        temperature: the sampler's; divides the logits.
        head_chunk: positions of each row whose logits are in memory at one time.
        remat: the part of each layer that is kept for the backward pass (`REMAT`).
        constrain: sharding constraint on hidden states [b, T, D].
        attention: attention over rows.
        head: shardings of the head and of its gradient.
        experts: the products of a mixture's experts; None without one.
    """

    temperature: float
    head_chunk: int
    remat: Callable[..., Any] | None = None
    constrain: Callable[[jax.Array], jax.Array] | None = None
    attention: RowAttention = row_attention
    head: HeadLayout = HeadLayout()  # noqa: RUF009  (immutable)
    experts: Experts | None = None


def forward_config(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh) -> ForwardConfig:
    """The settings of the learner's forward passes on a mesh."""

    # Rows stay split over data and fsdp. Without this constraint, the partitioner takes the sharding of the embedding's
    # weights, and sums activations over fsdp in every layer instead of gathering the layer's weights.
    def constrained_to(*axes: str | None) -> Callable[[jax.Array], jax.Array]:
        sharding = NamedSharding(mesh, partition(axes, TRAIN))
        return lambda x: jax.lax.with_sharding_constraint(x, sharding)

    return ForwardConfig(
        temperature=config.temperature,
        head_chunk=config.head_chunk,
        remat=REMAT[config.remat],
        constrain=constrained_to("rows", "length", None),
        attention=make_row_attention(config.attention, mesh),
        head=HeadLayout(
            shards=slot_shards(mesh),
            vocab_shards=mesh.shape["tensor"],
            gathered=constrained_to(None, "vocab"),
            per_shard=constrained_to("rows"),
            per_shard_head=constrained_to("rows", None, "vocab"),
            gradient=constrained_to("embed", "vocab"),
        ),
        experts=policy.experts(mesh),
    )


def row_statistics(
    policy: TrainablePolicy, params: Params, rows: Rows, config: ForwardConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every sampled token, and the entropy of the distribution that it was sampled from.

        logits_t = head(hidden_{t-1}) / temperature

    Args:
        policy: the policy.
        params: its parameters.
        rows: packed rows; a segment never begins with a sampled token.
        config: settings of the forward pass.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 outside responses. Not differentiable; `row_loss` is.
    """
    order = _SampledFirst(rows)
    hidden, _ = _hidden(policy, params, rows, order, config)
    settings = {"temperature": config.temperature, "chunk": config.head_chunk, "layout": config.head}
    targets, active = order.of_tokens(rows.tokens), order.of_tokens(rows.response_ids >= 0)
    logprobs, entropies = head_statistics(policy.head(params), hidden, targets, active, **settings)
    return order.undo(logprobs), order.undo(entropies)


def row_loss(
    policy: TrainablePolicy,
    params: Params,
    rows: Rows,
    tokens: Tokens,
    objective: Objective,
    config: ForwardConfig,
    sequence: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    value: tuple[ValueObjective, ValueTokens] | None = None,
    balance: jax.Array | None = None,
) -> tuple[jax.Array, Stats]:
    """A loss of the sampled tokens' log-probabilities, differentiable in the parameters.

        L = objective(logprobs, entropies, tokens),   logprobs and entropies as of `row_statistics`

    Args:
        policy: the policy.
        params: its parameters.
        rows: packed rows; a segment never begins with a sampled token.
        tokens: the loss's inputs for each token, [b, T]; mask is False outside responses.
        objective: a sum over tokens; each term depends only on the numbers of its own token.
        config: settings of the forward pass.
        sequence: (logprobs, logprobs as sampled, response ids), [b, T] each, in permuted order -> f32[b, T], the
            log-ratios for `tokens.sequence`. It computes the head of all sampled tokens once more, without gradient.
        value: the value loss to add, and its inputs for each token; the policy then has a value head.
        balance: f32[], weight of `balancing_loss` for each token; None for none.

    Returns:
        (loss f32[], stats); no gradient flows through the stats.
    """
    order = _SampledFirst(rows)
    hidden, load = _hidden(policy, params, rows, order, config)
    head, targets, tokens = policy.head(params), order.of_tokens(rows.tokens), jax.tree.map(order.of_tokens, tokens)
    if sequence is not None:
        settings = {"temperature": config.temperature, "chunk": config.head_chunk, "layout": config.head}
        constants = jax.lax.stop_gradient(head), jax.lax.stop_gradient(hidden)
        logprobs, _ = head_statistics(*constants, targets, tokens.mask, **settings)
        tokens = tokens._replace(sequence=sequence(logprobs, tokens.logprobs, order.of_tokens(rows.response_ids)))
    settings = config.temperature, config.head_chunk, config.head
    policy_loss: tuple[jax.Array, Stats] = head_loss(objective, *settings, head, hidden, targets, tokens)
    loss, stats = policy_loss
    if load is not None:
        stats = stats._replace(sums=stats.sums | load_sums(load, replayed=rows.experts is not None))
        if balance is not None:
            loss = loss + balance * load.tokens * balancing_loss(load)
    if value is None:
        return loss, stats
    value_objective, value_tokens = value
    value_tokens = ValueTokens(*map(order.of_tokens, value_tokens))
    value_loss, stats = value_objective(policy, params, hidden, value_tokens, stats)
    return loss + value_loss, stats


def row_values(policy: TrainablePolicy, params: Params, rows: Rows, config: ForwardConfig) -> jax.Array:
    """Value of the state after each position, f32[b, T], in units of reward; undefined in padding."""
    return policy.values(params, _hidden_of_rows(policy, params, rows, config, None)[0])


def _hidden_of_rows(
    policy: TrainablePolicy, params: Params, rows: Rows, config: ForwardConfig, remat: Callable[..., Any] | None
) -> tuple[jax.Array, Load | None]:
    """[b, T, D], and the load of a mixture's experts."""
    settings, mixture = (remat, config.constrain, config.attention), {"experts": config.experts}
    return policy.hidden(params, *rows[:3], *settings, **mixture, recorded=rows.experts)


def _hidden(
    policy: TrainablePolicy, params: Params, rows: Rows, order: "_SampledFirst", config: ForwardConfig
) -> tuple[jax.Array, Load | None]:
    """[b, T, D], the positions that predict a sampled token first; and the load of a mixture's experts."""
    hidden, load = _hidden_of_rows(policy, params, rows, config, config.remat)
    hidden = order.of_positions(hidden)
    return hidden if config.constrain is None else config.constrain(hidden), load


def balancing_loss(load: Load) -> jax.Array:
    """A loss that is least, 1, where the router spreads tokens evenly over experts (Fedus et al., arXiv 2101.03961).

        L = mean over layers of  E Σ_e f_e P_e

    f_e is the share of choices that are expert e, without gradient; P_e is its mean probability. Both are over the
    tokens of a microbatch, so this loss alone depends on how tokens are packed.
    """
    chosen = load.counts / jnp.maximum(jnp.sum(load.counts, axis=-1, keepdims=True), 1.0)
    probabilities = load.probabilities / jnp.maximum(load.tokens, 1.0)
    return load.counts.shape[-1] * jnp.mean(jnp.sum(jax.lax.stop_gradient(chosen) * probabilities, axis=-1))


def load_sums(load: Load, *, replayed: bool) -> dict[str, jax.Array]:
    """What `expert_metrics` needs, as sums over microbatches: f32[L, E] and f32[]."""
    sums = {"expert_counts": load.counts, "expert_choices": load.choices, "expert_flips": load.flips}
    return jax.lax.stop_gradient(sums if replayed else {name: sums[name] for name in sums if name != "expert_flips"})


def expert_metrics(metrics: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The load of a mixture's experts, from sums [optimizer steps, …] of `load_sums`; empty without them."""
    if "expert_counts" not in metrics:
        return {}
    counts, choices = jnp.sum(metrics["expert_counts"], axis=0), metrics["expert_choices"]
    share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0), axis=-1)
    results = {
        "expert_load_max": jnp.mean(jnp.max(share, axis=-1)) * counts.shape[-1],
        "expert_entropy": jnp.mean(entropy),
        "expert_dropped": jnp.sum(choices) - jnp.sum(counts),
    }
    if "expert_flips" in metrics:  # of the first optimizer step, before any update
        results["parity_flips"] = metrics["expert_flips"][0] / jnp.maximum(choices[0], 1.0)
    return results


class _SampledFirst:
    """A permutation of each row's positions: those that predict a sampled token come first.

    Position t predicts token t + 1. The roll never wraps a sampled token, since token 0 of a row is not sampled.
    """

    def __init__(self, rows: Rows):
        predicts = jnp.roll(rows.response_ids, -1, axis=1) >= 0
        self._order = jnp.argsort(~predicts, axis=1, stable=True)
        self._inverse = jnp.argsort(self._order, axis=1)

    def of_positions(self, x: jax.Array) -> jax.Array:
        """[b, T, …] of positions, in the new order."""
        return _permute(x, self._order, self._inverse)

    def of_tokens(self, x: jax.Array) -> jax.Array:
        """[b, T] of tokens, each at the position that predicts it, in the new order."""
        return jnp.take_along_axis(jnp.roll(x, -1, axis=1), self._order, axis=1)

    def undo(self, x: jax.Array) -> jax.Array:
        """The inverse of `of_tokens`."""
        return jnp.roll(jnp.take_along_axis(x, self._inverse, axis=1), 1, axis=1)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[b, order[b, t]]. The gradient is the inverse permutation: a gather, where autodiff would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), inverse


def _permute_backward(inverse, cotangent):
    return jnp.take_along_axis(cotangent, inverse[..., None], axis=1), None, None


_permute.defvjp(_permute_forward, _permute_backward)
