"""The update: against a hand-written float64 gradient, under packing, over devices, and in the compiled program."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.advantage import token_advantages
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import (
    LearnerConfig,
    init_state,
    make_supervised_update,
    make_token_logprobs,
    make_update,
    num_updates,
)
from aem_jax.learner.objective import Tokens, policy_objective, supervised_objective
from aem_jax.learner.update import make_program, minibatch_of, summarize
from aem_jax.models import ModelConfig, Policy
from aem_jax.sharding import MeshConfig, make_mesh

TOY = Bigram()
TINY = Policy(ModelConfig(32, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
LAYOUT = BatchLayout(num_microbatches=8, rows=2, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7)
AGGREGATIONS = ("token-mean", "trajectory-mean", "response-mean", "constant")


def advantages_of(batch, seed=0):
    per_response = np.random.default_rng(seed).standard_normal(batch.response_valid.shape[0]).astype(np.float32)
    return np.asarray(token_advantages(per_response, np.asarray(batch.response_ids))), per_response


def new_state(policy, config, mesh=ONE_DEVICE, seed=0):
    return init_state(policy, config, mesh, jax.random.key(seed))


def gradient_of(state, config):
    """The gradient of the first optimizer step, read off Adam's mean: mu = (1 − β1) · gradient."""
    adam = state.opt_state[1][0]
    return jax.tree.map(lambda mu: np.asarray(mu) / (1 - config.beta1), adam.mu)


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


def hand_gradient(trajectories, per_response, params, config, reference=None):
    """Loss and gradient of the clipped objective on `Bigram`, token by token in float64, from the definitions."""
    embed, head = (np.asarray(params["base"][name], np.float64) for name in ("embed", "head"))
    d_embed, d_head, loss = np.zeros_like(embed), np.zeros_like(head), 0.0
    lengths = [[len(turn.response_ids) for turn in trajectory.turns] for trajectory in trajectories]
    num_tokens, num_responses = sum(map(sum, lengths)), sum(map(len, lengths))
    response = 0
    for n, trajectory in enumerate(trajectories):
        before = None
        for k, turn in enumerate(trajectory.turns):
            weight = (
                1
                / {
                    "token-mean": num_tokens,
                    "response-mean": num_responses * lengths[n][k],
                    "trajectory-mean": len(trajectories) * sum(lengths[n]),
                    "constant": len(trajectories) * config.constant_length,
                }[config.aggregation]
            )
            before = turn.observation_ids[-1]
            for token, sampled in zip(turn.response_ids, turn.logprobs, strict=True):
                h = np.tanh(embed[before])
                z = h @ head / config.temperature
                log_policy = z - np.log(np.exp(z).sum())
                ratio = np.exp(log_policy[token] - np.float64(sampled))
                advantage = np.float64(per_response[response])
                bounded = np.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
                loss -= weight * min(ratio * advantage, bounded * advantage)
                slope = -ratio * advantage if ratio * advantage <= bounded * advantage else 0.0
                if reference is not None:
                    hr = np.tanh(np.asarray(reference["base"]["embed"], np.float64)[before])
                    zr = hr @ np.asarray(reference["base"]["head"], np.float64) / config.temperature
                    d = zr[token] - np.log(np.exp(zr).sum()) - log_policy[token]
                    loss += weight * config.kl_coefficient * (np.exp(d) - 1 - d)
                    slope += config.kl_coefficient * (1 - np.exp(d))
                dz = weight * slope * ((np.arange(len(z)) == token) - np.exp(log_policy)) / config.temperature
                d_head += np.outer(h, dz)
                d_embed[before] += (head @ dz) * (1 - h**2)
                before = token
            response += 1
    return loss, {"base": {"embed": d_embed, "head": d_head}}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("context", ["append", "window"])
def test_gradient_equals_the_hand_written_one(aggregation, context):
    config = dataclasses.replace(CONFIG, aggregation=aggregation, temperature=1.3, clip_high=0.3, constant_length=20)
    trajectories = random_trajectories(1, 11, TOY.vocab_size, context)
    batch = collate(trajectories, dataclasses.replace(LAYOUT, row_length=24))
    assert batch.num_microbatches > 1
    advantages, per_response = advantages_of(batch)
    state = new_state(TOY, config)
    loss, gradient = hand_gradient(trajectories, per_response, state.params, config)
    state, stats = make_update(TOY, config, ONE_DEVICE)(state, batch, advantages)
    assert_trees_close(gradient_of(state, config), gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats["loss"], loss, rtol=1e-5)
    flat = np.concatenate([leaf.ravel() for leaf in gradient["base"].values()])
    np.testing.assert_allclose(stats["grad_norm"], np.linalg.norm(flat), rtol=1e-5)
    assert stats["tokens"] == batch.response_tokens.sum() and stats["skipped"] == 0
    assert 0 < stats["clip_fraction"] < 1 < stats["ratio_max"]


def test_kl_to_the_reference_is_in_the_gradient():
    config = dataclasses.replace(CONFIG, kl_coefficient=0.5)
    trajectories = random_trajectories(2, 6, TOY.vocab_size)
    batch = collate(trajectories, LAYOUT)
    advantages, per_response = advantages_of(batch)
    state, reference = new_state(TOY, config), TOY.init(jax.random.key(9))
    reference_logprobs = make_token_logprobs(TOY, config, ONE_DEVICE)(reference, batch)
    loss, gradient = hand_gradient(trajectories, per_response, state.params, config, reference)
    state, stats = make_update(TOY, config, ONE_DEVICE)(state, batch, advantages, reference_logprobs)
    assert_trees_close(gradient_of(state, config), gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(stats["loss"], loss, rtol=1e-5)
    assert stats["kl_reference"] > 0


def test_a_reference_is_given_exactly_when_it_is_needed():
    batch = collate(random_trajectories(0, 2, TOY.vocab_size), LAYOUT)
    advantages, _ = advantages_of(batch)
    for config, reference in ((dataclasses.replace(CONFIG, kl_coefficient=0.5), None), (CONFIG, advantages)):
        with pytest.raises(ValueError, match="expected reference logprobs exactly when kl_coefficient > 0"):
            make_update(TOY, config, ONE_DEVICE)(new_state(TOY, config), batch, advantages, reference)


def test_supervised_gradient_is_the_policy_gradient_at_ratio_one():
    # d/dθ of −Σ w·logp is that of −Σ w·ρ·1 where ρ = 1, that is where the "sampled" logprobs are the policy's own.
    trajectories = random_trajectories(3, 8, TOY.vocab_size)
    batch = collate(trajectories, LAYOUT)
    state = new_state(TOY, CONFIG)
    own = np.asarray(make_token_logprobs(TOY, CONFIG, ONE_DEVICE)(state.params, batch))
    replayed = dataclasses.replace(batch, logprobs=own)
    ones = np.ones_like(own)
    policy_state, stats = make_update(TOY, CONFIG, ONE_DEVICE)(new_state(TOY, CONFIG), replayed, ones)
    state, supervised = make_supervised_update(TOY, CONFIG, ONE_DEVICE)(state, batch)
    assert_trees_close(gradient_of(state, CONFIG), gradient_of(policy_state, CONFIG), rtol=1e-5, atol=1e-7)
    mask = np.asarray(batch.response_ids) >= 0
    np.testing.assert_allclose(supervised["loss"], -own[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(supervised["entropy"], stats["entropy"], rtol=1e-6)


def test_parity_is_measured_before_any_step():
    config = dataclasses.replace(CONFIG, num_epochs=3, num_minibatches=2, learning_rate=0.3)
    batch = collate(random_trajectories(4, 8, TOY.vocab_size), dataclasses.replace(LAYOUT, num_minibatches=2))
    advantages, _ = advantages_of(batch)
    state = new_state(TOY, config)
    own = make_token_logprobs(TOY, config, ONE_DEVICE)(state.params, batch)
    shifted = dataclasses.replace(batch, logprobs=np.asarray(own) + 0.25 * (np.asarray(batch.response_ids) >= 0))
    _, stats = make_update(TOY, config, ONE_DEVICE)(state, shifted, advantages)
    np.testing.assert_allclose([stats["parity_max"], stats["parity_mean"]], 0.25, atol=1e-5)
    assert stats["ratio_max"] > 1.5 * np.exp(-0.25)  # later steps did move


def test_the_divergence_from_the_sampler_is_that_of_its_own_tokens():
    """Over all tokens that the sampler may draw, the mean of `kl_sampler` is KL(sampler ‖ policy)."""
    sampled, policy = np.log([0.5, 0.5]), np.log([0.9, 0.1])
    zeros = jnp.zeros(2)
    tokens = Tokens(jnp.ones(2, bool), jnp.ones(2), jnp.asarray(sampled), advantages=zeros, reference=None)
    _, stats = policy_objective(LearnerConfig())(jnp.asarray(policy), zeros, tokens)
    assert float(stats.sums["kl_sampler"]) / 2 == pytest.approx(float(np.sum(np.exp(sampled) * (sampled - policy))))


@pytest.mark.slow
def test_packing_and_microbatches_change_nothing():
    trajectories = random_trajectories(5, 10, TINY.config.vocab_size)
    config = dataclasses.replace(CONFIG, remat="dots", aggregation="trajectory-mean")
    layouts = {
        "packed": LAYOUT,
        "one a row": dataclasses.replace(
            LAYOUT, row_length=max(map(_length, trajectories)), rows=16, num_microbatches=1
        ),
        "one row a microbatch": dataclasses.replace(LAYOUT, rows=1, num_microbatches=16),
    }
    results = {}
    for name, layout in layouts.items():
        batch = collate(trajectories, layout)
        advantages, _ = advantages_of(batch)
        state, stats = make_update(TINY, config, ONE_DEVICE)(new_state(TINY, config), batch, advantages)
        results[name] = gradient_of(state, config), stats
    for gradient, stats in results.values():
        assert_trees_close(gradient, results["one a row"][0], rtol=2e-4, atol=2e-7)
        for name in set(stats) - {"parity_max"}:
            np.testing.assert_allclose(stats[name], results["one a row"][1][name], rtol=1e-4, atol=1e-7, err_msg=name)


def _length(trajectory):
    return sum(len(turn.observation_ids) + len(turn.response_ids) for turn in trajectory.turns)


def test_eight_devices_take_the_same_step_as_one():
    config = dataclasses.replace(CONFIG, aggregation="trajectory-mean", max_grad_norm=0.1, weight_decay=0.1)
    batch = collate(random_trajectories(6, 14, TINY.config.vocab_size), dataclasses.replace(LAYOUT, rows=4))
    advantages, _ = advantages_of(batch)
    results = []
    for mesh in (ONE_DEVICE, make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])):
        state = new_state(TINY, config, mesh)
        state, stats = make_update(TINY, config, mesh)(state, place(batch, mesh), advantages)
        assert state.params["base"]["layers"]["gate_up"].sharding.num_devices == mesh.size
        results.append((jax.device_get(state), jax.device_get(stats)))
    assert_trees_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    mu = results[1][0].params["base"]["layers"]["gate_up"]
    assert np.abs(mu - np.asarray(new_state(TINY, config).params["base"]["layers"]["gate_up"])).max() > 1e-4


def test_shards_of_parameters_and_moments_lie_together():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    state = new_state(TINY, CONFIG, mesh)
    gate = state.params["base"]["layers"]["gate_up"]
    assert gate.addressable_shards[0].data.size * 4 == gate.size  # over fsdp × tensor, whole on each data replica
    assert state.opt_state[1][0].mu["base"]["layers"]["gate_up"].sharding == gate.sharding
    with pytest.raises(ValueError, match=r"expected BatchLayout\.rows divisible by data × fsdp × expert = 4, got 2"):
        place(collate([], LAYOUT), mesh)


def test_fsdp_gathers_weights_and_moves_no_activations():
    mesh = make_mesh(MeshConfig(1, 4, 1), jax.devices()[:4])
    batch = place(collate([], dataclasses.replace(LAYOUT, rows=4)), mesh)
    compiled = make_supervised_update(TINY, CONFIG, mesh).lower(new_state(TINY, CONFIG, mesh), batch).compile()
    text = compiled.as_text() or ""
    moved = re.findall(r"= (\(?\w+\[.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text)
    floats = {re.sub(r"{[^}]*}", "", shape) for shape, _ in moved if "f32" in shape}
    # Halves of a layer's gate_up, whole. With a third axis, of one half, XLA for GPUs gathers each twice backward.
    assert any("f32[16,32]" in shape for shape in floats), floats
    rows = [shape for shape in floats if re.search(r"f32\[(1|4),(7|40),", shape)]
    assert not rows, f"activations are moved between devices: {rows}"


def test_epochs_and_minibatches_are_steps_in_a_row():
    trajectories = random_trajectories(7, 9, TOY.vocab_size)
    layout = dataclasses.replace(LAYOUT, num_minibatches=2)
    config = dataclasses.replace(CONFIG, num_minibatches=2, num_epochs=2)
    batch = collate(trajectories, layout, seed=3)
    advantages, per_response = advantages_of(batch)
    together, _ = make_update(TOY, config, ONE_DEVICE)(new_state(TOY, config), batch, advantages)
    assert num_updates(together.opt_state) == 4 and together.step == 1

    single = make_update(TOY, CONFIG, ONE_DEVICE)
    state, first_response = (
        new_state(TOY, CONFIG),
        np.cumsum([0] + [len(trajectory.turns) for trajectory in trajectories]),
    )
    for _ in range(2):
        for j in range(2):
            chosen = np.flatnonzero(batch.trajectory_minibatch[: len(trajectories)] == j)
            part = collate([trajectories[n] for n in chosen], LAYOUT)
            ids = np.concatenate([np.arange(first_response[n], first_response[n + 1]) for n in chosen])
            padded = np.zeros_like(per_response)
            padded[: len(ids)] = per_response[ids]
            state, _ = single(state, part, token_advantages(padded, part.response_ids))
    assert_trees_close(together.params, state.params, rtol=1e-4, atol=1e-6)


def test_one_program_for_any_number_of_microbatches():
    update = make_update(TOY, CONFIG, ONE_DEVICE)
    state, used = new_state(TOY, CONFIG), set()
    for count in (1, 5, 12, 0):
        batch = collate(random_trajectories(8, count, TOY.vocab_size), dataclasses.replace(LAYOUT, row_length=24))
        advantages, _ = advantages_of(batch)
        state, _ = update(state, batch, advantages)
        used.add(int(batch.num_microbatches))
    assert len(used) == 4
    assert update.compilations == 1


def test_the_state_is_donated():
    update = make_update(TINY, CONFIG, ONE_DEVICE)
    batch = collate(random_trajectories(9, 4, TINY.config.vocab_size), LAYOUT)
    state, advantages = new_state(TINY, CONFIG), np.zeros(batch.tokens.shape, np.float32)
    compiled: Any = update.lower(state, batch, advantages).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    update(state, batch, advantages)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_a_batch_of_nothing_and_a_gradient_of_nan_leave_the_parameters_alone():
    update = make_update(TOY, CONFIG, ONE_DEVICE)
    before = jax.device_get(new_state(TOY, CONFIG))
    full = collate(random_trajectories(10, 3, TOY.vocab_size), LAYOUT)
    for batch, fill in ((collate([], LAYOUT), 0.0), (full, np.nan)):
        state, stats = update(new_state(TOY, CONFIG), batch, np.full(batch.tokens.shape, fill, np.float32))
        assert_trees_close(state.params, before.params, rtol=0)
        assert_trees_close(state.opt_state, before.opt_state, rtol=0)
        assert state.step == 1 and stats["skipped"] == 1
        # without a token nothing was measured
        measured = set(stats) - {"tokens", "skipped", "learning_rate"}
        assert fill or all(np.isnan(stats[name]) for name in measured)


def test_a_batch_cut_otherwise_than_configured_is_refused():
    batch = collate([], dataclasses.replace(LAYOUT, num_minibatches=2))
    with pytest.raises(ValueError, match=r"expected a batch of 1 minibatches .* got 2"):
        make_update(TOY, CONFIG, ONE_DEVICE)(new_state(TOY, CONFIG), batch, jnp.zeros(batch.tokens.shape))


def test_cross_entropy_learns_a_deterministic_text():
    trajectories = random_trajectories(11, 4, TOY.vocab_size)
    cycle = [
        dataclasses.replace(turn, response_ids=(turn.observation_ids[-1] + 1 + np.arange(len(turn.response_ids))) % 12)
        for trajectory in trajectories
        for turn in trajectory.turns
    ]
    batch = collate([dataclasses.replace(trajectories[0], turns=(turn,)) for turn in cycle], LAYOUT)
    config = dataclasses.replace(CONFIG, learning_rate=0.05)
    update, state = make_supervised_update(TOY, config, ONE_DEVICE), new_state(TOY, config)
    for _ in range(100):
        state, stats = update(state, batch)
    assert stats["loss"] < 0.05


@pytest.mark.parametrize("aggregation", ["token-mean", "constant"])
def test_trajectories_out_of_the_loss_have_no_effect(aggregation):
    config = dataclasses.replace(CONFIG, aggregation=aggregation, constant_length=20)
    trajectories = random_trajectories(3, 8, TOY.vocab_size)
    masked = [dataclasses.replace(trajectory, in_loss=n % 3 > 0) for n, trajectory in enumerate(trajectories)]
    with_all, without = (
        collate(masked, LAYOUT),
        collate([trajectory for trajectory in masked if trajectory.in_loss], LAYOUT),
    )
    assert with_all.response_valid.sum() > without.response_valid.sum()
    of_rows = {}
    for batch, kept in (
        (with_all, [n for n, trajectory in enumerate(masked) if trajectory.in_loss]),
        (without, range(5)),
    ):
        # one advantage for each trajectory, the same in both batches
        per_response = np.zeros(batch.response_valid.shape[0], np.float32)
        for place_of, n in enumerate(kept):
            per_response[batch.response_trajectory == n] = place_of - 2.0
        advantages = np.asarray(token_advantages(per_response, np.asarray(batch.response_ids)))
        state, stats = make_update(TOY, config, ONE_DEVICE)(new_state(TOY, config), batch, advantages)
        of_rows[len(of_rows)] = (gradient_of(state, config), stats["loss"], stats["tokens"])
    assert_trees_close(*of_rows.values(), rtol=1e-5, atol=1e-7)


def test_a_minibatch_by_hand():
    """Trajectories 0 and 1 are in minibatch 0. Trajectory 2, with an invalid response, is in minibatch 1."""
    batch: Any = SimpleNamespace(
        response_trajectory=jnp.asarray([0, 1, 1, 2]),
        response_tokens=jnp.asarray([3, 1, 4, 5]),
        response_valid=jnp.asarray([True, True, True, False]),
        trajectory_minibatch=jnp.asarray([0, 0, 1]),
        valid=jnp.ones(3, bool),
        minibatch_ends=jnp.asarray([2, 3]),
    )
    config = dataclasses.replace(CONFIG, aggregation="response-mean")
    program = make_program(TOY, config, ONE_DEVICE, supervised_objective())
    first, second = (minibatch_of(program, batch, jnp.int32(index)) for index in (0, 1))
    assert first.response_tokens.tolist() == [3, 1, 4, 0] and (first.start, first.end) == (0, 2)
    # three responses: 1 / (3 n)
    np.testing.assert_allclose(first.weights, [1 / 9, 1 / 3, 1 / 12, 0])
    np.testing.assert_allclose(first.value_weights, [1 / 3, 1 / 3, 1 / 3, 0])
    # its only response is not valid: nothing is in the loss, and nothing is divided by 0
    assert second.response_tokens.tolist() == [0] * 4 and (second.start, second.end) == (2, 3)
    assert not second.weights.any() and not second.value_weights.any()


def test_an_update_is_summarized_over_its_optimizer_steps():
    """Two epochs of one minibatch, of 2 and 2 tokens. Sums over tokens become means; parity is the first step's."""
    metrics = {
        "loss": [2.0, 4.0],
        "tokens": [2.0, 2.0],
        "skipped": [0.0, 1.0],
        "learning_rate": [0.1, 0.2],
        "ratio_max": [1.0, 3.0],
        "parity_max": [0.5, 9.0],
        "parity_mean": [0.5, 9.0],
    }
    summary = summarize({name: jnp.asarray(values) for name, values in metrics.items()}, num_epochs=2)
    expected = {"loss": 1.5, "tokens": 2.0, "skipped": 1.0, "learning_rate": 0.2}
    expected |= {"ratio_max": 3.0, "parity_max": 0.5, "parity_mean": 0.25}
    assert {name: pytest.approx(value) for name, value in expected.items()} == {k: float(v) for k, v in summary.items()}
