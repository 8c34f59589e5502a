"""int8 weights: rounding by hand, products of the rounded weights, and the change of the policy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, POST_NORM, numpy_params, numpy_tokens

from aem_jax.models import ModelConfig, Policy
from aem_jax.models.int8 import quantize, scale_of

BIASED = ModelConfig(**{**vars(GROUPED_TIED), "qk_norm": None, "qkv_bias": True})
CONFIGS = [GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, BIASED, POST_NORM]
INPUTS = {"qkv": 1, "o": 2, "gate_up": 1, "down": 1}


def test_rounding_by_hand():
    # One layer, three inputs, two outputs: a column with the largest 1.27 has scale 0.01; one of zeros has scale 1.
    codes, scales = quantize(jnp.array([[[1.27, 0.0], [-0.5, 0.0], [0.018, 0.0]]]), 1)
    np.testing.assert_allclose(scales, [[0.01, 1.0]], rtol=1e-6)
    np.testing.assert_array_equal(codes, [[[127, 0], [-50, 0], [2, 0]]])
    assert codes.dtype == jnp.int8 and scales.dtype == jnp.float32


def dequantized(params):
    layers = dict(params["base"]["layers"])
    for name, inputs in INPUTS.items():
        scales = layers.pop(scale_of(name))
        layers[name] = layers[name].astype(jnp.float32) * jnp.expand_dims(scales, range(1, 1 + inputs))
    return {"base": {**params["base"], "layers": layers}}


@pytest.mark.parametrize("config", CONFIGS)
def test_products_are_those_of_the_rounded_weights(config: ModelConfig):
    policy, params = Policy(config), numpy_params(config)
    codes = jax.jit(policy.quantize)(params)
    expected = jax.tree.map(lambda leaf, dtype: (leaf.shape, dtype), policy.quantized.shapes, policy.quantized.dtypes)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), codes) == expected
    rounded = dequantized(codes)
    for name, inputs in INPUTS.items():
        error = jnp.abs(rounded["base"]["layers"][name] - params["base"]["layers"][name])
        half = jnp.expand_dims(codes["base"]["layers"][scale_of(name)] / 2, range(1, 1 + inputs))
        assert jnp.all(error <= half * (1 + 1e-5))
    tokens = jnp.asarray(numpy_tokens(config, (2, 12)))
    ours, wanted = jax.jit(policy.quantized.forward)(codes, tokens), jax.jit(policy.forward)(rounded, tokens)
    np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_what_the_policy_loses():
    """With logits of order one, log-probabilities change by at most hundredths of a nat."""
    policy, params = Policy(GROUPED_TIED), numpy_params(GROUPED_TIED)
    tokens = jnp.asarray(numpy_tokens(GROUPED_TIED, (8, 24)))
    ours, theirs = policy.forward(params, tokens), policy.quantized.forward(policy.quantize(params), tokens)
    gap = jnp.abs(jax.nn.log_softmax(ours) - jax.nn.log_softmax(theirs))
    assert 1e-4 < jnp.mean(gap) < 0.05 and jnp.max(gap) < 0.5
