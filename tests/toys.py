"""A policy small enough to differentiate by hand, and random trajectories, for tests of batches and learning."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.envs.protocol import Task
from aem_jax.models.policy import VALUE_AXES, state_values
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.trajectory import Ending, Trajectory, Turn

TASK = Task("task-0", "look", {})
ONE_DEVICE = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@dataclass(frozen=True)
class Bigram:
    """logits(t) = tanh(embed[token before t]) @ head: no attention, so gradients can be written down."""

    vocab_size: int = 12
    width: int = 8
    value: bool = False

    frozen = ()

    @property
    def axes(self):
        axes = {"base": {"embed": ("vocab", "embed"), "head": ("embed", "vocab")}}
        return {**axes, "value": VALUE_AXES} if self.value else axes

    def init(self, key):
        first, second = jax.random.split(key)
        base = {
            "embed": jax.random.normal(first, (self.vocab_size, self.width)),
            "head": jax.random.normal(second, (self.width, self.vocab_size)),
        }
        value = {"w": jnp.zeros((self.width, 1)), "b": jnp.zeros(1)}
        return {"base": base, "value": value} if self.value else {"base": base}

    def experts(self, mesh):
        return None

    def hidden(
        self,
        params,
        tokens,
        positions,
        segment_ids,
        remat=None,
        constrain=None,
        attention=None,
        *,
        experts=None,
        recorded=None,
    ):
        return jnp.tanh(params["base"]["embed"][tokens]), None

    def head(self, params):
        return params["base"]["head"]

    def values(self, params, hidden):
        return state_values(params["value"], hidden)


def random_trajectory(rng, vocab_size, group=0, context="append", max_turns=3):
    """A trajectory of 1 to max_turns turns; sampled logprobs are made up, near those of a flat policy."""
    turns = []
    for _ in range(rng.integers(1, max_turns + 1)):
        sampled = int(rng.integers(1, 6))
        turns.append(
            Turn(
                observation_ids=rng.integers(0, vocab_size, rng.integers(1, 6)).astype(np.int32),
                response_ids=rng.integers(0, vocab_size, sampled).astype(np.int32),
                logprobs=(-np.log(vocab_size) + 0.3 * rng.standard_normal(sampled)).astype(np.float32),
                entropies=rng.uniform(0.5, 2.0, sampled).astype(np.float32),
                reward=float(rng.standard_normal()),
                valid_action=True,
            )
        )
    return Trajectory(TASK, group, 0, tuple(turns), Ending.TERMINATED, success=False, context=context)


def random_trajectories(seed, count, vocab_size, context="append"):
    rng = np.random.default_rng(seed)
    return [random_trajectory(rng, vocab_size, n // 2, context) for n in range(count)]
