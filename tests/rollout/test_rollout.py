"""Rollouts are token-exact, independent of slots and cohorts, and unharmed by environments that break."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from aem_jax.compilations import compilations
from aem_jax.rollout import OverlongPromptsError, Rollout, check_some_played, slots
from aem_jax.rollout.context import windowed_messages
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.trajectory import Ending

from .fakes import CONFIG, POLICY, STOP, TASKS, ByteChat, LocalPool, RoomPool, sampled


def play(sampler, params, config=CONFIG, tasks=TASKS, broken=lambda *_: False, seed=7):
    pool = LocalPool(config.num_slots, broken=broken)
    return Rollout(sampler, ByteChat(), pool, config)(params, tasks, jax.random.key(seed))


FORWARD = jax.jit(POLICY.forward)


def log_probabilities(params, ids):
    """Log-probabilities [n, V] after each of the ids, in one plain pass (rows of one length: one program)."""
    row = np.zeros((1, CONFIG.context_tokens), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(FORWARD(params, row)))[0, : len(ids)]


def test_every_token_has_the_policys_logprob(sampler, params):
    """Logprobs and entropies of all responses equal those of one plain pass over the whole episode."""
    trajectories, stats = play(sampler, params)
    assert [(t.group, t.member) for t in trajectories] == [(g, m) for g in range(3) for m in range(4)]
    for t in trajectories:
        ids = np.concatenate([np.concatenate([turn.observation_ids, turn.response_ids]) for turn in t.turns])
        logps = log_probabilities(params, ids)
        at = 0
        for turn in t.turns:
            at += len(turn.observation_ids)
            rows = logps[at - 1 : at - 1 + len(turn.response_ids)]
            np.testing.assert_allclose(rows[np.arange(len(rows)), turn.response_ids], turn.logprobs, atol=2e-5)
            np.testing.assert_allclose(-(np.exp(rows) * rows).sum(-1), turn.entropies, atol=2e-5)
            at += len(turn.response_ids)
            assert len(turn.response_ids) == 7 or turn.response_ids[-1] == STOP
            assert STOP not in turn.response_ids[:-1]
    assert stats.sampled_tokens == sum(len(turn.response_ids) for t in trajectories for turn in t.turns)
    assert {len(t.turns) for t in trajectories[4:8]} == {5}
    assert all(t.ending is Ending.TERMINATED for t in trajectories)
    assert all(
        t.total_reward == pytest.approx(0.1 * (len(t.turns) - 1) + (1.0 if t.success else 0.1)) for t in trajectories
    )


def test_observation_ids_are_those_of_the_chat_template(sampler, params):
    trajectories, _ = play(sampler, params)
    chat = ByteChat()
    for t in trajectories:
        ids: list[int] = []
        for k, turn in enumerate(t.turns):
            closed = k == 0 or ids[-1] == STOP
            expected = (
                chat.delta_ids(turn.observation, closed=closed)
                if k
                else chat.prompt_ids([{"role": "user", "content": turn.observation}])
            )
            assert turn.observation_ids.tolist() == expected
            assert turn.response == chat.decode(turn.response_ids.tolist())
            ids += [*expected, *turn.response_ids.tolist()]


@pytest.mark.parametrize(
    "change", [{"num_slots": 4}, {"num_slots": 12, "num_cohorts": 3}, {"decode_chunk": 7}, {"extend_buckets": (3,)}]
)
def test_samples_do_not_depend_on_slots_cohorts_or_chunks(sampler, params, change):
    expected, _ = play(sampler, params)
    trajectories, _ = play(sampler, params, replace(CONFIG, **change))
    assert sampled(trajectories) == sampled(expected)
    for a, b in zip(trajectories, expected, strict=True):
        for x, y in zip(a.turns, b.turns, strict=True):
            np.testing.assert_allclose(x.logprobs, y.logprobs, atol=2e-5)


def test_members_of_a_group_differ_and_the_key_determines_samples(sampler, params):
    first, _ = play(sampler, params)
    repeated, _ = play(sampler, params)
    other, _ = play(sampler, params, seed=8)
    assert sampled(first) == sampled(repeated)
    assert sampled(first) != sampled(other)
    assert len({str(s) for s in sampled(first)[:4]}) > 1


def test_a_retried_episode_samples_the_same_tokens(sampler, params):
    """Calls 5, 20 and 21 fail: those episodes are retried and sample the same; the others are not affected."""
    expected, _ = play(sampler, params)
    trajectories, stats = play(sampler, params, broken=lambda _, call: call in (5, 20, 21))
    assert stats.retries == 3 and stats.env_errors == 0 and stats.first_error.endswith(": broken on purpose")
    assert sampled(trajectories) == sampled(expected)
    assert sum(t.retries for t in trajectories) == 3


def test_an_environment_that_stays_broken_is_masked(sampler, params):
    expected, _ = play(sampler, params)
    trajectories, stats = play(sampler, params, replace(CONFIG, num_slots=12), broken=lambda session, _: session == 5)
    errors = [t for t in trajectories if t.ending is Ending.ENV_ERROR]
    assert stats.env_errors == len(errors) >= 1 and not any(t.success for t in errors)
    unbroken = {
        (t.group, t.member): s
        for t, s in zip(trajectories, sampled(trajectories), strict=True)
        if t.ending is not Ending.ENV_ERROR
    }
    for t, responses in zip(expected, sampled(expected), strict=True):
        assert unbroken.get((t.group, t.member), responses) == responses
    assert len(trajectories) == 12


def test_turn_and_token_limits_truncate_episodes(sampler, params):
    by_turns, _ = play(sampler, params, replace(CONFIG, max_turns=2))
    assert [t.ending for t in by_turns[4:8]] == [Ending.TRUNCATED] * 4 and {len(t.turns) for t in by_turns} == {2}
    tight = replace(CONFIG, context_tokens=30)
    by_tokens, _ = play(sampler, params, tight)
    for t in by_tokens:
        total = sum(len(turn.observation_ids) + len(turn.response_ids) for turn in t.turns)
        assert total <= 30
    assert any(t.ending is Ending.TRUNCATED for t in by_tokens[4:8])


@pytest.mark.parametrize("change", [{"num_cohorts": 2}, {"mode": "continuous", "slot_divisors": ()}])
def test_episodes_that_wait_for_room_do_not_stop_those_that_hold_it(sampler, params, monkeypatch, change):
    """Two turns are less than the environments want, so the rollout ends episodes, and has to release their room."""
    config = replace(CONFIG, max_turns=2, **change)
    expected, _ = play(sampler, params, replace(CONFIG, max_turns=2))
    monkeypatch.setattr(slots, "_ROOM_S", 0.01)
    pool = RoomPool(12, room=3)
    rollout = Rollout(sampler, ByteChat(), pool, config)
    trajectories, _ = rollout(params, TASKS, jax.random.key(7))
    assert sampled(trajectories) == sampled(expected)
    assert [t.ending for t in trajectories] == [t.ending for t in expected]
    assert pool.most == 3 and pool.holding == set()


def test_an_interrupted_rollout_releases_the_room_that_its_own_calls_wait_for(sampler, params, monkeypatch):
    class Breaks(ByteChat):
        broken = True

        def decode(self, ids):
            if self.broken:
                raise KeyboardInterrupt
            return super().decode(ids)

    monkeypatch.setattr(slots, "_ROOM_S", 0.01)
    chat, pool = Breaks(), RoomPool(12, room=3)
    rollout = Rollout(sampler, chat, pool, replace(CONFIG, num_cohorts=2))
    with pytest.raises(KeyboardInterrupt):
        rollout(params, TASKS, jax.random.key(7))
    chat.broken = False
    assert sampled(rollout(params, TASKS, jax.random.key(7))[0]) == sampled(play(sampler, params)[0])


def test_a_first_prompt_that_is_too_long_ends_its_episodes_and_no_others(sampler, params):
    long = replace(TASKS[1], payload={"turns": 5, "first": "x" * 20})
    expected, _ = play(sampler, params)
    trajectories, stats = play(sampler, params, tasks=[TASKS[0], long, TASKS[2]])
    assert stats.overlong_prompts == 4 and stats.retries == stats.env_errors == 0
    assert [t.is_left_out for t in trajectories] == [False] * 4 + [True] * 4 + [False] * 4
    with pytest.raises(
        OverlongPromptsError, match=r"expected a first prompt of at most .* raise rollout.prompt_tokens"
    ):
        check_some_played(trajectories[4:8], stats, "step 0")
    assert [(t.ending, t.turns) for t in trajectories[4:8]] == [(Ending.TRUNCATED, ())] * 4
    assert sampled(trajectories[:4] + trajectories[8:]) == sampled(expected[:4] + expected[8:])


def test_a_task_that_is_over_at_its_reset_is_left_out_at_once(sampler, params, caplog):
    """No retry and one log line for the group; the other groups sample the same."""
    over = replace(TASKS[1], id="solved", payload={"turns": 0})
    expected, _ = play(sampler, params)
    trajectories, stats = play(sampler, params, tasks=[TASKS[0], over, TASKS[2]])
    assert (stats.retries, stats.env_errors) == (0, 4)
    assert [(t.ending, t.turns) for t in trajectories[4:8]] == [(Ending.ENV_ERROR, ())] * 4
    assert sampled(trajectories[:4] + trajectories[8:]) == sampled(expected[:4] + expected[8:])
    (line,) = [record.getMessage() for record in caplog.records if "solved" in record.getMessage()]
    assert line.startswith("task solved is left out: the episode ended at its reset (terminated, won)")
    assert stats.first_error.startswith("task solved: the episode ended at its reset")


def test_windowed_context_rebuilds_each_prompt(sampler, params):
    """The ids of each turn are a complete prompt, and its logprobs depend on that prompt alone."""
    config = replace(CONFIG, context="window", window_turns=1, prompt_tokens=16, context_tokens=60)
    trajectories, _ = play(sampler, params, config)
    chat = ByteChat()
    for t in trajectories:
        for k, turn in enumerate(t.turns):
            messages = [{"role": "user", "content": t.turns[0].observation}]
            if k > 1:
                messages.append({"role": "user", "content": t.turns[k - 1].observation})
            if k:
                messages += [
                    {"role": "assistant", "content": t.turns[k - 1].response},
                    {"role": "user", "content": turn.observation},
                ]
            assert turn.observation_ids.tolist() == chat.prompt_ids(messages)
            ids = np.concatenate([turn.observation_ids, turn.response_ids])
            logps = log_probabilities(params, ids)[len(turn.observation_ids) - 1 : -1]
            np.testing.assert_allclose(
                logps[np.arange(len(turn.response_ids)), turn.response_ids], turn.logprobs, atol=2e-5
            )


def test_a_window_may_drop_earlier_thinking():
    responses = ["<think>\nup\n</think>\n\ngo", "down</think>\nstay", "<think>too long, it was cut"]
    turns = [("seen", text) for text in responses]
    for thinking, shown in (("keep", responses), ("drop", ["go", "stay", responses[2]])):
        messages = windowed_messages(turns, "end", replace(CONFIG, context="window", window_turns=3, thinking=thinking))
        assert [m["content"] for m in messages if m["role"] == "assistant"] == shown
    with pytest.raises(ValueError, match="set rollout.context to 'window'"):
        replace(CONFIG, thinking="drop")


def test_nothing_compiles_after_warm_up(params):
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=96, slack=CONFIG.slack, windows=CONFIG.windows)
    config = replace(CONFIG, num_slots=6, num_cohorts=2)
    rollout = Rollout(sampler, ByteChat(), LocalPool(6), config)
    rollout.warm_up(params)
    rollout(params, TASKS, jax.random.key(0))
    programs, count = sampler.compilations, compilations()
    rollout(params, TASKS, jax.random.key(1))
    rollout(params, list(reversed(TASKS)), jax.random.key(2))
    assert (sampler.compilations, compilations()) == (programs, count)


def test_invalid_settings_are_refused_with_the_fix(sampler):
    with pytest.raises(ValueError, match="expected an environment session for each of 12 slots, got 3"):
        Rollout(sampler, ByteChat(), LocalPool(3), CONFIG)
    with pytest.raises(ValueError, match="num_slots divisible by rollout.num_cohorts"):
        replace(CONFIG, num_cohorts=5)
    with pytest.raises(ValueError, match="raise rollout.context_tokens"):
        replace(CONFIG, context_tokens=20)
