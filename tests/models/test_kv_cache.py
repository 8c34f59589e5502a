"""An int8 KV cache: rounding by hand, its error bound, and attention over the rounded numbers. Rings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.models import ModelConfig
from aem_jax.models.attention import chunk_attention
from aem_jax.models.int8 import QuantizedArray, quantize
from aem_jax.models.kv_cache import (
    KVChunk,
    LayerCache,
    append,
    copy_rows,
    copy_within,
    gather,
    init_cache,
    ring_length,
)


def test_rounding_by_hand():
    # Two tokens of two numbers: 1.27 is the largest, so its scale is 0.01; a token of zeros has scale 1.
    codes, scales = quantize(jnp.array([[1.27, -0.018], [0.0, 0.0]]), 1)
    np.testing.assert_allclose(scales, [0.01, 1.0], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[127, -2], [0, 0]])
    assert codes.dtype == jnp.int8 and scales.dtype == jnp.float32


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), power=st.integers(-30, 30), axis=st.sampled_from([1, 2]))
def test_the_error_is_at_most_half_a_scale(seed: int, power: int, axis: int):
    x = np.random.RandomState(seed).standard_normal((3, 8, 8)).astype(np.float32) * np.float32(2.0) ** power
    codes, scales = (np.asarray(array, np.float64) for array in quantize(jnp.asarray(x), axis))
    scales = np.expand_dims(scales, axis)
    assert np.abs(codes).max() == 127
    assert (np.abs(x - codes * scales) <= scales / 2 * (1 + 1e-4)).all()


def oracle(q, k, v, cached, chunk_k, chunk_v, index):
    """One query at a time in float64, softmax over the keys it may see: k and v [S,KV,T,Dh], q [S,C,H,Dh]."""
    out = np.zeros(q.shape)
    for s, c, h in np.ndindex(*q.shape[:3]):
        head = h // (q.shape[2] // k.shape[1])
        keys = np.concatenate([k[s, head, : cached[s]], chunk_k[s, head, : index + c + 1]])
        values = np.concatenate([v[s, head, : cached[s]], chunk_v[s, head, : index + c + 1]])
        scores = keys @ q[s, c, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[s, c, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_attention_is_that_to_the_rounded_numbers(dtype: str, tolerance: float):
    slots, count, heads, kv_heads, head_dim, window, places, index = 3, 2, 6, 2, 8, 12, 5, 3
    random, cached = np.random.RandomState(0), np.array([12, 0, 7])
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)
    q, chunk = draw(slots, count, heads, head_dim), [draw(slots, kv_heads, places, head_dim) for _ in range(2)]
    # Tokens of very different size, each with its own scale. Values past the length are large and not read.
    size = 2.0 ** random.randint(-3, 3, (slots, kv_heads, window, 1))
    size = np.where(np.arange(window)[:, None] < cached[:, None, None, None], size, 1e6)
    k, v = (quantize(draw(slots, kv_heads, window, head_dim) * size.astype(np.float32), 3) for _ in range(2))
    actual = chunk_attention(
        q,
        LayerCache(QuantizedArray(jnp.swapaxes(k.codes, 2, 3), k.scales), v),
        jnp.asarray(cached),
        KVChunk(jnp.swapaxes(chunk[0], 2, 3), chunk[1]),
        jnp.int32(index),
    )
    rounded = [np.asarray(x.codes, np.float64) * np.asarray(x.scales, np.float64)[..., None] for x in (k, v)]
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    wanted = oracle(wide(q), rounded[0], rounded[1], cached, wide(chunk[0]), wide(chunk[1]), index)
    assert actual.dtype == dtype
    np.testing.assert_allclose(wide(actual), wanted, atol=tolerance * 4, rtol=tolerance)


@pytest.mark.parametrize("int8", [False, True])
def test_a_ring_holds_the_last_tokens(int8: bool):
    """Chunks of which a part is kept, in all or some slots; rows that are gathered or copied are rings, too."""
    config = ModelConfig(9, 8, 8, 2, 2, 2, 4, sliding_windows=(3, 0))
    slots, chunk, random = 3, 6, np.random.RandomState(0)
    assert ring_length(3, chunk) == 16
    make = partial(init_cache, config, slots, 60, int8=int8, ring_slack=chunk)
    cache, lengths, hidden = make(), np.zeros(slots, np.int32), jnp.zeros((slots, 8))
    step, held = jax.jit(append), lambda layer: [np.asarray(x) for x in jax.tree.leaves(layer)]

    def check(cache, lengths):
        for ring, full in zip(held(cache.layers[0]), held(cache.layers[1]), strict=True):
            axis = full.shape.index(60)  # both layers were given the same numbers
            for slot, length in enumerate(lengths):
                last = np.arange(max(length - 3 - chunk, 0), length)
                np.testing.assert_array_equal(
                    ring[slot].take(last % 16, axis - 1), full[slot].take(last, axis - 1), err_msg=str((slot, length))
                )

    for turn in range(9):
        chosen = np.arange(slots) if turn % 3 else np.asarray([2, 0])
        keys, values = random.standard_normal((2, len(chosen), 2, 4, chunk)).astype(np.float32)
        new = KVChunk(jnp.asarray(keys), jnp.swapaxes(values, 2, 3))
        cache, hidden = step(cache, (new, new), lengths.copy(), hidden, hidden[chosen], chosen)  # lengths change below
        lengths[chosen] += random.randint(0, chunk + 1, len(chosen))
        check(cache, lengths)
    assert lengths.max() > 32
    rows = np.asarray([1, 2], np.int32)
    check(gather(cache, jnp.asarray(rows), 60), lengths[rows])
    check(copy_rows(make(), cache, jnp.asarray([2, -1, 0]), 60), [lengths[2], 0, lengths[0]])
    check(copy_within(cache, jnp.asarray([-1, 2, -1]), 60), [lengths[0], lengths[2], lengths[2]])
