"""One update of a small Qwen3 with random weights: forward, backward, AdamW, B rows of P prompt + G new tokens.

    python -m benchmarks.learner [B P G]

The counterpart of the peers' scripts in docs/benchmarks.md, with their model and the clipped policy loss at temperature
1 without a reference policy. Advantages and sampled logprobs are random. A step is one call of the jitted update until
the new state is available; two calls warm up, ten are timed. The last line is JSON.
"""

import json
import statistics
import sys
import time
from importlib.metadata import version

import jax
import numpy as np

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.envs.protocol import Task
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory, Turn

MODEL = ModelConfig(4096, 256, 768, 4, 8, 4, 32)


def measure(rows: int, prompt: int, new: int, calls: int = 10) -> dict[str, float]:
    """Returns best and median seconds of an update over `calls` warm calls."""
    policy, mesh, learner = Policy(MODEL), make_mesh(MeshConfig()), LearnerConfig(learning_rate=1e-6)
    state = init_state(policy, learner, mesh, jax.random.key(0))
    update = make_update(policy, learner, mesh)
    layout = BatchLayout(1, rows, prompt + new, rows, rows)
    rng = np.random.default_rng(0)
    batch = place(collate([_episode(n, prompt, new, rng) for n in range(rows)], layout), mesh)
    sampled = np.asarray(batch.response_ids) >= 0
    per_row = rng.standard_normal((*sampled.shape[:2], 1))
    advantages = jax.device_put(np.where(sampled, per_row, 0.0).astype(np.float32))
    seconds = []
    for _ in range(calls + 2):
        start = time.perf_counter()
        state, stats = update(state, batch, advantages)
        jax.block_until_ready((state, stats))
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(float(stats["loss"])) and float(stats["skipped"]) == 0
    return {"best": min(seconds[2:]), "median": statistics.median(seconds[2:])}


def _episode(member: int, prompt: int, new: int, rng: np.random.Generator) -> Trajectory:
    """One turn of random ids."""
    ids = rng.integers(3, MODEL.vocab_size, prompt + new).astype(np.int32)
    surprisal = np.full(new, np.log(MODEL.vocab_size), np.float32)
    turn = Turn(ids[:prompt], ids[prompt:], -surprisal, surprisal, 0.0, True)
    return Trajectory(Task("bench", "bench", {}), 0, member, (turn,), Ending.TERMINATED, False)


def main() -> None:
    """Measures one shape and prints it."""
    rows, prompt, new = (int(word) for word in (sys.argv[1:4] or (16, 64, 128)))
    line = {
        "system": "aem_jax",
        "device": jax.devices()[0].device_kind,
        "jax": version("jax"),
        "params": MODEL.num_parameters,
        "batch": rows,
        "prompt": prompt,
        "new_tokens": new,
        "train_step_s": measure(rows, prompt, new),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
