"""Credit of rollouts under every rule: the base algorithm, AEM, its ablations and its neighbours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.advantage import of_returns, over_trajectories, rloo
from aem_jax.analysis.efficiency import decisive_at_low_entropy, share_within
from aem_jax.batch import Batch, BatchLayout, collate, place
from aem_jax.config import components
from aem_jax.config.algorithms import AlgorithmConfig, response_advantages
from aem_jax.credit import AemConfig, Credit, experience, make_credit
from aem_jax.launch.context import RunContext
from aem_jax.learner.objective import AGGREGATIONS
from aem_jax.models import Params
from aem_jax.sharding import slot_shards
from aem_jax.trajectory import Ending, Trajectory

BASE = "base"
"""Name of the rule that the others are compared with."""

Credits = Mapping[str, Callable[..., Any]]
"""Rule → credit function (`make_credit`)."""

Values = Callable[[Params, Batch], jax.Array] | None
"""(parameters, batch) → values of its responses (`values_function`)."""


def rules(algorithm: AlgorithmConfig, min_range: float) -> dict[str, tuple[AlgorithmConfig, AemConfig]]:
    """Rule → base advantages and coefficient: the base algorithm, AEM, its ablations, and its neighbours.

    aem-0.5 and aem-2 have that λ, aem-trajectory and aem-batch that scope.
    """
    aem = AemConfig(min_range=min_range)
    off = replace(aem, strength=0.0)
    return {
        BASE: (algorithm, off),
        "aem": (algorithm, aem),
        "aem-0.5": (algorithm, replace(aem, strength=0.5)),
        "aem-2": (algorithm, replace(aem, strength=2.0)),
        "reversed": (algorithm, replace(aem, variant="reversed")),
        "shuffled": (algorithm, replace(aem, variant="shuffled")),
        "sign": (algorithm, replace(aem, variant="sign")),
        "aem-trajectory": (algorithm, replace(aem, scope="trajectory")),
        "aem-batch": (algorithm, replace(aem, scope="batch")),
        "empg": (replace(algorithm, estimator="empg"), off),
        "gigpo": (replace(algorithm, estimator="gigpo", gamma=0.95), off),
    }


RULES: Sequence[str] = tuple(rules(AlgorithmConfig(), 0.0))
"""Names of all rules."""


@dataclass(frozen=True)
class Step:
    """The responses of one training step, f64[R] each.

    Attributes:
        advantages: rule → scaled advantages.
        coefficients: rule → α.
        unbiased: leave-one-out advantages of their trajectories, in units of return.
        weights: weight of each token of a response in the training loss.
        tokens: lengths in tokens; 0 where a response is not in the loss.
        entropies: H̄, nats; NaN without tokens.
        groups: i64[R], rollout group.
    """

    advantages: Mapping[str, np.ndarray]
    coefficients: Mapping[str, np.ndarray]
    unbiased: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    entropies: np.ndarray
    groups: np.ndarray


class Part(NamedTuple):
    """Some groups of a step: a batch of their episodes alone, on the mesh, and their responses in the step's arrays.

    `response_ids` is the batch's, on the host.
    """

    batch: Batch
    response_ids: np.ndarray
    responses: np.ndarray
    step: int


def credits_of(run: RunContext, chosen: Mapping[str, tuple[AlgorithmConfig, AemConfig]]) -> Credits:
    groups = run.config.rollout.groups_per_step
    return {
        name: make_credit(response_advantages(algorithm), aem, groups, run.mesh)
        for name, (algorithm, aem) in chosen.items()
    }


def step_of(
    run: RunContext,
    params: Params,
    trajectories: Sequence[Trajectory],
    credits: Credits,
    values: Values,
    key: jax.Array,
) -> Step:
    """Credit of one step's episodes under every rule."""
    learner = components.learner(run.config)
    batch = collate(trajectories, _layout(run, len(trajectories)))
    placed = place(batch, run.mesh)
    given = values(params, placed) if values else None
    # One at a time, and what follows on the host's arrays: with many programs under way, the collectives of virtual
    # devices wait for one another.
    results = {name: _responses_of(credit(placed, key, given)[0]) for name, credit in credits.items()}
    of_trajectories = of_returns(over_trajectories, rloo)(experience(batch), run.config.rollout.groups_per_step)
    trajectory = jnp.asarray(batch.response_trajectory)
    packed = batch.response_valid & (jnp.asarray(batch.trajectory_minibatch)[trajectory] >= 0)
    tokens = jnp.where(packed, batch.response_tokens, 0)
    weights = AGGREGATIONS[learner.aggregation](learner)(tokens, trajectory, batch.valid.shape[0])
    host = lambda x: np.asarray(x, np.float64)
    return Step(
        advantages={name: base * alpha for name, (base, alpha, _) in results.items()},
        coefficients={name: alpha for name, (_, alpha, _) in results.items()},
        unbiased=host(of_trajectories),
        weights=host(weights),
        tokens=host(tokens),
        entropies=results[BASE][2],
        groups=np.asarray(batch.group_ids)[batch.response_trajectory],
    )


def _responses_of(credit: Credit) -> tuple[np.ndarray, ...]:
    """Base advantages, coefficients and entropies of the responses, f64[R] each."""
    arrays = jax.device_get((credit.base, credit.coefficients, credit.entropies))
    return tuple(np.asarray(array, np.float64) for array in arrays)


def _layout(run: RunContext, trajectories: int) -> BatchLayout:
    return components.batch_layout(run.config, trajectories, 1, run.policy.config)


def _layout_of_part(run: RunContext, trajectories: int) -> BatchLayout:
    """On a CPU a microbatch has as few rows as the mesh allows: a part then has little padding, and a CPU computes
    single rows faster."""
    layout = _layout(run, trajectories)
    if run.mesh.devices.flat[0].platform != "cpu":
        return layout
    rows = slot_shards(run.mesh)
    return replace(layout, rows=rows, num_microbatches=layout.num_microbatches * layout.rows // rows)


def part_of(run: RunContext, trajectories: Sequence[Trajectory], groups: set[int], step: int) -> Part:
    """The episodes of some groups of a step."""
    own, responses, first = [], [], 0
    for trajectory in trajectories:
        count = 0 if trajectory.ending is Ending.ENV_ERROR else len(trajectory.turns)
        if trajectory.group in groups:
            own.append(trajectory)
            responses += range(first, first + count)
        first += count
    size = run.config.rollout.group_size
    # One shape for a step's halves of two groups and more.
    episodes = size if len(groups) == 1 else max(len(own), -(-run.config.rollout.groups_per_step // 2) * size)
    batch = collate(own, _layout_of_part(run, episodes))
    return Part(place(batch, run.mesh), batch.response_ids, np.array(responses, np.int64), step)


def to_tokens(part: Part, of_responses: np.ndarray) -> np.ndarray:
    """[..., r] → f32[..., M, b, T]: numbers of a part's responses, given to their tokens; 0 elsewhere."""
    numbers = np.zeros((*of_responses.shape[:-1], of_responses.shape[-1] + 1), np.float32)
    numbers[..., :-1] = of_responses
    return numbers[..., part.response_ids]  # −1, outside responses, is the last


def response_facts(steps: Sequence[Step], states: Sequence[np.ndarray]) -> dict[str, Any]:
    """What a coefficient had to work with, over all responses in the loss."""
    over = lambda column: np.concatenate([column(step)[step.tokens > 0] for step in steps])
    base, alpha = (over(lambda s: s.advantages[BASE])), over(lambda s: s.coefficients["aem"])
    entropies, tokens = over(lambda s: s.entropies), over(lambda s: s.tokens)
    offset = max(map(len, states)) + 1
    visited = [
        own[step.tokens > 0] + number * offset for number, (own, step) in enumerate(zip(states, steps, strict=True))
    ]
    within, repeated = share_within(entropies, np.concatenate(visited))
    decisive = decisive_at_low_entropy(over(lambda s: s.advantages["gigpo"]), over(_relative))
    mean = lambda values: float(values.mean()) if len(values) else None
    return {
        "count": len(alpha),
        "tokens": [float(np.quantile(tokens, q)) for q in (0.05, 0.5, 0.95)],
        "entropy": float(entropies.mean()),
        "entropy_within_states": within,
        "repeated": repeated,
        "alpha_positive": mean(alpha[base > 0]),
        "alpha_negative": mean(alpha[base < 0]),
        "decisive_at_low_entropy": decisive,
    }


def _relative(step: Step) -> np.ndarray:
    """H̃ of each response; 0 in a group of equal entropies, NaN without an entropy."""
    relative = np.full(len(step.entropies), np.nan)
    for group in np.unique(step.groups):
        inside = (step.groups == group) & np.isfinite(step.entropies)
        if inside.any():
            values = step.entropies[inside]
            relative[inside] = (values - values.min()) / (np.ptp(values) or 1.0)
    return relative
