"""Top-k and top-p by bisection keep what a sort of the whole vocabulary keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.sampler import SamplingConfig
from aem_jax.sampler.sampling import _keep


def kept_by_sorting(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """The definition, in float64: the largest k, then the shortest prefix of them that reaches p; ties are kept."""
    kept = np.zeros(weights.shape, bool)
    for row, out in zip(weights.astype(np.float64), kept, strict=True):
        ordered = np.sort(row)[::-1][: top_k or len(row)]
        before = np.cumsum(ordered) - ordered
        floor = ordered[before < top_p * ordered.sum()][-1] if top_p < 1 else ordered[-1]
        out[:] = row >= floor
    return kept & (weights > 0)


def kept(weights: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    rows = jnp.asarray(weights, jnp.float32)
    actual = jax.jit(_keep, static_argnums=2)(rows, jnp.sum(rows, axis=-1), SamplingConfig(1.0, top_k, top_p))
    np.testing.assert_array_equal(actual, jnp.where(actual > 0, rows, 0.0))
    return np.asarray(actual) > 0


@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 64, 512, 1024]), min_size=12, max_size=12).filter(any),
    st.sampled_from([0, 1, 2, 5, 12]),
    st.sampled_from([1.0, 0.875, 0.5, 0.25, 2.0**-10]),
)
@settings(deadline=None, max_examples=150)
def test_sums_that_are_exact_keep_the_very_same(sizes: list[int], top_k: int, top_p: float):
    """Small multiples of a power of two add up without rounding: ties at the edge and masses of exactly p included."""
    weights = np.asarray([sizes], np.float32) / 1024
    np.testing.assert_array_equal(kept(weights, top_k, top_p), kept_by_sorting(weights, top_k, top_p))


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.999), (50, 1.0), (50, 0.9), (3000, 0.5), (1, 0.3)])
@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0, 30.0])
def test_random_weights(top_k: int, top_p: float, spread: float):
    """From flat rows (all ties) to rows of one peak; sums differ in their last bits, so may the token at the edge."""
    logits = np.random.default_rng(int(10 * spread)).standard_normal((4, 3000)) * spread
    weights = np.exp(logits - logits.max(1, keepdims=True)).astype(np.float32)
    actual, wanted = kept(weights, top_k, top_p), kept_by_sorting(weights, top_k, top_p)
    off = actual != wanted
    assert off.sum(axis=1).max() <= (0 if top_p == 1.0 or spread == 0.0 else 1)
    for row in np.nonzero(off.any(axis=1))[0]:  # there, the mass before the token is p to seven digits
        larger = weights[row] > weights[row][off[row]].max()
        among = np.sort(weights[row].astype(np.float64))[::-1][: top_k or None]
        assert weights[row][larger].astype(np.float64).sum() == pytest.approx(top_p * among.sum(), rel=1e-6)


def test_weights_far_apart_and_close_together():
    weights = np.asarray([[1.0, 1e-30, 1e-37, 0.0], [1.0, 1.0 - 2.0**-24, 2.0**-24, 0.0]], np.float32)
    np.testing.assert_array_equal(kept(weights, 1, 1.0), [[1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(kept(weights, 2, 1.0), [[1, 1, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(kept(weights, 0, 0.5), [[1, 0, 0, 0], [1, 0, 0, 0]])
