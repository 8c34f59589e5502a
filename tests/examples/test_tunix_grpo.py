"""The Tunix example, if google-tunix is installed: its training, and its loss against one scaled by hand."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("tunix", reason="google-tunix is not installed")

import jax
import jax.numpy as jnp
from flax import nnx

from examples import tunix_grpo

PAD, EOS, TEMPERATURE = 0, 2, 0.7


@pytest.fixture(autouse=True)
def loose_ranks() -> Iterator[None]:
    """Tunix does not support the strict rank promotion of these tests, and samples in its own thread."""
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def model():
    return tunix_grpo.tiny_qwen3()


@pytest.fixture
def example():
    """Two groups of three responses, of 1 to 5 tokens."""
    rng = np.random.default_rng(0)
    completions = rng.integers(3, 29, (6, 5))
    mask = np.arange(5) < np.array([[5], [3], [1], [4], [2], [5]])
    prompts = np.repeat(rng.integers(3, 29, (2, 4)), 3, axis=0)
    return tunix_grpo.grpo_learner.TrainExample(
        prompt_ids=jnp.array(prompts),
        prompt_mask=jnp.ones((6, 4), bool),
        completion_ids=jnp.array(np.where(mask, completions, PAD)),
        completion_mask=jnp.array(mask),
        advantages=jnp.array([1.2, -0.5, -0.7, -1.0, 0.1, 0.9], jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )


def algorithm():
    config = tunix_grpo.grpo_learner.GRPOConfig(num_generations=3, beta=0.0, policy_loss_fn="aem_grpo")
    config.temperature = TEMPERATURE  # GRPOLearner sets it from the rollout's
    return config


def gradient(loss, model, example):
    def value(model):
        return loss(model, example, algorithm(), PAD, EOS)

    (number, _), gradients = nnx.value_and_grad(value, has_aux=True)(model)
    return np.asarray(number), jax.tree.map(np.asarray, nnx.to_pure_dict(gradients))


def scaled_by_hand(model, example) -> np.ndarray:
    """α · A from the model's logits, response by response, in float64."""
    tokens = np.concatenate([example.prompt_ids, example.completion_ids], axis=1)
    real = tokens != PAD
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    seen = np.tril(np.ones((tokens.shape[1],) * 2, bool))[None] & real[:, None, :]
    logits, _ = model(jnp.array(tokens), positions=jnp.array(positions), attention_mask=jnp.array(seen), cache=None)
    advantages, mask = np.asarray(example.advantages, np.float64), np.asarray(example.completion_mask)
    for group in ([0, 1, 2], [3, 4, 5]):
        means = []
        for row in group:
            entropies = []
            for token in range(mask[row].sum()):
                z = np.asarray(logits[row, 3 + token], np.float64) / TEMPERATURE  # the prompt has 4 tokens
                policy = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
                entropies.append(-(policy * np.log(policy)).sum())
            means.append(np.mean(entropies))
        spread = max(means) - min(means)
        if spread < 0.1:
            continue  # the group is unchanged
        weights = [np.exp(-(mean - min(means)) / spread) for mean in means]
        for row, weight in zip(group, weights):
            advantages[row] *= weight / np.mean(weights)
    return advantages


def test_the_loss_is_tunixs_at_advantages_scaled_by_hand(model, example):
    advantages = scaled_by_hand(model, example)
    # entropies span 0.084 nats in the first group, which stays as it is, and more in the second
    assert (np.abs(advantages / example.advantages - 1) > 0.1).tolist() == [False] * 3 + [True] * 3
    by_hand = example.replace(advantages=jnp.array(advantages, jnp.float32))
    loss, gradients = gradient(tunix_grpo.aem_grpo_loss, model, example)
    expected_loss, expected = gradient(tunix_grpo.algo_core.grpo_loss_fn, model, by_hand)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients, expected)
    assert abs(loss - gradient(tunix_grpo.algo_core.grpo_loss_fn, model, example)[0]) > 1e-3


def test_strength_0_is_tunixs_own_loss(model, example, monkeypatch):
    monkeypatch.setattr(tunix_grpo, "STRENGTH", 0.0)
    loss, gradients = gradient(tunix_grpo.aem_grpo_loss, model, example)
    expected_loss, expected = gradient(tunix_grpo.algo_core.grpo_loss_fn, model, example)
    np.testing.assert_array_equal(loss, expected_loss)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)


def test_settings_that_give_wrong_entropies_are_refused(model, example):
    moved = example.replace(old_per_token_logps=jnp.zeros((6, 5)))
    with pytest.raises(ValueError, match="num_iterations=1"):
        tunix_grpo.aem_grpo_loss(model, moved, algorithm(), PAD, EOS)
    packed = example.replace(segment_ids=jnp.zeros((6, 5), jnp.int32))
    with pytest.raises(ValueError, match="packed"):
        tunix_grpo.aem_grpo_loss(model, packed, algorithm(), PAD, EOS)


def test_tunixs_learner_trains_with_it():
    history = tunix_grpo.train(steps=8)
    assert len(history) == 8
    # 0.445 for the random policy and with a learning rate of 0; 0.96 was measured after 8 steps
    assert history[0]["reward"] < 0.55 and history[-1]["reward"] > 0.8
    for line in history:
        assert 0.367 < line["aem/minimum"] < 1 < line["aem/maximum"] < 2.719


def test_without_a_learning_rate_nothing_is_learnt():
    first, *_, last = tunix_grpo.train(steps=3, learning_rate=0.0)
    assert first == last
