"""From the learner's layout to the sampler's: one jitted reshard a step, no second engine, no weight sync."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.models import LoraPolicy, Params, Policy
from aem_jax.sharding import DECODE, TRAIN, shardings


def make_reshard(policy: Policy, mesh: Mesh) -> Callable[[Params], Params]:
    """Builds `reshard(params) -> params`: the policy's dtype, decode layout. A decode step then gathers no weights.

    Scales of norms stay float32, in which the learner uses them too.
    """
    shapes = policy.shapes

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, policy.dtypes)

    return jax.jit(
        cast,
        in_shardings=(shardings(mesh, policy.axes, TRAIN, shapes),),
        out_shardings=shardings(mesh, policy.axes, DECODE, shapes),
    )


def make_lora_reshard(policy: LoraPolicy, mesh: Mesh) -> Callable[[Params, Params], Any]:
    """Builds `reshard(adapter, frozen) -> params` in the decode layout, for a policy of which an adapter is trained.

    With `lora.merge`, params are those of `policy.whole`, the adapter's projections made anew and rounded to the dtype
    of the frozen ones; else they are the pair that `policy` itself takes. What the adapter does not change and lies
    alike for learning and sampling is not copied: those are the frozen weights' own buffers.
    """
    lora, whole = policy.lora, policy.whole
    train, decode = (shardings(mesh, whole.axes, rules, whole.shapes) for rules in (TRAIN, DECODE))
    adapter = shardings(mesh, policy.axes, TRAIN, policy.shapes)
    if not lora.merge:
        dtype = jax.numpy.dtype(policy.config.dtype)
        cast = jax.jit(
            lambda adapter: jax.tree.map(lambda leaf: leaf.astype(dtype), adapter),
            in_shardings=(adapter,),
            out_shardings=shardings(mesh, policy.axes, DECODE, policy.shapes),
        )
        return lambda adapter, frozen: (cast(adapter), jax.device_put(frozen, decode))

    changed = lambda layers: {name: layers[name] for name in policy.merged_leaves}  # noqa: E731
    merge = jax.jit(
        policy.merge,
        in_shardings=(adapter, changed(train["layers"])),
        out_shardings=changed(decode["layers"]),
    )

    def reshard(adapter: Params, frozen: Params) -> Params:
        merged = merge(adapter, changed(frozen["layers"]))
        kept = lambda tree: {  # noqa: E731
            **tree,
            "layers": {name: leaf for name, leaf in tree["layers"].items() if name not in merged},
        }
        rest = jax.device_put(kept(frozen), kept(decode))
        return {**rest, "layers": {**rest["layers"], **merged}}

    return reshard
