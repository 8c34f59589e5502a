"""The paper's claims as numbers: is α − 1 a proxy of relative surprisal, and does A·(α − 1) say where entropy goes?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aem_jax.analysis.draws import Draws
from aem_jax.analysis.estimates import (
    Estimate,
    mean,
    opposed,
    pearson,
    pooled_correlation,
    predicted_drift,
    relative_surprisal,
    share_between,
    standard_error,
    with_interval,
)
from aem_jax.analysis.states import State

SIGNS = {"positive": 1, "negative": -1}
"""Of A·(α − 1): the responses that an update is restricted to."""


def choose(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of at most `count` responses, in order: at random, those with the largest weight class first.

    Args:
        weights: int[R]; a response with a higher one is taken before any with a lower one, and 0 is never taken.
        count: how many.
        seed: of the order inside a class.
    """
    shuffled = np.random.default_rng(seed).permutation(len(weights))
    ordered = shuffled[np.argsort(-weights[shuffled], kind="stable")]
    return np.sort(ordered[weights[ordered] > 0][:count])


def proxy(states: Sequence[State], alpha: np.ndarray, draws: Draws) -> dict[str, Any]:
    """α − 1 against Monte-Carlo relative surprisal, over states. The paper: |r| 0.63, signs opposed in 55 of 64.

    Args:
        states: N states.
        alpha: f[N], of the responses taken in them, over their rollout groups.
        draws: responses drawn in them.

    Returns:
        `pearson` and `opposed` of α − 1 and S − H_resp (unsurprising ↔ α > 1, so r is negative where the claim holds);
        `pearson_predictable`, the same with Σ_t H_t in place of S, which the sampling of the response's own tokens
        does not blur; `points`, one a state.
    """
    surprisal = np.array([each.surprisal for each in states])
    predictable = np.array([each.predictable for each in states])
    relative, errors = relative_surprisal(surprisal, draws.surprisal)
    steady, _ = relative_surprisal(predictable, draws.predictable)
    moved = alpha - 1
    signs = np.sign(moved) * np.sign(relative)
    return {
        "states": len(states),
        "draws": draws.surprisal.shape[1],
        "pearson": _plain(with_interval(pearson, moved, relative)),
        "pearson_predictable": _plain(with_interval(pearson, moved, steady)),
        "opposed": _plain(with_interval(opposed, moved, relative)),
        "opposed_count": int((signs < 0).sum()),
        "decided_count": int((signs != 0).sum()),
        "points": [
            {"alpha": float(a), "relative": float(r), "error": float(e), "tokens": s.tokens, "turn": s.turn}
            for a, r, e, s in zip(alpha, relative, errors, states, strict=True)
        ],
    }


def whose_entropy(draws: Draws) -> dict[str, Any]:
    """Whether a response's entropy is its own or its state's: the second thing to look at where α is no proxy.

    α compares the H̄ of responses in different states, S − H_resp responses to one state. H̄ can tell the two apart only
    as far as it varies with what is said: of a response of one uncertain token H̄ is known before that token is drawn,
    so over responses to one state it is constant, and over states S − H_resp averages to 0 whatever H̄ is.

    Args:
        draws: responses to each of N states.

    Returns:
        `between`: share of the variance of H̄ over all draws that lies between states; `inside`: correlation of H̄ and
        S − H_resp over responses to the same state (positive where the proxy can work). Each with its interval over
        states.
    """
    mean_entropy = draws.predictable / np.maximum(draws.tokens, 1)
    centre = lambda values: values - values.mean(axis=1, keepdims=True)
    own, relative = centre(mean_entropy), centre(draws.surprisal)
    moments = ((own * relative).mean(axis=1), (own**2).mean(axis=1), (relative**2).mean(axis=1))
    return {
        "between": _plain(with_interval(share_between, mean_entropy.mean(axis=1), moments[1])),
        "inside": _plain(with_interval(pooled_correlation, *moments)),
    }


def drift(
    states: Sequence[State], alpha: np.ndarray, advantages: np.ndarray, before: Draws, after: Draws, sign: int
) -> dict[str, Any]:
    """Predicted against measured change of response entropy, by an update on the responses of one sign of A·(α − 1).

    Predicted is A·(S − H_resp) of each response that the update was made on, up to the size of the step (METHOD §2);
    measured is the change of mean Σ_t H_t over draws, with the same random numbers before and after.

    Args:
        states: N states.
        alpha: f[N].
        advantages: f[N], base advantages.
        before: draws before the update.
        after: draws after it, with the same keys.
        sign: 1 or −1.

    Returns:
        `predicted` (mean over the update's own states; its sign is the claim), `measured` (mean over all states) and
        `measured_own` (over its own), in nats with intervals over states; `error`, the median standard error of one
        state's measured change; `pearson` of predicted and measured over its own states; `points`, one an own state.
    """
    own = np.sign(advantages * (alpha - 1)) == sign
    relative, _ = relative_surprisal(np.array([each.surprisal for each in states]), before.surprisal)
    expected = predicted_drift(advantages, relative)
    changes = after.predictable - before.predictable
    change, errors = changes.mean(axis=1), standard_error(changes)
    return {
        "own_states": int(own.sum()),
        "predicted": _mean(expected[own]),
        "measured": _mean(change),
        "measured_own": _mean(change[own]),
        "error": float(np.median(errors)),
        "pearson": _plain(with_interval(pearson, expected[own], change[own])) if own.any() else None,
        "points": [
            {"predicted": float(p), "measured": float(m), "error": float(e)}
            for p, m, e in zip(expected[own], change[own], errors[own], strict=True)
        ],
    }


def circumstances(
    states: Sequence[State], alpha: np.ndarray, entropies: np.ndarray, groups: np.ndarray, min_range: float
) -> dict[str, Any]:
    """What α had to work with: the first things to look at where AEM does nothing.

    Args:
        states: all of a rollout.
        alpha: f[N], of their responses.
        entropies: f[N], H̄ of their responses, nats.
        groups: i[N], their rollout groups.
        min_range: nats; groups whose entropies span less are flat.
    """
    spans = np.array([np.ptp(entropies[groups == g]) for g in np.unique(groups)])
    lengths = np.array([each.tokens for each in states])
    return {
        "responses": len(states),
        "groups": len(spans),
        "flat_groups": float((spans < min_range).mean()),
        "entropy_span": [float(np.quantile(spans, q)) for q in (0.25, 0.5, 0.75)],
        "alpha": [float(alpha.min()), float(alpha.max())],
        "tokens": [float(np.quantile(lengths, q)) for q in (0.05, 0.5, 0.95)],
        "turns": float(np.mean([1 + max(s.turn for s in states if s.trajectory == n) for n in _numbers(states)])),
    }


def _numbers(states: Sequence[State]) -> list[int]:
    return sorted({each.trajectory for each in states})


def _mean(values: np.ndarray) -> dict[str, float] | None:
    return _plain(with_interval(mean, values)) if len(values) else None


def _plain(found: Estimate) -> dict[str, float]:
    return {name: float(value) for name, value in found._asdict().items()}
