"""All attentions of packed rows equal the masked one, forward and backward; kernels run in interpret mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.doctor.attention import packed_rows, plain_attention
from aem_jax.models.attention import blocked_attention, longest_segment
from aem_jax.models.splash import splash_attention


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

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(q, k, v)

    for actual, expected in zip(
        jax.tree.leaves(loss(partial(blocked_attention, block=block))),
        jax.tree.leaves(loss(plain_attention)),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("attend", "length", "heads", "kv_heads"),
    [
        (partial(splash_attention, interpret=True), 256, 4, 2),  # one block
        (partial(splash_attention, interpret=True), 384, 2, 1),  # three: some pairs of blocks are not visited
    ],
)
def test_a_kernel_is_the_masked_softmax(attend, length: int, heads: int, kv_heads: int):
    """Values and gradients, against jax's own attention with the whole mask and against XLA's blocks."""
    q, k, v, segments = packed_rows(length, heads, kv_heads, 64)

    def loss(attention):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: jnp.sum(jnp.sin(attention(q, k, v, segments))), argnums=(0, 1, 2))
        )(q, k, v)

    values = loss(attend)
    for oracle in (plain_attention, partial(blocked_attention, block=128)):
        for one, other in zip(jax.tree.leaves(values), jax.tree.leaves(loss(oracle)), strict=True):
            np.testing.assert_allclose(one, other, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("window", [1, 7, 20])
def test_a_sliding_window_is_a_mask(window: int):
    """Values and gradients against a masked softmax. In blocks of 8, a query looks back over the window alone."""
    keys = jax.random.split(jax.random.key(window), 3)
    q, k, v = (jax.random.normal(key, (2, 48, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.asarray([np.repeat((1, 2, 0), (30, 15, 3)), np.full(48, 1)])
    windowed = jax.jit(partial(blocked_attention, sliding_window=window, block=8))
    ours, expected = _gradients(windowed)(q, k, v, segments), _masked_gradients(q, k, v, segments, window)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)
    beyond = v.at[1, : 40 - window].set(jnp.nan)  # 0 times NaN is NaN: these are not read
    assert bool(jnp.isfinite(windowed(q, k, beyond, segments)[1, 40:]).all())


@pytest.mark.parametrize("window", [100, 128])
def test_a_kernels_own_window_is_a_mask(window: int):
    q, k, v, segments = packed_rows(384, 2, 1, 64)
    windowed = partial(splash_attention, sliding_window=window, interpret=True)
    ours, expected = _gradients(windowed)(q, k, v, segments), _masked_gradients(q, k, v, segments, window)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5, rtol=5e-5)


def _gradients(attention):
    """Value and gradients of the sum over tokens, without padding."""

    def total(q, k, v, segments, *window):
        values = jnp.sin(attention(q, k, v, segments, *window))
        return jnp.sum(jnp.where((segments > 0)[..., None, None], values, 0.0))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))


def _masked(q, k, v, segments, window):
    distance = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])[None]
    visible = ((distance >= 0) & (distance < window))[None] & (segments[:, :, None] == segments[:, None])
    return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])


_masked_gradients = _gradients(_masked)
_plain_gradients = _gradients(plain_attention)
_blocked_gradients = _gradients(partial(blocked_attention, block=4))


@pytest.mark.parametrize("more", [0, 4, 30])
def test_short_segments_are_not_looked_beyond(more: int):
    """Rows of 48 in blocks of 4: with segments of at most 16, queries look back over 16 keys, and the numbers stay."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, 48, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True))
    lengths = ((12, 4, 3, 5), (12 + more, 1, 2, 3))  # and padding, the longest of all
    segments = jnp.asarray([np.repeat((*range(1, 5), 0), (*row, 48 - sum(row))) for row in lengths])
    assert longest_segment(segments) == 12 + more

    ours, expected = (gradients(q, k, v, segments) for gradients in (_blocked_gradients, _plain_gradients))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=2e-5)
    attention = partial(blocked_attention, segment_ids=segments, block=4)
    beyond = v.at[:, :16].set(jnp.nan)  # 0 times NaN is NaN; the last block looks back to key 28 alone
    last = attention(q, k, beyond)[:, 44:]
    assert bool(jnp.isfinite(last).all()) == (12 + more <= 16)
