"""The ratio of whole sequences (GSPO), from the table of responses.

It is the only input of a token's loss that depends on other tokens.

The log-ratios of a response's tokens are summed first, at the parameters of the current optimizer step;
`sequence_policy_loss` shows that a loss of single tokens is then exact. A response is in one row, so its sum is
computed in the row's microbatch, from the hidden states of the loss; this computes the head of sampled tokens once
more. The turns of a trajectory can be in several microbatches (windowed context), which requires a forward pass over
the minibatch first.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.losses import SequenceRatio, response_log_ratios, trajectory_log_ratios


class Level(NamedTuple):
    """The unit whose tokens share one ratio.

    Attributes:
        log_ratios: summed log-ratio of each response -> mean log-ratio of the sequence that it belongs to, f32[R].
        in_one_row: whether a sequence is always in one row, for any packing.
    """

    log_ratios: SequenceRatio
    in_one_row: bool


LEVELS: Mapping[str, Level | None] = {
    "token": None,
    "response": Level(response_log_ratios, in_one_row=True),
    "trajectory": Level(trajectory_log_ratios, in_one_row=False),
}
"""`LearnerConfig.ratio` → the sequence; None if every token has its own ratio."""


def response_sums(logprobs: jax.Array, sampled: jax.Array, response_ids: jax.Array, num_responses: int) -> jax.Array:
    """Σ_t (logp_t − logp_t as sampled) over the tokens of each response.

    Args:
        logprobs: f32[b, T], nats; ignored outside responses.
        sampled: f32[b, T], nats, as sampled.
        response_ids: i32[b, T]; -1 outside responses.
        num_responses: R, static.

    Returns:
        f32[R], nats; 0 for responses in other microbatches.
    """
    ratios = jnp.where(response_ids >= 0, logprobs - sampled, 0.0)
    return jax.ops.segment_sum(ratios.reshape(-1), response_ids.reshape(-1), num_responses)
