"""AdamW behind a global-norm clip, and its schedules. All of it is optax, but for small moments; the choice is ours."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.moments import KEPT, scale_by_small_adam

SCHEDULES: Mapping[str, Callable[[float, int], optax.Schedule]] = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
}
"""Name → (peak, steps after warm-up) → schedule."""


def make_schedule(config: LearnerConfig) -> optax.Schedule:
    """Learning rate of optimizer step 0, 1, …: a linear rise over warmup_steps, then the named schedule.

    The rise begins at peak / warmup_steps, not at 0, so that no step is without effect.
    """
    rest = SCHEDULES[config.schedule](config.learning_rate, config.total_steps - config.warmup_steps)
    if not config.warmup_steps:
        return rest
    first = config.learning_rate / config.warmup_steps
    rise = optax.linear_schedule(first, config.learning_rate, max(config.warmup_steps - 1, 1))
    return optax.join_schedules([rise, rest], [config.warmup_steps])


def make_optimizer(config: LearnerConfig, axes: Any) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW. A value head is clipped by a norm of its own and has its own learning rate, so
    that what the policy learns does not depend on the size of rewards.

    Args:
        config: learning rate, schedule, betas, decay, clip, dtype of the moments.
        axes: tree of logical axes, one tuple of names for each parameter; it tells matrices from scales.
    """
    clip, rate = optax.clip_by_global_norm(config.max_grad_norm), make_schedule(config)
    of_value = _leaves("value", axes=axes)
    if any(jax.tree.leaves(of_value)):
        of_policy = jax.tree.map(lambda is_value: not is_value, of_value)
        faster = optax.masked(optax.scale(config.value_learning_rate / config.learning_rate), of_value)
        clip = optax.chain(optax.masked(clip, of_policy), optax.masked(clip, of_value))
        return optax.chain(clip, _adamw(config, rate, axes), faster)
    return optax.chain(clip, _adamw(config, rate, axes))


def _adamw(config: LearnerConfig, rate: optax.Schedule, axes: Any) -> optax.GradientTransformation:
    # What reads or writes the residual stream, or is half of an adapter, decays: no scales of norms, no biases.
    matrices = _leaves("embed", "rank", axes=axes)
    if config.moments != "float32":
        return optax.chain(
            scale_by_small_adam(config.beta1, config.beta2, config.adam_eps, KEPT[config.moments]),
            optax.add_decayed_weights(config.weight_decay, matrices),
            optax.scale_by_learning_rate(rate),
        )
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=matrices,
    )


def num_updates(opt_state: Any) -> jax.Array:
    """i32[]: optimizer steps made so far."""
    adam = optax.tree_utils.tree_get(opt_state, "ScaleByAdamState")
    return adam.count


def _leaves(*names: str, axes: Any) -> Any:
    """Which parameters have one of these logical axes."""
    is_axes = lambda node: isinstance(node, tuple)
    return jax.tree.map(lambda found: bool({*names} & {*found}), axes, is_leaf=is_axes)
