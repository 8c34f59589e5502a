"""The paper's claims, measured: α − 1 is a proxy of relative surprisal; A·(α − 1) predicts the drift of entropy."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aem_jax.analysis.draws import Draws
from aem_jax.analysis.estimates import (
    Estimate,
    centred,
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
"""Sign of A·(α − 1) that an update's responses have."""


def choose(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of at most `count` responses, in order: a random choice that prefers larger weights.

    Args:
        weights: int[R]; responses of higher weight are taken first, responses of weight 0 never.
        count: maximum number of responses.
        seed: of the order of equal weights.
    """
    shuffled = np.random.default_rng(seed).permutation(len(weights))
    ordered = shuffled[np.argsort(-weights[shuffled], kind="stable")]
    return np.sort(ordered[weights[ordered] > 0][:count])


def proxy(states: Sequence[State], alpha: np.ndarray, draws: Draws) -> dict[str, Any]:
    """α − 1 against Monte-Carlo relative surprisal, over states. The paper: |r| 0.63, signs opposed in 55 of 64.

    Args:
        states: N states.
        alpha: f[N], of their responses, normalised over rollout groups.
        draws: responses sampled in the states.

    Returns:
        `pearson` and `opposed` of α − 1 and S − H_resp (unsurprising ↔ α > 1, so r is negative where the claim holds);
        `pearson_predictable`, the same with Σ_t H_t in place of S, without the sampling noise of the response's own
        tokens; `points`, one for each state.
    """
    surprisal = np.array([state.surprisal for state in states])
    predictable = np.array([state.predictable for state in states])
    relative, errors = relative_surprisal(surprisal, draws.surprisal)
    relative_predictable, _ = relative_surprisal(predictable, draws.predictable)
    centred = alpha - 1
    signs = np.sign(centred) * np.sign(relative)
    return {
        "states": len(states),
        "draws": draws.surprisal.shape[1],
        "pearson": _plain(with_interval(pearson, centred, relative)),
        "pearson_predictable": _plain(with_interval(pearson, centred, relative_predictable)),
        "opposed": _plain(with_interval(opposed, centred, relative)),
        "opposed_count": int((signs < 0).sum()),
        "decided_count": int((signs != 0).sum()),
        "points": [
            {"alpha": float(a), "relative": float(r), "error": float(e), "tokens": s.tokens, "turn": s.turn}
            for a, r, e, s in zip(alpha, relative, errors, states, strict=True)
        ],
    }


def entropy_decomposition(draws: Draws) -> dict[str, Any]:
    """Whether mean entropy H̄ varies between the responses to one state, or between states; a diagnostic of the proxy.

    α compares H̄ over responses in different states; S − H_resp compares responses to one state. H̄ is informative about
    S − H_resp only as far as it varies with the response. If a response has one uncertain token, H̄ is fixed by the
    state before that token is sampled: it is constant over the responses to that state, while over states S − H_resp
    averages to 0 for any H̄.

    Args:
        draws: responses to each of N states.

    Returns:
        `between`: share of the variance of H̄ over all draws that is between states; `inside`: correlation of H̄ and
        S − H_resp over responses to the same state (positive where the proxy can work). Each with its interval over
        states.
    """
    mean_entropy = draws.predictable / np.maximum(draws.tokens, 1)
    own, relative = centred(mean_entropy), centred(draws.surprisal)
    moments = ((own * relative).mean(axis=1), (own**2).mean(axis=1), (relative**2).mean(axis=1))
    return {
        "between": _plain(with_interval(share_between, mean_entropy.mean(axis=1), moments[1])),
        "inside": _plain(with_interval(pooled_correlation, *moments)),
    }


def drift(
    states: Sequence[State], alpha: np.ndarray, advantages: np.ndarray, before: Draws, after: Draws, sign: int
) -> dict[str, Any]:
    """Predicted and measured change of response entropy by an update on responses with one sign of A·(α − 1).

    The prediction is A·(S − H_resp) of each response in the update, up to the size of the step (METHOD §2). The
    measurement is the change of mean Σ_t H_t over draws, with the same random numbers before and after.

    Args:
        states: N states.
        alpha: f[N].
        advantages: f[N], base advantages.
        before: draws before the update.
        after: draws after the update, with the same keys.
        sign: 1 or −1.

    Returns:
        `predicted` (mean over the update's own states; the claim is its sign), `measured` (mean over all states) and
        `measured_own` (over its own), in nats with intervals over states; `error`, the median standard error of one
        state's measured change; `pearson` of predicted and measured over its own states; `points`, one for each of its
        own states.
    """
    own = np.sign(advantages * (alpha - 1)) == sign
    relative, _ = relative_surprisal(np.array([state.surprisal for state in states]), before.surprisal)
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


def coefficient_inputs(
    states: Sequence[State], alpha: np.ndarray, entropies: np.ndarray, groups: np.ndarray, min_range: float
) -> dict[str, Any]:
    """Statistics of α's inputs; the first thing to check where AEM has no effect.

    Args:
        states: all states of a rollout.
        alpha: f[N], of their responses.
        entropies: f[N], H̄ of their responses, nats.
        groups: i[N], their rollout groups.
        min_range: nats; groups whose entropies have a smaller range are flat.
    """
    spans = np.array([np.ptp(entropies[groups == g]) for g in np.unique(groups)])
    lengths = np.array([state.tokens for state in states])
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
    return sorted({state.trajectory for state in states})


def _mean(values: np.ndarray) -> dict[str, float] | None:
    return _plain(with_interval(mean, values)) if len(values) else None


def _plain(estimate: Estimate) -> dict[str, float]:
    return {name: float(value) for name, value in estimate._asdict().items()}
