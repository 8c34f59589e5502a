"""The gain of return per unit of step size of credit rules, on a run's policy: measured at a checkpoint, or live.

`analyze RUN --efficiency True` plays rollouts from a checkpoint and compares all rules (`measure`). A training step
compares AEM with the base algorithm on two halves of its own groups (`make_live`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.advantage import of_returns, over_trajectories, rloo, token_advantages
from aem_jax.analysis.efficiency import (
    Efficiency,
    Products,
    decisive_at_low_entropy,
    efficiencies,
    share_within,
)
from aem_jax.analysis.estimates import Estimate
from aem_jax.analysis.states import states_of
from aem_jax.batch import Batch, BatchLayout, collate, place
from aem_jax.config import components
from aem_jax.config.algorithms import AlgorithmConfig, response_advantages
from aem_jax.credit import AemConfig, Credit, experience, make_credit
from aem_jax.envs.protocol import Task
from aem_jax.errors import ConfigError
from aem_jax.launch.context import RunContext, values_function
from aem_jax.learner import LearnerConfig, TrainState
from aem_jax.learner.gradients import (
    Gradient,
    make_gradient,
    make_vector,
    second_moments,
    weighted_entropies,
    weighted_logprobs,
)
from aem_jax.learner.objective import AGGREGATIONS
from aem_jax.models import Params
from aem_jax.rollout import check_some_played
from aem_jax.trajectory import Ending, Trajectory

BASE = "base"
MAX_BYTES = 4 * 2**30
"""Of the gradients that are kept in memory."""

AT_ONCE = 4
"""Gradients that are computed at the same time, on one device."""

Credits = Mapping[str, Callable[..., Any]]
"""Rule → credit function (`make_credit`)."""

Values = Callable[[Params, Batch], jax.Array] | None
"""(parameters, batch) → values of its responses (`values_function`)."""


RULES = (
    *(BASE, "aem", "aem-0.5", "aem-2", "reversed", "shuffled", "sign", "aem-trajectory", "aem-batch"),
    *("empg", "gigpo"),
)
"""Names of all rules; those of `rules`."""


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


@dataclass(frozen=True)
class _Step:
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


class _Part(NamedTuple):
    """Some groups of a step: a batch of their episodes alone, on the mesh, and their responses in the step's arrays.

    `response_ids` is the batch's, on the host.
    """

    batch: Batch
    response_ids: np.ndarray
    responses: np.ndarray
    step: int


def measure(
    run: RunContext,
    state: TrainState,
    *,
    groups: int,
    chosen: Sequence[str] = RULES,
    min_range: float,
    seed: int,
    sketch: int,
    plain: bool,
) -> dict[str, Any]:
    """Plays rollouts with the policy and compares the credit rules on them.

    Args:
        run: the run.
        state: its state at the step to analyse.
        groups: number of rollout groups to play, rounded up to whole training steps, at least two.
        chosen: names of the rules to compare, beside those that the statistics of responses need (base, aem, gigpo).
        min_range: of AEM's coefficients, nats.
        seed: of the tasks, the episodes and the projection.
        sketch: numbers that a gradient is projected to; 0: exact.
        plain: Euclidean geometry in place of Adam's.

    Returns:
        The numbers, as JSON.

    Raises:
        ConfigError: the gradients do not fit into memory.
    """
    per_step, key = run.config.rollout.groups_per_step, jax.random.fold_in(run.key("evaluate"), seed + 1)
    count = max(-(-groups // per_step), 2)
    _check_memory(state, count * per_step, sketch)
    known, compared = rules(run.config.algorithm, min_range), {BASE, *chosen}
    needed = {name: rule for name, rule in known.items() if name in compared | {"aem", "gigpo"}}
    decode, credits = run.reshard(state.params), _credits(run, needed)
    values = values_function(run)
    steps, parts, states, played = [], [], [], []
    for number in range(count):
        run.stop.check()
        tasks = _tasks(run, per_step, (seed, number))
        trajectories, stats = run.rollout(decode, tasks, jax.random.fold_in(key, number))
        check_some_played(trajectories, stats, "the analysis")
        run.report("play", number + 1, count, {})
        steps.append(_step(run, state.params, trajectories, credits, values, jax.random.fold_in(key, number)))
        parts += [_part(run, trajectories, {group}, number) for group in range(per_step)]
        states.append(_states(run, trajectories, len(steps[-1].tokens)))
        played += [t for t in trajectories if t.ending is not Ending.ENV_ERROR]
    names = [name for name in known if name in compared]
    products, geometry = _products(run, state, steps, parts, names, jax.random.fold_in(key, count), sketch, plain)
    estimates = efficiencies(products, np.array([part.step for part in parts]), per_step, seed=seed)
    return {
        "geometry": geometry,
        "sketch": sketch,
        "groups": len(parts),
        "episodes": len(played),
        "success": float(np.mean([t.success for t in played])),
        "return": float(np.mean([t.total_reward for t in played])),
        "rules": {name: _plain(estimate) for name, estimate in estimates.items()},
        "responses": _responses(steps, states),
    }


def make_live(run: RunContext) -> Callable[[TrainState, Sequence[Trajectory], jax.Array], dict[str, float]]:
    """Builds `live(state, trajectories, key) -> metrics`: AEM against the base algorithm on a step's own episodes.

        ρ = (⟨g_A, u_B⟩ + ⟨g_B, u_A⟩ of AEM) / (… of the base), each over ‖g_A + g_B‖        A, B: halves of the groups

    It computes six gradients, each of half the groups. One step's ρ is noisy: average the two gains over steps before
    you divide them. The metrics are empty where the step has fewer than two groups, and NaN where no group of a half
    has different returns.
    """
    every = rules(run.config.algorithm, run.config.aem.min_range)
    chosen = {name: every[name] for name in (BASE, "aem")}
    credits, values, learner = _credits(run, chosen), values_function(run), _learner(run)
    vector = make_vector(
        make_gradient(replace(run.policy, value=False), learner, run.mesh, weighted_logprobs), run.mesh
    )

    def live(state: TrainState, trajectories: Sequence[Trajectory], key: jax.Array) -> dict[str, float]:
        numbers = list(dict.fromkeys(t.group for t in trajectories))
        if len(numbers) < 2:
            return {}
        step = _step(run, state.params, trajectories, credits, values, key)
        halves = [_part(run, trajectories, set(numbers[i::2]), 0) for i in range(2)]
        trainable = _trainable(state)
        moments = second_moments(state.opt_state, learner)
        ones = jax.tree.map(jnp.ones_like, trainable)
        scale = ones if moments is None else _inverse_roots({name: moments[name] for name in trainable}, learner)
        vector_of = lambda half, numbers: vector(trainable, state.frozen, half.batch, _to_tokens(half, numbers), scale)
        of = lambda numbers: [jax.block_until_ready(vector_of(half, numbers)) for half in halves]
        u, gains = of(step.unbiased), {}
        for name in chosen:
            g = of(step.weights * step.advantages[name])
            gains[name] = (jnp.vdot(g[0], u[1]) + jnp.vdot(g[1], u[0])) / jnp.linalg.norm(g[0] + g[1])
        host = {name: float(value) for name, value in jax.device_get(gains).items()}
        ratio = host["aem"] / host[BASE] if host[BASE] else float("nan")
        return {"aem/efficiency": ratio, "aem/gain": host["aem"], "aem/gain_base": host[BASE]}

    return live


def _tasks(run: RunContext, count: int, seed: Sequence[int]) -> list[Task]:
    picked = np.random.default_rng(seed).integers(len(run.suite.training), size=count)
    return [run.suite.training[int(index)] for index in picked]


def _check_memory(state: TrainState, groups: int, sketch: int) -> None:
    numbers = sketch or sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    if (size := 4 * groups * numbers * 4) > MAX_BYTES:
        raise ConfigError(
            f"--sketch: expected a projection, got exact gradients of {numbers:,} parameters in {groups} groups, which "
            f"take {size / 2**30:.0f} GiB; set --sketch 65536"
        )


def _learner(run: RunContext) -> LearnerConfig:
    return replace(components.learner(run.config), num_minibatches=1)


def _trainable(state: TrainState) -> Params:
    """The policy's trainable parts: a value head has no part in ∇J."""
    return {name: part for name, part in state.trainable.items() if name != "value"}


def _credits(run: RunContext, chosen: Mapping[str, tuple[AlgorithmConfig, AemConfig]]) -> Credits:
    groups = run.config.rollout.groups_per_step
    return {
        name: make_credit(response_advantages(algorithm), aem, groups, run.mesh)
        for name, (algorithm, aem) in chosen.items()
    }


def _step(
    run: RunContext,
    params: Params,
    trajectories: Sequence[Trajectory],
    credits: Credits,
    values: Values,
    key: jax.Array,
) -> _Step:
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
    return _Step(
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


def _part(run: RunContext, trajectories: Sequence[Trajectory], groups: set[int], step: int) -> _Part:
    """The episodes of some groups of a step."""
    own, responses, first = [], [], 0
    for trajectory in trajectories:
        count = 0 if trajectory.ending is Ending.ENV_ERROR else len(trajectory.turns)
        if trajectory.group in groups:
            own.append(trajectory)
            responses += range(first, first + count)
        first += count
    size = run.config.rollout.group_size
    # Halves of a step have one shape, whatever their number of groups.
    episodes = size if len(groups) == 1 else max(len(own), -(-run.config.rollout.groups_per_step // 2) * size)
    batch = collate(own, _layout(run, episodes))
    return _Part(place(batch, run.mesh), batch.response_ids, np.array(responses, np.int64), step)


def _to_tokens(part: _Part, of_step: np.ndarray) -> jax.Array:
    """f32[M, b, T]: numbers of a step's responses, given to the tokens of one of its parts."""
    numbers = np.zeros(part.batch.response_valid.shape[0], np.float32)
    numbers[: len(part.responses)] = of_step[part.responses]
    return token_advantages(numbers, part.response_ids)


def _products(
    run: RunContext,
    state: TrainState,
    steps: Sequence[_Step],
    parts: Sequence[_Part],
    names: Sequence[str],
    key: jax.Array,
    sketch: int,
    plain: bool,
) -> tuple[dict[str, Products], str]:
    """Inner products of all rules' gradients, and the name of their geometry."""
    config, trainable = run.config, _trainable(state)
    per_step, size = config.rollout.groups_per_step, config.rollout.group_size
    make = lambda objective: make_gradient(replace(run.policy, value=False), _learner(run), run.mesh, objective)
    of_logprobs, of_entropies = make(weighted_logprobs), make(weighted_entropies)
    vector, entropy_vector = (
        make_vector(gradient, run.mesh, sketch, key if sketch else None) for gradient in (of_logprobs, of_entropies)
    )
    done, total = 0, (len(names) + 2) * len(parts)
    tokens = sum(step.tokens.sum() for step in steps) / len(parts)
    size_of_vector = sketch or sum(leaf.size for leaf in jax.tree.leaves(trainable))
    # A program of a small policy keeps one core busy, so several run at once. With several devices one does: with many
    # programs under way, the collectives of virtual devices wait for one another.
    at_once = AT_ONCE if run.mesh.size == 1 else 1
    scale, geometry = _scale(run, state, trainable, steps, parts, of_logprobs, plain)

    def vectors(vector: Callable[..., jax.Array], of_step: Callable[[_Step], np.ndarray]) -> jax.Array:
        """f32[M, n]: the gradient of each group, from numbers of a step's responses."""
        nonlocal done
        rows = []
        for part in parts:
            run.stop.check()
            numbers = of_step(steps[part.step])
            if np.any(numbers[part.responses]):
                weights = _to_tokens(part, numbers)
                rows.append(vector(trainable, state.frozen, part.batch, weights, scale))
                jax.block_until_ready(rows[-at_once:][0])
            else:  # a group of equal returns
                rows.append(jnp.zeros(size_of_vector, jnp.float32))
            done += 1
            run.report("gradients", done, total, {})
        return jnp.stack(rows)

    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    inner = lambda x, y: np.asarray(product(x, y.T), np.float64)
    # A group's share of a step's gradient, times m: its mean is the step's gradient.
    of_rule = lambda name: vectors(vector, lambda step: per_step * step.weights * step.advantages[name])
    gain = vectors(vector, lambda step: step.unbiased / size)
    entropy = vectors(entropy_vector, lambda step: (step.tokens > 0) / tokens)
    base, products = of_rule(BASE), {}
    for name in names:
        own = base if name == BASE else of_rule(name)
        products[name] = Products(*(inner(own, other) for other in (own, base, gain, entropy)))
    return products, geometry


def _scale(
    run: RunContext,
    state: TrainState,
    trainable: Params,
    steps: Sequence[_Step],
    parts: Sequence[_Part],
    gradient: Gradient,
    plain: bool,
) -> tuple[Params, str]:
    """The preconditioner and its name: none, or Adam's.

    Adam's second moments are those after one more step, β₂ v̂ + (1 − β₂) f, and f alone before the first step. f is the
    second moment of gradients whose responses have advantages of random sign and the base rule's mean square: it is not
    0 where some rule has a gradient and the base rule has none.
    """
    if plain:
        return jax.tree.map(jnp.ones_like, trainable), "plain"
    learner, of_batch, rng = components.learner(run.config), jax.jit(gradient), np.random.default_rng(0)
    size = np.sqrt(np.mean(np.concatenate([step.advantages[BASE][step.tokens > 0] for step in steps]) ** 2))
    add_square = jax.jit(lambda total, g: jax.tree.map(lambda t, x: t + jnp.square(x), total, g))
    total = jax.tree.map(jnp.zeros_like, trainable)
    for number, step in enumerate(steps):
        signed = step.weights * size * rng.choice((-1.0, 1.0), len(step.weights))
        own = [part for part in parts if part.step == number]
        gradients = (of_batch(trainable, state.frozen, part.batch, _to_tokens(part, signed)) for part in own)
        summed = reduce(lambda x, y: jax.block_until_ready(jax.tree.map(jnp.add, x, y)), gradients)
        total = jax.block_until_ready(add_square(total, summed))
    moments = jax.tree.map(lambda t: t / len(steps), total)
    name = "Adam, with second moments of this rollout's gradients"
    if (known := second_moments(state.opt_state, learner)) is not None:
        blend = lambda v, f: learner.beta2 * v + (1 - learner.beta2) * f
        moments = {part: jax.tree.map(blend, known[part], moments[part]) for part in trainable}
        name = "Adam, with the run's second moments"
    return _inverse_roots(moments, learner), name


def _inverse_roots(moments: Params, learner: LearnerConfig) -> Params:
    """1 / (√v̂ + ε) for each parameter."""
    return jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + learner.adam_eps), moments)


def _states(run: RunContext, trajectories: Sequence[Trajectory], count: int) -> np.ndarray:
    """A number for each of `count` responses, equal for responses of a group to the same context; −1 without tokens."""
    numbers, known = np.full(count, -1), {}
    for state in states_of(trajectories, run.config.rollout.response_tokens, run.config.rollout.context_tokens):
        numbers[state.response] = known.setdefault((state.group, state.context.tobytes()), len(known))
    return numbers


def _responses(steps: Sequence[_Step], states: Sequence[np.ndarray]) -> dict[str, Any]:
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


def _relative(step: _Step) -> np.ndarray:
    """H̃ of each response; 0 in a group of equal entropies, NaN without an entropy."""
    relative = np.full(len(step.entropies), np.nan)
    for group in np.unique(step.groups):
        inside = (step.groups == group) & np.isfinite(step.entropies)
        if inside.any():
            values = step.entropies[inside]
            relative[inside] = (values - values.min()) / (np.ptp(values) or 1.0)
    return relative


def _plain(estimate: Efficiency) -> dict[str, Any]:
    """As JSON: numbers with their intervals."""
    as_json = lambda value: value._asdict() if isinstance(value, Estimate) else value
    return {field.name: as_json(getattr(estimate, field.name)) for field in dataclasses.fields(estimate)}
