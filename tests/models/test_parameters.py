"""The table of parameters: initial values, the tensors that fill each array, and values derived from its rows."""

from dataclasses import replace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, POST_NORM

from aem_jax.models import ModelConfig, Policy
from aem_jax.models.lora import Target, projections
from aem_jax.models.parameters import init_parameters, layer_matrices, parameter_table
from aem_jax.models.weights import tensors

BIASED = replace(MULTI_UNTIED, qk_norm=None, qkv_bias=True, dtype="bfloat16")
CONFIGS = [GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, BIASED, POST_NORM]


def test_initial_values():
    """The n-th drawn array has the key fold_in(key, n); standard deviations by hand, residual projections / √(2 L)."""
    config, key = BIASED, jax.random.key(3)
    params = init_parameters(config, key)
    d, f, layers = config.hidden_size, config.intermediate_size, config.num_layers
    drawn = {
        "embed": d**-0.5,
        "qkv": d**-0.5,
        "o": (config.num_heads * config.head_dim) ** -0.5 * (2 * layers) ** -0.5,
        "gate_up": d**-0.5,
        "down": f**-0.5 * (2 * layers) ** -0.5,
        "head": d**-0.5,
    }
    arrays = {**params, **params["layers"]}
    for n, (name, std) in enumerate(drawn.items()):
        noise = jax.random.normal(jax.random.fold_in(key, n), arrays[name].shape, jnp.float32)
        np.testing.assert_allclose(arrays[name], noise * std, rtol=1e-6)
    constants = {name: np.unique(array).tolist() for name, array in arrays.items() if name not in (*drawn, "layers")}
    assert constants == {"qkv_bias": [0.0], "attention_norm": [1.0], "mlp_norm": [1.0], "norm": [1.0]}
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("config", CONFIGS)
def test_tensors_fill_every_array_once(config: ModelConfig):
    filled = jax.tree.map(lambda leaf: np.zeros(leaf.shape, int), Policy(config).shapes)
    for tensor in tensors(config):
        array = filled
        for name in tensor.path:
            array = array[name]
        numbers = np.arange(np.prod(tensor.shape)).reshape(tensor.shape)
        block = tensor.to_ours(numbers)
        np.testing.assert_array_equal(tensor.to_theirs(block), numbers)
        array[tuple(slice(at, at + size) for at, size in zip(tensor.start, block.shape, strict=True))] += 1
    assert all((array == 1).all() for array in jax.tree.leaves(filled))


@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_and_codes_are_of_the_matrices_of_layers(config: ModelConfig):
    rows = {row.name for row in parameter_table(config) if row.lora}
    assert rows == {row.name for row in parameter_table(config) if row.int8}
    assert rows == {row.name for row in layer_matrices(config)} == {p.parameter for p in projections(config).values()}
    assert get_args(Target) == ("all", *projections(config))


def test_dtypes_of_use():
    """Norms stay float32, all else is in the config's dtype; masters are float32."""
    policy = Policy(BIASED)
    base = policy.dtypes["base"]
    assert {name for name, dtype in base["layers"].items() if dtype == "float32"} == {"attention_norm", "mlp_norm"}
    assert {name: base[name].name for name in base if name != "layers"} == {
        "embed": "bfloat16",
        "head": "bfloat16",
        "norm": "float32",
    }
    assert {leaf.dtype.name for leaf in jax.tree.leaves(policy.shapes)} == {"float32"}
