"""The head in chunks of positions, so that the logits of all tokens are never in memory together.

If each term of a loss depends on one token's log-probability only, its gradient in that token's logits z is:

    dL/dz = dL/dlogp · (onehot(token) − softmax(z)) / temperature

and a term of the entropy H of its distribution (an entropy bonus) adds

    dL/dz = dL/dH · (−softmax(z) (log softmax(z) + H)) / temperature

The gradient follows from z directly, so the forward pass computes a chunk's gradients while its logits exist. A
backward pass over the chunks would compute all logits a second time.

On several devices the loop over chunks communicates nothing over data and fsdp. The head is gathered before the loop,
each shard of rows accumulates its loss, its stats and its part of the head's gradient, and the shards are summed after
the loop. (If the vocabulary is split over tensor, a few numbers per token are reduced inside the loop.) Without these
constraints, the partitioner gathers the head and sums its gradient in every chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.advantage import token_statistics
from aem_jax.learner.objective import EntropyObjective, Objective, Stats, Tokens

Array = jax.Array


def _unconstrained(x: Array) -> Array:
    return x


class HeadLayout(NamedTuple):
    """Sharding constraints for the loop over chunks; by default one device.

    Attributes:
        shards: number of parts into which the rows are split, each on separate devices; it divides the number of rows.
        gathered: for the head [D, V]: on every device, except for a split of V.
        per_shard: for arrays [shards, …] of one number per shard: each on the devices of its shard's rows.
        per_shard_head: for the shards' gradients of the head [shards, D, V]: likewise.
        gradient: for the head's final gradient [D, V].
    """

    shards: int = 1
    gathered: Callable[[Array], Array] = _unconstrained
    per_shard: Callable[[Array], Array] = _unconstrained
    per_shard_head: Callable[[Array], Array] = _unconstrained
    gradient: Callable[[Array], Array] = _unconstrained


def head_statistics(
    head: Array,
    hidden: Array,
    targets: Array,
    active: Array,
    *,
    temperature: float,
    chunk: int,
    layout: HeadLayout = HeadLayout(),  # noqa: B008
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of targets.

    Args:
        head: [D, V], in any dtype; cast to that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        active: bool[b, T], the positions to compute. Chunks without one cost nothing.
        temperature: divides the logits.
        chunk: positions of each row whose logits exist at one time.
        layout: sharding constraints.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 where not active. Not for differentiation.
    """
    weights = layout.gathered(head.astype(hidden.dtype))

    def compute(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        logprobs, entropies = token_statistics(_logits(x, weights, temperature), target)
        return jnp.where(mask, logprobs, 0.0), jnp.where(mask, entropies, 0.0)

    def skip(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        return jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, jnp.float32)

    def one(_: None, xs: tuple[Array, tuple[Array, Array, Array]]) -> tuple[None, tuple[Array, Array]]:
        return None, jax.lax.cond(xs[0], compute, skip, *xs[1])

    parts = _split((hidden, targets, active), chunk)
    _, parts = jax.lax.scan(one, None, (_any_active(parts[2]), parts))
    logprobs, entropies = (_join(part, targets.shape[1]) for part in parts)
    return logprobs, entropies


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def head_loss(
    objective: Objective,
    temperature: float,
    chunk: int,
    layout: HeadLayout,
    head: Array,
    hidden: Array,
    targets: Array,
    tokens: Tokens,
) -> tuple[Array, Stats]:
    """A loss of the targets' log-probabilities (and of entropies, with an `EntropyObjective`), and its stats.

    The gradients in `head` and `hidden` are computed together with the loss; none flows through the stats.

    Args:
        objective: the loss, a sum over tokens; each term depends only on the numbers of its own token.
        temperature: divides the logits.
        chunk: positions of each row whose logits exist at one time.
        layout: sharding constraints.
        head: [D, V], in any dtype; cast to that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        tokens: [b, T] each; chunks without a token in `tokens.mask` cost nothing.

    Returns:
        (loss f32[], stats).
    """
    settings = {"temperature": temperature, "chunk": chunk}
    logprobs, entropies = head_statistics(head, hidden, targets, tokens.mask, **settings, layout=layout)
    return objective(logprobs, entropies, tokens)


def _head_loss_forward(objective, temperature, chunk, layout, head, hidden, targets, tokens):
    targets, tokens = jax.tree.map(lambda leaf: leaf.value, (targets, tokens), is_leaf=_is_primal)
    trains_head = head.perturbed  # a frozen head needs no gradient
    head, hidden = head.value, hidden.value
    weights = layout.gathered(head.astype(hidden.dtype))

    @jax.vmap  # over shards of rows
    def compute(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        logits = _logits(x, weights, temperature)
        statistics = token_statistics(logits, target)
        logprobs, entropies = (jnp.where(tokens.mask, x, 0.0) for x in statistics)
        chunk_loss = lambda logprobs, entropies: objective(logprobs, entropies, tokens)
        variables = (0, 1) if isinstance(objective, EntropyObjective) else (0,)
        (loss, stats), slopes = jax.value_and_grad(chunk_loss, variables, has_aux=True)(logprobs, entropies)
        normaliser = jnp.take_along_axis(logits, target[..., None], axis=-1) - statistics[0][..., None]
        is_target = jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.bool_)
        d_logprob = (slopes[0] / temperature)[..., None]
        policy = jnp.exp(logits - normaliser)
        d_logits = d_logprob * (is_target - policy)
        if isinstance(objective, EntropyObjective):
            d_entropy = -policy * (logits - normaliser + statistics[1][..., None])
            d_logits = d_logits + (slopes[1] / temperature)[..., None] * d_entropy
        d_logits = jnp.where(tokens.mask[..., None], d_logits, 0.0).astype(x.dtype)
        d_head = None
        if trains_head:
            d_head = total[2] + jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("btv,dv->btd", d_logits, weights)
        return (total[0] + loss, _add(total[1], stats), d_head), d_hidden

    def skip(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        return total, jnp.zeros_like(x)

    def one(total: Any, xs: tuple[Array, tuple[Array, Array, Tokens]]) -> tuple[Any, Array]:
        return jax.lax.cond(xs[0], compute, skip, total, *xs[1])

    shards = layout.shards
    chunks = _split((hidden, targets, tokens), chunk)
    parts = jax.tree.map(lambda x: x.reshape(len(x), shards, -1, *x.shape[2:]), chunks)
    shapes = jax.eval_shape(objective, *(jnp.zeros(()),) * 2, jax.tree.map(lambda x: x[0, 0, 0], chunks[2]))
    zeros = jax.tree.map(lambda leaf: layout.per_shard(jnp.zeros((shards, *leaf.shape), leaf.dtype)), shapes)
    d_head = layout.per_shard_head(jnp.zeros((shards, *head.shape), jnp.float32)) if trains_head else None
    total, d_hidden = jax.lax.scan(one, (*zeros, d_head), (_any_active(chunks[2].mask), parts))
    loss, stats = jnp.sum(total[0]), _over_shards(total[1])
    d_head = layout.gradient(jnp.sum(total[2], axis=0)) if trains_head else None
    d_hidden = _join(d_hidden.reshape(chunks[0].shape), targets.shape[1])
    return (loss, stats), (d_head, d_hidden, jnp.zeros((), head.dtype))


def _head_loss_backward(objective, temperature, chunk, layout, residuals, cotangents):
    (d_head, d_hidden, like), (slope, _) = residuals, cotangents
    slope = jnp.zeros(()) if isinstance(slope, jax.custom_derivatives.SymbolicZero) else slope
    d_head = None if d_head is None else (slope * d_head).astype(like.dtype)
    return d_head, (slope.astype(d_hidden.dtype) * d_hidden), None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _logits(hidden: Array, weights: Array, temperature: float) -> Array:
    """f32[b, c, V], without rounding to the activations' dtype."""
    return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32) / temperature


def _add(total: Stats, chunk: Stats) -> Stats:
    return Stats(jax.tree.map(jnp.add, total.sums, chunk.sums), jax.tree.map(jnp.maximum, total.maxima, chunk.maxima))


def _over_shards(stats: Stats) -> Stats:
    """[shards] → []."""
    total, largest = (lambda x: jnp.sum(x, axis=0)), (lambda x: jnp.max(x, axis=0))
    return Stats(jax.tree.map(total, stats.sums), jax.tree.map(largest, stats.maxima))


def _any_active(mask: Array) -> Array:
    """bool[chunks] of [chunks, b, c]: computed before the loop, because it is a reduction over all devices."""
    return jnp.any(mask, axis=(1, 2))


def _split(arrays: Any, chunk: int) -> Any:
    """[b, T, …] → [T / chunk, b, chunk, …], padded with zeros."""

    def one(x: Array) -> Array:
        rows, length = x.shape[:2]
        size = min(chunk, length)
        count = -(-length // size)
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, size, *x.shape[2:]), 1, 0)

    return jax.tree.map(one, arrays)


def _join(parts: Array, length: int) -> Array:
    """The inverse of `_split`."""
    count, rows, size = parts.shape[:3]
    return jnp.moveaxis(parts, 0, 1).reshape(rows, count * size, *parts.shape[3:])[:, :length]
