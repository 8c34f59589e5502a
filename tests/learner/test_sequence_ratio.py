"""GSPO through the real update, compared with finite differences of its loss in float64, for any packing of rows."""

import dataclasses

import jax
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.advantage import token_advantages
from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.sharding import MeshConfig, make_mesh

TOY = Bigram(vocab_size=6, width=4)
LAYOUT = BatchLayout(num_microbatches=16, rows=1, row_length=24, max_responses=40, max_trajectories=12)
CONFIG = LearnerConfig(learning_rate=0.01, max_grad_norm=1e9, head_chunk=7, clip_low=0.1, clip_high=0.15)
MEANS = {"token": "token-mean", "response": "response-mean", "trajectory": "trajectory-mean"}


def configured(ratio: str, **changes) -> LearnerConfig:
    return dataclasses.replace(CONFIG, ratio=ratio, aggregation=MEANS[ratio], **changes)


def start(config: LearnerConfig, mesh=ONE_DEVICE):
    return init_state(TOY, config, mesh, jax.random.key(0))


def sequences(trajectory, level: str) -> list[list]:
    """The turns of each sequence of a trajectory."""
    return [list(trajectory.turns)] if level == "trajectory" else [[turn] for turn in trajectory.turns]


def log_probability(params, before: int, token: int) -> float:
    logits = np.tanh(params["embed"][before]) @ params["head"]
    return logits[token] - np.log(np.exp(logits).sum())


def gspo_loss(params, trajectories, values, level: str) -> tuple[float, float]:
    """(−mean over sequences of min(s A, clip(s) A), fraction of sequences where the clip is active).

    s is a function of the parameters. This is the loss of the paper, without our code. `values` are the advantages of
    sequences.
    """
    losses, clipped = [], []
    all_of_them = [turns for trajectory in trajectories for turns in sequences(trajectory, level)]
    for turns, advantage in zip(all_of_them, values, strict=True):
        gaps = []
        for turn in turns:
            before = turn.observation_ids[-1]
            for token, sampled in zip(turn.response_ids, turn.logprobs, strict=True):
                gaps.append(log_probability(params, before, token) - np.float64(sampled))
                before = token
        s = np.exp(np.mean(gaps))
        bounded = np.clip(s, 1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
        losses.append(-min(s * advantage, bounded * advantage))
        clipped.append(bounded * advantage < s * advantage)
    return float(np.mean(losses)), float(np.mean(clipped))


def differences(loss, params, step=1e-6):
    """dloss/dparams by central differences."""
    slopes = {}
    for name, value in params.items():
        slopes[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            up, down = ({**params, name: value.copy()} for _ in range(2))
            up[name][index] += step
            down[name][index] -= step
            slopes[name][index] = (loss(up) - loss(down)) / (2 * step)
    return slopes


def per_response(trajectories, values, level: str) -> np.ndarray:
    """f32[R], the advantage of each response's sequence."""
    values = iter(values)
    shared = [[next(values)] * len(turns) for trajectory in trajectories for turns in sequences(trajectory, level)]
    padded = np.zeros(LAYOUT.max_responses, np.float32)
    padded[: sum(map(len, shared))] = np.concatenate(shared)
    return padded


@pytest.mark.parametrize("level", ["response", "trajectory"])
@pytest.mark.parametrize("context", ["append", "window"])
def test_the_gradient_is_that_of_the_paper_s_loss(level, context):
    config, trajectories = configured(level), random_trajectories(1, 7, TOY.vocab_size, context)
    batch = collate(trajectories, LAYOUT)
    if context == "window":  # some trajectory's turns lie in several microbatches
        places = [np.flatnonzero((batch.response_ids == r).any((1, 2))) for r in range(40)]
        rows = {n: {m for r in range(40) if batch.response_trajectory[r] == n for m in places[r]} for n in range(7)}
        assert max(map(len, rows.values())) > 1
    count = sum(len(sequences(trajectory, level)) for trajectory in trajectories)
    values = np.random.default_rng(3).standard_normal(count).astype(np.float32)
    advantages = token_advantages(per_response(trajectories, values, level), batch.response_ids)
    state = start(config)
    params = {name: np.asarray(value, np.float64) for name, value in state.params["base"].items()}
    loss, clipped = gspo_loss(params, trajectories, values, level)
    assert 0 < clipped < 1
    expected = differences(lambda p: gspo_loss(p, trajectories, values, level)[0], params)
    state, stats = make_update(TOY, config, ONE_DEVICE)(state, batch, advantages)
    for name, slope in expected.items():
        ours = np.asarray(state.opt_state[1][0].mu["base"][name]) / (1 - config.beta1)
        np.testing.assert_allclose(ours, slope, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(stats["loss"], loss, rtol=1e-5)
    assert 0 < stats["clip_fraction"] < 1


def test_a_response_of_one_token_is_that_token():
    short = [
        dataclasses.replace(
            trajectory,
            turns=tuple(
                dataclasses.replace(
                    turn, response_ids=turn.response_ids[:1], logprobs=turn.logprobs[:1], entropies=turn.entropies[:1]
                )
                for turn in trajectory.turns
            ),
        )
        for trajectory in random_trajectories(2, 6, TOY.vocab_size)
    ]
    batch = collate(short, LAYOUT)
    advantages = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    updates = [
        make_update(TOY, config, ONE_DEVICE)(start(config), batch, advantages)
        for config in (configured("response"), configured("token"))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *updates)


@pytest.mark.parametrize("level", ["response", "trajectory"])
def test_every_optimizer_step_measures_the_ratio_anew(level):
    """Two epochs equal two updates of one epoch, each at the current parameters; four devices equal one."""
    config = configured(level, num_minibatches=2)
    layout = dataclasses.replace(LAYOUT, num_minibatches=2, rows=4)
    batch = collate(random_trajectories(4, 9, TOY.vocab_size, "window"), layout, seed=1)
    advantages = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    once, state = make_update(TOY, config, ONE_DEVICE), start(config)
    for _ in range(2):
        state, _ = once(state, batch, advantages)
    twice, mesh = dataclasses.replace(config, num_epochs=2), make_mesh(MeshConfig(2, 2, 1), jax.devices()[:4])
    other, _ = make_update(TOY, twice, mesh)(start(twice, mesh), place(batch, mesh), advantages)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other.params, state.params)


def test_a_cap_on_tokens_and_a_ratio_of_sequences_are_refused():
    with pytest.raises(ValueError, match="expected importance_cap 0 with ratio response, got 2.0"):
        LearnerConfig(ratio="response", importance_cap=2.0)
    with pytest.raises(ValueError, match=r"expected dual_clip of 0 \(off\) or above 1, got 0.5"):
        LearnerConfig(dual_clip=0.5)
