"""Attention of a decode step on accelerators: the kernels against one softmax over all tokens, and the choice."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.models import ModelConfig, kv_cache, ragged
from aem_jax.models.decode_attention import (
    CHUNKED,
    attend_chunked,
    attend_in_place,
    choose,
)
from aem_jax.models.kernels import Device
from aem_jax.models.kv_cache import KVCache, KVChunk, LayerCache
from aem_jax.models.ragged import attend_ragged, block_length, ragged_attention

QWEN = ModelConfig(151936, 1536, 8960, 28, 12, 2, 128, dtype="bfloat16")
H100, A100, V100 = (Device("gpu", True, capability) for capability in (9.0, 8.0, 7.0))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3)])
def test_the_kernel_reads_each_slots_tokens_and_nothing_else(dtype: str, tolerance: float, monkeypatch):
    monkeypatch.setattr(ragged, "BLOCK_BYTES", 2**13)  # blocks of 128: a slot has several, and the last one is cut
    lengths = np.asarray([0, 1, 127, 128, 129, 300])
    slots, kv_heads, rows, head_dim, length = len(lengths), 2, 3, 8, 300
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    q, keys, values = (
        draw(slots, kv_heads, rows, head_dim),
        draw(slots, kv_heads, head_dim, length),
        draw(slots, kv_heads, length, head_dim),
    )
    unused = np.arange(length) >= lengths[:, None]
    keys = np.where(unused[:, None, None], np.nan, keys)
    values = np.where(unused[:, None, :, None], np.nan, values)
    arrays = jnp.asarray(keys, dtype), jnp.asarray(values, dtype)
    out, top, total = ragged_attention(*arrays, jnp.asarray(lengths), jnp.asarray(q, dtype), interpret=True)
    assert block_length(length, 2 * kv_heads * head_dim * arrays[0].dtype.itemsize) == 128
    for s, count in enumerate(lengths):
        if not count:
            assert not out[s].any() and not total[s].any() and (top[s] == -1e30).all()
            continue
        k, v, queries = (np.asarray(x, np.float64) for x in (arrays[0][s, ..., :count], arrays[1][s, :, :count], q[s]))
        queries = np.asarray(jnp.asarray(queries, dtype), np.float64)
        scores = np.einsum("hrd,hdt->hrt", queries, k) / np.sqrt(head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        wanted = np.einsum("hrt,htd->hrd", weights, v) / weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(out[s] / total[s], wanted, atol=tolerance)
        np.testing.assert_allclose(top[s, ..., 0], scores.max(-1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(total[s, ..., 0], weights.sum(-1), rtol=1e-4)


def test_blocks_hold_enough_bytes_for_their_reads_to_be_worth_a_step():
    assert block_length(4096, token_bytes=2 * 2 * 128 * 2) == 1024  # 1 MiB
    assert block_length(4096, token_bytes=2 * 8 * 128 * 2) == 256
    assert block_length(300, token_bytes=1) == 300


def decode(attend, in_place: bool, steps: int = 4):
    """Four steps on four slots of different lengths; the outputs of each, and the cache with the new tokens."""
    config = ModelConfig(64, 48, 80, 1, 6, 2, 8)
    lengths, length = jnp.asarray([5, 1, 120, 40]), 128
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = LayerCache(draw(4, 2, 8, length), draw(4, 2, length, 8))
    chunk: Any = cache if in_place else kv_cache.init_chunk(config, 4, steps)[0]
    outs = []
    for index in range(steps):
        q, k, v = draw(4, 1, 6, 8), draw(4, 1, 2, 8), draw(4, 1, 2, 8)
        out, chunk = attend(q, k, v, cache, lengths, chunk, jnp.int32(index))
        outs.append(out)
    if not in_place:
        chunk, _ = kv_cache.append(KVCache((cache,)), [chunk], lengths, draw(4, 48), draw(4, 48))
        chunk = chunk.layers[0]
    ends = np.asarray(lengths) + steps
    tokens = [np.asarray(chunk.keys)[s, ..., : ends[s]] for s in range(4)]
    return np.stack(outs), tokens + [np.asarray(chunk.values)[s, :, : ends[s]] for s in range(4)]


@pytest.mark.parametrize(
    ("attend", "in_place"),
    [
        (partial(attend_ragged, interpret=True), False),
        (partial(attend_in_place, implementation="xla"), True),
    ],
)
def test_both_kernels_attend_as_one_softmax_over_cache_and_chunk(attend, in_place: bool):
    (actual, cached), (wanted, appended) = decode(attend, in_place), decode(attend_chunked, in_place=False)
    np.testing.assert_allclose(actual, wanted, atol=2e-6)
    for one, other in zip(cached, appended, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_slot_of_length_zero_writes_nothing_in_place():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache = LayerCache(draw(2, 1, 8, 16), draw(2, 1, 16, 8))
    new = draw(2, 1, 1, 8)
    out, after = attend_in_place(new, new, new, cache, jnp.asarray([0, 3]), cache, jnp.int32(2), implementation="xla")
    assert np.isfinite(out).all()
    changed = (np.asarray(after.values) != np.asarray(cache.values)).any(-1)[:, 0]
    np.testing.assert_array_equal(np.argwhere(changed), [[1, 5]])
    np.testing.assert_array_equal(after.keys[0], cache.keys[0])


@pytest.mark.parametrize(
    ("device", "config", "int8", "wanted"),
    [
        (Device("tpu"), QWEN, False, attend_ragged),
        (Device("tpu"), replace(QWEN, dtype="float32"), False, attend_ragged),
        (H100, QWEN, False, attend_in_place),
        (A100, replace(QWEN, head_dim=64), False, attend_in_place),
        (H100, replace(QWEN, dtype="float32"), False, attend_chunked),  # cuDNN takes 16 bits
        (H100, replace(QWEN, head_dim=256), False, attend_chunked),
        (V100, QWEN, False, attend_chunked),
        (Device("gpu"), QWEN, False, attend_chunked),  # not of NVIDIA
        (Device("cpu"), QWEN, False, attend_chunked),
        (Device("tpu"), QWEN, True, attend_chunked),
        (H100, QWEN, True, attend_chunked),
        (Device("tpu"), replace(QWEN, sliding_windows=(512,) * 28), False, attend_chunked),
    ],
)
def test_the_choice_follows_device_and_sizes(device: Device, config: ModelConfig, int8: bool, wanted):
    chosen = choose(config, device, int8=int8)
    assert chosen.attend is wanted
    assert chosen.follows_lengths == (wanted is not attend_chunked)
    assert (chosen == CHUNKED) == (wanted is attend_chunked)
    assert chosen.in_place == (wanted is attend_in_place)


def test_a_chunk_is_an_argument_of_the_joined_softmax():
    """The chunk's tokens after the query are not attended to."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    cache, new = LayerCache(draw(1, 1, 8, 16), draw(1, 1, 16, 8)), draw(1, 1, 1, 8)
    chunk = KVChunk(jnp.full((1, 1, 8, 4), 1e3), jnp.full((1, 1, 4, 8), 1e3))
    attend = partial(attend_ragged, interpret=True)
    out, _ = attend(new, new, new, cache, jnp.asarray([7]), chunk, jnp.int32(0))
    assert np.abs(out).max() < 10
