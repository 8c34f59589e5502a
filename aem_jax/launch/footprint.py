"""Bytes that weights take on each device, from shapes and layouts alone; nothing is computed.

Left out is what depends on the batch: activations, the KV cache, the compiler's temporaries.
"""

import math

import jax
import optax
from jax.sharding import Mesh

from aem_jax.learner import abstract_state
from aem_jax.models import LoraPolicy, Policy
from aem_jax.sharding import DECODE, TRAIN, shardings


def weight_bytes(policy: Policy | LoraPolicy, optimizer: optax.GradientTransformation, mesh: Mesh) -> dict[str, int]:
    """Bytes on each device.

    Args:
        policy: what is trained.
        optimizer: from `make_optimizer`.
        mesh: the mesh.

    Returns:
        frozen (weights beside an adapter), trained (float32 masters), optimizer, gradients (the sum over microbatches
        and the next one to add), decode (what is laid out for sampling and shares no buffer with the frozen ones).
    """
    state, base = abstract_state(policy, optimizer, mesh), policy.base
    train, decode = (shardings(mesh, base.axes, rules, base.shapes) for rules in (TRAIN, DECODE))
    size = lambda shaped, place, dtype: math.prod(place.shard_shape(shaped.shape)) * dtype.itemsize  # noqa: E731
    total = lambda tree: sum(size(leaf, leaf.sharding, leaf.dtype) for leaf in jax.tree.leaves(tree))  # noqa: E731
    weights = lambda where: jax.tree.map(size, base.shapes, where, base.dtypes)  # noqa: E731

    copied, frozen, beside = weights(decode), 0, 0
    if isinstance(policy, LoraPolicy):
        frozen = sum(jax.tree.leaves(weights(train)))
        shared = jax.tree.map(lambda a, b, shape: a.is_equivalent_to(b, shape.ndim), train, decode, base.shapes)
        if policy.lora.merge:
            shared["layers"] |= dict.fromkeys(policy.merged_leaves, False)
        copied = jax.tree.map(lambda count, is_shared: 0 if is_shared else count, copied, shared)
        beside = 0 if policy.lora.merge else total(state.params) // 2
    return {
        "frozen": frozen,
        "trained": total(state.params),
        "optimizer": total(state.opt_state),
        "gradients": 2 * total(state.params),
        "decode": sum(jax.tree.leaves(copied)) + beside,
    }
