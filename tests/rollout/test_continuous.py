"""Continuous mode samples the same as lockstep mode for any timing of replies, and calls before it reads."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from aem_jax.compilations import compilations
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.models.decode_attention import DecodeAttention, attend_in_place, on_mesh
from aem_jax.rollout import Rollout, RolloutConfig, RolloutStats
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory

from .fakes import CONFIG, POLICY, STOP, TASKS, ByteChat, LatePool, LocalPool, sampled

CONTINUOUS = replace(CONFIG, mode="continuous", slot_divisors=(2, 4))


def play(sampler, params, config: RolloutConfig, pool: LocalPool, tasks=TASKS) -> tuple[list[Trajectory], RolloutStats]:
    return Rollout(sampler, ByteChat(), pool, config)(params, tasks, jax.random.key(7))


def same(trajectories: list[Trajectory], expected: list[Trajectory]) -> None:
    assert sampled(trajectories) == sampled(expected)
    for one, other in zip(trajectories, expected, strict=True):
        assert (one.group, one.member, one.ending, one.success, one.total_reward) == (
            other.group, other.member, other.ending, other.success, other.total_reward,
        )  # fmt: skip
        for x, y in zip(one.turns, other.turns, strict=True):
            assert x.observation_ids.tolist() == y.observation_ids.tolist()
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-5)
            np.testing.assert_allclose(x.entropies, y.entropies, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_slots": 5},
        {"decode_chunk": 1},
        {"context": "window", "window_turns": 1, "context_tokens": 60},
        {"max_turns": 2, "slot_divisors": ()},
    ],
)
def test_continuous_samples_what_lockstep_samples(sampler, params, change):
    expected, wanted = play(sampler, params, replace(CONFIG, **(change | {"slot_divisors": ()})), LocalPool(12))
    for seed in (0, 1):
        trajectories, stats = play(sampler, params, replace(CONTINUOUS, **change), LatePool(12, seed))
        same(trajectories, expected)
        assert (stats.sampled_tokens, stats.episodes) == (wanted.sampled_tokens, wanted.episodes)
        assert 0 < stats.device_busy_s <= stats.total_s and stats.environment_s < stats.total_s


def test_retried_episodes_sample_the_same_tokens(sampler, params):
    expected, _ = play(sampler, params, CONFIG, LocalPool(12))
    trajectories, stats = play(sampler, params, CONTINUOUS, LatePool(12, 0, broken=lambda _, call: call in (5, 20, 21)))
    same(trajectories, expected)
    assert stats.retries == 3 and stats.env_errors == 0
    # Which episode gets a broken session depends on timing; so all sessions are broken.
    trajectories, stats = play(sampler, params, CONTINUOUS, LatePool(12, 0, broken=lambda *_: True))
    assert [t.ending for t in trajectories] == [Ending.ENV_ERROR] * 12
    assert (stats.env_errors, stats.retries) == (12, 12 * CONTINUOUS.max_retries)


def test_more_first_prompts_than_cache_rows_sample_the_same(sampler, params):
    tasks = [Task(f"t{n}", "countdown", {"turns": 1 + n % 3, "first": "abcdefgh"[: n + 1]}) for n in range(8)]
    config = replace(CONFIG, group_size=2)
    expected, _ = play(sampler, params, config, LocalPool(12), tasks)
    trajectories, _ = play(sampler, params, replace(config, mode="continuous"), LatePool(12, 0), tasks)
    same(trajectories, expected)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_prompt_is_prefilled_once_however_late_its_group_starts(sampler, params, seed):
    """Slots start one by one, in alternating groups: no prompt is evicted while a row is empty."""
    tasks = [replace(t, payload={**t.payload, "first": "abc" * (n + 1)}) for n, t in enumerate(TASKS)]
    expected, wanted = play(sampler, params, CONFIG, LocalPool(12), tasks)
    trajectories, stats = play(sampler, params, CONTINUOUS, LatePool(12, seed), tasks)
    same(trajectories, expected)
    assert stats.prefill_tokens == wanted.prefill_tokens


class OneAtATime(LatePool):
    """Refuses a call to a session whose last one is pending, as servers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._out: dict[int, Future[StepResult]] = {}

    def _future(self, session: int, call: Callable[[], StepResult]) -> Future[StepResult]:
        assert session not in self._out or self._out[session].done()
        self._out[session] = super()._future(session, call)
        return self._out[session]


def test_an_interrupted_rollout_can_be_repeated(sampler, params):
    class Breaks(ByteChat):
        calls = 0

        def decode(self, ids):
            self.calls += 1
            if self.calls == 9:
                raise KeyboardInterrupt
            return super().decode(ids)

    expected, _ = play(sampler, params, CONFIG, LocalPool(12))
    rollout = Rollout(sampler, Breaks(), OneAtATime(12, 0), CONTINUOUS)
    with pytest.raises(KeyboardInterrupt):
        rollout(params, TASKS, jax.random.key(7))
    same(rollout(params, TASKS, jax.random.key(7))[0], expected)


class Watched:
    """A sampler that records its decode calls."""

    def __init__(self, sampler: Sampler):
        self._sampler, self.events = sampler, []

    def __getattr__(self, name: str):
        return getattr(self._sampler, name)

    def decode(self, *arguments, **named):
        state, out = self._sampler.decode(*arguments, **named)
        self.events.append("call")
        return state, out


def test_the_next_chunk_is_called_before_the_last_is_read(sampler, params, monkeypatch):
    watched, read = Watched(sampler), jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: (watched.events.append("read"), read(tree))[1])
    play(watched, params, replace(CONTINUOUS, decode_chunk=2), LocalPool(12))
    ahead = np.cumsum([1 if event == "call" else -1 for event in watched.events])
    assert set(ahead.tolist()) == {0, 1, 2}  # at most two calls are in flight, and none at the end
    assert (ahead >= 1).mean() > 0.8 and ahead[-1] == 0


@pytest.mark.parametrize("mode", ["lockstep", "continuous"])
def test_a_sampler_that_follows_lengths_decodes_all_slots_in_every_call(sampler, params, mode: str):
    expected, _ = play(sampler, params, CONFIG, LocalPool(12))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    in_place = DecodeAttention(partial(attend_in_place, implementation="xla"), follows_lengths=True, in_place=True)
    ragged = Sampler(
        POLICY,
        SamplingConfig(),
        [STOP],
        capacity=96,
        slack=CONFIG.slack,
        windows=CONFIG.windows,
        mesh=mesh,
        attention=on_mesh(in_place, mesh),
    )
    rollout = Rollout(ragged, ByteChat(), LatePool(12, 0), replace(CONTINUOUS, mode=mode))
    rollout.warm_up(params)
    warm = ragged.compilations
    trajectories, _ = rollout(params, TASKS, jax.random.key(7))
    same(trajectories, expected)
    assert ragged.compilations == warm


def test_nothing_compiles_after_warm_up(params):
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=96, slack=CONFIG.slack, windows=CONFIG.windows)
    rollout = Rollout(sampler, ByteChat(), LatePool(12, 0), CONTINUOUS)
    rollout.warm_up(params)
    rollout(params, TASKS, jax.random.key(0))
    programs, count = sampler.compilations, compilations()
    for seed in (1, 2, 3):
        rollout(params, list(reversed(TASKS)), jax.random.key(seed))
    assert (sampler.compilations, compilations()) == (programs, count)


def test_contradictory_settings_are_refused():
    with pytest.raises(ValueError, match="expected rollout.num_cohorts 1 with rollout.mode 'continuous'"):
        replace(CONTINUOUS, num_cohorts=2)
    with pytest.raises(ValueError, match="expected rollout.slot_divisors of at least 2"):
        replace(CONTINUOUS, slot_divisors=(1,))
    with pytest.raises(ValueError, match="expected rollout.mode 'lockstep' or 'continuous', got 'async'"):
        replace(CONTINUOUS, mode="async")
    assert replace(CONTINUOUS, num_slots=12).slot_sizes(4) == (4,)
    assert replace(CONTINUOUS, num_slots=16).slot_sizes(2) == (4, 8)
    assert replace(CONTINUOUS, num_slots=2).slot_sizes(2) == ()
    windowed = replace(CONFIG, context="window", num_slots=24, num_cohorts=2)  # only prefills, of one cohort
    assert (windowed.slot_sizes(1), replace(windowed, context="append").slot_sizes(1)) == ((3,), ())
