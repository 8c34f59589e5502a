"""The ratio of whole sequences (GSPO), from the table of responses: the one number that a token's loss needs of others.

The log-ratios of a response's tokens are summed first, at the parameters of the present optimizer step; why a loss of
single tokens is then exact, `sequence_policy_loss` says. Where a sequence never leaves its row (a response) the sum is
taken in the row's own microbatch, from the hidden states that the loss needs anyway: the head of sampled tokens is
computed once more, and nothing else. The turns of a trajectory can lie in several microbatches (windowed context), so
there a forward pass over the minibatch comes first.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.losses import SequenceRatio, response_log_ratios, trajectory_log_ratios


class Level(NamedTuple):
    """What a sequence is.

    Attributes:
        log_ratios: sums of responses -> log s of the sequence that each stands in.
        in_one_row: whether all of a sequence lies in one row, whatever the packing.
    """

    log_ratios: SequenceRatio
    in_one_row: bool


LEVELS: Mapping[str, Level | None] = {
    "token": None,
    "response": Level(response_log_ratios, in_one_row=True),
    "trajectory": Level(trajectory_log_ratios, in_one_row=False),
}
"""`LearnerConfig.ratio` → what a sequence is; None where every token has a ratio of its own."""


def response_sums(logprobs: jax.Array, sampled: jax.Array, response_ids: jax.Array, num_responses: int) -> jax.Array:
    """Σ_t (logp_t − logp_t as sampled) over the tokens of each response.

    Args:
        logprobs: f32[b, T], nats; anything outside responses.
        sampled: f32[b, T], nats, as sampled.
        response_ids: i32[b, T]; -1 outside responses.
        num_responses: R, static.

    Returns:
        f32[R], nats; 0 for responses that lie elsewhere.
    """
    ratios = jnp.where(response_ids >= 0, logprobs - sampled, 0.0)
    return jax.ops.segment_sum(ratios.reshape(-1), response_ids.reshape(-1), num_responses)
