"""Token log-probabilities and entropies of packed rows, the learner's way.

The logits of all tokens never exist together: the head runs over chunks of positions, and the backward pass computes
each chunk again. Only sampled tokens need logits, and most tokens of an agent's row are observations; so the positions
that predict a sampled token are moved to the front of their row, and chunks with none of them are skipped. With a
vocabulary of 150k and one token in five sampled, that is four fifths of the head's cost.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.advantage import token_statistics
from aem_jax.learner.state import Params, TrainablePolicy
from aem_jax.models.attention import RowAttention, row_attention

REMAT: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "layers": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Name → what `jax.checkpoint` keeps of a layer; None keeps everything."""


class Rows(NamedTuple):
    """The rows of one microbatch, i32[b, T] each; see `Batch`."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    response_ids: jax.Array


def row_statistics(
    policy: TrainablePolicy,
    params: Params,
    rows: Rows,
    *,
    temperature: float,
    head_chunk: int,
    remat: Callable[..., Any] | None = None,
    constrain: Callable[[jax.Array], jax.Array] | None = None,
    attention: RowAttention = row_attention,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every sampled token, and the entropy of the distribution that it was drawn from.

        logits_t = head(hidden_{t-1}) / temperature

    Args:
        policy: the policy.
        params: its parameters.
        rows: packed rows; a segment never begins with a sampled token.
        temperature: the sampler's.
        head_chunk: positions of each row whose logits exist at one time.
        remat: what to keep of each layer for the backward pass (`REMAT`).
        constrain: says where hidden states [b, T, D] lie on the mesh.
        attention: of the rows.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 outside responses. No gradient flows through the entropies.
    """
    hidden = policy.hidden(params, rows.tokens, rows.positions, rows.segment_ids, remat, constrain, attention)
    # Position t predicts token t + 1. Nothing wraps round: token 0 of a row is never a sampled one.
    predicts = jnp.roll(rows.response_ids, -1, axis=1) >= 0
    targets = jnp.roll(rows.tokens, -1, axis=1)
    order = jnp.argsort(~predicts, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    front = _permute(hidden, order, place)
    logprobs, entropies = _chunked_head(
        lambda x: policy.logits(params, x) / temperature,
        front,
        jnp.take_along_axis(targets, order, axis=1),
        jnp.take_along_axis(predicts, order, axis=1),
        head_chunk,
    )
    back = lambda x: jnp.roll(jnp.take_along_axis(x, place, axis=1), 1, axis=1)  # noqa: E731
    return back(logprobs), back(entropies)


def _chunked_head(
    head: Callable[[jax.Array], jax.Array], hidden: jax.Array, targets: jax.Array, active: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Statistics f32[b, T] of hidden [b, T, D], 0 where not active; chunks without an active position cost nothing."""
    rows, length = targets.shape
    chunk = min(chunk, length)
    count = -(-length // chunk)
    spare = count * chunk - length

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, chunk, *x.shape[2:]), 1, 0)

    def compute(x: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        logprobs, entropies = token_statistics(head(x), target)
        return jnp.where(mask, logprobs, 0.0), jax.lax.stop_gradient(jnp.where(mask, entropies, 0.0))

    def skip(x: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, jnp.float32)

    @jax.checkpoint
    def one(x: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.cond(jnp.any(mask), compute, skip, x, target, mask)

    _, parts = jax.lax.scan(lambda _, xs: (None, one(*xs)), None, (split(hidden), split(targets), split(active)))
    logprobs, entropies = (jnp.moveaxis(x, 0, 1).reshape(rows, count * chunk)[:, :length] for x in parts)
    return logprobs, entropies


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[b, order[b, t]]. The gradient is the inverse permutation: a gather, where autodiff would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), inverse


def _permute_backward(inverse, cotangent):
    return jnp.take_along_axis(cotangent, inverse[..., None], axis=1), None, None


_permute.defvjp(_permute_forward, _permute_backward)
