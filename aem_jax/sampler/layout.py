"""From the learner's layout to the sampler's: one jitted reshard a step, no second engine, no weight sync."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.models.int8 import INPUTS, layer_axes, quantize_layers
from aem_jax.sharding import TRAIN, decode_formats, shardings

INT8_MERGES = (
    "expected lora.merge with int8 weights, got False: an adapter beside frozen weights is sampled from without a copy "
    "that could be in int8; drop --lora.merge False or --sampling.weights int8"
)


def make_reshard(policy: Policy, mesh: Mesh, *, int8: bool = False) -> Callable[[Params], Params]:
    """Builds `reshard(params) -> params`: the policy's dtype, decode layout. A decode step then gathers no weights.

    Scales of norms stay float32, in which the learner uses them too. With `int8` the parameters are those of
    `policy.in_int8`, made from the masters: each device quantises its part, and codes are what is gathered.
    """
    shapes = policy.shapes
    sampled = policy.in_int8 if int8 else policy

    def cast(params: Params) -> Params:
        if not int8:
            return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, policy.dtypes)
        found = policy.quantize(params)
        return jax.lax.with_sharding_constraint(found, shardings(mesh, sampled.axes, TRAIN))

    return jax.jit(
        cast,
        in_shardings=(shardings(mesh, policy.axes, TRAIN, shapes),),
        out_shardings=decode_formats(mesh, sampled.axes, sampled.shapes),
    )


def make_lora_reshard(policy: LoraPolicy, mesh: Mesh, *, int8: bool = False) -> Callable[[Params, Params], Any]:
    """Builds `reshard(adapter, frozen) -> params` in the decode layout, for a policy of which an adapter is trained.

    With `lora.merge`, params are those of `policy.whole`, the adapter's projections made anew and rounded to the dtype
    of the frozen ones; else they are the pair that `policy` itself takes. What the adapter does not change and lies
    alike for learning and sampling is not copied: those are the frozen weights' own buffers. With `int8` all matrices
    of layers are copied, in codes.

    Raises:
        ValueError: int8 without `lora.merge`.
    """
    lora, whole = policy.lora, policy.whole
    train, decode = shardings(mesh, whole.axes, TRAIN, whole.shapes), decode_formats(mesh, whole.axes, whole.shapes)
    adapter = shardings(mesh, policy.axes, TRAIN, policy.shapes)
    if int8 and not lora.merge:
        raise ValueError(INT8_MERGES)
    if not lora.merge:
        dtype = jax.numpy.dtype(policy.config.dtype)
        cast = jax.jit(
            lambda adapter: jax.tree.map(lambda leaf: leaf.astype(dtype), adapter),
            in_shardings=(adapter,),
            out_shardings=decode_formats(mesh, policy.axes, policy.shapes),
        )
        return lambda adapter, frozen: (cast(adapter), jax.device_put(frozen, decode))

    leaves = tuple(INPUTS) if int8 else policy.merged_leaves
    changed = lambda layers: {name: layers[name] for name in leaves}

    def quantized(adapter: Params, layers: Params) -> Params:
        found = quantize_layers({**layers, **policy.merge(adapter, layers)})
        axes = layer_axes(changed(whole.axes["layers"]))
        return jax.lax.with_sharding_constraint(found, shardings(mesh, axes, TRAIN))

    placed = decode_formats(mesh, layer_axes(changed(whole.axes["layers"]))) if int8 else changed(decode["layers"])
    merge = jax.jit(
        quantized if int8 else policy.merge,
        in_shardings=(adapter, changed(train["layers"])),
        out_shardings=placed,
    )

    def reshard(adapter: Params, frozen: Params) -> Params:
        merged = merge(adapter, changed(frozen["layers"]))
        kept = lambda tree: {
            **tree,
            "layers": {name: leaf for name, leaf in tree["layers"].items() if name not in merged},
        }
        rest = jax.device_put(kept(frozen), kept(decode))
        return {**rest, "layers": {**rest["layers"], **merged}}

    return reshard
