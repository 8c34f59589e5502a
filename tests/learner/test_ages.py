"""Tokens of older parameters: parity is reported by age, and nothing else of an update changes."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_token_logprobs, make_update

TOY = Bigram()
LAYOUT = BatchLayout(8, rows=2, row_length=40, max_responses=64, max_trajectories=16, num_minibatches=2)
CONFIG = LearnerConfig(learning_rate=0.01, head_chunk=7, importance_cap=2.0, num_minibatches=2)
STEP, MAX_AGE = 7, 3


def carried_trajectories():
    """Random episodes whose tokens are 0, 1 and 3 steps old."""
    rng = np.random.default_rng(2)
    old = lambda turn: STEP - rng.choice([0, 1, 3], len(turn.response_ids)).astype(np.int32)
    return [
        dataclasses.replace(t, turns=tuple(dataclasses.replace(turn, versions=old(turn)) for turn in t.turns))
        for t in random_trajectories(0, 8, TOY.vocab_size)
    ]


def updated(batch, max_age):
    state = init_state(TOY, CONFIG, ONE_DEVICE, jax.random.key(0))
    advantages = np.random.default_rng(1).standard_normal(batch.tokens.shape).astype(np.float32)
    placed = place(batch, ONE_DEVICE)
    before = np.asarray(make_token_logprobs(TOY, CONFIG, ONE_DEVICE)(state.params, placed))
    state, stats = make_update(TOY, CONFIG, ONE_DEVICE, max_age)(state, placed, advantages)
    return state, {name: float(value) for name, value in stats.items()}, before


def test_parity_is_that_of_the_tokens_of_each_age():
    batch = collate(carried_trajectories(), LAYOUT, step=STEP)
    assert set(np.unique(batch.ages)) == {-1, 0, 1, 3} and ((batch.ages < 0) == (batch.response_ids < 0)).all()
    state, stats, before = updated(batch, MAX_AGE)
    first = slice(0, int(batch.minibatch_ends[0]))
    gap, ages = np.abs(before - batch.logprobs)[first], batch.ages[first]
    for age, name in enumerate(("parity", "parity_age_1", "parity_age_2", "parity_age_3")):
        if age == 2:
            assert np.isnan(stats[f"{name}_mean"]) and np.isnan(stats[f"{name}_max"])
        else:
            assert stats[f"{name}_mean"] == pytest.approx(gap[ages == age].mean(), rel=1e-5)
            assert stats[f"{name}_max"] == pytest.approx(gap[ages == age].max(), rel=1e-5)
    plain, rest, _ = updated(collate(carried_trajectories(), LAYOUT), None)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(one, other)
    assert {name: stats[name] for name in rest if not name.startswith("parity")} == {
        name: value for name, value in rest.items() if not name.startswith("parity")
    }


def test_ages_and_a_largest_age_go_together():
    with pytest.raises(ValueError, match="expected a batch with ages exactly with a max_age, got none and max_age 3"):
        updated(collate(carried_trajectories(), LAYOUT), MAX_AGE)
    with pytest.raises(
        ValueError, match="expected a batch with ages exactly with a max_age, got ages and max_age None"
    ):
        updated(collate(carried_trajectories(), LAYOUT, step=STEP), None)
