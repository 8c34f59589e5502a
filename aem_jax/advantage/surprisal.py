"""Surprisal and entropy: of tokens from logits, and of responses as means over tokens. METHOD §1 and §3."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from aem_jax.advantage._checks import float_array, id_array, same_shape, static_count


def token_statistics(logits: ArrayLike, tokens: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token, and the entropy of the distribution that it was sampled from.

        log π(v) = z_v − logsumexp(z)        logprob = log π(token)        H = −Σ_v π(v) log π(v)

    A logit of −inf (a token ruled out by top-k or top-p) adds nothing to the entropy. Divide the logits by the sampling
    temperature first. Differentiable in `logits`.

    Args:
        logits: float[..., V], unnormalised; lower precisions are cast to float32.
        tokens: int[...], ids in [0, V); not checked.

    Returns:
        (logprobs, entropies), both float32[...] (float64 for float64 logits), in nats. Entropies are >= 0.

    Raises:
        ValueError: on dtypes that are not float and int, or leading shapes that differ.
    """
    logits = float_array("logits", logits)
    tokens = jnp.asarray(tokens)
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"expected tokens of an integer dtype, got {tokens.dtype}")
    if logits.ndim == 0 or logits.shape[:-1] != tokens.shape:
        raise ValueError(f"expected logits of shape tokens.shape + (V,), got {logits.shape} for tokens {tokens.shape}")
    # The maximum is subtracted before the sum, as in log_softmax. So every log π is <= 0, and H >= 0 to the last bit.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))
    # Of the logits, not of log π: to read one of its elements, a TPU would first write all of log π to memory.
    of_tokens = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    logprobs = (of_tokens - top - log_sum)[..., 0]
    log_policy = logits - top - log_sum
    possible = log_policy > -jnp.inf
    finite = jnp.where(possible, log_policy, 0.0)
    entropies = -jnp.sum(jnp.where(possible, jnp.exp(finite) * finite, 0.0), axis=-1)
    return logprobs, entropies


def response_entropy(token_entropy: ArrayLike, response_ids: ArrayLike, num_responses: int) -> jax.Array:
    """Mean token entropy of each response: the length-free, predictable part of its surprisal (METHOD §3).

        H̄_r = Σ_{t: id_t = r} H_t / |{t: id_t = r}|

    Tokens of one response may lie anywhere: in one row, in several, unsorted. Sums are taken in float32 or wider.

    Args:
        token_entropy: float[B, T] (any shape), nats, under the sampling policy.
        response_ids: int, same shape: the response that each token belongs to; -1 for tokens of no response.
        num_responses: R, static.

    Returns:
        float32[R] (float64 for float64), nats; NaN for a response that has no token, which `aem_coefficients`
        reads as "takes no part".

    Raises:
        ValueError: on unequal shapes, wrong dtypes, or ids known to lie outside [-1, R).
    """
    num_responses = static_count("num_responses", num_responses)
    token_entropy = float_array("token_entropy", token_entropy)
    response_ids = id_array("response_ids", response_ids, num_responses)
    same_shape(token_entropy=token_entropy, response_ids=response_ids)
    ids = response_ids.reshape(-1)
    in_response = ids >= 0
    # Values outside responses are arbitrary, even NaN, and must not reach a sum.
    entropies = jnp.where(in_response, token_entropy.reshape(-1), 0.0)
    total = jax.ops.segment_sum(entropies, ids, num_responses)
    count = jax.ops.segment_sum(in_response.astype(entropies.dtype), ids, num_responses)
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), jnp.nan)
