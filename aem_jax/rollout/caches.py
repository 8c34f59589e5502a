"""What the KV caches of a rollout take of each device's memory, known before any of it is allocated."""

import math

import jax

from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.prompts import prompt_rows
from aem_jax.sampler import Sampler

GIB = 2**30


def cache_bytes(sampler: Sampler, config: RolloutConfig, num_slots: int) -> int:
    """Bytes on each device: of all slots, and of the rows in which first prompts are computed.

    Args:
        sampler: whose caches they are.
        config: cohorts, group size and lengths.
        num_slots: in place of the configured one; a multiple of its cohorts and of the sampler's `slot_shards`.
    """
    size = num_slots // config.num_cohorts
    rows = prompt_rows(size, config, sampler.slot_shards)
    states = [sampler.abstract(size)] * config.num_cohorts + [sampler.abstract(rows, config.prompt_tokens)]
    return sum(map(_on_device, jax.tree.leaves(states)))


def check_caches(sampler: Sampler, config: RolloutConfig, device_bytes: int | None) -> str:
    """Looks whether the caches fit.

    Args:
        sampler: whose caches they are.
        config: of the rollout; its `cache_gib` is the budget, if there is one.
        device_bytes: memory of a device; None where it is not known.

    Returns:
        A sentence that says what they take.

    Raises:
        ValueError: they do not fit; names the slots that would.
    """
    limit = config.cache_gib * GIB or device_bytes or math.inf
    needed = cache_bytes(sampler, config, config.num_slots)
    if needed > limit:
        step = config.num_cohorts * sampler.slot_shards
        fits = [n for n in range(step, config.num_slots, step) if cache_bytes(sampler, config, n) <= limit]
        most = f"at most {fits[-1]}" if fits else f"none: even {step} do not fit, lower rollout.context_tokens"
        whose = "rollout.cache_gib" if config.cache_gib else "the device's memory"
        raise ValueError(
            f"--rollout.num-slots: expected {most} with KV caches of {limit / GIB:.4g} GiB on a device ({whose}), got "
            f"{config.num_slots}, which take {needed / GIB:.4g} GiB"
        )
    return (
        f"KV caches take {needed / GIB:.4g} GiB of each device: {config.num_slots} slots of {sampler.capacity} tokens, "
        f"and first prompts of {config.prompt_tokens}"
    )


def _on_device(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
