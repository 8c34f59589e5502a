"""Routing replay: the learner routes every token to the experts that the sampler routed it to."""

import json
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.compilations import compilations
from aem_jax.envs.protocol import StepResult
from aem_jax.learner import LearnerConfig, init_state, make_token_logprobs, make_update
from aem_jax.learner.forward import forward_config
from aem_jax.learner.passes import token_logprobs
from aem_jax.models import ModelConfig, Policy
from aem_jax.models.parameters import Mixture
from aem_jax.rollout import Carried, Rollout, RolloutConfig, group_attempts
from aem_jax.rollout.carry import from_record, record
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings
from aem_jax.trajectory import Trajectory

from .fakes import CONFIG, STOP, TASKS, VOCAB, ByteChat, LatePool, LocalPool

MIXTURE = Mixture(6, 2)
MOE = Policy(ModelConfig(VOCAB, 32, 24, 2, 4, 2, 8, rope_theta=10_000.0, mixture=MIXTURE))
WIDTH = 4
WINDOW = replace(CONFIG, context="window", window_turns=2, prompt_tokens=30, extend_buckets=(4, 16))
CONTINUOUS = replace(WINDOW, mode="continuous", slot_divisors=(2,))
COMPACT = replace(CONFIG, context="compact", window_turns=1, compact_chars=1, context_tokens=48)
CARRY = replace(CONFIG, carry_min_groups=1, carry_max_age=2)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def moe_params():
    return jax.tree.map(lambda x: 2 * x, MOE.init(jax.random.key(1)))  # far from uniform routers


@pytest.fixture(scope="module")
def moe_sampler():
    return Sampler(MOE, SamplingConfig(), [STOP], capacity=96, slack=16, records_experts=True)


@pytest.fixture(scope="module")
def logprobs():
    """(params, batch) -> logprobs by the batch's experts, and by the learner's own."""
    config, mesh = LearnerConfig(head_chunk=32), make_mesh(MeshConfig(), jax.devices()[:1])
    forward = forward_config(MOE, config, mesh)
    replayed = jax.jit(lambda params, batch: token_logprobs(MOE, forward, params, batch))
    return replayed, make_token_logprobs(MOE, config, mesh)


def packed(trajectories: list[Trajectory], experts: int = WIDTH):
    layout = BatchLayout(24, 2, 96, max_responses=80, max_trajectories=16, experts=experts)
    return collate(trajectories, layout)


@pytest.mark.parametrize(
    ("config", "pool"),
    [
        (CONFIG, LocalPool(12)),
        (WINDOW, LocalPool(12)),
        (replace(CONTINUOUS, num_slots=4), LatePool(4, 0)),
        (COMPACT, LocalPool(12)),
    ],
    ids=["append", "window", "continuous", "compact"],
)
def test_recorded_experts_give_the_sampled_logprobs(config: RolloutConfig, pool, moe_params, moe_sampler, logprobs):
    """With the packing of rows, copied prefixes and rewound slots. Shifted by one token, they give others."""
    trajectories, _ = Rollout(moe_sampler, ByteChat(), pool, config)(moe_params, TASKS, KEY)
    for turn in (turn for t in trajectories for turn in t.turns):
        assert turn.experts is not None and turn.experts.dtype == np.uint8
        assert turn.experts.shape == (len(turn.observation_ids) + len(turn.response_ids), WIDTH)
        assert turn.experts.max() < MIXTURE.num_experts
    batch, (replayed, own) = packed(trajectories), logprobs
    sampled = batch.response_ids >= 0
    ours = np.asarray(replayed(moe_params, batch))
    np.testing.assert_allclose(ours[sampled], batch.logprobs[sampled], atol=1e-4)
    np.testing.assert_allclose(own(moe_params, batch)[sampled], batch.logprobs[sampled], atol=1e-4)
    shifted = replace(batch, experts=np.roll(batch.experts, 1, axis=2))
    assert np.abs(np.asarray(replayed(moe_params, shifted)) - batch.logprobs)[sampled].mean() > 0.05


class Impatient(LocalPool):
    """An agent that takes two tokens of a response, then waits for the next one and drops it, and so on."""

    def reset(self, session: int, payload: Mapping[str, int]) -> Future[StepResult]:
        self._left, self._prompts = getattr(self, "_left", {}), getattr(self, "_prompts", {})
        self._left[session], self._prompts[session] = 5, [4, 5, 6]
        return self._future(session, lambda: StepResult("", info={"prompt_ids": [4, 5, 6], "max_tokens": 0}))

    def without_response(self, session: int) -> Future[StepResult]:
        self._next, self._ids = getattr(self, "_next", {}), getattr(self, "_ids", {})
        self._next[session], self._ids[session] = Future(), []
        return self._next[session]

    def sampled(self, session: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        self._ids[session] += ids.tolist()
        if self._left[session] % 2 and len(self._ids[session]) >= 2:
            self._go_on(session)

    def step(self, session: int, text: str) -> Future[StepResult]:
        self._go_on(session)
        return self._next[session]

    def _go_on(self, session: int) -> None:
        if self._next[session].done():
            return
        received = self._ids[session][:2] if self._left[session] % 2 else []
        self._prompts[session] = [*self._prompts[session], *received, 7]
        self._left[session] -= 1
        info = {"received": bool(received), "num_received": len(received), "prompt_ids": self._prompts[session]}
        info |= {"max_tokens": 0, "branches": 0, "rematched": 0}
        self._next[session].set_result(StepResult("", terminated=not self._left[session], info=info))


def test_responses_that_a_client_cuts_short_have_their_experts(moe_params, moe_sampler, logprobs):
    config = replace(CONFIG, context="tree", mode="continuous", slot_divisors=(), num_slots=4)
    trajectories, _ = Rollout(moe_sampler, ByteChat(), Impatient(4), config)(moe_params, TASKS[:2], KEY)
    assert {len(turn.response_ids) for t in trajectories for turn in t.turns} == {1, 2}
    batch, (replayed, _) = packed(trajectories), logprobs
    sampled = batch.response_ids >= 0
    np.testing.assert_allclose(np.asarray(replayed(moe_params, batch))[sampled], batch.logprobs[sampled], atol=1e-4)


def test_rings_and_windows_change_no_record():
    """Layers with a sliding window and without one, in caches whose rings an episode goes round."""
    of_layers = {"num_layers": 3, "sliding_windows": (5, 0, 5), "sliding_rope_theta": 300.0, "unrotated_layers": (1,)}
    policy = Policy(replace(MOE.config, **of_layers))
    params = jax.tree.map(lambda x: 2 * x, policy.init(jax.random.key(2)))
    sampler = Sampler(policy, SamplingConfig(), [STOP], capacity=96, slack=16, grows=True, records_experts=True)
    ring, whole, _ = (jax.tree.leaves(layer.values)[0].shape[2] for layer in sampler.abstract(1).cache.layers)
    trajectories, _ = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)(params, TASKS, KEY)
    batch = packed(trajectories, experts=6)
    assert ring < batch.positions.max() < whole
    forward = forward_config(policy, LearnerConfig(head_chunk=32), make_mesh(MeshConfig(), jax.devices()[:1]))
    replayed = jax.jit(lambda params, batch: token_logprobs(policy, forward, params, batch))
    sampled = batch.response_ids >= 0
    np.testing.assert_allclose(np.asarray(replayed(params, batch))[sampled], batch.logprobs[sampled], atol=1e-4)
    shifted = replace(batch, experts=np.roll(batch.experts, 1, axis=2))
    assert np.abs(np.asarray(replayed(params, shifted)) - batch.logprobs)[sampled].mean() > 0.05


def test_carried_episodes_have_the_experts_of_the_caches_that_they_were_sampled_from(moe_sampler, logprobs):
    """Caches are computed again in each step; a resumed run has the same record as an uninterrupted one."""
    replayed, _ = logprobs
    versions = [jax.tree.map(lambda x: 2 * x, MOE.init(jax.random.key(step))) for step in range(3)]
    attempts = group_attempts(lambda step, round: TASKS, KEY, CARRY)

    def play(resume: bool) -> list[Trajectory]:
        rollout, carried, complete = Rollout(moe_sampler, ByteChat(), LocalPool(12), CARRY), Carried(), []
        for step, params in enumerate(versions):
            trajectories, carried, _ = rollout.carry_on(params, carried, attempts, step)
            complete += trajectories
            batch = packed(trajectories)
            fresh = np.zeros(batch.response_ids.shape, bool)
            ages = collate(trajectories, BatchLayout(24, 2, 96, 80, 16, experts=WIDTH), step=step).ages
            fresh = (batch.response_ids >= 0) & (ages == 0)
            ours = np.asarray(replayed(params, batch))
            np.testing.assert_allclose(ours[fresh], batch.logprobs[fresh], atol=1e-4)
            assert fresh.any() and (not step or (ages > 0).any())
            if resume:
                carried = from_record(json.loads(json.dumps(record(carried))), attempts)
                rollout = Rollout(moe_sampler, ByteChat(), LocalPool(12), CARRY)
        return complete

    for one, other in zip(play(False), play(True), strict=True):
        for turn, same in zip(one.turns, other.turns, strict=True):
            np.testing.assert_array_equal(turn.experts, same.experts)


@pytest.fixture(scope="module")
def played(moe_params, moe_sampler):
    return Rollout(moe_sampler, ByteChat(), LocalPool(12), CONFIG)(moe_params, TASKS, KEY)[0]


def test_an_expert_axis_samples_the_same_tokens_by_the_same_experts(moe_params, played):
    mesh = make_mesh(MeshConfig(expert=2, fsdp=1), jax.devices()[:2])
    placed = jax.device_put(moe_params, shardings(mesh, MOE.axes, TRAIN, MOE.shapes))
    sampler = Sampler(MOE, SamplingConfig(), [STOP], capacity=96, slack=16, records_experts=True, mesh=mesh)
    rollout = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)
    for ours, wanted in zip(rollout(make_reshard(MOE, mesh)(placed), TASKS, KEY)[0], played, strict=True):
        for turn, same in zip(ours.turns, wanted.turns, strict=True):
            np.testing.assert_array_equal(turn.response_ids, same.response_ids)
            np.testing.assert_array_equal(turn.experts, same.experts)
            np.testing.assert_allclose(turn.logprobs, same.logprobs, atol=1e-4)


def test_an_update_on_several_devices_is_that_of_one(moe_params, played):
    """With the balancing loss. The metrics of experts, from a batch that the learner's router agrees with."""
    batch, results = packed(played), []
    advantages = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    config = LearnerConfig(head_chunk=32, balance_coefficient=0.1, adam_eps=1e-2)
    for sizes in (MeshConfig(1, 1, 1), MeshConfig(1, 1, 1, 2)):
        mesh = make_mesh(sizes, jax.devices()[: sizes.expert])
        base = jax.device_put(jax.tree.map(np.asarray, moe_params), shardings(mesh, MOE.axes, TRAIN, MOE.shapes))
        state = init_state(MOE, config, mesh, KEY, base)
        state, stats = make_update(MOE, config, mesh)(state, place(batch, mesh), jax.device_put(advantages))
        results.append((jax.device_get(state.trainable), jax.device_get(stats)))
    (one, stats), (several, same) = results
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), several, one)
    for name, value in stats.items():
        np.testing.assert_allclose(same[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert stats["expert_dropped"] == stats["parity_flips"] == 0 and stats["parity_max"] < 1e-4
    assert 1 < stats["expert_load_max"] < 6 and 0 < stats["expert_entropy"] < np.log(6)
    assert np.abs(one["base"]["layers"]["router"] - moe_params["base"]["layers"]["router"]).max() > 0


def test_nothing_compiles_after_warm_up(moe_params):
    sampler = Sampler(MOE, SamplingConfig(), [STOP], capacity=96, slack=16, records_experts=True)
    rollout = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)
    rollout.warm_up(moe_params)
    rollout(moe_params, TASKS, KEY)
    programs, count = sampler.compilations, compilations()
    rollout(moe_params, TASKS[::-1], jax.random.key(1))
    assert (sampler.compilations, compilations()) == (programs, count)


def test_episodes_without_a_record_are_refused(moe_params):
    sampler = Sampler(MOE, SamplingConfig(), [STOP], capacity=96, slack=16)
    trajectories, _ = Rollout(sampler, ByteChat(), LocalPool(12), CONFIG)(moe_params, TASKS[:1], KEY)
    assert packed(trajectories, experts=0).experts is None
    with pytest.raises(ValueError, match=r"expected recorded experts \[\d+, 4\] of a turn, got none in turn 0"):
        packed(trajectories)
