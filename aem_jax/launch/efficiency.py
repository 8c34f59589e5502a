"""The gain of return per unit of step size of credit rules, on a run's policy: measured at a checkpoint, or live.

`analyze RUN --efficiency True` plays rollouts from a checkpoint and compares all rules (`measure`). A training step
compares AEM with the base algorithm on two halves of its own groups (`make_live`).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.analysis.efficiency import Efficiency, Products, distinct, efficiencies
from aem_jax.analysis.estimates import Estimate
from aem_jax.analysis.states import states_of
from aem_jax.config import components
from aem_jax.envs.protocol import Task
from aem_jax.errors import ConfigError
from aem_jax.launch.context import RunContext, values_function
from aem_jax.launch.rules import (
    BASE,
    RULES,
    Part,
    Step,
    credits_of,
    part_of,
    response_facts,
    rules,
    step_of,
    to_tokens,
)
from aem_jax.learner import LearnerConfig, TrainState
from aem_jax.learner.gradients import (
    Gradient,
    flattened,
    make_gradient,
    make_vectors,
    projected,
    second_moments,
    weighted_entropies,
    weighted_logprobs,
)
from aem_jax.models import Params
from aem_jax.rollout import check_some_played
from aem_jax.trajectory import Trajectory

MAX_BYTES = 7 * 2**30
"""Largest total size of stored gradients."""

STORED = 6
"""Stored gradients of each group, beside those that are computed together: of ∇J, of ∇H̄, of the base rule, of the rule
at hand and the one before it, and a copy."""

UNDER_WAY_BYTES = 2**30
"""Largest total size of the gradients that are computed at the same time."""

IN_A_SET, AT_ONCE = 5, 4
"""Most gradients of one program, and most programs at the same time."""

Column = Callable[[Step], np.ndarray]
"""Numbers of a step's responses, f64[R], that a gradient weights their log-probabilities with."""


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
        chosen: names of the rules to compare; the base rule is always among them.
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
    in_a_set = _set_size(state, count * per_step, sketch)
    known, compared = rules(run.config.algorithm, min_range), {BASE, *chosen}
    needed = {name: rule for name, rule in known.items() if name in compared | {"aem", "gigpo"}}
    decode, credits = run.reshard(state.params), credits_of(run, needed)
    values = values_function(run)
    steps, parts, states, played = [], [], [], []
    for number in range(count):
        run.stop.check()
        tasks = _tasks(run, per_step, (seed, number))
        trajectories, stats = run.rollout(decode, tasks, jax.random.fold_in(key, number))
        check_some_played(trajectories, stats, "the analysis")
        run.report("play", number + 1, count, {})
        steps.append(step_of(run, state.params, trajectories, credits, values, jax.random.fold_in(key, number)))
        parts += [part_of(run, trajectories, {group}, number) for group in range(per_step)]
        states.append(_states(run, trajectories, len(steps[-1].tokens)))
        played += [t for t in trajectories if not t.is_left_out]
    names = [name for name in known if name in compared]
    to_vector = partial(projected, size=sketch, key=jax.random.fold_in(key, count)) if sketch else flattened
    products, geometry = _products(run, state, steps, parts, names, to_vector, in_a_set, plain)
    estimates = efficiencies(products, np.array([part.step for part in parts]), per_step)
    return {
        "geometry": geometry,
        "sketch": sketch,
        "groups": len(parts),
        "episodes": len(played),
        "success": float(np.mean([t.success for t in played])),
        "return": float(np.mean([t.total_reward for t in played])),
        "rules": {name: _plain(estimate) for name, estimate in estimates.items()},
        "responses": response_facts(steps, states),
    }


def make_live(run: RunContext) -> Callable[[TrainState, Sequence[Trajectory], jax.Array], dict[str, float]]:
    """Builds `live(state, trajectories, key) -> metrics`: AEM against the base algorithm on a step's own episodes.

        e = (⟨g_A, u_B⟩ + ⟨g_B, u_A⟩) / ‖g_A + g_B‖      ρ = e of AEM / e of the base      A, B: halves of the groups

    g_A + g_B is the step's gradient with the rule, and u_A is the estimate of ∇J from half A. AEM is that of the run;
    with a strength of 0, that of strength 1. u is estimated from the step's episodes after their selection: with
    `selection.truncated` mask or drop it lacks those that ended at a limit, and is biased. It computes three gradients
    of each half. One step's ρ is noisy: average the two gains over steps before you divide them. There are no metrics
    where the step has fewer than two groups. ρ is NaN where the gain of the base algorithm is 0 or not defined: where
    no group of a half has different returns.
    """
    config = run.config
    every = rules(config.algorithm, config.aem.min_range)
    chosen = {BASE: every[BASE], "aem": (config.algorithm, config.aem) if config.aem.strength else every["aem"]}
    credits, values, learner = credits_of(run, chosen), values_function(run), _learner(run)
    gradient = make_gradient(replace(run.policy, value=False), learner, run.mesh, weighted_logprobs)
    vectors = make_vectors(gradient, run.mesh)

    @jax.jit
    def gains_of(a: jax.Array, b: jax.Array) -> jax.Array:
        """f32[rules] of the halves' vectors, f32[1 + rules, n] each, ∇J first."""
        product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        return (product(a[1:], b[0]) + product(b[1:], a[0])) / jnp.linalg.norm(a[1:] + b[1:], axis=1)

    def live(state: TrainState, trajectories: Sequence[Trajectory], key: jax.Array) -> dict[str, float]:
        groups = list(dict.fromkeys(t.group for t in trajectories))
        if len(groups) < 2:
            return {}
        step = step_of(run, state.params, trajectories, credits, values, key)
        trainable = _trainable(state)
        moments = second_moments(state.opt_state, learner)
        ones = jax.tree.map(jnp.ones_like, trainable)
        scale = ones if moments is None else _inverse_roots({name: moments[name] for name in trainable}, learner)
        weighted = [step.weights * step.advantages[name] for name in chosen]
        halves = []
        for half in range(2):
            own = set(groups[half::2])
            part = part_of(run, trajectories, own, 0)
            columns = np.stack([step.unbiased / (len(own) * config.rollout.group_size), *weighted])
            weights = to_tokens(part, columns[:, part.responses])
            halves.append(jax.block_until_ready(vectors(trainable, state.frozen, part.batch, weights, scale)))
        gains = dict(zip(chosen, jax.device_get(gains_of(*halves)).tolist(), strict=True))
        ratio = gains["aem"] / gains[BASE] if gains[BASE] else float("nan")
        return {"aem/efficiency": ratio, "aem/gain": gains["aem"], "aem/gain_base": gains[BASE]}

    return live


def _tasks(run: RunContext, count: int, seed: Sequence[int]) -> list[Task]:
    picked = np.random.default_rng(seed).integers(len(run.suite.training), size=count)
    return [run.suite.training[int(index)] for index in picked]


def _set_size(state: TrainState, groups: int, sketch: int) -> int:
    """Number of gradients of a group that one program computes, as far as those of all groups fit into memory.

    Raises:
        ConfigError: the gradients do not fit into memory.
    """
    numbers = _size(state)
    size = 4 * groups * (sketch or numbers)
    if (STORED + 1) * size > MAX_BYTES:
        raise ConfigError(
            f"--sketch: expected a projection, got exact gradients of {numbers:,} parameters in {groups} groups, which "
            f"take {(STORED + 1) * size / 2**30:.0f} GiB; set --sketch 65536"
        )
    return min(MAX_BYTES // size - STORED, IN_A_SET)


def _together(run: RunContext, state: TrainState, in_a_set: int) -> int:
    """Number of a set's gradients that are computed at the same time; see `make_vectors`."""
    if run.mesh.devices.flat[0].platform != "cpu" or run.policy.config.mixture is not None:
        return 1
    return max(1, min(UNDER_WAY_BYTES // (4 * _size(state)), in_a_set))


def _size(state: TrainState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(_trainable(state)))


def _learner(run: RunContext) -> LearnerConfig:
    """Gradients of the objective alone: the balancing loss of experts does not depend on credit, and the covariance
    control acts on steps after the first."""
    return replace(components.learner(run.config), num_minibatches=1, balance_coefficient=0.0, covariance="off")


def _trainable(state: TrainState) -> Params:
    """The policy's trainable parts: a value head has no part in ∇J."""
    return {name: part for name, part in state.trainable.items() if name != "value"}


def _products(
    run: RunContext,
    state: TrainState,
    steps: Sequence[Step],
    parts: Sequence[Part],
    names: Sequence[str],
    to_vector: Callable[[Params], jax.Array],
    in_a_set: int,
    plain: bool,
) -> tuple[dict[str, Products], str]:
    """Inner products of all rules' gradients, and the name of their geometry."""
    rollout, trainable = run.config.rollout, _trainable(state)
    make = lambda objective: make_gradient(replace(run.policy, value=False), _learner(run), run.mesh, objective)
    of_logprobs = make(weighted_logprobs)
    scale, geometry = _scale(run, state, trainable, steps, parts, of_logprobs, plain)
    tokens = sum(step.tokens.sum() for step in steps) / len(parts)
    # A group's share of a step's gradient, times m: its mean is the step's gradient.
    rule = lambda name: lambda step: rollout.groups_per_step * step.weights * step.advantages[name]
    others = [name for name in names if name != BASE]
    columns = [lambda step: step.unbiased / rollout.group_size, *map(rule, (BASE, *others))]
    sets = [columns[first : first + in_a_set] for first in range(0, len(columns), in_a_set)]
    done, total = 0, (len(sets) + 1) * len(parts)
    # A program of a small policy keeps one core busy, so several run at once. With several devices one does: with many
    # programs under way, the collectives of virtual devices wait for one another.
    together = _together(run, state, in_a_set)
    under_way = UNDER_WAY_BYTES // (4 * _size(state) * together)
    at_once = max(1, min(under_way, AT_ONCE)) if run.mesh.size == 1 else 1
    zeros = jnp.zeros((1, *jax.eval_shape(to_vector, trainable).shape), jnp.float32)

    def gradients(vectors: Callable[..., jax.Array], columns: Sequence[Column]) -> Iterator[jax.Array]:
        """f32[groups, n] of each column: gradients of all groups, from numbers of a step's responses."""
        nonlocal done
        tables = [np.stack([of(steps[part.step])[part.responses] for of in columns]) for part in parts]
        merged = [distinct(table) for table in tables]
        most, rows = max(1, *(len(rows) for rows, _ in merged)), list[jax.Array]()
        for part, (kept, _) in zip(parts, merged, strict=True):
            run.stop.check()
            if len(kept):
                count = most if len(kept) > 1 else 1  # two programs: where α is 1, most rules have one gradient
                weights = to_tokens(part, np.pad(kept, ((0, count - len(kept)), (0, 0))))
                rows.append(vectors(trainable, state.frozen, part.batch, weights, scale))
                jax.block_until_ready(rows[-at_once:][0])
            else:  # a group of equal returns
                rows.append(zeros)
            done += 1
            run.report("gradients", done, total, {})
        for column in range(len(columns)):
            scaled = [(row, *multiples[column]) for row, (_, multiples) in zip(rows, merged, strict=True)]
            yield jnp.stack([factor * row[index] for row, index, factor in scaled])

    product = jax.jit(partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST))
    inner = lambda x, y: np.asarray(product(x, y.T), np.float64)
    of_entropies = make_vectors(make(weighted_entropies), run.mesh, to_vector)
    entropy = next(gradients(of_entropies, [lambda step: (step.tokens > 0) / tokens]))
    of_rules = make_vectors(of_logprobs, run.mesh, to_vector, together=together)
    every = chain.from_iterable(gradients(of_rules, columns) for columns in sets)
    gain, base = next(every), next(every)
    products_of = lambda own: Products(*(inner(own, other) for other in (own, base, gain, entropy)))
    products = {BASE: products_of(base)}
    return products | {name: products_of(own) for name, own in zip(others, every, strict=True)}, geometry


def _scale(
    run: RunContext,
    state: TrainState,
    trainable: Params,
    steps: Sequence[Step],
    parts: Sequence[Part],
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
        gradients = (
            of_batch(trainable, state.frozen, part.batch, to_tokens(part, signed[part.responses])) for part in own
        )
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


def _plain(estimate: Efficiency) -> dict[str, Any]:
    """As JSON: numbers with their intervals."""
    as_json = lambda value: value._asdict() if isinstance(value, Estimate) else value
    return {field.name: as_json(getattr(estimate, field.name)) for field in dataclasses.fields(estimate)}
