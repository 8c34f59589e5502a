"""Small training steps: equal results on all devices, no recompilation, and recovery from a killed server."""

import logging
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from aem_jax.compilations import compilations
from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.episodes import SLOTS, fits, make_sampler, packed, play, random_params, server_settings
from aem_jax.doctor.finding import Finding, first_line, judge
from aem_jax.doctor.parity import full_precision, one_device
from aem_jax.envs.protocol import EnvError, StepResult
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.learner import LearnerConfig, init_state, make_update
from aem_jax.models import ModelConfig, Policy
from aem_jax.rollout.sessions import Pool
from aem_jax.sampler import SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory

LEARNER = LearnerConfig(learning_rate=1e-3, adam_eps=1e-3, attention="xla")
"""adam_eps is large, because Adam divides by the gradient's size, which amplifies the rounding of tiny gradients."""
SAME = 1e-4
"""Largest relative gap of loss and gradient norm, and absolute gap of a parameter, between meshes."""
STATE_BYTES = 24
"""Bytes of a float32 parameter during learning on one device: master, both moments, gradient, the sampler's weights."""
STEPS_BEFORE_THE_KILL = 20

MESH_ADVICE = (
    "devices disagree on one step: train on one (CUDA_VISIBLE_DEVICES=0) until it passes. Test the links (nccl-tests; "
    "NCCL_P2P_DISABLE=1 leaves one kind out), unset XLA_FLAGS, take the versions of constraints.txt"
)
COMPILE_ADVICE = (
    "a program compiles in every step, which costs seconds to minutes each time: JAX_LOG_COMPILES=1 names it; take the "
    "versions of constraints.txt"
)
SERVER_ADVICE = (
    "environment servers are processes on 127.0.0.1: see the errors above, and allow new processes (ulimit -u), open "
    "files (ulimit -n 4096) and connections to 127.0.0.1 (no_proxy=127.0.0.1)"
)


class Stepped(NamedTuple):
    """Results of a training step; parameters are on the host."""

    trajectories: list[Trajectory]
    stats: Mapping[str, float]
    params: Any


class Trainer:
    """A policy in training on a mesh: `step` plays episodes and learns from them.

    Args:
        model: sizes of the policy.
        mesh: devices of the policy.
        slots: number of episodes in a step.
        rows: rows of a microbatch.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, slots: int, rows: int = 8) -> None:
        self._policy, self._mesh, self._slots, self._rows = Policy(model), mesh, slots, rows
        self._sampler = make_sampler(self._policy, SamplingConfig(), slots, mesh)
        self._reshard = make_reshard(self._policy, mesh)
        self._update = make_update(self._policy, LEARNER, mesh)
        copied = jax.tree.map(lambda leaf: leaf + 0, random_params(self._policy, mesh))  # the state's are donated
        self.state = init_state(self._policy, LEARNER, mesh, jax.random.key(0), copied)

    def play(self, seed: int, pool: Pool | None = None) -> tuple[list[Trajectory], Any]:
        """Trajectories and statistics of a rollout."""
        return play(self._sampler, self._reshard(self.state.params), self._slots, seed=seed, pool=pool)

    def step(self, seed: int) -> Stepped:
        """One training step; the advantage is 1 for responses of even length, and −1 for all others."""
        trajectories, _ = self.play(seed)
        batch = packed(trajectories, self._slots, self._mesh, self._rows)
        ids = np.asarray(batch.response_ids)
        sign = np.where(np.asarray(batch.response_tokens) % 2, -1.0, 1.0).astype(np.float32)
        self.state, stats = self._update(self.state, batch, np.where(ids >= 0, sign[np.maximum(ids, 0)], 0.0))
        params = jax.tree.map(np.asarray, self.state.params)
        return Stepped(trajectories, {name: float(value) for name, value in stats.items()}, params)


def mesh(config: DoctorConfig) -> Finding:
    """One step on the first device and on all of them."""
    count = jax.device_count()
    if count == 1:
        simulated = "; --runtime.cpu-devices 4 tries it on simulated ones" if jax.default_backend() == "cpu" else ""
        return Finding(None, f"one device{simulated}")
    model = config.shallow("float32")
    if not fits(model, STATE_BYTES):
        model = _tiny_model()
    all_devices = every_device(model)
    slots = 4 * math.lcm(2, count)
    with full_precision():
        one, other = (Trainer(model, mesh, slots, rows=slots).step(0) for mesh in (one_device(), all_devices))
    axes = " x ".join(f"{axis} {size}" for axis, size in all_devices.shape.items())
    return compare(one, other, f"a step on 1 and on {count} devices ({axes})")


def compare(one: Stepped, other: Stepped, what: str) -> Finding:
    """Whether two steps from the same parameters and tasks are the same: tokens, loss, gradient, new parameters."""
    tokens, others = _tokens(one.trajectories), _tokens(other.trajectories)
    differ = sum(pair[0] != pair[1] for pair in zip(tokens, others)) + abs(len(tokens) - len(others))
    facts: dict[str, Any] = {"tokens": len(tokens), "differ": differ}
    for name in ("loss", "grad_norm"):
        facts[name] = abs(one.stats[name] - other.stats[name]) / max(abs(one.stats[name]), 1e-3)
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    facts["parameters"] = float(np.max([np.max(np.abs(left - right)) for left, right in pairs]))
    faults = [f"{differ} of {len(tokens)} sampled tokens differ"] if differ else []
    different = [name for name in ("loss", "grad_norm", "parameters") if not facts[name] <= SAME]
    faults += [f"{name} differs by {facts[name]:.1e}" for name in different]
    text = f"{what}: {len(tokens)} tokens, parameters at most {facts['parameters']:.1e} apart"
    return judge(faults, text, MESH_ADVICE, facts)


def every_device(model: ModelConfig) -> Mesh:
    """All devices, over as many axes as their number and the model's sizes allow."""
    count = jax.device_count()
    divides = all(size % 2 == 0 for size in (count, model.num_kv_heads, model.intermediate_size, model.vocab_size))
    tensor = 2 if divides else 1
    fsdp = math.gcd(count // tensor, model.hidden_size)
    data = count // tensor // fsdp
    if data == 1 and fsdp % 2 == 0 and fsdp > 2:
        data, fsdp = 2, fsdp // 2
    return make_mesh(MeshConfig(data, fsdp, tensor))


def recompiles(config: DoctorConfig) -> Finding:
    """Programs compiled in the second and third of three steps."""
    # In bfloat16 a GPU runs its own attentions. Elsewhere the sampler is that of other checks.
    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    trainer = _tiny(dtype)
    counts = []
    for seed in range(3):
        before = compilations()
        with full_precision():
            trainer.step(seed)
        counts.append(compilations() - before)
    later = sum(counts[1:])
    faults = ["expected none"] if later else []
    facts = {"first_step": counts[0], "later_steps": later}
    text = f"{later} programs compiled in the second and third of three training steps"
    return judge(faults, text, COMPILE_ADVICE, facts)


def servers(config: DoctorConfig) -> Finding:
    """Two environment servers with 32 sessions; one is killed while they play."""
    start = time.perf_counter()
    settings = PoolConfig(num_servers=2, sessions_per_server=SLOTS // 2, start_deadline_s=30.0, first_pause_s=0.05)
    try:
        opened = EnvPool(settings, server_settings())
    except EnvError as error:
        return Finding(False, first_line(error), SERVER_ADVICE)
    started = time.perf_counter() - start
    with _quiet("aem_jax"), full_precision(), opened as pool:
        trainer = _tiny()
        calm, _ = trainer.play(0, pool)
        killing = KilledOnce(pool, STEPS_BEFORE_THE_KILL)
        disturbed, stats = trainer.play(0, killing)
        restarts, errors = sum(pool.stats().restarts), pool.stats().errors
    lost = SLOTS - sum(one.ending is not Ending.ENV_ERROR for one in disturbed)
    differ = sum(_tokens([one]) != _tokens([other]) for one, other in zip(calm, disturbed))
    facts = {"start_s": started, "restarts": restarts, "retries": stats.retries, "lost": lost, "errors": list(errors)}
    faults = []
    if not killing.killed:
        faults.append("no server could be killed")
    elif not restarts:
        faults.append("the killed server did not come back")
    elif not stats.retries:
        faults.append("no episode was retried")
    if lost:
        faults.append(f"{lost} of {SLOTS} episodes lost, the last error: {errors[-1] if errors else 'none'}")
    if differ > lost:
        faults.append(f"{differ - lost} episodes differ from those of the undisturbed round")
    after = f"{stats.retries} episodes retried, {lost} lost"
    text = f"2 servers up in {started:.1f} s, {SLOTS} sessions; one killed: {after}"
    return judge(faults, text, SERVER_ADVICE, facts)


class KilledOnce:
    """A pool that kills one of its servers at a step.

    Args:
        pool: the pool.
        at: number of the step, from 1.
    """

    def __init__(self, pool: EnvPool, at: int) -> None:
        self._pool, self._at, self._steps = pool, at, 0
        self.capacity, self.server_of, self.reset = pool.capacity, pool.server_of, pool.reset
        self.killed = False

    def step(self, session: int, text: str) -> Future[StepResult]:
        """See `EnvPool.step`."""
        self._steps += 1
        if self._steps == self._at:
            os.kill(self._pool.server_pids[0], signal.SIGKILL)
            self.killed = True
        return self._pool.step(session, text)


def _tiny(dtype: str = "float32") -> Trainer:
    # These checks do not depend on the model's widths. Full precision: with `--model tiny` the sampler is that of
    # parity-float32.
    return Trainer(_tiny_model(dtype), one_device(), SLOTS)


def _tiny_model(dtype: str = "float32") -> ModelConfig:
    return DoctorConfig(model="tiny").shallow(dtype)


def _tokens(trajectories: Sequence[Trajectory]) -> list[int]:
    return [int(token) for trajectory in trajectories for turn in trajectory.turns for token in turn.response_ids]


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hides the messages of a logger: the failure is deliberate."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
