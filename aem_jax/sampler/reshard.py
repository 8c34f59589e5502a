"""Reshards parameters from the learner's layout to the sampler's, once a step: no second engine, no weight sync."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from aem_jax.models import Params, Policy
from aem_jax.models.int8 import quantize_layers, quantized_matrices, scale_of
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

    With LoRA, weights that the adapter does not change, and that have the same layout for learning and sampling, are
    not copied: the results share their buffers. With `int8` all matrices of layers are copied, as codes.

    Raises:
        ValueError: int8 without `lora.merge`.
    """
    if policy.lora is None:
        return _make_cast(policy, mesh, int8=int8)
    if policy.lora.merge:
        return _make_merge(policy, mesh, int8=int8)
    if int8:
        raise ValueError(INT8_MERGES)
    train, decode = _layouts(policy, mesh)
    cast = jax.jit(
        lambda adapter: jax.tree.map(lambda leaf: leaf.astype(policy.config.dtype), adapter),
        in_shardings=(train["adapter"],),
        out_shardings=decode["adapter"],
    )
    return lambda params: {"base": jax.device_put(params["base"], decode["base"]), "adapter": cast(params["adapter"])}


def _make_cast(policy: Policy, mesh: Mesh, *, int8: bool) -> Callable[[Params], Params]:
    """`reshard` without LoRA, from float32 masters."""
    sampled = policy.quantized if int8 else policy.sampled

    def cast(params: Params) -> Params:
        if not int8:
            return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), {"base": params["base"]}, sampled.dtypes)
        return jax.lax.with_sharding_constraint(policy.quantize(params), shardings(mesh, sampled.axes, TRAIN))

    return jax.jit(cast, in_shardings=(_layouts(policy, mesh)[0],), out_shardings=_layouts(sampled, mesh)[1])


def _make_merge(policy: Policy, mesh: Mesh, *, int8: bool) -> Callable[[Params], Params]:
    """`reshard` with LoRA that merges the adapter."""
    names = tuple(quantized_matrices(policy.config)) if int8 else policy.merged_leaves
    changed = lambda layers: {name: layers[name] for name in names}
    train, decode = _layouts(policy, mesh)
    code_axes: Params = {}
    if int8:
        axes = policy.quantized.axes["base"]["layers"]
        code_axes = {name: axes[name] for name in (*names, *map(scale_of, names))}

    def merge_layers(adapter: Params, layers: Params) -> Params:
        merged = policy.merge({"base": {"layers": layers}, "adapter": adapter})["base"]["layers"]
        if not int8:
            return merged
        codes = quantize_layers(policy.config, merged)
        return jax.lax.with_sharding_constraint(codes, shardings(mesh, code_axes, TRAIN))

    merge = jax.jit(
        merge_layers,
        in_shardings=(train["adapter"], changed(train["base"]["layers"])),
        out_shardings=decode_formats(mesh, code_axes) if int8 else changed(decode["base"]["layers"]),
    )

    def reshard(params: Params) -> Params:
        base = params["base"]
        merged = merge(params["adapter"], changed(base["layers"]))
        unchanged = lambda tree: {
            **tree,
            "layers": {name: leaf for name, leaf in tree["layers"].items() if name not in merged},
        }
        rest = jax.device_put(unchanged(base), unchanged(decode["base"]))
        return {"base": {**rest, "layers": {**rest["layers"], **merged}}}

    return reshard


def _layouts(policy: Policy, mesh: Mesh) -> tuple[Params, Params]:
    """The layouts of a policy's parameters for learning and for sampling."""
    axes, shapes = policy.axes, policy.shapes
    return shardings(mesh, axes, TRAIN, shapes), decode_formats(mesh, axes, shapes)
