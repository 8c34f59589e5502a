"""The head and all that needs its logits, in chunks of positions: the logits of all tokens never exist together.

A loss that looks at one token's log-probability at a time has the gradient, in that token's logits,

    dL/dz = dL/dlogp · (onehot(token) − softmax(z)) / temperature

which is known as soon as z is: so a chunk's gradients are taken while its logits are there. Going back through the
chunks later would compute every one of them a second time.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from aem_jax.advantage import token_statistics
from aem_jax.learner.objective import Measures, Objective, Tokens

Array = jax.Array


def head_statistics(
    head: Array, hidden: Array, targets: Array, active: Array, *, temperature: float, chunk: int
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of targets.

    Args:
        head: [D, V], in any dtype; used in that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        active: bool[b, T], where they are wanted. Chunks without one cost nothing.
        temperature: divides the logits.
        chunk: positions of each row whose logits exist at one time.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 where not active. No gradient is meant to flow through them.
    """
    weights = head.astype(hidden.dtype)

    def compute(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        found = token_statistics(_logits(x, weights, temperature), target)
        return jnp.where(mask, found[0], 0.0), jnp.where(mask, found[1], 0.0)

    def skip(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        return jnp.zeros(mask.shape, jnp.float32), jnp.zeros(mask.shape, jnp.float32)

    def one(_: None, xs: tuple[Array, Array, Array]) -> tuple[None, tuple[Array, Array]]:
        return None, jax.lax.cond(jnp.any(xs[2]), compute, skip, *xs)

    _, parts = jax.lax.scan(one, None, _split((hidden, targets, active), chunk))
    logprobs, entropies = (_join(part, targets.shape[1]) for part in parts)
    return logprobs, entropies


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def head_loss(
    objective: Objective,
    temperature: float,
    chunk: int,
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
        head: [D, V], in any dtype; used in that of `hidden`.
        hidden: [b, T, D].
        targets: i32[b, T], in [0, V).
        tokens: [b, T] each; chunks without a token in `tokens.mask` cost nothing.

    Returns:
        (loss f32[], measures).
    """
    settings = {"temperature": temperature, "chunk": chunk}
    logprobs, entropies = head_statistics(head, hidden, targets, tokens.mask, **settings)
    return objective(logprobs, entropies, tokens)


def _head_loss_forward(objective, temperature, chunk, head, hidden, targets, tokens):
    targets, tokens = jax.tree.map(lambda leaf: leaf.value, (targets, tokens), is_leaf=_is_primal)
    learns = head.perturbed  # a frozen head has no gradient, and should not cost one
    head, hidden = head.value, hidden.value
    weights = head.astype(hidden.dtype)

    def compute(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        logits = _logits(x, weights, temperature)
        found = token_statistics(logits, target)
        logprobs, entropies = (jnp.where(tokens.mask, each, 0.0) for each in found)
        part = lambda logprobs: objective(logprobs, entropies, tokens)  # noqa: E731
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

    def one(total: Any, xs: tuple[Array, Array, Tokens]) -> tuple[Any, Array]:
        return jax.lax.cond(jnp.any(xs[2].mask), compute, skip, total, *xs)

    parts = _split((hidden, targets, tokens), chunk)
    shapes = jax.eval_shape(objective, *(jnp.zeros(()),) * 2, jax.tree.map(lambda x: x[0, 0, 0], parts[2]))
    loss, measures = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    d_head = jnp.zeros(head.shape, jnp.float32) if learns else None
    (loss, measures, d_head), d_hidden = jax.lax.scan(one, (loss, measures, d_head), parts)
    return (loss, measures), (d_head, _join(d_hidden, targets.shape[1]), jnp.zeros((), head.dtype))


def _head_loss_backward(objective, temperature, chunk, residuals, cotangents):
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
