"""The parts of a policy's parameters: one structure in all trees, and the same draws whatever parts there are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import GROUPED_TIED

from aem_jax.learner import combine, partition
from aem_jax.models import LoraConfig, Policy

CONFIG = replace(GROUPED_TIED, dtype="bfloat16")
LORA = LoraConfig(rank=2)


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("value", [False, True])
def test_parts_and_their_draws(lora: LoraConfig | None, value: bool):
    policy, key = Policy(CONFIG, lora, value), jax.random.key(4)
    params = policy.init(key)
    assert set(params) == {"base"} | ({"adapter"} if lora else set()) | ({"value"} if value else set())
    structure = jax.tree.structure(params)
    assert jax.tree.structure(policy.shapes) == jax.tree.structure(policy.dtypes) == structure
    same_rank = lambda names, leaf: len(names) == leaf.ndim
    assert all(jax.tree.leaves(jax.tree.map(same_rank, policy.axes, params, is_leaf=lambda x: type(x) is tuple)))
    base = Policy(CONFIG).init(key)["base"]
    used = Policy(CONFIG).dtypes["base"] if lora else jax.tree.map(lambda _: jnp.dtype("float32"), base)
    jax.tree.map(
        lambda leaf, plain, dtype: np.testing.assert_array_equal(leaf, plain.astype(dtype), strict=True),
        *(params["base"], base, used),
    )
    trainable, frozen = partition(policy, params)
    assert set(frozen) == ({"base"} if lora else set()) and trainable.keys() | frozen.keys() == params.keys()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainable)} == {"float32"}
    assert jax.tree.structure(combine(trainable, frozen)) == structure


def test_the_policies_to_sample_with():
    assert Policy(CONFIG, LORA, value=True).sampled == Policy(CONFIG, value=True).sampled == Policy(CONFIG)
    apart = replace(LORA, merge=False)
    assert Policy(CONFIG, apart, value=True).sampled == Policy(CONFIG, apart)
    assert Policy(CONFIG, LORA, value=True).quantized == Policy(CONFIG, int8=True)
