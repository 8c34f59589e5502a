"""The entropy bonus against autodiff and by hand, and the tokens that Clip-Cov and KL-Cov act on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.advantage import token_advantages
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_token_logprobs, make_update
from aem_jax.learner.covariance import clip_cov, covariances, kl_cov, selected_tokens
from aem_jax.learner.head import HeadLayout, head_loss
from aem_jax.learner.objective import EntropyObjective, Stats, Tokens, policy_objective
from aem_jax.losses import clipped_policy_loss
from aem_jax.sharding import MeshConfig, make_mesh

TOY = Bigram()
LAYOUT = BatchLayout(num_microbatches=8, rows=2, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7, temperature=1.3)


def new_batch(seed: int = 0, layout: BatchLayout = LAYOUT):
    batch = collate(random_trajectories(seed, 8, TOY.vocab_size), layout)
    per_response = np.random.default_rng(seed).standard_normal(layout.max_responses).astype(np.float32)
    return batch, np.asarray(token_advantages(per_response, np.asarray(batch.response_ids)))


def gradient_of(config: LearnerConfig, batch, advantages) -> tuple[dict, dict[str, float]]:
    """Gradient of the first optimizer step, from Adam's mean, and the metrics."""
    state = init_state(TOY, config, ONE_DEVICE, jax.random.key(0))
    state, stats = make_update(TOY, config, ONE_DEVICE)(state, place(batch, ONE_DEVICE), advantages)
    gradient = jax.tree.map(lambda mu: np.asarray(mu) / (1 - config.beta1), state.opt_state[1][0].mu)
    return gradient["base"], {name: float(value) for name, value in stats.items()}


def naive_loss(params, batch, advantages, config: LearnerConfig, selected=None, old=None):
    """The loss from all logits at once, with weights 1/tokens; `old` are the log-probabilities before the update."""
    hidden = jnp.tanh(params["embed"][batch.tokens])[:, :, :-1]
    log_policy = jax.nn.log_softmax(hidden @ params["head"] / config.temperature)
    entropies = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
    logprobs = jnp.take_along_axis(log_policy, batch.tokens[:, :, 1:, None], axis=-1)[..., 0]
    cut = lambda x: jnp.asarray(x)[:, :, 1:]
    mask, bounds = cut(batch.response_ids) >= 0, {"clip_low": config.clip_low, "clip_high": config.clip_high}
    losses = clipped_policy_loss(logprobs, cut(batch.logprobs), cut(advantages), **bounds).loss
    if config.covariance == "clip":
        losses = jnp.where(cut(selected), 0.0, losses)
    if config.covariance == "kl":
        losses = losses + config.covariance_penalty * jnp.where(cut(selected), jnp.abs(logprobs - cut(old)), 0.0)
    return jnp.sum(jnp.where(mask, losses - config.entropy_coefficient * entropies, 0.0)) / jnp.sum(mask)


def test_the_bonus_adds_the_gradient_of_the_mean_entropy():
    batch, advantages = new_batch()
    config = dataclasses.replace(CONFIG, entropy_coefficient=0.3)
    gradient, stats = gradient_of(config, batch, advantages)
    params = init_state(TOY, config, ONE_DEVICE, jax.random.key(0)).params["base"]
    loss, wanted = jax.value_and_grad(naive_loss)(params, batch, advantages, config)
    without, plain = gradient_of(CONFIG, batch, advantages)
    for name in ("embed", "head"):
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert np.abs(gradient[name] - without[name]).max() > 1e-3
    assert stats["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert stats["loss"] == pytest.approx(plain["loss"] - 0.3 * plain["entropy"], rel=1e-5)
    assert stats["entropy"] == plain["entropy"] and set(stats) == set(plain)


def test_the_bonus_by_hand():
    # Two tokens, π = (¾, ¼): H = 0.5623351, log π + H = 0.2746531, −0.8239592. dH/dz = −π (log π + H) = ∓0.2059898.
    # With z = h · w / T, h = 1, T = 2, c = 1 and weight ½: dL/dw = −½ · dH/dz / 2 = ±0.0514975.
    config = LearnerConfig(entropy_coefficient=1.0)
    ones = jnp.ones((1, 1))
    tokens = Tokens(mask=ones > 0, weights=ones / 2, logprobs=jnp.log(ones * 0.75), advantages=ones * 0, reference=None)
    head = 2 * jnp.log(jnp.array([[0.75, 0.25]]))
    inputs = ones[..., None], jnp.zeros((1, 1), jnp.int32), tokens
    loss = lambda head: head_loss(policy_objective(config), 2.0, 1, HeadLayout(), head, *inputs)
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(head)
    np.testing.assert_allclose(value, -0.5623351 / 2, rtol=1e-5)
    np.testing.assert_allclose(gradient, [[0.0514975, -0.0514975]], rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_a_loss_of_entropies_is_differentiated_in_chunks(chunk):
    """Any function of both numbers of a token: head and hidden states against autodiff over all logits."""
    rng = np.random.default_rng(chunk)
    head, hidden = rng.normal(size=(4, 9)).astype(np.float32), rng.normal(size=(2, 8, 4)).astype(np.float32)
    targets, mask = rng.integers(0, 9, (2, 8)).astype(np.int32), jnp.asarray(rng.random((2, 8)) < 0.6)
    weights = jnp.where(mask, jnp.asarray(rng.random((2, 8)), jnp.float32), 0.0)
    tokens = Tokens(mask, weights, weights, weights, None)

    def loss(logprobs, entropies, tokens):
        return jnp.sum(tokens.weights * (logprobs * entropies + entropies**2)), Stats({}, {})

    def chunked(head, hidden):
        return head_loss(EntropyObjective(loss), 1.7, chunk, HeadLayout(), head, hidden, targets, tokens)

    def naive(head, hidden):
        log_policy = jax.nn.log_softmax(hidden @ head / 1.7)
        entropies = -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
        return loss(jnp.take_along_axis(log_policy, targets[..., None], axis=-1)[..., 0], entropies, tokens)

    (value, _), gradients = jax.value_and_grad(chunked, (0, 1), has_aux=True)(head, hidden)
    (expected, _), wanted = jax.value_and_grad(naive, (0, 1), has_aux=True)(head, hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, wanted)


def test_covariances_golden():
    # A = 1, 3, −4 (mean 0) and logp = −1, 0, −2 (mean −1); the last token does not count.
    computed = covariances(
        jnp.array([-1.0, 0.0, -2.0, -50.0]), jnp.array([1.0, 3.0, -4.0, 9.0]), jnp.array([True, True, True, False])
    )
    np.testing.assert_allclose(computed, [0, 3, 4, 0], rtol=1e-6)
    # Over the tokens that count, they sum to the covariance times their number.
    rng = np.random.default_rng(0)
    logprobs, advantages, mask = -rng.random(50), rng.normal(size=50), rng.random(50) < 0.7
    computed = covariances(jnp.float32(logprobs), jnp.float32(advantages), jnp.asarray(mask))
    assert float(computed.sum()) == pytest.approx(
        np.cov(logprobs[mask], advantages[mask], bias=True)[0, 1] * mask.sum(), rel=1e-4
    )


def test_selections_golden():
    covariance = jnp.array([[5.0, 2.0, 2.0], [0.5, 9.0, 3.0]])
    mask = jnp.array([[True, True, True], [True, True, False]])
    draws = jnp.array([[0.1, 0.9, 0.3], [0.2, 0.0, 0.0]])
    # Five tokens. Between 1 and 5, exclusive: the two of 2.0, in the order of their draws.
    for share, expected in (0.2, [[0, 0, 1], [0, 0, 0]]), (0.5, [[0, 1, 1], [0, 0, 0]]), (1.0, [[0, 1, 1], [0, 0, 0]]):
        np.testing.assert_array_equal(clip_cov(covariance, mask, draws, share, 1.0, 5.0), expected)
    np.testing.assert_array_equal(clip_cov(covariance, mask, draws, 1.0, 10.0, 20.0), np.zeros((2, 3)))
    # The largest: 9, 5, and of the equal ones the lowest draw. A share below one token selects one.
    for share, expected in (0.01, [[0, 0, 0], [0, 1, 0]]), (0.6, [[1, 0, 1], [0, 1, 0]]), (1.0, mask):
        np.testing.assert_array_equal(kl_cov(covariance, mask, draws, share), expected)


def placed_tokens(batch, selected) -> set[tuple[int, int]]:
    """(response, position) of selected tokens."""
    where = np.asarray(selected)
    return set(zip(np.asarray(batch.response_ids)[where].tolist(), np.asarray(batch.positions)[where].tolist()))


@pytest.mark.parametrize("kind", ["clip", "kl"])
def test_the_selection_is_that_of_its_definition_for_any_packing(kind):
    config = dataclasses.replace(
        CONFIG, covariance=kind, covariance_share=0.2, covariance_range=(0.0, 1.0), num_epochs=2
    )
    batch, advantages = new_batch(3)
    selected = np.asarray(selected_tokens(config, jax.tree.map(jnp.asarray, batch), jnp.asarray(advantages), 4))
    mask = batch.response_ids >= 0
    count = int(0.2 * mask.sum())
    assert selected.sum() == count and not selected[~mask].any()
    a, logp = advantages[mask].astype(np.float64), batch.logprobs[mask].astype(np.float64)
    covariance = (a - a.mean()) * (logp - logp.mean())
    if kind == "kl":
        assert set(np.flatnonzero(selected[mask])) == set(np.argsort(-covariance)[:count])
    else:
        assert np.all((covariance[selected[mask]] > 0) & (covariance[selected[mask]] < 1))
    other, other_advantages = new_batch(3, dataclasses.replace(LAYOUT, rows=1, row_length=60, num_microbatches=16))
    again = selected_tokens(config, jax.tree.map(jnp.asarray, other), jnp.asarray(other_advantages), 4)
    assert placed_tokens(other, again) == placed_tokens(batch, selected)
    later = selected_tokens(config, jax.tree.map(jnp.asarray, batch), jnp.asarray(advantages), 5)
    assert (placed_tokens(batch, later) == placed_tokens(batch, selected)) == (kind == "kl")


def test_clip_cov_leaves_the_selected_tokens_out_of_the_gradient():
    config = dataclasses.replace(CONFIG, covariance="clip", covariance_share=0.25, covariance_range=(0.0, 9.0))
    batch, advantages = new_batch(5)
    selected = selected_tokens(config, jax.tree.map(jnp.asarray, batch), jnp.asarray(advantages), 0)
    gradient, stats = gradient_of(config, batch, advantages)
    params = init_state(TOY, config, ONE_DEVICE, jax.random.key(0)).params["base"]
    loss, wanted = jax.value_and_grad(naive_loss)(params, batch, advantages, config, selected)
    for name in ("embed", "head"):
        np.testing.assert_allclose(gradient[name], wanted[name], rtol=1e-4, atol=1e-6)
    tokens = int(batch.response_tokens.sum())
    assert stats["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert stats["covariance_fraction"] == pytest.approx(int(0.25 * tokens) / tokens)


def test_kl_cov_penalises_a_change_of_the_selected_tokens():
    """In the first of two steps nothing has changed, so the gradient is that of the surrogate. In the second it is that
    of the naive loss at the parameters after the first. Adam's mean is (1 − β)(β g_1 + g_2)."""
    config = dataclasses.replace(CONFIG, covariance="kl", covariance_share=0.25, covariance_penalty=2.0, num_epochs=2)
    batch, advantages = new_batch(6)
    placed, new_state = place(batch, ONE_DEVICE), lambda: init_state(TOY, config, ONE_DEVICE, jax.random.key(0))
    before = make_token_logprobs(TOY, config, ONE_DEVICE)(new_state().params, placed)
    selected = selected_tokens(config, jax.tree.map(jnp.asarray, batch), jnp.asarray(advantages), 0)
    one, _ = make_update(TOY, CONFIG, ONE_DEVICE)(new_state(), placed, advantages)
    first = jax.tree.map(lambda mu: np.asarray(mu) / (1 - CONFIG.beta1), one.opt_state[1][0].mu["base"])
    second = jax.grad(naive_loss)(one.params["base"], batch, advantages, config, selected, before)
    free = jax.grad(naive_loss)(one.params["base"], batch, advantages, CONFIG)
    state, stats = make_update(TOY, config, ONE_DEVICE)(new_state(), placed, advantages)
    for name in ("embed", "head"):
        mean = np.asarray(state.opt_state[1][0].mu["base"][name]) / (1 - config.beta1)
        np.testing.assert_allclose(mean, config.beta1 * first[name] + second[name], rtol=1e-3, atol=1e-5)
        assert np.abs(free[name] - second[name]).max() > 1e-3
    tokens = int(batch.response_tokens.sum())
    assert float(stats["covariance_fraction"]) == pytest.approx(int(0.25 * tokens) / tokens)


def test_without_them_the_update_has_no_trace_of_the_controls():
    batch, advantages = new_batch()
    lowered = lambda config: make_update(TOY, config, ONE_DEVICE).lower(
        init_state(TOY, config, ONE_DEVICE, jax.random.key(0)), place(batch, ONE_DEVICE), advantages
    )
    plain = lowered(CONFIG).as_text()
    assert "threefry" not in plain and "shift_right" not in plain
    assert "shift_right" in lowered(dataclasses.replace(CONFIG, covariance="clip")).as_text()
    assert lowered(dataclasses.replace(CONFIG, entropy_coefficient=0.1)).as_text() != plain
    assert lowered(dataclasses.replace(CONFIG, covariance_share=0.1, covariance_penalty=3.0)).as_text() == plain


def test_the_bonus_has_the_gradient_of_any_packing_and_aggregation():
    config = dataclasses.replace(CONFIG, entropy_coefficient=0.3, aggregation="trajectory-mean")
    gradients = [
        gradient_of(config, *new_batch(7, layout))[0]
        for layout in (LAYOUT, dataclasses.replace(LAYOUT, rows=1, row_length=60, num_microbatches=16))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)


def test_several_devices_compute_what_one_does():
    policy = Bigram(vocab_size=24, width=16)
    layout = dataclasses.replace(LAYOUT, rows=8, num_microbatches=2)
    batch = collate(random_trajectories(8, 8, policy.vocab_size), layout)
    advantages = np.random.default_rng(8).standard_normal(batch.tokens.shape).astype(np.float32)
    config = dataclasses.replace(
        CONFIG, entropy_coefficient=0.3, covariance="clip", covariance_share=0.2, covariance_range=(0.0, 9.0)
    )
    results = []
    for mesh in (ONE_DEVICE, make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        state = init_state(policy, config, mesh, jax.random.key(0))
        state, stats = make_update(policy, config, mesh)(state, place(batch, mesh), advantages)
        results.append(jax.device_get((state.opt_state[1][0].mu, stats)))
    jax.tree.map(lambda one, many: np.testing.assert_allclose(many, one, rtol=1e-4, atol=1e-6), *results)
    assert results[0][1]["covariance_fraction"] > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy_coefficient": -0.1}, "expected entropy_coefficient ≥ 0, got -0.1"),
        ({"covariance_penalty": -1.0}, "expected covariance_penalty ≥ 0, got -1.0"),
        ({"covariance": "kl"}, "expected several optimizer steps a batch with covariance kl"),
        ({"covariance_share": 0.0}, r"expected covariance_share in \(0, 1\], got 0.0"),
        ({"covariance_range": (5.0, 1.0)}, r"expected covariance_range of a lower and a higher number, got \(5.0, 1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LearnerConfig(**change)
