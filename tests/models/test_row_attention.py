"""The blocked attention of packed rows is the masked one, forward and backward, whatever the row's length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.models.attention import _blocked_attention, _masked_attention


@pytest.mark.parametrize("length", [5, 64, 150])
def test_blocks_change_nothing(length):
    keys = jax.random.split(jax.random.key(length), 3)
    q, k, v = (jax.random.normal(key, (2, length, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    rng = np.random.default_rng(length)
    segments = np.stack([np.sort(rng.integers(1, 4, length)), np.full(length, 1)])
    segments[0, length - length // 5 :] = 0

    def loss(attention):
        def total(q, k, v):
            return jnp.sum(jnp.sin(attention(q, k, v, jnp.asarray(segments))))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    for found, expected in zip(
        jax.tree.leaves(loss(_blocked_attention)), jax.tree.leaves(loss(_masked_attention)), strict=True
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
