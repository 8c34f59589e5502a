"""Two training steps on all available devices, in one process or as one of several.

As a script: `two_steps.py INDEX COUNT COORDINATOR OUT` is one process of such a run and writes its results.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from aem_jax.advantage import grpo, of_returns, over_trajectories
from aem_jax.batch import BatchLayout
from aem_jax.credit import AemConfig, make_credit
from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.rollout import Rollout, RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.selection import Rule, succeeded
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.train import train

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from rollout.fakes import STOP, VOCAB, ByteChat, LocalPool  # noqa: E402

POLICY = Policy(ModelConfig(VOCAB, 16, 32, 1, 2, 2, 8, rope_theta=10_000.0))
ROLLOUT = RolloutConfig(
    groups_per_step=4, group_size=4, num_slots=8, max_turns=2, response_tokens=3, context_tokens=32, prompt_tokens=8,
    decode_chunk=3, extend_buckets=(8,), windows=(),
)  # fmt: skip
LAYOUT = BatchLayout(num_microbatches=3, rows=8, row_length=32, max_responses=32, max_trajectories=16)


class VowelEnv:
    """Two turns; each earns half a point when the response begins with a vowel."""

    def reset(self, task):
        self.turns = 0
        return StepResult(task["word"], info={"won": False, "valid_action": True})

    def step(self, text: str) -> StepResult:
        good = text[:1] in set("aeiou") and bool(text)
        self.turns += 1
        return StepResult("ok" if good else "no", 0.5 * good, self.turns == 2, False, {"won": good})

    def close(self) -> None:
        pass


def two_steps(
    mesh: Mesh, processes: ProcessGroup = SINGLE_PROCESS, broken: Callable = lambda *_: False
) -> dict[str, Any]:
    """The metrics and the trajectories of two steps. Episodes outnumber slots, so that these are refilled; steps play
    a second round when some group's endings are all won or all lost."""
    config = LearnerConfig(learning_rate=3e-3)
    sampler = Sampler(POLICY, SamplingConfig(), [STOP], capacity=32, slack=ROLLOUT.slack, mesh=mesh)
    pool = LocalPool(ROLLOUT.num_slots // processes.count, VowelEnv, broken)
    history, episodes = [], []

    def on_step(state, step, metrics, played, credit):
        history.append({name: float(value) for name, value in metrics.items()})
        for t in played.trajectories:
            turns = [[turn.observation, turn.response, turn.response_ids.tolist(), turn.reward] for turn in t.turns]
            episodes.append([t.task.id, t.group, t.member, t.ending.value, turns])

    rollout = Rollout(sampler, ByteChat(), pool, ROLLOUT, processes)
    tasks = [Task(word, "vowel", {"word": word}) for word in ("ab", "cd", "ef", "gh")]
    train(
        init_state(POLICY, config, mesh, jax.random.key(0)),
        rollout=rollout,
        tasks=lambda step, round: tasks,
        rule=Rule(len(tasks), max_rounds=2, outcome=succeeded),
        layout=LAYOUT,
        mesh=mesh,
        reshard=make_reshard(POLICY, mesh),
        credit=make_credit(of_returns(over_trajectories, grpo), AemConfig(), 4, mesh),
        update=make_update(POLICY, config, mesh),
        key=jax.random.key(1),
        seed=0,
        num_steps=2,
        on_step=on_step,
    )
    return {"history": history, "episodes": episodes}


def main(index: int, count: int, coordinator: str, out: Path) -> None:
    """One process of a run."""
    from aem_jax.distributed.config import RuntimeConfig
    from aem_jax.distributed.join import open_process_group
    from aem_jax.distributed.runtime import set_up

    runtime = RuntimeConfig(
        platform="cpu", cpu_devices=8 // count, coordinator=coordinator, num_processes=count, process_id=index
    )
    set_up(runtime)
    with open_process_group(runtime) as processes:
        # process 1's calls 4 and 9 fail: the lost episodes start again, and nothing else changes
        split = two_steps(make_mesh(MeshConfig()), processes, lambda _, call: index == 1 and call in (4, 9))
        # heads on a tensor axis that spans both processes
        mixed = np.reshape(jax.devices(), (count, -1)).T.ravel().tolist()
        across = two_steps(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), mixed), processes)
    out.write_text(json.dumps({"split": split, "across": across}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
