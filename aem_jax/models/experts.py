"""Mixtures of experts: the router, the experts' products, and their exchange between devices.

    p = softmax(x R)        y = Σ_{e in top k of p} w_e · down_e(act(x gate_e) · (x up_e))

w_e = p_e, divided by the sum over the k experts where the model does so. Each token's k experts may be given, as the
sampler recorded them (routing replay); then w is computed from the probabilities of these, with their gradient.

The copies of tokens are sorted by expert, so that all experts' products are one ragged product. No token is dropped.
On a mesh each device orders its own tokens inside `shard_map`. Where the mesh has an `expert` axis, a device holds some
experts only: `exchange` sends the copies to their experts' devices and the outputs back.

Left out: the grouped kernels of tokamax, which need Python 3.12 and a device to be tested on.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from aem_jax.models.exchange import EXPERT_AXIS, exchange, order_by_key
from aem_jax.models.parameters import Mixture
from aem_jax.models.ragged_product import ragged_product
from aem_jax.sharding import TRAIN, partition

Array = jax.Array

PRODUCT = "product"
"""Name of the products with weights, for the policies of `jax.checkpoint`."""


class Routing(NamedTuple):
    """The experts of tokens.

    Attributes:
        experts: i32[B,T,k].
        weights: f32[B,T,k], of their outputs.
        probabilities: f32[B,T,E], of all experts.
    """

    experts: Array
    weights: Array
    probabilities: Array


class ExpertWeights(NamedTuple):
    """The matrices of a layer's experts.

    Attributes:
        gate: [E,D,F].
        up: [E,D,F].
        down: [E,F,D].
    """

    gate: "Matrices"
    up: "Matrices"
    down: "Matrices"


class Matrices(NamedTuple):
    """A matrix of each expert.

    Attributes:
        weights: [E,inputs,outputs], or int8 codes.
        scales: f32[E,outputs] of int8 codes.
        a: [E,inputs,r] of an adapter, multiplied by its scale.
        b: [E,r,outputs] of an adapter.
    """

    weights: Array
    scales: Array | None = None
    a: Array | None = None
    b: Array | None = None


Experts = Callable[[Array, Routing, Array | None, ExpertWeights], Array]
"""(x [B,T,D], routing, bool[B,T] of the tokens that count or None for all, weights) -> the experts' outputs [B,T,D]."""


def route(x: Array, router: Array, mixture: Mixture, recorded: Array | None = None) -> Routing:
    """The experts of tokens, in float32.

    Args:
        x: [B,T,D].
        router: [D,E].
        mixture: sizes.
        recorded: integers [B,T,k], experts to take instead of the most likely ones.
    """
    logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), router.astype(jnp.float32), precision="highest")
    probabilities = jax.nn.softmax(logits)
    experts = top_experts(probabilities, mixture) if recorded is None else recorded.astype(jnp.int32)
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if mixture.norm_topk:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts, weights, probabilities)


def top_experts(probabilities: Array, mixture: Mixture) -> Array:
    """i32[...,k], the most likely experts, the most likely first."""
    return jax.lax.top_k(jax.lax.stop_gradient(probabilities), mixture.experts_per_token)[1]


class Load(NamedTuple):
    """How the tokens of rows spread over the experts of each layer.

    Attributes:
        counts: f32[L,E], tokens whose experts include this one.
        probabilities: f32[L,E], sums of the router's probabilities over tokens.
        flips: f32[], experts that were given, but are not among the most likely k, over tokens and layers.
        tokens: f32[], number of tokens.
        choices: f32[], experts of all tokens and layers.
    """

    counts: Array
    probabilities: Array
    flips: Array
    tokens: Array
    choices: Array


def load_of(routing: Routing, valid: Array, mixture: Mixture, *, given: bool) -> Load:
    """The load of one layer: `counts` and `probabilities` are f32[E]."""
    count = lambda x: jnp.sum(x * valid[..., None], axis=(0, 1), dtype=jnp.float32)
    experts, flips = routing.experts, jnp.float32(0)
    if given:
        own = top_experts(routing.probabilities, mixture)
        is_own = jnp.any(experts[..., :, None] == own[..., None, :], axis=-1)
        flips = jnp.sum(~is_own & valid[..., None], dtype=jnp.float32)
    chosen = jnp.sum(jax.nn.one_hot(experts, mixture.num_experts, dtype=jnp.int32), axis=-2)
    tokens = jnp.sum(valid, dtype=jnp.float32)
    return Load(count(chosen), count(routing.probabilities), flips, tokens, tokens * experts.shape[-1])


def make_experts(activation: Callable[[Array, Array], Array], mesh: Mesh | None) -> Experts:
    """The experts' products for tokens that are split over a mesh as rows and slots are.

    Args:
        activation: (gate, up) -> the input of the down projection.
        mesh: None for one device, or to leave the split to the partitioner.
    """

    def local(
        x: Array, experts: Array, weights: Array, valid: Array | None, matrices: ExpertWeights, shards: int = 1
    ) -> Array:
        """[B,T,D] on one device; `matrices` are those of its experts."""
        num_experts = shards * matrices.gate.weights.shape[0]
        if valid is not None:
            experts = jnp.where(valid[..., None], experts, num_experts)
        flat, k = x.reshape(-1, x.shape[-1]), experts.shape[-1]
        # The buffer of an exchange is several times the rows that come: too much to keep in every layer.
        compute = partial(_products, activation, keep=shards == 1)
        order = order_by_key(experts.reshape(-1, k), num_experts)
        rows = order.sorted_copies(flat, k)
        inputs = matrices, rows, order.sizes
        out = compute(*inputs) if shards == 1 else exchange(compute, *inputs, shards)
        out = order.undo(out).reshape(-1, k, x.shape[-1])
        y = jnp.einsum("nkd,nk->nd", out.astype(jnp.float32), weights.reshape(-1, k))
        return y.astype(x.dtype).reshape(x.shape)

    if mesh is None or mesh.devices.size == 1:
        return lambda x, routing, *rest: local(x, *routing[:2], *rest)
    tokens = partition(("rows", "length", None), TRAIN)
    inward = partition(("experts", None, "mlp"), TRAIN)
    outward = partition(("experts", "mlp", None), TRAIN)
    axes, shards = set(mesh.axis_names), mesh.shape[EXPERT_AXIS]

    def spec(matrices: Matrices, whole: Any) -> Matrices:
        """Partition specs; an adapter's rank is not split."""
        experts, inputs, outputs = whole
        parts = (whole, (experts, outputs), (experts, inputs, None), (experts, None, outputs))
        specs: Any = (None if x is None else jax.P(*part) for x, part in zip(matrices, parts, strict=True))
        return Matrices(*specs)

    def on_mesh(x: Array, routing: Routing, valid: Array | None, matrices: ExpertWeights) -> Array:
        specs = ExpertWeights(*(spec(m, s) for m, s in zip(matrices, (inward, inward, outward), strict=True)))
        mask = None if valid is None else partition(("rows", "length"), TRAIN)
        in_specs = (tokens, tokens, tokens, mask, specs)

        def one(*inputs: Any) -> Array:
            # The products define their own gradients, which vary over the axes of their operands: so must the operands.
            inputs = jax.tree.map(lambda x, spec: _vary(x, axes - _names(spec)), inputs, in_specs)
            return jax.lax.psum(local(*inputs, shards=shards), "tensor")

        return jax.shard_map(one, mesh=mesh, in_specs=in_specs, out_specs=tokens)(x, *routing[:2], valid, matrices)

    return on_mesh


def _names(spec: Any) -> set[str]:
    """The mesh axes of a partition spec."""
    return {name for entry in spec if entry for name in ((entry,) if isinstance(entry, str) else entry)}


def _vary(x: Array, axes: set[str]) -> Array:
    """x, marked as varying over further mesh axes; its gradient is summed over them."""
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _products(
    activation: Callable[[Array, Array], Array], matrices: ExpertWeights, rows: Array, sizes: Array, *, keep: bool
) -> Array:
    """The experts' outputs of rows [M,D] sorted by expert, of which sizes i32[E] belong to each.

    `keep` names products, so that `jax.checkpoint` may keep them; else it recomputes them, and the exchange before.
    """
    ids = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")

    def times(x: Array, m: Matrices) -> Array:
        if m.scales is None:
            y = ragged_product(x, m.weights.astype(x.dtype), sizes)
            y = checkpoint_name(y, PRODUCT) if keep else y
        else:
            y = ragged_product(x, m.weights, sizes)
            y = (y.astype(jnp.float32) * m.scales[jnp.minimum(ids, len(sizes) - 1)]).astype(x.dtype)
        if m.a is None or m.b is None:
            return y
        low = ragged_product(x, m.a.astype(x.dtype), sizes)
        return y + ragged_product(low, m.b.astype(x.dtype), sizes)

    return times(activation(times(rows, matrices.gate), times(rows, matrices.up)), matrices.down)
