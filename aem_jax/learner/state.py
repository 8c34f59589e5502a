"""What training changes: parameters, optimizer state, step."""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aem_jax.sharding import TRAIN, replicated, shardings

Params = Any


class TrainablePolicy(Protocol):
    """What the learner needs of a policy; `aem_jax.models.Policy` is one; so are `LoraPolicy`, `ValuePolicy`.

    Where only part of the weights is trained, `axes` and `init` are of that part, and `hidden` and `head` take the
    pair (trained, frozen) as their parameters.
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
        """[B, T, D] of packed rows i32[B, T]; `constrain` says where the residual stream lies, `attention` attends."""
        ...

    def head(self, params: Params) -> jax.Array:
        """[D, V], as kept: hidden states times these, in the dtype of the hidden states, are logits."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that an update reads and writes.

    Attributes:
        params: float32 masters of what is trained. Frozen weights are no part of the state: nothing changes them.
        opt_state: optax state.
        step: i32[], rollout steps done (each is num_epochs × num_minibatches optimizer steps).
    """

    params: Params
    opt_state: Any
    step: Any


def abstract_state(policy: TrainablePolicy, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its numbers: what a restore fills.

    The optimizer's per-parameter arrays lie as their parameters do (along a dimension of which they hold one number a
    row, whole); everything else is on every device.

    Raises:
        ValueError: a parameter's dimension does not divide over the mesh.
    """
    params = jax.eval_shape(policy.init, jax.random.key(0))
    opt_state = jax.eval_shape(optimizer.init, params)
    where = shardings(mesh, policy.axes, TRAIN, params)
    whole = replicated(mesh)
    opt_where = optax.tree_utils.tree_map_params(
        optimizer, _beside, opt_state, params, where, transform_non_params=lambda _: whole
    )
    shapes = TrainState(params, opt_state, jax.ShapeDtypeStruct((), jnp.int32))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        TrainState(where, opt_where, whole),
    )


def _beside(leaf: Any, param: Any, place: NamedSharding) -> NamedSharding:
    """The sharding of an optimizer's array: its parameter's, without the axes of which it holds one number."""
    spec = (*place.spec, *(None,) * (len(param.shape) - len(place.spec)))
    kept = [axis if size == whole else None for axis, size, whole in zip(spec, leaf.shape, param.shape, strict=True)]
    return place if leaf.shape == param.shape else NamedSharding(place.mesh, PartitionSpec(*kept))


def init_state(
    policy: TrainablePolicy, optimizer: optax.GradientTransformation, mesh: Mesh, source: jax.Array | Params
) -> TrainState:
    """A state at step 0, born where it belongs on the mesh: no device ever holds all of it.

    Args:
        policy: the policy.
        optimizer: from `make_optimizer`.
        mesh: the mesh.
        source: a PRNG key, for random parameters, or parameters, which are donated: no device holds them twice.
    """
    is_key = isinstance(source, jax.Array) and jnp.issubdtype(source.dtype, jax.dtypes.prng_key)

    def create(source) -> TrainState:
        params = policy.init(source) if is_key else source
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(policy, optimizer, mesh))
    return jax.jit(create, out_shardings=where, donate_argnums=() if is_key else 0)(source)
