"""Reshards parameters from the learner's layout to the sampler's, once a step: no second engine, no weight sync."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from aem_jax.models import Params, Policy
from aem_jax.models.int8 import quantize_layers
from aem_jax.sharding import TRAIN, decode_formats, shardings

INT8_MERGES = (
    "expected lora.merge with int8 weights, got False: an adapter beside frozen weights is sampled from without a copy "
    "that could be in int8; drop --lora.merge False or --sampling.weights int8"
)


def make_reshard(policy: Policy, mesh: Mesh, *, int8: bool = False) -> Callable[[Params], Params]:
    """Builds `reshard(params) -> params`: the dtypes of use, in the decode layout, so that decoding gathers no weights.

    The result is parameters of `policy.sampled`: the base, with the adapter merged into it in its dtype, or beside it
    without `lora.merge`. With `int8` it is parameters of `policy.quantized`: each device quantises its shard, and the
    codes are gathered.

    Each layer has arrays of its own (`Policy.by_layer`), so that a decode step reads them where they are. With LoRA,
    embedding, head and final norm are not copied if they have the same layout for learning and sampling: the results
    share their buffers. Without `lora.merge` no weight is copied: layers stay stacked, as the learner has them.

    Raises:
        ValueError: int8 without `lora.merge`.
    """
    if policy.lora is not None and policy.lora.merge:
        return _make_merge(policy, mesh, int8=int8)
    if policy.lora is None:
        return _make_cast(policy, mesh, int8=int8)
    if int8:
        raise ValueError(INT8_MERGES)
    train, decode = _train_layout(policy, mesh), _decode_layout(policy.sampled, mesh)
    cast = jax.jit(
        lambda adapter: jax.tree.map(lambda leaf: leaf.astype(policy.config.dtype), adapter),
        in_shardings=(train["adapter"],),
        out_shardings=decode["adapter"],
    )
    return lambda params: {"base": jax.device_put(params["base"], decode["base"]), "adapter": cast(params["adapter"])}


def abstract_sampled(sampled: Policy, mesh: Mesh) -> Params:
    """Shape structs of the result of `reshard`, for `sampled`: `Policy.sampled` or `Policy.quantized`."""
    shapes, dtypes = sampled.shapes, sampled.dtypes
    if sampled.lora is None:
        shapes, dtypes = sampled.by_layer(shapes, _layer_shape), sampled.by_layer(dtypes, lambda dtype, _: dtype)
    struct = lambda leaf, dtype, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)
    return jax.tree.map(struct, shapes, dtypes, _decode_layout(sampled, mesh))


def _make_cast(policy: Policy, mesh: Mesh, *, int8: bool) -> Callable[[Params], Params]:
    """`reshard` without LoRA, from float32 masters."""
    sampled = policy.quantized if int8 else policy.sampled

    def cast(params: Params) -> Params:
        if int8:
            codes = jax.lax.with_sharding_constraint(policy.quantize(params), shardings(mesh, sampled.axes, TRAIN))
            return sampled.by_layer(codes, _layer)
        base = {"base": params["base"]}
        return sampled.by_layer(jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), base, sampled.dtypes), _layer)

    return jax.jit(cast, in_shardings=(_train_layout(policy, mesh),), out_shardings=_decode_layout(sampled, mesh))


def _make_merge(policy: Policy, mesh: Mesh, *, int8: bool) -> Callable[[Params], Params]:
    """`reshard` with LoRA that merges the adapter."""
    sampled = policy.quantized if int8 else policy.sampled
    train, decode = _train_layout(policy, mesh), _decode_layout(sampled, mesh)

    def merge_layers(adapter: Params, layers: Params) -> list[Params]:
        merged = policy.merge({"base": {"layers": layers}, "adapter": adapter})["base"]["layers"]
        if int8:
            codes = quantize_layers(policy.config, merged)
            axes = sampled.axes["base"]["layers"]
            merged = jax.lax.with_sharding_constraint(codes, shardings(mesh, axes, TRAIN))
        return sampled.by_layer({"base": {"layers": merged}}, _layer)["base"]["layers"]

    merge = jax.jit(
        merge_layers,
        in_shardings=(train["adapter"], train["base"]["layers"]),
        out_shardings=decode["base"]["layers"],
    )
    rest = {name: where for name, where in decode["base"].items() if name != "layers"}

    def reshard(params: Params) -> Params:
        base = params["base"]
        shared = jax.device_put({name: base[name] for name in rest}, rest)
        return {"base": {**shared, "layers": merge(params["adapter"], base["layers"])}}

    return reshard


def _train_layout(policy: Policy, mesh: Mesh) -> Params:
    return shardings(mesh, policy.axes, TRAIN, policy.shapes)


def _decode_layout(sampled: Policy, mesh: Mesh) -> Params:
    """The layout of parameters to sample from: by layer, but beside an adapter, where they are shared."""
    axes, shapes = sampled.axes, sampled.shapes
    if sampled.lora is None:
        axes, shapes = sampled.by_layer(axes, lambda names, _: names[1:]), sampled.by_layer(shapes, _layer_shape)
    return decode_formats(mesh, axes, shapes)


def _layer(leaf: jax.Array, layer: int) -> jax.Array:
    return leaf[layer]


def _layer_shape(leaf: jax.ShapeDtypeStruct, layer: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
