"""Small scripted episodes, played by the rollout of training. Most checks use them."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import cache, partial
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.batch import Batch, BatchLayout, collate, place
from aem_jax.bench.chat import ByteChat
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.envs.testing.scripted import ScriptedConfig, ScriptedEnv
from aem_jax.models import ModelConfig, Params, Policy
from aem_jax.rollout import Rollout, RolloutConfig, RolloutStats
from aem_jax.rollout.sessions import Pool
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import TRAIN, shardings
from aem_jax.trajectory import Trajectory

SLOTS = 32
"""Episodes of a round; equal in all checks, so that they share the sampler's programs."""
SCRIPT = ScriptedConfig(min_turns=2, max_turns=4, prompt_chars=40, observation_chars=12)
ROW = 384
"""Maximum tokens of an episode, and tokens of a learner row: a multiple of the length that every attention kernel
requires."""
RESPONSE_MEAN = 12.0


def fits(model: ModelConfig, width: float, devices: int = 1) -> bool:
    """Whether `width` bytes per parameter leave a fifth of a device's memory free, as far as its size is known."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)
    return width * model.num_parameters / devices < 0.8 * limit


def rollout_config(slots: int) -> RolloutConfig:
    """One episode per slot, in groups of four."""
    return RolloutConfig(
        groups_per_step=slots // 4,
        group_size=4,
        num_slots=slots,
        max_turns=SCRIPT.max_turns,
        response_tokens=24,
        context_tokens=ROW,
        prompt_tokens=96,
        decode_chunk=24,
        extend_buckets=(48,),
        windows=(),
    )


class InProcess:
    """Sessions of the scripted environment in this process; numerical checks need no servers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._sessions = [ScriptedEnv(SCRIPT) for _ in range(capacity)]

    def server_of(self, session: int) -> int:
        """Each session is its own server."""
        return session

    def reset(self, session: int, payload: Mapping[str, Any]) -> Future[StepResult]:
        """Starts an episode."""
        return self._answer(partial(self._sessions[session].reset, payload))

    def step(self, session: int, text: str) -> Future[StepResult]:
        """Sends a response to the environment."""
        return self._answer(partial(self._sessions[session].step, text))

    def _answer(self, call: Callable[[], StepResult]) -> Future[StepResult]:
        future: Future[StepResult] = Future()
        future.set_result(call())
        return future


def chat_of(model: ModelConfig) -> ByteChat:
    """A chat whose stop ids end a random policy's responses after about a dozen tokens."""
    return ByteChat(model.vocab_size, RESPONSE_MEAN)


@cache
def make_sampler(policy: Policy, sampling: SamplingConfig, slots: int, mesh: Mesh) -> Sampler:
    """A sampler for `rollout_config(slots)`; cached, so that checks share its programs."""
    config = rollout_config(slots)
    stops = chat_of(policy.config).stop_ids
    return Sampler(policy, sampling, stops, capacity=config.context_tokens, slack=config.slack, mesh=mesh)


def play(
    sampler: Sampler, params: Params, slots: int, *, seed: int = 0, pool: Pool | None = None
) -> tuple[list[Trajectory], RolloutStats]:
    """Plays one episode per slot.

    Args:
        sampler: from `make_sampler`.
        params: in the sampler's layout.
        slots: number of episodes.
        seed: seed of tasks and tokens.
        pool: pool of the environments; by default they run in this process.
    """
    config = rollout_config(slots)
    rollout = Rollout(sampler, chat_of(sampler.policy.config), pool or InProcess(slots), config)
    return rollout(params, tasks(config, seed), jax.random.key(seed))


def tasks(config: RolloutConfig, seed: int) -> Sequence[Task]:
    """The tasks of a step, in the scripted environment."""
    numbers = random.Random(seed).sample(range(10**6), config.groups_per_step)
    return [Task(str(number), "scripted", {"seed": number}) for number in numbers]


def server_settings() -> tuple[str, Mapping[str, Any]]:
    """The same environment, as settings for servers."""
    return "scripted", asdict(SCRIPT)


def packed(trajectories: Sequence[Trajectory], slots: int, mesh: Mesh, rows: int = 8) -> Batch:
    """Packs the episodes into a batch on the mesh, several episodes to a row."""
    layout = BatchLayout(
        num_microbatches=-(-slots // rows),
        rows=rows,
        row_length=ROW,
        max_responses=slots * SCRIPT.max_turns,
        max_trajectories=slots,
    )
    return place(collate(trajectories, layout), mesh)


@cache
def random_params(policy: Policy, mesh: Mesh, seed: int = 0) -> Params:
    """Random float32 values of the trained parameters, in the learner's layout. They are shared: never donate them.

    As in a trained model, norms differ from 1, and biases and the second half of an adapter differ from 0. An error
    that omits one of them therefore becomes visible.
    """

    def init(key: jax.Array) -> Params:
        def leaf(path: Any, value: jax.Array) -> jax.Array:
            name = path[-1].key
            if not name.endswith(("norm", "bias")) and name != "b":
                return value
            noise = jax.random.normal(jax.random.fold_in(key, sum(name.encode())), value.shape)
            return value + (0.05 if name == "b" else 0.2) * noise

        return jax.tree_util.tree_map_with_path(leaf, policy.init(key))

    key = jax.random.key(seed, impl="rbg")  # compiles three times faster than the default
    return jax.jit(init, out_shardings=shardings(mesh, policy.axes, TRAIN))(key)
