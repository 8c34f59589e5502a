"""The decoder against Hugging Face transformers, and properties of its passes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_policies
from small_policies import GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, POST_NORM, numpy_params, numpy_tokens

from aem_jax.models import CONFIGS, ModelConfig, Policy
from aem_jax.models.attention import row_attention
from aem_jax.models.config import TINY
from aem_jax.models.kernels import make_row_attention
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings

GOLDEN = Path(__file__).resolve().parent / "golden"
CASES = [
    "GROUPED_TIED",
    "MULTI_UNTIED",
    "ONE_KV_UNTIED",
    "POST_NORM",
    "GELU",
    "SLIDING",
]  # in make_golden.py's order: the index is the seed


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_recorded_transformers_logits(name: str):
    config = getattr(small_policies, name)
    recorded = np.load(GOLDEN / f"{name.lower()}.npz")
    logits = Policy(config).forward(numpy_params(config, CASES.index(name)), jnp.asarray(recorded["tokens"]))
    assert recorded["logits"].std() > 1  # else 1e-4 would be a weak bound
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_live_transformers_logits(name: str):
    pytest.importorskip("torch", reason="torch is not installed; recorded logits are compared instead")
    import transformers_logits

    config = getattr(small_policies, name)
    params, tokens = numpy_params(config, 7), numpy_tokens(config, (3, 23), 7)
    theirs = transformers_logits.logits(config, params, tokens)
    np.testing.assert_allclose(Policy(config).forward(params, jnp.asarray(tokens)), theirs, atol=1e-4, rtol=0)


def test_packed_segments_equal_separate_rows():
    """Two rows of packed segments, with padding between and after them, against one row per segment."""
    policy, params = Policy(GROUPED_TIED), numpy_params(GROUPED_TIED)
    lengths = [[5, 9, 3], [11, 7]]
    width = 24
    tokens, positions, segments = (np.zeros((2, width), np.int32) for _ in range(3))
    alone = {}
    for row, parts in enumerate(lengths):
        at = 2 * row  # the second row begins with padding
        for index, length in enumerate(parts):
            ids = numpy_tokens(GROUPED_TIED, (length,), 10 * row + index)
            tokens[row, at : at + length] = ids
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = index + 1
            alone[row, at] = ids
            at += length + index  # a hole of padding after the second segment
    hidden, _ = jax.jit(policy.hidden)(params, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))
    assert np.all(np.isfinite(hidden))
    logits, forward = policy.logits(params, hidden), jax.jit(policy.forward)
    for (row, at), ids in alone.items():
        own = forward(params, jnp.asarray(ids)[None])[0]
        np.testing.assert_allclose(logits[row, at : at + len(ids)], own, atol=2e-5, rtol=0)


def test_no_token_sees_a_later_one():
    policy, params = Policy(MULTI_UNTIED), numpy_params(MULTI_UNTIED)
    tokens = numpy_tokens(MULTI_UNTIED, (1, 12))
    changed = tokens.copy()
    changed[0, 7:] = (changed[0, 7:] + 1) % MULTI_UNTIED.vocab_size
    first, second = (policy.forward(params, jnp.asarray(x)) for x in (tokens, changed))
    np.testing.assert_array_equal(first[:, :7], second[:, :7])
    assert np.min(np.max(np.abs(first[:, 7:] - second[:, 7:]), axis=-1)) > 1e-3


def test_remat_changes_nothing():
    policy, params = Policy(GROUPED_TIED), numpy_params(GROUPED_TIED)
    tokens = jnp.asarray(numpy_tokens(GROUPED_TIED, (2, 10)))
    positions, segments = jnp.broadcast_to(jnp.arange(10), (2, 10)), jnp.ones((2, 10), jnp.int32)

    def loss(params, remat):
        return jnp.sum(jnp.square(policy.hidden(params, tokens, positions, segments, remat)[0]))

    plain = jax.value_and_grad(loss)(params, None)
    saved = jax.value_and_grad(loss)(params, jax.checkpoint_policies.nothing_saveable)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, saved)


def test_gradients_of_all_options_on_a_mesh_equal_those_on_one_device():
    options: Any = {"norm_placement": "post", "qk_norm": "projection", "activation": "gelu_tanh"}
    policy = Policy(ModelConfig(64, 48, 80, 3, 4, 2, 16, sliding_windows=(5, 0, 9), **options))
    params, tokens = numpy_params(policy.config), jnp.asarray(numpy_tokens(policy.config, (4, 64)))
    rows = (tokens, jnp.broadcast_to(jnp.arange(64), tokens.shape), jnp.ones_like(tokens))

    def gradient(params, attention):
        loss = lambda params: jnp.mean(policy.hidden(params, *rows, attention=attention)[0] ** 3)
        return jax.jit(jax.value_and_grad(loss))(params)

    mesh = make_mesh(MeshConfig(2, 2, 2))
    placed = jax.device_put(params, shardings(mesh, policy.axes, TRAIN))
    expected, actual = gradient(params, row_attention), gradient(placed, make_row_attention("auto", mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), actual, expected)


def test_bfloat16_activations_stay_near_float32():
    """The dtype is that of activations; parameters stay float32 masters."""
    half = ModelConfig(**{**vars(GROUPED_TIED), "dtype": "bfloat16"})
    params, tokens = numpy_params(GROUPED_TIED), jnp.asarray(numpy_tokens(GROUPED_TIED, (2, 9)))
    positions, segments = jnp.broadcast_to(jnp.arange(9), (2, 9)), jnp.ones((2, 9), jnp.int32)
    hidden, _ = Policy(half).hidden(params, tokens, positions, segments)
    assert hidden.dtype == jnp.bfloat16
    logits = Policy(half).logits(params, hidden)
    rounded = np.mean(logits == logits.astype(jnp.bfloat16).astype(jnp.float32))
    assert logits.dtype == jnp.float32 and rounded < 0.1  # logits are never bfloat16, also not in between
    logits = Policy(half).forward(params, tokens)
    assert logits.dtype == jnp.float32
    exact = Policy(GROUPED_TIED).forward(params, tokens)
    assert 1e-4 < np.sqrt(np.mean(np.square(logits - exact))) < 0.1


@pytest.mark.parametrize("config", [GROUPED_TIED, MULTI_UNTIED, ONE_KV_UNTIED, POST_NORM])
def test_parameters_are_counted_and_named(config: ModelConfig):
    policy = Policy(config)
    sizes = [leaf.size for leaf in jax.tree.leaves(policy.shapes)]
    assert sum(sizes) == config.num_parameters
    ranks = jax.tree.map(
        lambda axes, leaf: len(axes) == leaf.ndim, policy.axes, policy.shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert all(jax.tree.leaves(ranks))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(policy.shapes))


PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "olmo-2-0425-1b": 1_484_916_736,
    "olmo-2-1124-7b": 7_298_617_344,
    "olmo-2-1124-13b": 13_716_198_400,
    "olmo-2-0325-32b": 32_234_279_936,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,  # without the tower for images
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.3": 7_248_023_552,
    "ministral-8b-2410": 8_019_808_256,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "mixtral-8x7b": 46_702_792_704,
}
"""Parameters of the published checkpoints; a head that is the embedding counts once."""


def test_known_sizes_are_the_published_ones():
    assert {name: config.num_parameters for name, config in CONFIGS.items() if name not in TINY} == PUBLISHED
    assert CONFIGS["tiny"].num_parameters < 1_000_000
    for name in ("qwen2.5-1.5b", "llama-3.2-1b"):
        policy = Policy(CONFIGS[name])
        assert sum(leaf.size for leaf in jax.tree.leaves(policy.shapes)) == PUBLISHED[name]


def test_init_starts_near_the_uniform_distribution():
    config = CONFIGS["tiny"]
    policy = Policy(config)
    logits = policy.forward(policy.init(jax.random.key(0)), jnp.asarray(numpy_tokens(config, (2, 32))))
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), axis=-1)
    assert float(jnp.min(entropy)) > 0.85 * np.log(config.vocab_size)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_heads": 3}, "num_heads divisible by num_kv_heads, got 3 and 2"),
        ({"head_dim": 15}, "even head_dim"),
        ({"norm_placement": "sandwich"}, r"norm_placement to be one of \('pre', 'post', 'both'\), got 'sandwich'"),
        ({"qk_norm": True}, "qk_norm to be one of .*, got True"),
        ({"activation": "relu"}, "activation to be one of .*, got 'relu'"),
        ({"sliding_windows": (4, 0)}, r"a whole number for each of 3 layers, .*, got \(4, 0\)"),
        ({"sliding_windows": (4, 0, -1)}, "sliding_windows to be a whole number"),
        ({"unrotated_layers": (2, 1)}, r"unrotated_layers to be indices of 3 layers in ascending order, got \(2, 1\)"),
        ({"unrotated_layers": (3,)}, "unrotated_layers to be indices of 3 layers"),
        ({"score_dim": 0}, "score_dim to be a whole number of at least 1, got 0"),
        ({"sliding_rope_theta": 0.0}, "rotary bases above 0, got 10000.0 and 0.0"),
    ],
)
def test_bad_sizes_and_options_are_refused(change: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        ModelConfig(**{**vars(GROUPED_TIED), **change})


def program_size(layers: int) -> int:
    """Number of instructions in the lowered gradient of a decoder with this many layers."""
    policy = Policy(ModelConfig(**{**vars(GROUPED_TIED), "num_layers": layers}))
    tokens = jnp.zeros((1, 8), jnp.int32)
    text = jax.jit(jax.grad(lambda p: jnp.sum(policy.forward(p, tokens)))).lower(policy.shapes).as_text()
    return text.count("\n")


def test_program_does_not_grow_with_depth():
    assert program_size(8) == program_size(2)
