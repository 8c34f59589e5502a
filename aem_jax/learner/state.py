"""The training state: parameters, optimizer state, step."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from aem_jax.sharding import TRAIN, replicated, shardings

Params = Any


class TrainablePolicy(Protocol):
    """The learner's interface to a policy: `Policy`, `LoraPolicy` and `ValuePolicy` of `aem_jax.models` implement it.

    If part of the weights is frozen, `axes` and `init` cover the trained part, and `hidden` and `head` take the pair
    (trained, frozen) as their parameters.
    """

    @property
    def axes(self) -> Params:
        """Logical axes of every trained parameter."""
        ...

    def init(self, key: jax.Array) -> Params:
        """float32 parameters to train."""
        ...

    def hidden(
        self, params: Params, tokens, positions, segment_ids, remat=None, constrain=None, attention: Any = ...
    ) -> jax.Array:
        """[B, T, D] of packed rows i32[B, T]; `constrain` is the residual stream's sharding, `attention` the kernel."""
        ...

    def head(self, params: Params) -> jax.Array:
        """[D, V], as stored: logits are hidden states times the head, cast to the dtype of the hidden states."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state that an update reads and writes.

    Attributes:
        params: float32 master copy of the trained parameters. Frozen weights are not part of the state.
        opt_state: optax state.
        step: i32[], rollout steps done (each is num_epochs × num_minibatches optimizer steps).
    """

    params: Params
    opt_state: Any
    step: Any


def abstract_state(policy: TrainablePolicy, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its values: the target of a restore.

    The optimizer's per-parameter arrays are sharded as their parameters; everything else is replicated.

    Raises:
        ValueError: a parameter's dimension does not divide over the mesh.
    """
    params = jax.eval_shape(policy.init, jax.random.key(0))
    opt_state = jax.eval_shape(optimizer.init, params)
    params_sharding = shardings(mesh, policy.axes, TRAIN, params)
    everywhere = replicated(mesh)
    opt_sharding = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_state, params_sharding, transform_non_params=lambda _: everywhere
    )
    shapes = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        TrainState(params_sharding, opt_sharding, everywhere),
    )


def init_state(
    policy: TrainablePolicy, optimizer: optax.GradientTransformation, mesh: Mesh, source: jax.Array | Params
) -> TrainState:
    """Returns a state at step 0, created in its sharding: no device ever holds all of it.

    Args:
        policy: the policy.
        optimizer: from `make_optimizer`.
        mesh: the mesh.
        source: a PRNG key for random parameters, or parameters, which are donated.
    """
    is_key = isinstance(source, jax.Array) and jnp.issubdtype(source.dtype, jax.dtypes.prng_key)

    def create(source) -> TrainState:
        params = policy.init(source) if is_key else source
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    out_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(policy, optimizer, mesh))
    return jax.jit(create, out_shardings=out_shardings, donate_argnums=() if is_key else 0)(source)
