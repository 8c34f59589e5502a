"""Gradients of sums over a batch's sampled tokens, as vectors in the optimizer's geometry.

An update needs one gradient, and never its inner products. Analyses compare gradients: of several credit rules, in
several rollout groups. The inner product of two vectors here is ⟨x, y⟩ = Σ_i x_i y_i p_i, with p the preconditioner.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from aem_jax.batch import Batch
from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.objective import EntropyObjective, Objective, Stats, Tokens
from aem_jax.learner.state import TrainablePolicy
from aem_jax.learner.update import Inputs, make_program, minibatch_gradient
from aem_jax.models import Params
from aem_jax.sharding import replicated

Array = jax.Array
Gradient = Callable[[Params, Params, Batch, Array], Params]
"""(trainable, frozen, batch of one minibatch, weights f32[M, b, T]) -> gradient of the trainable parts, float32."""


def weighted_logprobs(logprobs: Array, entropies: Array, tokens: Tokens) -> tuple[Array, Stats]:
    """Objective Σ_t a_t log p_t, with a_t in `tokens.advantages`."""
    return jnp.sum(tokens.advantages * logprobs, where=tokens.mask), Stats({}, {})


@EntropyObjective
def weighted_entropies(logprobs: Array, entropies: Array, tokens: Tokens) -> tuple[Array, Stats]:
    """Objective Σ_t a_t H_t, with a_t in `tokens.advantages`: the prefixes are fixed."""
    return jnp.sum(tokens.advantages * entropies, where=tokens.mask), Stats({}, {})


def make_gradient(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh, objective: Objective) -> Gradient:
    """The gradient of an objective over all tokens of a batch; not jitted.

    Args:
        policy: the policy.
        config: settings of the forward pass; `num_minibatches` is not used.
        mesh: the mesh of parameters and batch.
        objective: `weighted_logprobs` or `weighted_entropies`.
    """
    program = make_program(policy, config, mesh, objective)

    def gradient(trainable: Params, frozen: Params, batch: Batch, weights: Array) -> Params:
        total, _ = minibatch_gradient(program, trainable, Inputs(batch, frozen, weights), jnp.int32(0))
        return total.gradient

    return gradient


def second_moments(opt_state: Any, config: LearnerConfig) -> Params | None:
    """Adam's v̂ of each trainable parameter, with bias correction; None before the first optimizer step.

    Args:
        opt_state: the optimizer's state.
        config: of the optimizer.
    """
    adam = optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")
    count = int(adam.count)
    if not count:
        return None
    return jax.tree.map(lambda v: v.astype(jnp.float32) / (1 - config.beta2**count), adam.nu)


def flattened(tree: Params) -> Array:
    """All numbers of a tree as one vector, f32[n]."""
    return jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)])


def projected(tree: Params, size: int, key: Array) -> Array:
    """A random linear projection of a tree of n numbers to f32[size], which preserves inner products in expectation.

        y = Σ_blocks roll(s ∘ x_block, shift)        s_i = ±1 and one shift of each block of `size` numbers, random
        E⟨y, y′⟩ = ⟨x, x′⟩,        Var⟨y, y′⟩ ≈ (‖x‖²‖x′‖² + ⟨x, x′⟩²) / size

    A count sketch (Charikar et al. 2002), in which numbers of the same block never collide: additions of whole blocks
    in place of a scatter.

    Args:
        tree: the numbers.
        size: of the projection.
        key: PRNG key; the same key gives the same projection.
    """
    total = jnp.zeros(size, jnp.float32)
    for number, leaf in enumerate(jax.tree.leaves(tree)):
        flat = leaf.astype(jnp.float32).ravel()
        blocks = jnp.pad(flat, (0, -len(flat) % size)).reshape(-1, size)

        def add(i: Array, total: Array, blocks: Array = blocks, number: int = number) -> Array:
            signs, shift = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, number), i))
            signed = blocks[i] * jax.random.rademacher(signs, (size,), jnp.float32)
            return total + jnp.roll(signed, jax.random.randint(shift, (), 0, size))

        total = jax.lax.fori_loop(0, len(blocks), add, total)
    return total


def make_vectors(
    gradient: Gradient, mesh: Mesh, to_vector: Callable[[Params], Array] = flattened, *, together: int = 1
) -> Callable[..., Array]:
    """vectors(trainable, frozen, batch, weights f32[K, M, b, T], p) -> f32[K, n], jitted: gradients times √p.

    Args:
        gradient: from `make_gradient`.
        mesh: the mesh of the parameters.
        to_vector: linear, from a tree to its vector: `flattened`, or for large policies `projected`.
        together: number of gradients that are computed at the same time; they share the forward pass. Every operation
            then needs a rule of batching; cuDNN's attention and the products of experts have none.
    """

    @partial(jax.jit, out_shardings=replicated(mesh))
    def vectors(trainable: Params, frozen: Params, batch: Batch, weights: Array, scale: Params) -> Array:
        def vector(weights: Array) -> Array:
            given = gradient(trainable, frozen, batch, weights)
            return to_vector(jax.tree.map(lambda g, p: g * jnp.sqrt(p), given, scale))

        at_once = min(together, len(weights))
        return jax.lax.map(vector, weights, batch_size=at_once if at_once > 1 else None)

    return vectors
