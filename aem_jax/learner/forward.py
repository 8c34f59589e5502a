"""What a policy says of packed rows: log-probabilities and entropies of their tokens, and a loss of these.

Only sampled tokens need logits, and most tokens of an agent's row are observations; so the positions that predict a
sampled token are moved to the front of their row, and chunks of positions with none of them are skipped. With a
vocabulary of 150k and one token in five sampled, that is four fifths of the head's cost.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from aem_jax.learner.head import HeadLayout, head_loss, head_statistics
from aem_jax.learner.objective import Measures, Objective, Tokens
from aem_jax.learner.state import Params, TrainablePolicy
from aem_jax.learner.value import ValueObjective, ValueTokens
from aem_jax.models import ValuePolicy
from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.decoder import PRODUCT

REMAT: Mapping[str, Callable[..., Any] | None] = {
    "none": None,
    "layers": jax.checkpoint_policies.nothing_saveable,
    # By name: the products say their own gradients, and policies of operations don't look into those.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
}
"""Name → what `jax.checkpoint` keeps of a layer; None keeps everything."""


class Rows(NamedTuple):
    """The rows of one microbatch, i32[b, T] each; see `Batch`."""

    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    response_ids: jax.Array


class Computation(NamedTuple):
    """How much is computed at a time, and where.

    Attributes:
        temperature: the sampler's; divides the logits.
        head_chunk: positions of each row whose logits exist at one time.
        remat: what to keep of each layer for the backward pass (`REMAT`).
        constrain: says where hidden states [b, T, D] lie on the mesh.
        attention: of the rows.
        head: where the head and its gradient lie on the mesh while its logits are taken.
    """

    temperature: float
    head_chunk: int
    remat: Callable[..., Any] | None = None
    constrain: Callable[[jax.Array], jax.Array] | None = None
    attention: RowAttention = row_attention
    head: HeadLayout = HeadLayout()


def row_statistics(
    policy: TrainablePolicy, params: Params, rows: Rows, how: Computation
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of every sampled token, and the entropy of the distribution that it was drawn from.

        logits_t = head(hidden_{t-1}) / temperature

    Args:
        policy: the policy.
        params: its parameters.
        rows: packed rows; a segment never begins with a sampled token.
        how: how it is computed.

    Returns:
        (logprobs, entropies) f32[b, T], nats, 0 outside responses. For numbers alone: a gradient takes `row_loss`.
    """
    front = _Front(rows)
    hidden = _hidden(policy, params, rows, front, how)
    settings = {"temperature": how.temperature, "chunk": how.head_chunk, "layout": how.head}
    targets, active = front(rows.tokens), front(rows.response_ids >= 0)
    logprobs, entropies = head_statistics(policy.head(params), hidden, targets, active, **settings)
    return front.back(logprobs), front.back(entropies)


def row_loss(
    policy: TrainablePolicy,
    params: Params,
    rows: Rows,
    tokens: Tokens,
    objective: Objective,
    how: Computation,
    sequence: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
    value: tuple[ValueObjective, ValueTokens] | None = None,
) -> tuple[jax.Array, Measures]:
    """A loss of the sampled tokens' log-probabilities, differentiable in the parameters.

        L = objective(logprobs, entropies, tokens),   logprobs and entropies as of `row_statistics`

    Args:
        policy: the policy.
        params: its parameters.
        rows: packed rows; a segment never begins with a sampled token.
        tokens: what the loss knows of each token, [b, T]; mask is False outside responses.
        objective: a sum over tokens, of which each looks at its own numbers alone.
        how: how it is computed.
        sequence: (logprobs, logprobs as sampled, response ids), [b, T] each in one order of its own, -> f32[b, T], what
            `tokens.sequence` is to be. It takes the head of all sampled tokens, without gradient, before the loss.
        value: a loss of the values of these states, which is added, and what it knows of each token; the policy has a
            value head then.

    Returns:
        (loss f32[], measures); no gradient flows through the measures.
    """
    front = _Front(rows)
    hidden = _hidden(policy, params, rows, front, how)
    head, targets, tokens = policy.head(params), front(rows.tokens), jax.tree.map(front, tokens)
    if sequence is not None:
        settings = {"temperature": how.temperature, "chunk": how.head_chunk, "layout": how.head}
        constants = jax.lax.stop_gradient(head), jax.lax.stop_gradient(hidden)
        logprobs, _ = head_statistics(*constants, targets, tokens.mask, **settings)
        tokens = tokens._replace(sequence=sequence(logprobs, tokens.logprobs, front(rows.response_ids)))
    found: Any = head_loss(objective, how.temperature, how.head_chunk, how.head, head, hidden, targets, tokens)
    if value is None:
        return found
    assert isinstance(policy, ValuePolicy)
    (of_tokens, measures), (of_values, at) = found, value
    of_states, measures = of_values(policy, params, hidden, ValueTokens(*map(front, at)), measures)
    return of_tokens + of_states, measures


def row_values(policy: ValuePolicy, params: Params, rows: Rows, how: Computation) -> jax.Array:
    """Values of the states behind every position, f32[b, T], in units of reward; of padding anything."""
    return policy.values(params, policy.hidden(params, *rows[:3], None, how.constrain, how.attention))


def _hidden(policy: TrainablePolicy, params: Params, rows: Rows, front: "_Front", how: Computation) -> jax.Array:
    """[b, T, D], the positions that predict a sampled token first."""
    hidden = front.hidden(policy.hidden(params, *rows[:3], how.remat, how.constrain, how.attention))
    return hidden if how.constrain is None else how.constrain(hidden)


class _Front:
    """Positions in another order: those that predict a sampled token first, in each row.

    Position t predicts token t + 1. Nothing wraps round: token 0 of a row is never a sampled one.
    """

    def __init__(self, rows: Rows):
        predicts = jnp.roll(rows.response_ids, -1, axis=1) >= 0
        self._order = jnp.argsort(~predicts, axis=1, stable=True)
        self._place = jnp.argsort(self._order, axis=1)

    def hidden(self, x: jax.Array) -> jax.Array:
        """[b, T, …] of positions, in the new order."""
        return _permute(x, self._order, self._place)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[b, T] of tokens, each at the position that predicts it."""
        return jnp.take_along_axis(jnp.roll(x, -1, axis=1), self._order, axis=1)

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse."""
        return jnp.roll(jnp.take_along_axis(x, self._place, axis=1), 1, axis=1)


@jax.custom_vjp
def _permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """x[b, order[b, t]]. The gradient is the inverse permutation: a gather, where autodiff would scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permute_forward(x, order, inverse):
    return _permute(x, order, inverse), inverse


def _permute_backward(inverse, cotangent):
    return jnp.take_along_axis(cotangent, inverse[..., None], axis=1), None, None


_permute.defvjp(_permute_forward, _permute_backward)
