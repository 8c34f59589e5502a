"""The value head: against a handwritten float64 gradient, under packing, over devices, with frozen weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax import learner
from aem_jax.advantage import ValueTargets, token_advantages
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_optimizer, make_response_values, partition
from aem_jax.models import ModelConfig, Policy
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings

LAYOUT = BatchLayout(num_microbatches=8, rows=4, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7, value_learning_rate=0.03)


TOY, VALUED_TOY = Bigram(), Bigram(value=True)


def with_head(policy: Any, seed: int = 0) -> Any:
    """Parameters in the middle of training: the value head is not zero."""
    params, rng = policy.init(jax.random.key(seed)), np.random.default_rng(seed)
    width = params["value"]["w"].shape[0]
    head = {"w": rng.normal(size=(width, 1)) * 3, "b": np.array([0.5])}
    return {**params, "value": jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), head)}


def experience_of(trajectories, layout=LAYOUT, seed=0):
    """A batch, and for each of its responses an advantage, a value and a return, the same however it is packed."""
    batch, rng = collate(trajectories, layout), np.random.default_rng(seed)
    table = rng.normal(size=(3, layout.max_responses)).astype(np.float32)
    return batch, token_advantages(table[0], batch.response_ids), ValueTargets(*map(jnp.asarray, 2 * table[1:]))


make_update = functools.cache(learner.make_update)


def copied(policy, params):
    """Parameters whose trainable parts may be donated."""
    trainable, frozen = partition(policy, params)
    return {**jax.tree.map(jnp.copy, trainable), **frozen}


def stepped(policy, config, mesh, params, experience):
    batch, advantages, values = experience
    state = init_state(policy, config, mesh, jax.random.key(0), copied(policy, params))
    return make_update(policy, config, mesh)(state, place(batch, mesh), advantages, values=values)


def gradient_of(state, config):
    """The gradient of the first optimizer step, read off Adam's mean: mu = (1 − β1) · gradient."""
    return jax.tree.map(lambda mu: np.asarray(mu) / (1 - config.beta1), state.opt_state[1][0].mu)


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


def by_hand(trajectories, params, values, config):
    """Loss, gradient in w, b and embedding, and values, state by state in float64, from the definitions."""
    embed = np.asarray(params["base"]["embed"], np.float64)
    w, b = np.asarray(params["value"]["w"], np.float64)[:, 0], float(params["value"]["b"][0])
    d_w, d_b, d_embed = np.zeros_like(w), 0.0, np.zeros_like(embed)
    old, returns = (np.asarray(x, np.float64) for x in values)
    count, loss, clipped, all_values = sum(len(t.turns) for t in trajectories), 0.0, 0, []
    for r, turn in enumerate(turn for t in trajectories for turn in t.turns):
        before = turn.observation_ids[-1]  # the first token is predicted from it
        h = np.tanh(embed[before])
        v = h @ w / np.sqrt(len(w)) + b
        all_values.append(v)
        near = np.clip(v, old[r] - config.value_clip, old[r] + config.value_clip)
        free, bounded = (v - returns[r]) ** 2, (near - returns[r]) ** 2
        loss += 0.5 * max(free, bounded) / count
        if bounded > free:
            clipped += 1
            continue
        slope = config.value_coefficient * (v - returns[r]) / count
        d_w, d_b = d_w + slope * h / np.sqrt(len(w)), d_b + slope
        d_embed[before] += slope * w / np.sqrt(len(w)) * (1 - h**2)
    return loss, {"w": d_w[:, None], "b": np.array([d_b])}, d_embed, clipped / count, all_values


def test_gradients_equal_the_hand_written_ones():
    base = dataclasses.replace(CONFIG, value_coefficient=0.7, value_clip=1.0)
    layout = dataclasses.replace(LAYOUT, rows=2, row_length=24)
    params, plain = with_head(VALUED_TOY), None
    # a bigram sees only the previous token, so all numbers are equal in both contexts
    for context, gradient in (("append", "head"), ("window", "all")):
        config = dataclasses.replace(base, value_gradient=gradient)
        trajectories = random_trajectories(1, 11, TOY.vocab_size, context)
        batch, advantages, values = experience_of(trajectories, layout)
        assert batch.num_microbatches > 1
        loss, of_head, of_embed, clipped, hand_values = by_hand(trajectories, params, values, config)
        assert 0.1 < clipped < 0.9
        state, stats = stepped(VALUED_TOY, config, ONE_DEVICE, params, (batch, advantages, values))
        if plain is None:  # without a value head
            plain = init_state(TOY, config, ONE_DEVICE, jax.random.key(0), copied(TOY, params))
            plain, alone = make_update(TOY, config, ONE_DEVICE)(plain, batch, advantages)
        both, wanted = gradient_of(state, config), gradient_of(plain, config)
        wanted["base"]["embed"] = wanted["base"]["embed"] + (gradient == "all") * of_embed
        assert_trees_close(both, {**wanted, "value": of_head}, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose([stats["value_loss"], stats["value_clip_fraction"]], [loss, clipped], rtol=1e-5)
        np.testing.assert_allclose(stats["loss"], alone["loss"] + 0.7 * loss, rtol=1e-5)
        if gradient == "head":  # then the policy learns the same as without a value head
            assert_trees_close(state.params["base"], plain.params["base"], rtol=1e-6)
    # the initial values of a step are those of the same states; an empty response has no value
    before = make_response_values(VALUED_TOY, config, ONE_DEVICE)(params, place(batch, ONE_DEVICE))
    np.testing.assert_allclose(before[: len(hand_values)], hand_values, rtol=1e-5)
    assert np.isnan(before[len(hand_values) :]).all()


def test_packing_and_devices_change_nothing_over_several_steps():
    trajectories = [dataclasses.replace(t, in_loss=n != 1) for n, t in enumerate(random_trajectories(5, 12, 12))]
    params, loop = with_head(VALUED_TOY), {"num_minibatches": 2, "num_epochs": 2}
    config = dataclasses.replace(CONFIG, value_gradient="all", max_grad_norm=0.1, value_clip=0.01, **loop)
    packed = dataclasses.replace(LAYOUT, num_minibatches=2)
    eight = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    results = []
    for mesh, layout in ((ONE_DEVICE, packed), (eight, dataclasses.replace(packed, rows=8, row_length=32))):
        batch, advantages, targets = experience_of(trajectories, layout)
        placed = jax.device_put(params, shardings(mesh, VALUED_TOY.axes, TRAIN, params))
        values = make_response_values(VALUED_TOY, config, mesh)(placed, place(batch, mesh))
        # tokens outside the loss are not packed, so nothing is computed for them
        out = batch.response_valid & (batch.response_trajectory == 1)
        np.testing.assert_array_equal(np.isnan(values), out | ~batch.response_valid)
        targets = ValueTargets(values, targets.returns)
        state, stats = stepped(VALUED_TOY, config, mesh, placed, (batch, advantages, targets))
        assert stats["skipped"] == 0 and stats["value_clip_fraction"] > 0.1  # a step moves a value by about 0.03
        results.append(jax.device_get((state.params, values, stats["value_loss"], stats["grad_norm"])))
    assert_trees_close(*results, rtol=2e-5, atol=2e-5)
    assert np.abs(results[1][0]["value"]["w"] - params["value"]["w"]).max() > 0.02


def test_the_head_has_a_clip_and_a_learning_rate_of_its_own():
    # A large ε, so that Adam's first step, rate · g / (|g| + ε), shows how large the clipped gradient was.
    schedule = {"schedule": "linear", "warmup_steps": 2, "total_steps": 10}
    settings: dict[str, Any] = {"max_grad_norm": 1.0, "adam_eps": 0.1, **schedule}
    optimizer = make_optimizer(dataclasses.replace(CONFIG, **settings), VALUED_TOY.axes)
    params, update = with_head(VALUED_TOY), jax.jit(optimizer.update)
    for scale in (1.0, 1000.0):
        gradient = jax.tree.map(jnp.ones_like, params)
        gradient["value"] = jax.tree.map(lambda leaf: scale * leaf, gradient["value"])  # noqa: B023 (called at once)
        step, _ = update(gradient, optimizer.init(params), params)
        # 2 · 12 · 8 weights and 8 + 1 of the head, each of norm 1; the schedule begins at half of 0.01 and of 0.03
        for part, clipped, rate in (("base", 192**-0.5, 0.005), ("value", 1 / 3, 0.015)):
            for leaf in jax.tree.leaves(step[part]):
                np.testing.assert_allclose(leaf, -rate * clipped / (clipped + 0.1), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Adapted(Bigram):
    """A bigram with a frozen embedding, as with LoRA a decoder has frozen weights, and a trained head."""

    frozen = ("base",)

    @property
    def axes(self):
        base = TOY.axes["base"]
        return {"base": {"embed": base["embed"]}, "adapter": {"head": base["head"]}, "value": VALUED_TOY.axes["value"]}

    def init(self, key):
        base = TOY.init(key)["base"]
        value = VALUED_TOY.init(key)["value"]
        return {"base": {"embed": base["embed"]}, "adapter": {"head": base["head"]}, "value": value}

    def head(self, params):
        return params["adapter"]["head"]


def test_beside_frozen_weights():
    policy = Adapted(value=True)
    params = with_head(policy)
    batch, advantages, targets = experience_of(random_trajectories(1, 11, TOY.vocab_size))
    values = make_response_values(policy, CONFIG, ONE_DEVICE)(params, batch)
    *_, hand_values = by_hand(random_trajectories(1, 11, TOY.vocab_size), params, targets, CONFIG)
    np.testing.assert_allclose(values[: len(hand_values)], hand_values, rtol=1e-5)
    before = jax.tree.map(np.asarray, params["base"])
    state, stats = stepped(policy, CONFIG, ONE_DEVICE, params, (batch, advantages, targets))
    assert stats["value_loss"] > 0 and set(state.trainable) == {"adapter", "value"}
    assert state.params["base"]["embed"] is params["base"]["embed"]
    assert_trees_close(state.params["base"], before, rtol=0)
    assert np.abs(state.params["value"]["w"] - params["value"]["w"]).max() > 0.02
    assert np.abs(state.params["adapter"]["head"] - params["adapter"]["head"]).max() > 5e-3


def test_a_head_is_attached_and_left_behind():
    key, plain = jax.random.key(3), Policy(ModelConfig(12, 16, 8, 1, 1, 1, 16))
    policy = dataclasses.replace(plain, value=True)
    params = policy.init(key)
    assert_trees_close({"base": params["base"]}, plain.init(key), rtol=0)
    assert jax.tree.structure(params) == jax.tree.structure(policy.shapes)
    state = init_state(policy, CONFIG, ONE_DEVICE, jax.random.key(5), plain.init(key))
    assert_trees_close(state.params, params, rtol=0)
    assert partition(plain, params) == ({"base": params["base"]}, {})
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["value"]))
    # V = w · h / √D + b:  (1·3 + 2·−4 + 0 + …) / 4 + ½
    head = {"w": jnp.zeros((16, 1)).at[:2, 0].set(jnp.array([3.0, -4.0])), "b": jnp.array([0.5])}
    hidden = jnp.zeros((1, 1, 16)).at[0, 0, :3].set(jnp.array([1.0, 2.0, 9.0]))
    assert policy.values({"value": head}, hidden).tolist() == [[0.5 - 5 / 4]]
    assert policy.values({"value": head}, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


def test_values_are_given_exactly_when_there_is_a_head():
    batch, advantages, values = experience_of(random_trajectories(0, 2, TOY.vocab_size))
    for policy, given in ((VALUED_TOY, None), (TOY, values)):
        state = init_state(policy, CONFIG, ONE_DEVICE, jax.random.key(0))
        with pytest.raises(ValueError, match="expected values exactly when the policy has a value head"):
            make_update(policy, CONFIG, ONE_DEVICE)(state, batch, advantages, values=given)
    for name, value in (("value_clip", -1.0), ("value_coefficient", -0.5), ("value_learning_rate", 0.0)):
        numbers: dict[str, Any] = {name: value}
        with pytest.raises(ValueError, match=f"expected {name} .* got {value}"):
            LearnerConfig(**numbers)
