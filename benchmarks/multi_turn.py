"""Training with three-turn episodes: rollout with real environment servers, credit with AEM, one update per step.

    python -m benchmarks.multi_turn [num_steps]         trains ten times as many steps

The counterpart of a peer's script in docs/benchmarks.md, with its sizes: 2 layers of width 64, 260 ids of which 18 end
a response, 2 prompts per step in groups of 4, 3 turns, responses of at most 96 tokens, an AdamW update after every
step. Beyond the peer's work, the environment runs in a separate process, and AEM scales the advantages. Episodes per
second are those of the second half of the steps. Both programs get the same argument, but this one trains ten times as
many steps: a step takes a fraction of a second, and fewer steps would be too short to time. The last line is JSON.
"""

import sys
import time

import jax
import numpy as np

from aem_jax.advantage import grpo, of_returns, over_trajectories
from aem_jax.batch import BatchLayout
from aem_jax.bench.chat import ByteChat
from aem_jax.credit import AemConfig, Credit, make_credit
from aem_jax.envs.protocol import Task
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.learner import LearnerConfig, TrainState, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.rollout import Rollout, RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.selection import Rule, StepEpisodes
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.train import Metrics, train
from benchmarks.peers import print_measurement

MODEL = ModelConfig(260, 64, 128, 2, 4, 2, 16, rope_theta=10_000.0)
TURNS, GROUP, PROMPTS, STOPS = 3, 4, 2, 18
ROLLOUT = RolloutConfig(
    groups_per_step=PROMPTS,
    group_size=GROUP,
    num_slots=PROMPTS * GROUP,
    max_turns=TURNS,
    response_tokens=96,
    context_tokens=256 + 96,
    prompt_tokens=256,
    decode_chunk=16,
    extend_buckets=(32,),
    windows=(128,),
)
EPISODES = PROMPTS * GROUP
LAYOUT = BatchLayout(
    num_microbatches=EPISODES // 2,
    rows=2,
    row_length=ROLLOUT.context_tokens,
    max_responses=EPISODES * TURNS,
    max_trajectories=EPISODES,
)
# Lengths as in the peer's texts: a first observation of five letters ("hello"), then three letters ("obs").
WORLD = {"min_turns": TURNS, "max_turns": TURNS, "prompt_chars": 5, "observation_chars": 3}


def _tasks(step: int, round: int) -> list[Task]:
    return [Task(str(seed), "scripted", {"seed": seed}) for seed in range(PROMPTS)]


def measure(num_steps: int) -> dict[str, float]:
    """Trains and returns the speed.

    Args:
        num_steps: training steps; the first half is warm-up.

    Raises:
        ValueError: fewer than two steps.
    """
    if num_steps < 2:
        raise ValueError(f"expected at least 2 steps, got {num_steps}")
    policy, mesh, learner = Policy(MODEL), make_mesh(MeshConfig()), LearnerConfig(learning_rate=1e-4)
    chat = ByteChat(MODEL.vocab_size, MODEL.vocab_size / STOPS)
    sampler = Sampler(
        policy,
        SamplingConfig(),
        chat.stop_ids,
        capacity=ROLLOUT.context_tokens,
        slack=ROLLOUT.slack,
        windows=ROLLOUT.windows,
        mesh=mesh,
    )
    marks: list[float] = []
    history: list[Metrics] = []

    def on_step(state: TrainState, step: int, metrics: Metrics, episodes: StepEpisodes, credit: Credit) -> None:
        marks.append(time.perf_counter())
        history.append(metrics)

    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=ROLLOUT.num_slots), ("scripted", WORLD)) as pool:
        rollout = Rollout(sampler, chat, pool, ROLLOUT)
        state = init_state(policy, learner, mesh, jax.random.key(0))
        reshard, update = make_reshard(policy, mesh), make_update(policy, learner, mesh)
        start = time.perf_counter()
        train(
            state,
            rollout=rollout,
            tasks=_tasks,
            rule=Rule(PROMPTS),
            layout=LAYOUT,
            mesh=mesh,
            reshard=reshard,
            credit=make_credit(of_returns(over_trajectories, grpo), AemConfig(), PROMPTS, mesh),
            update=update,
            key=jax.random.key(1),
            seed=0,
            num_steps=num_steps,
            on_step=on_step,
        )
        total = time.perf_counter() - start
    half = num_steps // 2
    warm = history[half:]
    mean = lambda name: float(np.mean([metrics[name] for metrics in warm]))
    return {
        "wall_s": round(total, 2),
        "warm_episodes_per_s": round(len(warm) * EPISODES / (marks[-1] - marks[half - 1]), 3),
        "warm_step_s": round(mean("time/step"), 4),
        "warm_rollout_s": round(mean("time/rollout"), 4),
        "warm_update_s": round(mean("time/update"), 4),
        "response_tokens": round(mean("rollout/response_tokens"), 2),
        "turns": mean("rollout/turns"),
        "recompiles": sum(metrics["compile/recompiles"] for metrics in warm),
    }


def main() -> None:
    """Measures and prints the result."""
    num_steps = 10 * int((sys.argv[1:] or [6])[0])
    print_measurement(MODEL.num_parameters, episodes=num_steps * EPISODES, **measure(num_steps))


if __name__ == "__main__":
    main()
