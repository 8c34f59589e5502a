"""Small policies for tests. The random weights come from numpy's frozen generator and are equal on every machine."""

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.models import Mixture, ModelConfig, Params, Policy

GROUPED_TIED = ModelConfig(61, 48, 80, 3, 4, 2, 16, rope_theta=10_000.0)
MULTI_UNTIED = ModelConfig(40, 32, 64, 2, 2, 2, 16, rope_theta=1_000_000.0, tied_head=False)
DEEP = ModelConfig(30, 16, 24, 9, 2, 1, 8, rope_theta=10_000.0)  # too deep for the sampler to write its layers out
ONE_KV_UNTIED = ModelConfig(33, 40, 56, 2, 4, 1, 8, rope_theta=50_000.0, norm_eps=1e-5, tied_head=False)
POST_NORM = ModelConfig(
    *(37, 32, 56, 2, 4, 2, 8), norm_eps=1e-5, tied_head=False, norm_placement="post", qk_norm="projection"
)
GELU = ModelConfig(35, 32, 56, 2, 4, 2, 8, activation="gelu_tanh")
MOE = ModelConfig(38, 32, 24, 2, 4, 2, 8, tied_head=False, mixture=Mixture(6, 2))
SLIDING = ModelConfig(36, 32, 56, 3, 4, 2, 8, sliding_windows=(4, 0, 4))


def numpy_params(config: ModelConfig, seed: int = 0) -> Params:
    """Random parameters, spread so that logits are of order one and norms differ from one."""
    random = np.random.RandomState(seed)

    def leaf(path, shape):
        name = path[-1].key
        value = random.standard_normal(shape.shape).astype(np.float32)
        if name.endswith("norm"):
            return jnp.asarray((0.0 if config.zero_centered_norms else 1.0) + np.float32(0.2) * value)
        inner = dict.fromkeys(("down", "experts_down"), config.intermediate_size)
        fan_in = (inner | {"o": config.num_heads * config.head_dim}).get(name, config.hidden_size)
        return jnp.asarray(value * (1.5 * fan_in**-0.5))

    return jax.tree_util.tree_map_with_path(leaf, Policy(config).shapes)


def numpy_tokens(config: ModelConfig, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random token ids i32."""
    return np.random.RandomState(seed).randint(0, config.vocab_size, shape).astype(np.int32)
