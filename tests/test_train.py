"""The loop learns (a trivial environment, a fixed seed, one threshold), and its metrics match their definitions."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aem_jax.advantage import gae, grpo, of_returns, over_trajectories, value_returns
from aem_jax.batch import BatchLayout
from aem_jax.credit import AemConfig, Credit, make_credit
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.learner import LearnerConfig, init_state, make_response_values, make_update
from aem_jax.rollout import Carried, Rollout, RolloutConfig, RolloutStats
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.selection import Rule
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.train import rollout_metrics, train, transcripts
from aem_jax.trajectory import Ending, Trajectory, Turn

from .rollout.fakes import POLICY, STOP, ByteChat, LocalPool

ROLLOUT = RolloutConfig(
    groups_per_step=4, group_size=8, num_slots=32, max_turns=2, response_tokens=3, context_tokens=32, prompt_tokens=8,
    decode_chunk=3, extend_buckets=(8,), windows=(),
)  # fmt: skip
LAYOUT = BatchLayout(num_microbatches=5, rows=8, row_length=64, max_responses=64, max_trajectories=32)


class VowelEnv:
    """Two turns, unless the task says otherwise. Each earns half a point if the response begins with a vowel; the
    episode is won with two points."""

    def reset(self, task):
        self.score = self.turns = 0
        self.limit = task.get("turns", 2)
        return StepResult(task["word"], info={"won": False, "valid_action": True})

    def step(self, text: str) -> StepResult:
        good = text[:1] in set("aeiou") and bool(text)
        self.turns += 1
        self.score += good
        info = {"won": self.score == 2, "valid_action": True}
        return StepResult("ok" if good else "no", 0.5 * good, self.turns == self.limit, False, info)

    def close(self) -> None:
        pass


def tasks(step: int, round: int) -> list[Task]:
    return [Task(word, "vowel", {"word": word}) for word in ("ab", "cd", "ef", "gh")]


ALL_GROUPS = Rule(4)


def run(
    steps: int,
    strength: float,
    mesh=None,
    *,
    rule=ALL_GROUPS,
    tasks=tasks,
    first=None,
    trained: Any = POLICY,
    settings: RolloutConfig = ROLLOUT,
    importance_cap: float = 0.0,
    carried: list[Carried] | None = None,
    prepare=None,
):
    """Trains to `steps`, from the state `first` or from scratch; with a value head this is PPO.

    With carry-over, `carried` ends with the groups under way at the start, and gets those after each step.
    """
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    config = LearnerConfig(learning_rate=3e-3, value_learning_rate=0.1, importance_cap=importance_cap)
    capacity = settings.context_tokens
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=capacity, slack=ROLLOUT.slack, mesh=mesh)
    max_age = None if carried is None else settings.carry_max_age
    update, valued = make_update(trained, config, mesh, max_age), trained.value
    estimate, reshard = gae if valued else of_returns(over_trajectories, grpo), make_reshard(trained, mesh)
    history, shown = [], []

    def on_step(state, step, metrics, episodes, credit):
        history.append({name: float(value) for name, value in metrics.items()})
        shown[:] = transcripts(episodes.trajectories, credit, step)
        if carried is not None:
            carried.append(episodes.carried)

    rollout = Rollout(sampler, ByteChat(), LocalPool(32, VowelEnv), settings)
    state = train(
        first or init_state(trained, config, mesh, jax.random.key(0)),
        rollout=rollout,
        tasks=tasks,
        rule=rule,
        layout=LAYOUT,
        mesh=mesh,
        reshard=reshard,
        credit=make_credit(estimate, AemConfig(strength), 4, mesh, value_returns if valued else None),
        update=update,
        values=make_response_values(trained, config, mesh) if valued else None,
        key=jax.random.key(1),
        seed=0,
        num_steps=steps,
        carried=carried[-1] if carried else None,
        prepare=prepare,
        on_step=on_step,
    )
    return state, history, shown


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_training_raises_the_return(strength):
    state, history, shown = run(40, strength)
    start, end = (np.mean([h["rollout/return"] for h in part]) for part in (history[:3], history[-3:]))
    assert start < 0.5 and end > 0.9, (start, end)
    assert max(h["parity/max"] for h in history) <= 1e-4
    assert sum(h["compile/recompiles"] for h in history) == 0
    assert int(state.step) == 40
    alphas = [turn["alpha"] for episode in shown for turn in episode["turns"]]
    assert (len(set(alphas)) > 1) <= (strength > 0)
    assert all(
        set(turn) >= {"observation", "response", "entropy", "alpha", "advantage"} for e in shown for turn in e["turns"]
    )


def test_a_run_is_a_function_of_its_seed():
    told: list[str] = []
    turned = lambda step, round: tasks(step, round)[step:] + tasks(step, round)[:step]
    _, first, _ = run(3, 1.0, tasks=turned, prepare=lambda upcoming: told.append(upcoming[0].id))
    _, second, _ = run(3, 1.0, tasks=turned)
    assert told == ["ab", "cd", "ef"]  # before the first step, and each step the next one's
    assert list(map(timeless, first)) == list(map(timeless, second))


def timeless(metrics: dict) -> dict:
    return {k: v for k, v in metrics.items() if not k.startswith(("time/", "throughput/", "compile/"))}


@pytest.mark.slow
def test_a_value_head_learns_returns_and_a_resumed_run_gives_the_same_numbers():
    trained = dataclasses.replace(POLICY, value=True)
    _, unbroken, _ = run(16, 1.0, trained=trained)
    explained = [h["value/explained_variance"] for h in unbroken]
    assert explained[0] == 0.0 == unbroken[0]["value/mean"]  # a new head predicts 0 everywhere
    assert np.mean(explained[-4:]) > 0.15
    assert max(abs(h["value/mean"] - h["value/return"]) for h in unbroken[-4:]) < 0.2  # of a return of up to 1
    assert np.mean([h["rollout/return"] for h in unbroken[-3:]]) > 0.8
    assert sum(h["compile/recompiles"] for h in unbroken) == 0
    state, broken, _ = run(6, 1.0, trained=trained)
    _, rest, _ = run(8, 1.0, trained=trained, first=state)
    assert list(map(timeless, unbroken[:8])) == list(map(timeless, broken + rest))


def test_rounds_are_played_until_enough_groups_differ_also_in_a_resumed_run():
    # 1 in 25 episodes is won at first, so some step needs more than one round; step 2 has nothing to learn from
    rule = Rule(2, max_rounds=3, outcome=lambda t: t.task.task_type == "vowel" and t.success)
    requested = []

    def tasks_of(step: int, round: int) -> list[Task]:
        requested.append((step, round))
        return [dataclasses.replace(task, task_type="none") if step == 2 else task for task in tasks(step, round)]

    state, first_steps, _ = run(2, 1.0, rule=rule, tasks=tasks_of)
    _, rest, _ = run(4, 1.0, rule=rule, tasks=tasks_of, first=state)
    counts = [int(h["selection/rounds"]) for h in first_steps + rest]
    assert requested == [(step, round) for step, count in enumerate(counts) for round in range(count)]
    assert max(counts[:2]) > 1 and counts[2] == 3
    for h in first_steps + rest:
        groups, filtered, surplus = (h[f"selection/{name}"] for name in ("groups", "filtered_groups", "surplus_groups"))
        assert groups + filtered + surplus == 4 * h["selection/rounds"]
        assert groups == 2 or h["selection/rounds"] == 3
        assert h["learner/skipped"] == (groups == 0)
        assert np.isfinite(h["rollout/success"])  # over all played episodes, selected or not
    assert rest[0]["selection/groups"] == 0
    _, unbroken, _ = run(4, 1.0, rule=rule, tasks=tasks_of)
    same = lambda a, b: a == b or (np.isnan(a) and np.isnan(b))
    for a, b in zip(map(timeless, unbroken), map(timeless, first_steps + rest), strict=True):
        assert a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    assert sum(h["compile/recompiles"] for h in unbroken) == 0


def uneven(step: int, round: int) -> list[Task]:
    """Tasks of one, three, two and one turns, in an order that changes with the step."""
    turns = np.roll([1, 3, 2, 1], step).tolist()
    words = ("ab", "cd", "ef", "gh")
    return [Task(word, "vowel", {"word": word, "turns": n}) for word, n in zip(words, turns, strict=True)]


UNEVEN = dataclasses.replace(ROLLOUT, max_turns=3, context_tokens=48, carry_min_groups=2, carry_max_age=2)


def test_where_all_groups_are_waited_for_carry_over_changes_no_number():
    """But for rounding: an update that measures ages is another program."""
    settings, groups = dataclasses.replace(UNEVEN, carry_min_groups=4), [Carried()]
    _, plain, _ = run(2, 1.0, tasks=uneven, settings=settings, importance_cap=2.0)
    _, waited, _ = run(2, 1.0, tasks=uneven, settings=settings, importance_cap=2.0, carried=groups)
    assert [len(carried.groups) for carried in groups] == [0] * 3
    for one, other in zip(map(timeless, plain), map(timeless, waited), strict=True):
        assert {name: other[name] for name in one} == pytest.approx(one, rel=1e-5, abs=2e-6)
        assert other["carry/share_age_0"] == 1 and other["carry/groups"] == other["carry/age_max"] == 0


def test_carried_groups_are_learnt_from_and_parity_is_that_of_new_tokens():
    groups = [Carried()]
    _, history, _ = run(6, 1.0, tasks=uneven, settings=UNEVEN, importance_cap=2.0, carried=groups)
    gap = lambda name: np.nanmax([h[name] for h in history])
    assert gap("parity/max") <= 1e-4 < 1e-3 < gap("parity/age_1_max")
    assert sum(h["compile/recompiles"] for h in history) == 0
    assert max(h["carry/age_max"] for h in history) in (1, 2) and max(h["carry/groups"] for h in history) == 2
    for h, carried in zip(history, groups[1:], strict=True):
        assert sum(h[f"carry/share_age_{age}"] for age in range(3)) == pytest.approx(1)
        assert h["selection/groups"] == 4 - h["carry/groups"] == 4 - len(carried.groups) >= 2


@pytest.mark.slow
def test_one_mesh_of_eight_devices_gives_the_same_losses():
    _, one, _ = run(2, 1.0)
    _, eight, _ = run(2, 1.0, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    for a, b in zip(one, eight, strict=True):
        for name in ("learner/loss", "learner/grad_norm", "entropy/response", "aem/alpha_max", "rollout/return"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


def test_rollout_metrics_leave_out_broken_episodes():
    def episode(ending, success, task_type, reward, score=0.0):
        turn = Turn(np.array([5]), np.array([6, 1]), np.zeros(2), np.zeros(2), reward, True)
        return Trajectory(Task("t", task_type, {}), 0, 0, (turn,), ending, success, score=score)

    trajectories = [
        episode(Ending.TERMINATED, True, "a", 1.0, 1.0),
        episode(Ending.TRUNCATED, False, "b", 0.0, 0.25),
        episode(Ending.ENV_ERROR, False, "b", 0.0),
    ]
    metrics = rollout_metrics(trajectories, RolloutStats(env_errors=1))
    assert metrics["rollout/success"] == metrics["rollout/return"] == metrics["rollout/truncated"] == 0.5
    assert (metrics["rollout/success/a"], metrics["rollout/success/b"]) == (1.0, 0.0)
    assert metrics["rollout/score"] == 0.625
    assert (metrics["rollout/mixed_groups"], metrics["rollout/env_errors"]) == (1.0, 1)
    assert np.isnan(rollout_metrics([], RolloutStats())["rollout/success"])  # no episode is no failure


def test_transcripts_of_episodes_out_of_the_loss_show_the_sampled_entropies():
    turn = Turn(np.array([5]), np.array([6, 1]), np.zeros(2), np.array([0.5, 1.0]), 1.0, True)
    silent = Turn(np.array([5]), np.zeros(0, int), np.zeros(0), np.zeros(0), 0.0, False)
    episode = Trajectory(Task("t", "a", {}), 0, 0, (turn, silent), Ending.TRUNCATED, False, in_loss=False)
    tokens, nothing = jnp.zeros((1, 1, 4)), jnp.full(2, jnp.nan)
    credit = Credit(tokens, base=jnp.array([-1.0, 0.0]), coefficients=jnp.ones(2), entropies=nothing)
    (shown,) = transcripts([episode], credit, step=3)
    assert [entry["entropy"] for entry in shown["turns"]] == [0.75, None]
    assert [entry["advantage"] for entry in shown["turns"]] == [-1.0, 0.0]
    json.dumps(shown, allow_nan=False)
