"""Exchange of tokens between the devices of a mesh's expert axis, in as many rounds as their buffers take.

The rows that come to a device are numbered by expert, then by sender, and arrive in this order. With room for C rows,
round r brings rows r·C to (r+1)·C and returns their outputs. C is twice the mean load, so most loads take one round; no
row is dropped.

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

ALL_ROUNDS, FURTHER_ROUNDS = "all_rounds", "further_rounds"
"""Names in compiled programs of the loops over the rounds of an exchange, and over those after the first."""


def buffer_rows(rows: int, shards: int) -> int:
    """Rows that a device of an expert axis receives at once, where every device sends `rows`."""
    return min(shards * rows, max(MEAN_LOADS * rows, FEW_ROWS))


class Order(NamedTuple):
    """A permutation of N rows.

    Attributes:
        order: i32[N], the row at each place.
        inverse: i32[N], the place of each row.
        sizes: i32[count], rows of each key.
    """

    order: Array
    inverse: Array
    sizes: Array

    def sorted_copies(self, x: Array, copies: int) -> Array:
        """[N·copies, D], sorted: `copies` of each row of x [N,D], in the order of the keys."""
        return _copy_rows(copies, x, self.order, self.inverse)

    def undo(self, rows: Array) -> Array:
        """Sorted rows [M,D] in the order of the keys."""
        return _copy_rows(1, rows, self.inverse, self.order)


def order_by_key(keys: Array, count: int) -> Order:
    """The stable order of rows by their keys.

        place of row (t,j) = rows of smaller keys + rows with its key before t + those of t before j

    It counts and does not sort: XLA takes two seconds to compile a sort for a TPU, in every layer.

    Args:
        keys: i32[T,k], in [0, count]. Rows with the key `count` come last and belong to nobody.
        count: number of keys.
    """
    of_token = jnp.sum(jax.nn.one_hot(keys, count + 1, dtype=jnp.int32), axis=1)  # [T, key]
    up_to_token = jnp.cumsum(of_token, axis=0)
    sizes = up_to_token[-1]
    first = (jnp.cumsum(sizes) - sizes)[None] + up_to_token - of_token
    same_before = jnp.sum(jnp.tril(keys[:, :, None] == keys[:, None, :], -1), axis=2, dtype=jnp.int32)
    inverse = (jnp.take_along_axis(first, keys, axis=1) + same_before).reshape(-1)
    order = jnp.zeros_like(inverse).at[inverse].set(jnp.arange(inverse.size, dtype=jnp.int32), unique_indices=True)
    return Order(order, inverse, sizes[:count])


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
    """The rows that devices of the expert axis send one another, i32[senders,receivers,experts of a receiver].

    Attributes:
        sent: their number.
        in_sender: where they begin among the sender's rows.
        in_receiver: where they begin among those that come to the receiver.
    """

    sent: Array
    in_sender: Array
    in_receiver: Array


Compute = Callable[[Any, Array, Array], Array]
"""(a device's experts, rows sorted by expert, rows of each expert) -> outputs."""


def exchange(compute: Compute, matrices: Any, rows: Array, sizes: Array, shards: int) -> Array:
    """`compute` of rows [M,D] sorted by expert, on the devices of the experts; in shard_map.

    The rows that come to a device are numbered by expert, then by sender. Round r is for those from r·C to (r+1)·C,
    C = `buffer_rows`. Rounds take place as long as a device of the mesh gets more rows.
    """
    capacity, counts = buffer_rows(rows.shape[0], shards), jax.lax.all_gather(sizes, EXPERT_AXIS)  # [sender, expert]
    before = lambda x: jnp.cumsum(x, axis=1) - x
    sent = counts.reshape(shards, shards, -1)
    coming = sent.transpose(1, 2, 0)  # [receiver, expert, sender]
    in_receiver = before(coming.reshape(shards, -1)).reshape(coming.shape).transpose(2, 0, 1)
    arrivals = _Arrivals(sent, before(counts).reshape(sent.shape), in_receiver)
    one_round = partial(_one_round, compute, capacity)
    if capacity == shards * rows.shape[0]:
        return one_round(arrivals, jnp.int32(0), rows, matrices)
    # Every device has to run as many rounds, since all take part in an exchange.
    most = jax.lax.pmax(jnp.max(jnp.sum(sent, axis=(0, 2))), AXES)
    return _rounds(one_round, capacity, arrivals, most, rows, matrices)


def _one_round(compute: Compute, capacity: int, arrivals: _Arrivals, first: Array, rows: Array, matrices: Any) -> Array:
    """[M,D], outputs of the rows that come to their devices at `first` to `first + capacity`; 0 for others."""
    me, (sent, in_sender, in_receiver) = jax.lax.axis_index(EXPERT_AXIS), arrivals
    start, stop = (jnp.clip(edge - in_receiver, 0, sent) for edge in (first, first + capacity))
    size, source = stop - start, in_sender + start
    target = jnp.clip(in_receiver + start - first, 0, capacity)
    buffer = zeros_like_varying((capacity, rows.shape[1]), rows.dtype, rows)
    received = _all_to_all(rows, buffer, source[me], size[me], target[me], size[:, me])
    out = compute(matrices, received, jnp.sum(size[:, me], axis=0))
    empty = zeros_like_varying(rows.shape, rows.dtype, rows)
    return _all_to_all(out, empty, target[:, me], size[:, me], source[:, me], size[me])


Round = Callable[[_Arrivals, Array, Array, Any], Array]
"""(rows that are sent, number of the first of this round, rows, matrices) -> outputs."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounds(one_round: Round, capacity: int, arrivals: _Arrivals, most: Array, rows: Array, matrices: Any) -> Array:
    """The outputs of all rounds, for devices that get at most `most` rows.

    Autodiff has no gradient of a loop whose length is decided while it runs. Where a gradient is wanted, the first
    round is outside the loop, and its gradient is autodiff's; the backward pass computes the others again. Without a
    gradient one loop runs all rounds: a second copy of the products in every layer would take minutes to compile.
    """
    add = lambda first, out: out + one_round(arrivals, first, rows, matrices)
    zeros = zeros_like_varying(rows.shape, rows.dtype, rows)
    with jax.named_scope(ALL_ROUNDS):
        return _loop(0, capacity, most, add, zeros)


def _loop(first: int, capacity: int, most: Array, step: Callable[[Array, Any], Any], state: Any) -> Any:
    """`step` of (first row, state) for the rounds from row `first` on."""
    further = lambda at: (at[0] + capacity, step(*at))
    return jax.lax.while_loop(lambda at: at[0] < most, further, (jnp.int32(first), state))[1]


def _rounds_forward(
    one_round: Round, capacity: int, arrivals: _Arrivals, most: Array, rows: Array, matrices: Any
) -> tuple[Array, Any]:
    out, pull = jax.vjp(partial(one_round, arrivals, jnp.int32(0)), rows, matrices)
    add = lambda first, out: out + one_round(arrivals, first, rows, matrices)
    with jax.named_scope(FURTHER_ROUNDS):
        return _loop(capacity, capacity, most, add, out), (arrivals, most, (rows, matrices), pull)


def _rounds_backward(one_round: Round, capacity: int, inputs: Any, cotangent: Array) -> Any:
    arrivals, most, operands, pull = inputs

    def add(first: Array, total: Any) -> Any:
        gradients = jax.vjp(partial(one_round, arrivals, first), *operands)[1](cotangent)
        return jax.tree.map(jnp.add, total, gradients)

    with jax.named_scope(FURTHER_ROUNDS):
        return None, None, *_loop(capacity, capacity, most, add, pull(cotangent))


_rounds.defvjp(_rounds_forward, _rounds_backward)


def _all_to_all(
    rows: Array, buffer: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array
) -> Array:
    """`jax.lax.ragged_all_to_all` over the expert axis, of i32[devices,experts] slices each way. XLA for CPUs has none:
    there every device gathers all rows."""
    everywhere = partial(jax.lax.ragged_all_to_all, axis_name=EXPERT_AXIS)
    slices = (x.reshape(-1) for x in (input_offsets, send_sizes, output_offsets, recv_sizes))
    return jax.lax.platform_dependent(rows, buffer, *slices, cpu=_gathered_all_to_all, default=everywhere)


def _gathered_all_to_all(
    rows: Array, buffer: Array, input_offsets: Array, send_sizes: Array, output_offsets: Array, recv_sizes: Array
) -> Array:
    me, devices = jax.lax.axis_index(EXPERT_AXIS), jax.lax.axis_size(EXPERT_AXIS)
    gather = partial(jax.lax.all_gather, axis_name=EXPERT_AXIS)
    to_me = lambda x: gather(x.reshape(devices, -1))[:, me].reshape(-1)  # [slice], by sender
    from_sender, start, size = map(to_me, (input_offsets, output_offsets, send_sizes))
    position = jnp.arange(len(buffer))[:, None]
    hit = (position >= start[None]) & (position < (start + size)[None])  # [row, slice]
    found = jnp.argmax(hit, axis=1)
    row = position[:, 0] - start[found] + from_sender[found]
    sender = found // (len(start) // devices)
    taken = gather(rows)[sender, jnp.where(jnp.any(hit, axis=1), row, 0)]
    return jnp.where(jnp.any(hit, axis=1)[:, None], taken, buffer)
