"""The scripted environment: lengths follow its formula and are equal in every process; sleeps do not block others."""

import time

import pytest

from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.testing.scripted import ScriptedConfig, ScriptedEnv, num_turns, pareto


def test_turns_are_pareto():
    # a = 3, b = 5: P(N >= 4) = (1/4 - 1/6) / (1/3 - 1/6) = 1/2, P(N >= 5) = (1/5 - 1/6) / (1/6) = 1/5
    assert [pareto(3, 5, uniform) for uniform in (0.0, 0.49, 0.51, 0.79, 0.81, 1 - 1e-16)] == [3, 3, 4, 4, 5, 5]
    assert {pareto(7, 7, uniform) for uniform in (0.0, 0.5, 1 - 1e-16)} == {7}


def test_most_episodes_are_short_and_a_few_are_long():
    turns = [num_turns(ScriptedConfig(), {"seed": seed}) for seed in range(4000)]
    assert min(turns) == 3 and max(turns) == 30
    # P(N >= n) of the formula by hand: half are done after 5 turns, one in 17 plays more than 19
    assert sum(n >= 6 for n in turns) / 4000 == pytest.approx((1 / 6 - 1 / 31) / (1 / 3 - 1 / 31), abs=0.03)
    assert sum(n >= 20 for n in turns) / 4000 == pytest.approx((1 / 20 - 1 / 31) / (1 / 3 - 1 / 31), abs=0.015)


def play(env: ScriptedEnv, seed: int, say: str = "yes"):
    results = [env.reset({"seed": seed})]
    while not results[-1].done:
        results.append(env.step(say))
    return results


def test_an_episode_is_a_function_of_its_task_and_its_responses():
    config = ScriptedConfig(max_turns=6, prompt_chars=9, observation_chars=4)
    first, again, other = (play(ScriptedEnv(config), seed) for seed in (1, 1, 2))
    assert first == again and first[0] != other[0]
    assert len(first) == 1 + num_turns(config, {"seed": 1}) and first[-1].terminated and not first[-1].truncated
    assert [len(result.observation) for result in first] == [9] + [4] * (len(first) - 1)
    assert play(ScriptedEnv(config), 1, "no")[1].observation != first[1].observation
    assert not first[-1].info["won"] and play(ScriptedEnv(config), 1, "no")[-1].reward == 1.0  # an even number wins


def test_one_session_sleeps_and_the_others_do_not():
    settings = {"min_turns": 4, "max_turns": 4, "latency_ms": 400.0}
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=16), ("scripted", settings)) as pool:
        for future in [pool.reset(session, {"seed": session}) for session in range(16)]:
            future.result()
        start = time.perf_counter()
        took = []
        futures = [pool.step(session, "hello") for session in range(16)]
        for future in futures:
            future.add_done_callback(lambda _: took.append(time.perf_counter() - start))
        for future in futures:
            future.result()
        assert time.perf_counter() - start < 1.6  # one after the other they would take 16 × 0.2 s
    assert max(took) - min(took) > 0.1  # spread over 0 … 0.4 s


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"min_turns": 4, "max_turns": 3}, "min_turns <= max_turns"),
        ({"latency_ms": -1.0}, "latency_ms >= 0"),
        ({"prompt_chars": 0}, "at least 1"),
    ],
)
def test_bad_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        ScriptedConfig(**settings)


def test_a_task_needs_a_seed():
    with pytest.raises(ValueError, match="an integer as its seed"):
        ScriptedEnv().reset({"seed": "1"})
