"""The training state: parameters, optimizer state, step.

Trainable and frozen parameters are a partition of the policy's parameters. It is taken here once: gradients, the
optimizer and checkpoints see the trainable parts alone, and everything else sees all parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.optimizer import make_optimizer
from aem_jax.models import Params
from aem_jax.sharding import TRAIN, replicated, shardings


class TrainablePolicy(Protocol):
    """The learner's interface to a policy; `aem_jax.models.Policy` implements it."""

    @property
    def axes(self) -> Params:
        """Logical axes of every parameter, in the parameters' structure."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parts that are not trained."""
        ...

    @property
    def value(self) -> bool:
        """Whether there is a value head, the part "value"."""
        ...

    def experts(self, mesh: Mesh | None) -> Any:
        """The products of a mixture's experts on a mesh, for `hidden`; None without a mixture."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Parameters from a PRNG key; trainable ones are float32."""
        ...

    def hidden(
        self,
        params: Params,
        tokens,
        positions,
        segment_ids,
        remat=None,
        constrain=None,
        attention: Any = ...,
        *,
        experts: Any = None,
        recorded=None,
    ) -> tuple[jax.Array, Any]:
        """[B, T, D] of packed rows i32[B, T], and the load of a mixture's experts; None without a mixture.

        `constrain` is the residual stream's sharding, `attention` the kernel, `experts` from the method; `recorded` are
        the experts in a batch.
        """
        ...

    def head(self, params: Params) -> jax.Array:
        """[D, V], as stored: logits are hidden states times the head, cast to the dtype of the hidden states."""
        ...

    def values(self, params: Params, hidden: jax.Array) -> jax.Array:
        """Values f32[...] of hidden states [..., D], in units of reward; only with a value head."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state that an update reads and writes.

    Attributes:
        trainable: the parts that are trained, float32 masters.
        frozen: the other parts.
        opt_state: optax state of the trainable parts.
        step: i32[], rollout steps done (each is num_epochs × num_minibatches optimizer steps).
    """

    trainable: Params
    frozen: Params
    opt_state: Any
    step: Any

    @property
    def params(self) -> Params:
        """All parameters of the policy."""
        return combine(self.trainable, self.frozen)

    def without_frozen(self) -> "TrainState":
        """What an update replaces, and what a checkpoint holds."""
        return replace(self, frozen={})


def partition(policy: TrainablePolicy, params: Mapping[str, Any]) -> tuple[Params, Params]:
    """The trainable and the frozen parts of a tree of parameters, or of one in its structure.

    Parts that the policy does not have are left out.
    """
    parts = {name: params[name] for name in policy.axes if name in params}
    trainable = {name: part for name, part in parts.items() if name not in policy.frozen}
    return trainable, {name: parts[name] for name in policy.frozen if name in parts}


def combine(trainable: Params, frozen: Params) -> Params:
    """All parameters, from the two results of `partition`."""
    return {**frozen, **trainable}


def policy_optimizer(policy: TrainablePolicy, config: LearnerConfig) -> optax.GradientTransformation:
    """The optimizer of the trainable parts."""
    return make_optimizer(config, partition(policy, policy.axes)[0])


def abstract_state(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its values; without frozen parts the target of a restore.

    The optimizer's per-parameter arrays are sharded as their parameters; everything else is replicated.

    Raises:
        ValueError: a parameter's dimension does not divide over the mesh.
    """
    optimizer, everywhere = policy_optimizer(policy, config), replicated(mesh)
    params = jax.eval_shape(policy.init, jax.random.key(0))
    where = shardings(mesh, policy.axes, TRAIN, params)
    (trainable, frozen), (of_trainable, of_frozen) = partition(policy, params), partition(policy, where)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    of_opt_state = optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_state, of_trainable, transform_non_params=lambda _: everywhere
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        TrainState(trainable, frozen, opt_state, jax.ShapeDtypeStruct((), jnp.int32)),
        TrainState(of_trainable, of_frozen, of_opt_state, everywhere),
    )


def init_state(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh, key: jax.Array, params: Mapping[str, Any] | None = None
) -> TrainState:
    """Returns a state at step 0, created in its sharding: no device ever holds all of it.

    Args:
        policy: the policy.
        config: of the optimizer.
        mesh: the mesh.
        key: of the random parameters.
        params: parts that are not random, such as those of a model's files, in the train layout. Trainable parts are
            donated; frozen ones are shared.
    """
    optimizer = policy_optimizer(policy, config)
    given, frozen = partition(policy, params or {})

    def create(key: jax.Array, given: Params) -> TrainState:
        trainable, drawn = partition(policy, {**policy.init(key), **given})
        drawn = {name: part for name, part in drawn.items() if name not in frozen}
        return TrainState(trainable, drawn, optimizer.init(trainable), jnp.zeros((), jnp.int32))

    where = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(policy, config, mesh))
    where = replace(where, frozen={name: part for name, part in where.frozen.items() if name not in frozen})
    state = jax.jit(create, out_shardings=where, donate_argnums=1)(key, given)
    return replace(state, frozen=combine(state.frozen, frozen))
