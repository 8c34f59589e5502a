"""AdamW after a global-norm clip, its schedules, and its moments in bfloat16. Everything else is optax.

Moments in bfloat16 halve AdamW's memory:

    m ← β1 m + (1 − β1) g,  v ← β2 v + (1 − β2) g²,  update = (m / (1 − β1^t)) / (√(v / (1 − β2^t)) + ε)

The computation is in float32; only the stored moments are rounded. m is rounded to the nearest value. v is rounded
stochastically, so that it is unbiased: near β2 = 1 a step changes v by less than half of bfloat16's precision, and
rounding to the nearest would never change it. The random bits derive from the step number, so a resumed run gets the
same bits.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from aem_jax.learner.config import LearnerConfig

SCHEDULES: Mapping[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}
"""Name → (peak, steps after warm-up) → schedule."""


def make_schedule(config: LearnerConfig) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, …: a linear rise over warmup_steps, then the named schedule.

    The rise begins at peak / warmup_steps, not at 0, so that the first step has an effect.
    """
    after_warmup = SCHEDULES[config.schedule](config.learning_rate, config.total_steps - config.warmup_steps)
    if not config.warmup_steps:
        return after_warmup
    first = config.learning_rate / config.warmup_steps
    warmup = optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, after_warmup], [config.warmup_steps])


def make_optimizer(config: LearnerConfig, axes: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    A value head has its own clip norm and its own learning rate, so that the policy's updates do not depend on the size
    of rewards.

    Args:
        config: learning rate, schedule, betas, decay, clip, dtype of the moments.
        axes: tree of logical axes, one tuple of names for each parameter; they tell matrices from norm scales.
    """
    clip, schedule = optax.clip_by_global_norm(config.max_grad_norm), make_schedule(config)
    is_value = _with_axes("value", axes=axes)
    if any(jax.tree.leaves(is_value)):
        is_policy = jax.tree.map(lambda value: not value, is_value)
        own_rate = optax.masked(optax.scale(config.value_learning_rate / config.learning_rate), is_value)
        clip = optax.chain(optax.masked(clip, is_policy), optax.masked(clip, is_value))
        return optax.chain(clip, _adamw(config, schedule, axes), own_rate)
    return optax.chain(clip, _adamw(config, schedule, axes))


def _adamw(config: LearnerConfig, schedule: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    # Weights that read or write the residual stream decay, and so do adapters; norm scales and biases do not.
    matrices = _with_axes("embed", "expert_embed", "rank", axes=axes)
    if config.moments == "bfloat16":
        return optax.chain(
            scale_by_bfloat16_adam(config.beta1, config.beta2, config.adam_eps),
            optax.add_decayed_weights(config.weight_decay, matrices),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=matrices,
    )


def scale_by_bfloat16_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with both moments stored in bfloat16; the state is optax's."""

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        count = optax.safe_increment(state.count)
        m = jax.tree.map(lambda g, m: beta1 * m.astype(jnp.float32) + (1 - beta1) * g, updates, state.mu)
        nu = jax.tree.map(lambda v: v.astype(jnp.float32), state.nu)
        v = jax.tree.map(lambda g, v: beta2 * v + (1 - beta2) * jnp.square(g), updates, nu)
        scaled = jax.tree.map(lambda m, v: (m / (1 - beta1**count)) / (jnp.sqrt(v / (1 - beta2**count)) + eps), m, v)
        structure = jax.tree.structure(v)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), structure.num_leaves)
        nu = jax.tree.map(round_stochastically, v, structure.unflatten(list(keys)))
        return scaled, optax.ScaleByAdamState(count, jax.tree.map(lambda m: m.astype(jnp.bfloat16), m), nu)

    return optax.GradientTransformation(init, update)


def round_stochastically(values: jax.Array, key: jax.Array) -> jax.Array:
    """f32 in bfloat16, without bias: adds 16 random bits below bfloat16's last bit, then truncates."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    bits = bits + jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def num_updates(opt_state: Any) -> jax.Array:
    """i32[]: optimizer steps made so far."""
    adam = optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")
    return adam.count


def _with_axes(*names: str, axes: Any) -> Any:
    """bool for each parameter: whether one of its logical axes is among the names."""
    is_axes = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda parameter: bool({*names} & {*parameter}), axes, is_leaf=is_axes)
