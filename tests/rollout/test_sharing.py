"""Prefixes are copied between slots of a group: the same tokens and logprobs as without, from fewer computed tokens."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aem_jax.compilations import compilations
from aem_jax.envs.protocol import Task
from aem_jax.rollout import Rollout, RolloutConfig
from aem_jax.rollout.sharing import Pass, common_prefix, plan_passes
from aem_jax.rollout.slots import SlotGroup
from aem_jax.sampler import Sampler, SamplingConfig

from .fakes import CONFIG, POLICY, STOP, ByteChat, LatePool, LocalPool
from .test_continuous import same
from .test_processes import episodes
from .test_processes import play as play_processes

LOCKSTEP = replace(
    CONFIG, context="window", window_turns=2, prompt_tokens=30, extend_buckets=(4, 16), slot_divisors=(2,)
)
CONTINUOUS = replace(LOCKSTEP, mode="continuous")
TASKS = [Task(f"t{n}", "countdown", {"turns": n, "first": "abcdefghijklmnop" + "x" * n}) for n in (2, 5, 3)]


def cold(*windows: int) -> Sampler:
    """Its samples are often the most likely ones, so members of a group often respond the same."""
    return Sampler(POLICY, SamplingConfig(0.1), [STOP], capacity=96, slack=LOCKSTEP.slack, windows=windows)


@pytest.fixture(scope="module")
def sampler():
    return cold()


def play(sampler: Sampler, params, config: RolloutConfig, pool: LocalPool):
    return Rollout(sampler, ByteChat(), pool, config)(params, TASKS, jax.random.key(7))


def test_the_same_tokens_and_logprobs_as_without_sharing(sampler, params, monkeypatch):
    shared, stats = play(sampler, params, LOCKSTEP, LocalPool(12))
    late, later = play(sampler, params, CONTINUOUS, LatePool(12, 0))
    with monkeypatch.context() as plain:
        plain.setattr(SlotGroup, "_plan_passes", lambda self, prompts, keep: [Pass(keep=dict(keep))])
        expected, before = play(sampler, params, LOCKSTEP, LocalPool(12))
    same(shared, expected)
    same(late, expected)
    prompts = [turn.observation_ids for t in expected for turn in t.turns]
    assert {stats.prompt_tokens, later.prompt_tokens, before.prompt_tokens} == {sum(map(len, prompts))}
    assert max(stats.prefill_tokens, later.prefill_tokens) < 0.9 * before.prefill_tokens < 0.9 * before.prompt_tokens
    assert stats.prefill_tokens < stats.padded_tokens < before.padded_tokens


def test_processes_copy_the_same_prefixes(sampler, params):
    config = replace(LOCKSTEP, num_slots=6, num_cohorts=2)
    [(expected, _, calls)] = play_processes(sampler, params, 1, config)
    assert "copy_prefix" in {name for name, *_ in calls}
    for trajectories, _, theirs in play_processes(sampler, params, 2, config):
        assert theirs == calls and episodes(trajectories) == episodes(expected)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (replace(LOCKSTEP, num_slots=6, num_cohorts=2), [32]),
        (CONTINUOUS, []),
        (replace(LOCKSTEP, context="compact"), [32]),
    ],
)
def test_nothing_compiles_after_warm_up(params, config, windows):
    sampler = cold(*windows)
    rollout = Rollout(sampler, ByteChat(), LocalPool(12), config)
    rollout.warm_up(params)
    programs = sampler.compilations
    rollout(params, TASKS, jax.random.key(0))
    count = compilations()
    for seed in (1, 2):
        rollout(params, list(reversed(TASKS)), jax.random.key(seed))
    assert (sampler.compilations, compilations()) == (programs, count)


def rows(cost):
    """A cost of computed tokens, each row padded to the longest."""
    return lambda lengths: cost + len(lengths) * max(lengths.values()) if lengths else 0


def one_family(slot: int) -> int:
    return 0


def test_equal_prompts_are_computed_once():
    prompts = {slot: list(range(40)) for slot in (0, 2, 5)}
    passes = plan_passes(prompts, {0: 10, 2: 10, 5: 10}, {}, one_family, rows(0))
    assert passes == [Pass(keep={0: 10}), Pass(source={2: 0, 5: 0}, keep={2: 40, 5: 40})]
    assert plan_passes(prompts, {0: 10, 2: 10, 5: 10}, {}, lambda slot: slot, rows(0)) == [
        Pass(keep={0: 10, 2: 10, 5: 10})
    ]


def test_parts_are_shared_where_that_is_cheaper():
    """Two prompts of 40 that differ in their last 8: 2 × 40 tokens in a pass, or 40 and 8 in two."""
    prompts, own = {0: [*range(40)], 1: [*range(32), *range(50, 58)]}, {0: 0, 1: 0}
    two = [Pass(keep={0: 0}), Pass(source={1: 0}, keep={1: 32})]
    assert plan_passes(prompts, own, {}, one_family, rows(31)) == two
    assert plan_passes(prompts, own, {}, one_family, rows(33)) == [Pass(keep=own)]


def test_a_prefix_that_another_slot_holds_is_copied():
    held = {0: [*range(20)], 1: [*range(40), 99], 2: [*range(30)]}
    prompts = {0: [*range(40)], 2: [*range(30), 7]}
    passes = plan_passes(prompts, {0: 20, 2: 30}, held, one_family, rows(0))
    assert passes == [Pass(source={0: 1}, keep={0: 39, 2: 30})]  # the last id is computed: it predicts the response


@st.composite
def rounds(draw):
    """Prompts of some slots, and what slots hold: words of a few long pieces, so that prefixes often coincide."""
    pieces = st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=4)
    ids = st.builds(lambda words, cut: [id for word in words for id in (word, *range(9))][: 10 * len(words) - cut],
                    pieces, st.integers(0, 9))  # fmt: skip
    held = draw(st.dictionaries(st.integers(0, 7), ids, min_size=1))
    prompts = {slot: draw(ids) for slot in held if draw(st.booleans())}
    return held, prompts, draw(st.sampled_from([0, 20, 1000]))


@given(rounds())
def test_passes_bring_every_slot_to_its_prompt(round_):
    """The passes are executed on lists of ids, in the order of the device: copies one after another, then prefills."""
    held, prompts, call_cost = round_
    own = {}
    for slot, prompt in prompts.items():
        own[slot] = min(common_prefix(np.array(prompt), np.array(held[slot])), len(prompt) - 1)
    family = lambda slot: slot % 2
    passes = plan_passes(prompts, own, held, family, rows(call_cost))
    contents, complete = dict(held), set()
    assert sorted(slot for p in passes for slot in p.keep) == sorted(prompts)
    for p in passes:
        for slot, source in sorted(p.source.items()):
            assert source not in p.source and family(source) == family(slot)
            assert p.keep[slot] < len(prompts[slot]) or (source in complete and prompts[source] == prompts[slot])
            assert p.keep[slot] > own[slot] or prompts[source] == prompts[slot]
            contents[slot] = contents[source]
        for slot, keep in p.keep.items():
            assert keep <= len(contents[slot]) and contents[slot][:keep] == prompts[slot][:keep]
            contents[slot] = prompts[slot]
            complete.add(slot)


def test_the_plan_never_computes_more_tokens_than_without_sharing():
    rng = np.random.default_rng(0)
    for _ in range(50):
        held = {slot: rng.integers(0, 2, 30).tolist() for slot in range(6)}
        prompts = {slot: [*held[int(rng.integers(6))][:20], *rng.integers(0, 2, 10).tolist()] for slot in range(6)}
        own = {s: min(common_prefix(np.array(p), np.array(held[s])), 29) for s, p in prompts.items()}
        for p in plan_passes(prompts, own, held, one_family, rows(5)):
            assert all(keep >= own[slot] for slot, keep in p.keep.items())
