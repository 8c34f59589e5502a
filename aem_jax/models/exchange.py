"""Exchange of tokens between the devices of a mesh's expert axis, in as many rounds as their buffers take.

The rows that come to a device are numbered by sender, then by expert. With room for C rows, round r brings rows r·C to
(r+1)·C and returns their outputs. C is twice the mean load, so most loads take one round; no row is dropped.

Left out: buffers of the worst case, all rows at one device. Everything but the products runs over the whole buffer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.models.ragged_product import zeros_like_varying
from aem_jax.sharding import AXES

Array = jax.Array

EXPERT_AXIS = "expert"

MEAN_LOADS = 2
"""The buffer of an exchange has room for so many times the mean load, the rows that a device gets if all get as many.
All but the products runs over the whole buffer; a further round costs time only if a device gets more."""

FEW_ROWS = 1024
"""A buffer has room for this many rows, or for the worst case. So few rows cost less than a second round, and chance
alone makes their load uneven."""

FURTHER_ROUNDS = "further_rounds"
"""Name in compiled programs of the loop over further rounds of an exchange."""


def buffer_rows(rows: int, shards: int) -> int:
    """Rows that a device of an expert axis receives at once, where every device sends `rows`."""
    return min(shards * rows, max(MEAN_LOADS * rows, FEW_ROWS))


class Order:
    """Rows sorted by a key in [0, count); rows with the key `count` come last and belong to nobody.

    Attributes:
        sizes: i32[count], rows of each key.
    """

    def __init__(self, keys: Array, count: int) -> None:
        self._order = jnp.argsort(keys, stable=True)
        self._inverse = jnp.argsort(self._order)
        self.sizes: Array = jnp.sum(keys[:, None] == jnp.arange(count)[None], axis=0, dtype=jnp.int32)

    def sorted_copies(self, x: Array, copies: int) -> Array:
        """[N·copies, D], sorted: `copies` of each row of x [N,D], in the order of the keys."""
        return _copy_rows(copies, x, self._order, self._inverse)

    def undo(self, rows: Array) -> Array:
        """Sorted rows [M,D] in the order of the keys."""
        return _copy_rows(1, rows, self._inverse, self._order)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _copy_rows(copies: int, x: Array, order: Array, inverse: Array) -> Array:
    """x[order // copies]. The gradient gathers by the inverse permutation, where autodiff would scatter."""
    return x[order // copies]


def _copy_rows_backward(copies: int, inverse: Array, cotangent: Array) -> tuple[Array, None, None]:
    rows = cotangent[inverse].reshape(-1, copies, cotangent.shape[-1])
    return jnp.sum(rows.astype(jnp.float32), axis=1).astype(cotangent.dtype), None, None


_copy_rows.defvjp(
    lambda copies, x, order, inverse: (_copy_rows(copies, x, order, inverse), inverse), _copy_rows_backward
)


class _Arrivals(NamedTuple):
    """The rows that devices of the expert axis send one another.

    Attributes:
        sent: i32[senders,receivers].
        in_sender: i32[senders,receivers], where they begin among the sender's rows.
        in_receiver: i32[senders,receivers], where they begin among those that come to the receiver.
        own: i32[senders,experts], those for each expert of this device.
    """

    sent: Array
    in_sender: Array
    in_receiver: Array
    own: Array


Compute = Callable[[Any, Array, Array], Array]
"""(a device's experts, rows sorted by expert, rows of each expert) -> outputs."""


def exchange(compute: Compute, matrices: Any, rows: Array, sizes: Array, shards: int) -> Array:
    """`compute` of rows [M,D] sorted by expert, on the devices of the experts; in shard_map.

    The rows that come to a device are numbered by sender, then by expert. Round r is for those from r·C to (r+1)·C,
    C = `buffer_rows`. The first always takes place, others as long as a device of the mesh gets more.
    """
    me, capacity = jax.lax.axis_index(EXPERT_AXIS), buffer_rows(rows.shape[0], shards)
    counts = jax.lax.all_gather(sizes, EXPERT_AXIS)  # [sender, expert]
    by_device = counts.reshape(shards, shards, -1)  # [sender, receiver, expert]
    sent = jnp.sum(by_device, axis=-1)
    before = lambda x, axis: jnp.cumsum(x, axis=axis) - x
    arrivals = _Arrivals(sent, before(sent, 1), before(sent, 0), by_device[:, me])
    one_round = partial(_one_round, compute, capacity)
    out = one_round(arrivals, jnp.int32(0), rows, matrices)
    if capacity == shards * rows.shape[0]:
        return out
    # Every device has to run as many rounds, since all take part in an exchange.
    most = jax.lax.pmax(jnp.max(jnp.sum(sent, axis=0)), AXES)
    return _further_rounds(one_round, capacity, arrivals, most, out, rows, matrices)


def _one_round(compute: Compute, capacity: int, arrivals: _Arrivals, first: Array, rows: Array, matrices: Any) -> Array:
    """[M,D], outputs of the rows that come to their devices at `first` to `first + capacity`; 0 for others."""
    me, (sent, in_sender, in_receiver, own) = jax.lax.axis_index(EXPERT_AXIS), arrivals
    start, stop = (jnp.clip(edge - in_receiver, 0, sent) for edge in (first, first + capacity))
    size, source = stop - start, in_sender + start
    target = jnp.clip(in_receiver + start - first, 0, capacity)
    buffer = zeros_like_varying((capacity, rows.shape[1]), rows.dtype, rows)
    received = _all_to_all(rows, buffer, source[me], size[me], target[me], size[:, me])
    segment = jnp.searchsorted(jnp.cumsum(own.reshape(-1)), first + jnp.arange(capacity), side="right")
    order = Order(jnp.where(segment < own.size, segment % own.shape[1], own.shape[1]), own.shape[1])
    out = order.undo(compute(matrices, order.sorted_copies(received, 1), order.sizes))
    empty = zeros_like_varying(rows.shape, rows.dtype, rows)
    return _all_to_all(out, empty, target[:, me], size[:, me], source[:, me], size[me])


Round = Callable[[_Arrivals, Array, Array, Any], Array]
"""(rows that are sent, number of the first of this round, rows, matrices) -> outputs."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _further_rounds(
    one_round: Round, capacity: int, arrivals: _Arrivals, most: Array, out: Array, rows: Array, matrices: Any
) -> Array:
    """`out` of the first round, and the outputs of all others, for devices that get at most `most` rows.

    Autodiff has no gradient of a loop whose length is decided while it runs. Here the backward pass computes each round
    again, so nothing of it is kept.
    """
    add = lambda first, out: out + one_round(arrivals, first, rows, matrices)
    return _rounds(capacity, most, add, out)


def _rounds(capacity: int, most: Array, step: Callable[[Array, Any], Any], state: Any) -> Any:
    """`step` of (first row, state) for all rounds but the first."""
    further = lambda at: (at[0] + capacity, step(*at))
    with jax.named_scope(FURTHER_ROUNDS):
        return jax.lax.while_loop(lambda at: at[0] < most, further, (jnp.int32(capacity), state))[1]


def _further_rounds_backward(one_round: Round, capacity: int, inputs: Any, cotangent: Array) -> Any:
    arrivals, most, *operands = inputs

    def add(first: Array, total: Any) -> Any:
        gradients = jax.vjp(partial(one_round, arrivals, first), *operands)[1](cotangent)
        return jax.tree.map(jnp.add, total, gradients)

    zeros = jax.tree.map(lambda x: zeros_like_varying(x.shape, x.dtype, x), tuple(operands))
    return None, None, cotangent, *_rounds(capacity, most, add, zeros)


_further_rounds.defvjp(
    lambda one_round, capacity, arrivals, most, out, *operands: (
        _further_rounds(one_round, capacity, arrivals, most, out, *operands),
        (arrivals, most, *operands),
    ),
    _further_rounds_backward,
)


def _all_to_all(
    rows: Array, buffer: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array
) -> Array:
    """`jax.lax.ragged_all_to_all` over the expert axis. XLA for CPUs has none: there every device gathers all rows."""
    everywhere = partial(jax.lax.ragged_all_to_all, axis_name=EXPERT_AXIS)
    offsets = input_offsets, send_sizes, output_offsets, recv_sizes
    return jax.lax.platform_dependent(rows, buffer, *offsets, cpu=_gathered_all_to_all, default=everywhere)


def _gathered_all_to_all(
    rows: Array, buffer: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array
) -> Array:
    me = jax.lax.axis_index(EXPERT_AXIS)
    gather = partial(jax.lax.all_gather, axis_name=EXPERT_AXIS)
    from_sender, start, size = (gather(x)[:, me] for x in (input_offsets, output_offsets, send_sizes))
    position = jnp.arange(len(buffer))[:, None]
    hit = (position >= start[None]) & (position < (start + size)[None])  # [row, sender]
    sender = jnp.argmax(hit, axis=1)
    row = position[:, 0] - start[sender] + from_sender[sender]
    taken = gather(rows)[sender, jnp.where(jnp.any(hit, axis=1), row, 0)]
    return jnp.where(jnp.any(hit, axis=1)[:, None], taken, buffer)
