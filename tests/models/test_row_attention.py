"""The blocked attention of packed rows is the masked one, forward and backward, whatever the row's length."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.models.attention import blocked_attention


def masked_attention(q, k, v, segment_ids):
    """jax's own, with the whole mask."""
    length = q.shape[1]
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])


@pytest.mark.parametrize(("length", "block"), [(5, 64), (64, 64), (150, 64), (150, 128)])
def test_blocks_change_nothing(length, block):
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
        jax.tree.leaves(loss(partial(blocked_attention, block=block))),
        jax.tree.leaves(loss(masked_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=2e-5)
