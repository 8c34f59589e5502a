"""The head and all that needs its logits, in chunks of positions: the logits of all tokens never exist together.

A loss that looks at one token's log-probability at a time has the gradient, in that token's logits,

    dL/dz = dL/dlogp · (onehot(token) − softmax(z)) / temperature

which is known as soon as z is: so a chunk's gradients are taken while its logits are there. Going back through the
chunks later would compute every one of them a second time.

On several devices the chunks' loop moves nothing over data and fsdp: the head is gathered before it, each device adds
up the loss, the measures and the head's gradient of its own rows, and what they found is summed after it. (What a
vocabulary split over tensor takes, a few numbers a token, stays inside.) Left to itself the partitioner gathers the
head and sums its gradient in every chunk.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.advantage import token_statistics
from aem_jax.learner.objective import Measures, Objective, Tokens

Array = jax.Array


def _as_is(x: Array) -> Array:
    return x


class HeadLayout(NamedTuple):
    """Where the head, its gradient and sums over rows lie while the loop over chunks runs; by default on one device.

    Attributes:
        shards: into how many parts the rows are split, each on devices of its own; it divides their number.
        whole: says that every device has all of the head [D, V], but for a split of V.
        apart: says of an array [shards, …] of one number for each part that it lies with that part's rows.
        apart_head: the same of the parts' gradients of the head [shards, D, V].
        gradient: says where the head's gradient [D, V] lies at last.
    """

    shards: int = 1
    whole: Callable[[Array], Array] = _as_is
    apart: Callable[[Array], Array] = _as_is
    apart_head: Callable[[Array], Array] = _as_is
    gradient: Callable[[Array], Array] = _as_is


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
        head: [D, V], in any dtype; used in that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        active: bool[b, T], where they are wanted. Chunks without one cost nothing.
        temperature: divides the logits.
        chunk: positions of each row whose logits exist at one time.
        layout: where things lie on the mesh.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 where not active. No gradient is meant to flow through them.
    """
    weights = layout.whole(head.astype(hidden.dtype))

    def compute(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        found = token_statistics(_logits(x, weights, temperature), target)
        return jnp.where(mask, found[0], 0.0), jnp.where(mask, found[1], 0.0)

    def skip(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        return jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, jnp.float32)

    def one(_: None, xs: tuple[Array, tuple[Array, Array, Array]]) -> tuple[None, tuple[Array, Array]]:
        return None, jax.lax.cond(xs[0], compute, skip, *xs[1])

    parts = _split((hidden, targets, active), chunk)
    _, parts = jax.lax.scan(one, None, (_anything(parts[2]), parts))
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
) -> tuple[Array, Measures]:
    """A loss of the targets' log-probabilities, and what is measured beside it.

    Its gradient flows into `head` and `hidden`, computed together with the loss; none flows through the measures.

    Args:
        objective: the loss, a sum over tokens of which each looks at its own numbers alone.
        temperature: divides the logits.
        chunk: positions of each row whose logits exist at one time.
        layout: where things lie on the mesh.
        head: [D, V], in any dtype; used in that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        tokens: [b, T] each; chunks without a token in `tokens.mask` cost nothing.

    Returns:
        (loss f32[], measures).
    """
    settings = {"temperature": temperature, "chunk": chunk}
    logprobs, entropies = head_statistics(head, hidden, targets, tokens.mask, **settings, layout=layout)
    return objective(logprobs, entropies, tokens)


def _head_loss_forward(objective, temperature, chunk, layout, head, hidden, targets, tokens):
    targets, tokens = jax.tree.map(lambda leaf: leaf.value, (targets, tokens), is_leaf=_is_primal)
    learns = head.perturbed  # a frozen head has no gradient, and should not cost one
    head, hidden = head.value, hidden.value
    weights = layout.whole(head.astype(hidden.dtype))

    @jax.vmap  # over the parts of the rows
    def compute(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        logits = _logits(x, weights, temperature)
        found = token_statistics(logits, target)
        logprobs, entropies = (jnp.where(tokens.mask, each, 0.0) for each in found)
        part = lambda logprobs: objective(logprobs, entropies, tokens)
        (loss, measures), slope = jax.value_and_grad(part, has_aux=True)(logprobs)
        normaliser = jnp.take_along_axis(logits, target[..., None], axis=-1) - found[0][..., None]
        is_target = jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.bool_)
        back = (slope / temperature)[..., None] * (is_target - jnp.exp(logits - normaliser))
        back = jnp.where(tokens.mask[..., None], back, 0.0).astype(x.dtype)
        d_head = total[2] + jnp.einsum("btd,btv->dv", x, back, preferred_element_type=jnp.float32) if learns else None
        d_hidden = jnp.einsum("btv,dv->btd", back, weights)
        return (total[0] + loss, _add(total[1], measures), d_head), d_hidden

    def skip(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        return total, jnp.zeros_like(x)

    def one(total: Any, xs: tuple[Array, tuple[Array, Array, Tokens]]) -> tuple[Any, Array]:
        return jax.lax.cond(xs[0], compute, skip, total, *xs[1])

    shards = layout.shards
    chunks = _split((hidden, targets, tokens), chunk)
    parts = jax.tree.map(lambda x: x.reshape(len(x), shards, -1, *x.shape[2:]), chunks)
    shapes = jax.eval_shape(objective, *(jnp.zeros(()),) * 2, jax.tree.map(lambda x: x[0, 0, 0], chunks[2]))
    zeros = jax.tree.map(lambda leaf: layout.apart(jnp.zeros((shards, *leaf.shape), leaf.dtype)), shapes)
    d_head = layout.apart_head(jnp.zeros((shards, *head.shape), jnp.float32)) if learns else None
    total, d_hidden = jax.lax.scan(one, (*zeros, d_head), (_anything(chunks[2].mask), parts))
    loss, measures = jnp.sum(total[0]), _over_parts(total[1])
    d_head = layout.gradient(jnp.sum(total[2], axis=0)) if learns else None
    d_hidden = _join(d_hidden.reshape(chunks[0].shape), targets.shape[1])
    return (loss, measures), (d_head, d_hidden, jnp.zeros((), head.dtype))


def _head_loss_backward(objective, temperature, chunk, layout, residuals, cotangents):
    (d_head, d_hidden, like), (slope, _) = residuals, cotangents
    slope = jnp.zeros(()) if isinstance(slope, jax.custom_derivatives.SymbolicZero) else slope
    d_head = None if d_head is None else (slope * d_head).astype(like.dtype)
    return d_head, (slope.astype(d_hidden.dtype) * d_hidden), None, None


head_loss.defvjp(_head_loss_forward, _head_loss_backward, symbolic_zeros=True)


def _is_primal(leaf: Any) -> bool:
    return isinstance(leaf, jax.custom_derivatives.CustomVJPPrimal)


def _logits(hidden: Array, weights: Array, temperature: float) -> Array:
    """f32[b, c, V], not rounded to the activations' dtype on the way."""
    return jnp.matmul(hidden, weights, preferred_element_type=jnp.float32) / temperature


def _add(total: Measures, part: Measures) -> Measures:
    return Measures(jax.tree.map(jnp.add, total.sums, part.sums), jax.tree.map(jnp.maximum, total.maxima, part.maxima))


def _over_parts(parts: Measures) -> Measures:
    """Of [shards] to []."""
    total = lambda each: jnp.sum(each, axis=0)
    return Measures(jax.tree.map(total, parts.sums), jax.tree.map(lambda each: jnp.max(each, axis=0), parts.maxima))


def _anything(mask: Array) -> Array:
    """bool[chunks] of [chunks, b, c]: asked before the loop, since the answer is found over all devices."""
    return jnp.any(mask, axis=(1, 2))


def _split(arrays: Any, chunk: int) -> Any:
    """[b, T, …] to [T / chunk, b, chunk, …], filled up with zeros."""

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
