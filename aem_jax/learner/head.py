"""The head in chunks of positions, so that the logits of all tokens are never in memory together.

If each term of a loss depends on one token's log-probability only, its gradient in that token's logits z is:

    dL/dz = dL/dlogp · (onehot(token) − softmax(z)) / temperature

and a term of the entropy H of its distribution (an entropy bonus) adds

    dL/dz = dL/dH · (−softmax(z) (log softmax(z) + H)) / temperature

The gradient follows from z directly, so the forward pass computes a chunk's gradients while its logits exist. A
backward pass over the chunks would compute all logits a second time.

Where the logits of a chunk would take more than `LOGIT_BYTES` on a device, the vocabulary is split, too. A first pass
over its parts sums up exponentials, relative to the largest logit so far (m, rescaled when it grows):

    S = Σ exp(z − m),  E = Σ exp(z − m) (z − m),   log π(v) = z_v − m − log S,   H = log S − E / S

The gradient then takes a second pass, which computes the logits of each part again.

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

LOGIT_BYTES = 2**32
"""Most bytes of float32 logits on a device at one time. Their gradient takes about as much again."""
_LOWEST = -1e30  # finite: differences of two of them are 0, not NaN


def _unconstrained(x: Array) -> Array:
    return x


class HeadLayout(NamedTuple):
    """Sharding constraints for the loop over chunks; by default one device.

    Attributes:
        shards: number of parts into which the rows are split, each on separate devices; it divides the number of rows.
        vocab_shards: number of parts into which the devices of a shard split V.
        gathered: for the head [D, V]: on every device, except for a split of V.
        per_shard: for arrays [shards, …] of one number per shard: each on the devices of its shard's rows.
        per_shard_head: for the shards' gradients of the head [shards, D, V]: likewise.
        gradient: for the head's final gradient [D, V].
    """

    shards: int = 1
    vocab_shards: int = 1
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
    vocabulary = _Vocabulary.of(layout, hidden, head, chunk)

    def compute(x: Array, target: Array, mask: Array) -> tuple[Array, Array]:
        if vocabulary.parts > 1:
            logprobs, entropies, _ = vocabulary.statistics(x, weights, target, temperature)
        else:
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
    vocabulary = _Vocabulary.of(layout, hidden, head, chunk)

    @jax.vmap  # over shards of rows
    def compute(total: Any, x: Array, target: Array, tokens: Tokens) -> tuple[Any, Array]:
        if vocabulary.parts > 1:
            *statistics, normaliser = vocabulary.statistics(x, weights, target, temperature)
        else:
            logits = _logits(x, weights, temperature)
            statistics = token_statistics(logits, target)
            normaliser = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0] - statistics[0]
        logprobs, entropies = (jnp.where(tokens.mask, x, 0.0) for x in statistics)
        chunk_loss = lambda logprobs, entropies: objective(logprobs, entropies, tokens)
        variables = (0, 1) if isinstance(objective, EntropyObjective) else (0,)
        (loss, stats), slopes = jax.value_and_grad(chunk_loss, variables, has_aux=True)(logprobs, entropies)

        def d_logits_of(logits: Array, is_target: Array) -> Array:
            log_policy = logits - normaliser[..., None]
            policy = jnp.exp(log_policy)
            d_logits = (slopes[0] / temperature)[..., None] * (is_target - policy)
            if isinstance(objective, EntropyObjective):
                d_entropy = -policy * (log_policy + statistics[1][..., None])
                d_logits = d_logits + (slopes[1] / temperature)[..., None] * d_entropy
            return jnp.where(tokens.mask[..., None], d_logits, 0.0).astype(x.dtype)

        if vocabulary.parts > 1:
            d_hidden, d_head = vocabulary.gradients(x, weights, target, temperature, d_logits_of, total[2])
        else:
            d_logits = d_logits_of(logits, jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.bool_))
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


class _Vocabulary(NamedTuple):
    """A loop over parts of the vocabulary, each of all shards of the head.

    Attributes:
        parts: number of parts; 1 for no loop.
        shards: number of parts into which devices split the vocabulary.
    """

    parts: int
    shards: int

    @classmethod
    def of(cls, layout: HeadLayout, hidden: Array, head: Array, chunk: int) -> "_Vocabulary":
        """The fewest parts whose logits take at most `LOGIT_BYTES`."""
        positions = hidden.shape[0] // layout.shards * min(chunk, hidden.shape[1])
        num_bytes = 4 * positions * head.shape[1] // layout.vocab_shards
        return cls(-(-num_bytes // LOGIT_BYTES), layout.vocab_shards)

    def statistics(self, x: Array, weights: Array, target: Array, temperature: float) -> tuple[Array, Array, Array]:
        """(log π(target), H, log Σ exp z) of positions x [b, c, D]."""

        def add(carry: tuple[Array, ...], part: Array) -> tuple[tuple[Array, ...], None]:
            top, total, weighted, of_target = carry
            logits, is_target, is_new, _ = self._logits(x, weights, target, temperature, part)
            new_top = jnp.maximum(top, jnp.max(jnp.where(is_new, logits, _LOWEST), axis=-1))
            scale, distance = jnp.exp(top - new_top), logits - new_top[..., None]
            mass = jnp.where(is_new, jnp.exp(jnp.minimum(distance, 0.0)), 0.0)
            weighted = scale * (weighted + (top - new_top) * total) + jnp.sum(mass * distance, axis=-1)
            of_target = of_target + jnp.sum(jnp.where(is_target & is_new, logits, 0.0), axis=-1)
            return (new_top, scale * total + jnp.sum(mass, axis=-1), weighted, of_target), None

        zeros = jnp.zeros(target.shape, jnp.float32)
        start = (zeros + _LOWEST, zeros, zeros, zeros)
        (top, total, weighted, of_target), _ = jax.lax.scan(add, start, jnp.arange(self.parts))
        entropies = jnp.maximum(jnp.log(total) - weighted / total, 0.0)
        normaliser = top + jnp.log(total)
        return of_target - normaliser, entropies, normaliser

    def gradients(
        self,
        x: Array,
        weights: Array,
        target: Array,
        temperature: float,
        d_logits_of: Callable[[Array, Array], Array],
        d_head: Array | None,
    ) -> tuple[Array, Array | None]:
        """The gradient of x, and `d_head` [D, V] (None: a frozen head) with that of the head added.

        Args:
            x: [b, c, D].
            weights: [D, V].
            target: i32[b, c].
            temperature: divides the logits.
            d_logits_of: logits, whether each is its token's -> their gradient.
            d_head: f32[D, V].
        """

        def add(carry: tuple[Array, Array | None], part: Array) -> tuple[tuple[Array, Array | None], None]:
            d_hidden, d_head = carry
            logits, is_target, is_new, matrix = self._logits(x, weights, target, temperature, part)
            d_logits = d_logits_of(logits, is_target)
            d_logits = jnp.where(is_new, d_logits, jnp.zeros((), d_logits.dtype))
            d_logits = d_logits.reshape(*d_logits.shape[:-1], *matrix.shape[1:])
            product = partial(jnp.einsum, preferred_element_type=jnp.float32)
            d_hidden = d_hidden + product("btsv,dsv->btd", d_logits, matrix)
            if d_head is not None:
                first = self._first(d_head, part)
                held = jax.lax.dynamic_slice_in_dim(d_head, first, matrix.shape[2], axis=2)
                held = held + product("btd,btsv->dsv", x, d_logits)
                d_head = jax.lax.dynamic_update_slice_in_dim(d_head, held, first, axis=2)
            return (d_hidden, d_head), None

        split = None if d_head is None else self._split(d_head)
        start = jnp.zeros(x.shape, jnp.float32), split
        (d_hidden, split), _ = jax.lax.scan(add, start, jnp.arange(self.parts))
        return d_hidden.astype(x.dtype), None if d_head is None or split is None else split.reshape(d_head.shape)

    def _split(self, head: Array) -> Array:
        """[D, V] to [D, shards, V / shards]."""
        return head.reshape(head.shape[0], self.shards, -1)

    def _width(self, split: Array) -> int:
        return -(-split.shape[2] // self.parts)

    def _first(self, split: Array, part: Array) -> Array:
        """Where a part begins in each shard. The last one ends with the shard, and overlaps the one before it."""
        return jnp.minimum(part * self._width(split), split.shape[2] - self._width(split))

    def _logits(
        self, x: Array, weights: Array, target: Array, temperature: float, part: Array
    ) -> tuple[Array, Array, Array, Array]:
        """Of a part of the vocabulary: logits f32[b, c, v], whether each is its token's, whether no part before has
        that word [1, 1, v], and the head's matrix [D, shards, v / shards]."""
        split = self._split(weights)
        width, length, first = self._width(split), split.shape[2], self._first(split, part)
        matrix = jax.lax.dynamic_slice_in_dim(split, first, width, axis=2)
        logits = jnp.einsum("btd,dsv->btsv", x, matrix, preferred_element_type=jnp.float32) / temperature
        columns = first + jax.lax.broadcasted_iota(jnp.int32, (self.shards, width), 1)
        ids = length * jax.lax.broadcasted_iota(jnp.int32, columns.shape, 0) + columns
        is_target = ids.reshape(1, 1, -1) == target[..., None]
        return logits.reshape(*x.shape[:2], -1), is_target, (columns >= part * width).reshape(1, 1, -1), matrix


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
