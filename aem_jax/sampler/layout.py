"""From the learner's layout to the sampler's: one jitted reshard a step, no second engine, no weight sync."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models import Params, Policy
from aem_jax.sharding import DECODE, TRAIN, shardings


def make_reshard(policy: Policy, mesh: Mesh) -> Callable[[Params], Params]:
    """Builds `reshard(params) -> params`: the policy's dtype, decode layout. A decode step then gathers no weights.

    Scales of norms stay float32, in which the learner uses them too.
    """
    shapes, dtype = policy.shapes, jnp.dtype(policy.config.dtype)

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda leaf, axes: leaf if "norm" in axes else leaf.astype(dtype), params, policy.axes)

    return jax.jit(
        cast,
        in_shardings=(shardings(mesh, policy.axes, TRAIN, shapes),),
        out_shardings=shardings(mesh, policy.axes, DECODE, shapes),
    )
