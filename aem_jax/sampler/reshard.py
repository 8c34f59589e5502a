"""Reshards parameters from the learner's layout to the sampler's, once a step: no second engine, no weight sync."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.models.int8 import quantize_layers, quantized_matrices, scale_of
from aem_jax.sharding import TRAIN, decode_formats, shardings

INT8_MERGES = (
    "expected lora.merge with int8 weights, got False: an adapter beside frozen weights is sampled from without a copy "
    "that could be in int8; drop --lora.merge False or --sampling.weights int8"
)


def make_reshard(policy: Policy, mesh: Mesh, *, int8: bool = False) -> Callable[[Params], Params]:
    """Builds `reshard(params) -> params`: the dtypes of use, in the decode layout, so that decoding gathers no weights.

    With `int8` the parameters are those of `policy.quantized`, made from the masters: each device quantises its shard,
    and the codes are gathered.
    """
    shapes = policy.shapes
    sampled = policy.quantized if int8 else policy

    def cast(params: Params) -> Params:
        if not int8:
            return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, policy.dtypes)
        codes = policy.quantize(params)
        return jax.lax.with_sharding_constraint(codes, shardings(mesh, sampled.axes, TRAIN))

    return jax.jit(
        cast,
        in_shardings=(shardings(mesh, policy.axes, TRAIN, shapes),),
        out_shardings=decode_formats(mesh, sampled.axes, sampled.shapes),
    )


def make_lora_reshard(policy: LoraPolicy, mesh: Mesh, *, int8: bool = False) -> Callable[[Params, Params], Any]:
    """Builds `reshard(adapter, frozen) -> params` in the decode layout, for a policy that trains an adapter.

    With `lora.merge`, params are those of `policy.base`, with merged projections in the dtype of the frozen ones; else
    they are the pair that `policy` takes. Frozen weights that the adapter does not change, and that have the same
    layout for learning and sampling, are not copied: params share their buffers. With `int8` all matrices of layers
    are copied, as codes.

    Raises:
        ValueError: int8 without `lora.merge`.
    """
    lora, base = policy.lora, policy.base
    train, decode = shardings(mesh, base.axes, TRAIN, base.shapes), decode_formats(mesh, base.axes, base.shapes)
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

    names = tuple(quantized_matrices(policy.config)) if int8 else policy.merged_leaves
    changed = lambda layers: {name: layers[name] for name in names}
    code_axes = {name: base.quantized.axes["layers"][name] for name in (*names, *map(scale_of, names))} if int8 else {}

    def quantized(adapter: Params, layers: Params) -> Params:
        codes = quantize_layers(policy.config, {**layers, **policy.merge(adapter, layers)})
        return jax.lax.with_sharding_constraint(codes, shardings(mesh, code_axes, TRAIN))

    placed = decode_formats(mesh, code_axes) if int8 else changed(decode["layers"])
    merge = jax.jit(
        quantized if int8 else policy.merge,
        in_shardings=(adapter, changed(train["layers"])),
        out_shardings=placed,
    )

    def reshard(adapter: Params, frozen: Params) -> Params:
        merged = merge(adapter, changed(frozen["layers"]))
        unchanged = lambda tree: {
            **tree,
            "layers": {name: leaf for name, leaf in tree["layers"].items() if name not in merged},
        }
        rest = jax.device_put(unchanged(frozen), unchanged(decode))
        return {**rest, "layers": {**rest["layers"], **merged}}

    return reshard
