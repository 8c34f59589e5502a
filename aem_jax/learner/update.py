"""The jitted update: a batch in, the next state out.

    for each epoch, for each minibatch:
        gradient = Σ over the minibatch's microbatches (a loop of dynamic length: shapes and program never change)
        clip, AdamW

The policy's update and the supervised one differ only in the objective. There is no old-policy pass: `batch.logprobs`
are the sampler's, and `parity_max` measures in every step how far the learner is from them. If it cannot agree (int8
weights, `importance_cap`), the first optimizer step computes the old policy's log-probabilities anyway; only further
steps need a pass for them. The ratio of whole sequences is computed before the loss that uses it: see `sequence.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from aem_jax.advantage import ValueTargets, token_advantages
from aem_jax.batch import Batch, constrained
from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.covariance import selected_tokens
from aem_jax.learner.forward import ForwardConfig, expert_metrics, forward_config, row_loss, row_statistics
from aem_jax.learner.objective import AGGREGATIONS, Objective, Stats, Tokens, policy_objective, supervised_objective
from aem_jax.learner.optimizer import make_schedule, num_updates
from aem_jax.learner.passes import microbatch, rows_of, token_logprobs
from aem_jax.learner.sequence import LEVELS, Level, response_sums
from aem_jax.learner.state import TrainablePolicy, TrainState, abstract_state, combine, policy_optimizer
from aem_jax.learner.value import ValueTokens, first_tokens, value_objective
from aem_jax.losses import Aggregation
from aem_jax.models import Params
from aem_jax.sharding import replicated

Array = jax.Array
Metrics = dict[str, Array]


def make_update(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh, max_age: int | None = None) -> "Update":
    """The policy's update, jitted.

    Args:
        policy: the policy.
        config: optimizer, loss and sizes.
        mesh: the mesh of state and batch.
        max_age: largest age of a token, with carry-over; None without, where batches have no ages.

    Returns:
        update(state, batch, advantages, reference=None, values=None) -> (state, metrics). `state` is donated but for
        its frozen parts. `advantages` are f32[M, b, T]. `reference` are the reference policy's logprobs, f32[M, b, T]
        (`make_token_logprobs`), given exactly if kl_coefficient > 0. `values` are the value head's targets, given
        exactly if the policy has one.
        metrics, f32[] each; means over tokens of all optimizer steps (NaN without tokens), unless stated otherwise:
            loss, grad_norm (of all trainable parameters, before the clip), learning_rate (of the last optimizer step);
            clip_fraction (share of tokens whose ratio was clipped), ratio_mean, ratio_max;
            kl_sampler (of the sampler's distribution from the policy's), kl_reference (of the policy's from the
                reference's, only with one), k3 estimates in nats; entropy (nats);
            value_loss (without its coefficient), value_clip_fraction: means over responses, only with a value head;
            covariance_fraction (share of tokens that the control by covariance acts on), only with covariance;
            importance_mean, importance_capped (share of tokens at the cap), only with importance_cap;
            expert_load_max (load of the fullest expert relative to the mean, mean over layers), expert_entropy (of the
                experts' loads, nats, mean over layers), expert_dropped (0), of all tokens: only with experts;
            parity_flips (share of the recorded experts that the learner's router would not choose, in the first
                minibatch): only with recorded experts;
            parity_max, parity_mean: |learner's − sampler's logprob| in the first minibatch, before any step, nats; of
                tokens of age 0, and likewise parity_age_1_max, … of older ones; NaN where there are none;
            tokens (sampled, of the batch), skipped (optimizer steps without tokens or with a gradient not finite).
    """
    program = make_program(policy, config, mesh, policy_objective(config, max_age or 0), LEVELS[config.ratio])

    def update(
        state: TrainState,
        batch: Batch,
        advantages: Array,
        reference: Array | None = None,
        values: ValueTargets | None = None,
    ) -> tuple[TrainState, Metrics]:
        if (reference is None) == (config.kl_coefficient > 0):
            raise ValueError(
                f"expected reference logprobs exactly when kl_coefficient > 0, got kl_coefficient = "
                f"{config.kl_coefficient} and {'no reference' if reference is None else 'a reference'}"
            )
        if (values is None) == policy.value:
            raise ValueError(
                f"expected values exactly when the policy has a value head, got {'a' if policy.value else 'no'} value "
                f"head and {'no values' if values is None else 'values'}"
            )
        if (batch.ages is None) != (max_age is None):
            got = "none" if batch.ages is None else "ages"
            raise ValueError(
                f"expected a batch with ages exactly with a max_age, got {got} and max_age {max_age}; with carry-over, "
                "give `collate` the step"
            )
        return update_step(program, state, Inputs(batch, state.frozen, advantages, reference, values))

    return Update(update, program)


def make_supervised_update(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh) -> "Update":
    """Cross-entropy on response tokens, jitted; otherwise as `make_update`.

    Returns:
        update(state, batch) -> (state, metrics) with loss, grad_norm, learning_rate, entropy, tokens and skipped.
    """
    program = make_program(policy, config, mesh, supervised_objective())

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return update_step(program, state, Inputs(batch, state.frozen))

    return Update(update, program)


@dataclass(frozen=True)
class Program:
    """The static part of an update.

    Attributes:
        policy: the policy.
        config: optimizer, loss and sizes.
        mesh: the mesh of state and batch.
        forward: settings of the forward passes.
        objective: the loss of a microbatch's tokens.
        sequence: the unit of the ratio; None if every token has its own.
        aggregate: weights of tokens in the loss.
        optimizer: gradient → parameter update.
        state: shardings of the state without frozen parts.
    """

    policy: TrainablePolicy
    config: LearnerConfig
    mesh: Mesh
    forward: ForwardConfig
    objective: Objective
    sequence: Level | None
    aggregate: Aggregation
    optimizer: optax.GradientTransformation
    state: TrainState


def make_program(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh, objective: Objective, sequence: Level | None = None
) -> Program:
    """The static part of an update with this objective."""
    optimizer, aggregate = policy_optimizer(policy, config), AGGREGATIONS[config.aggregation](config)
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(policy, config, mesh).without_frozen())
    return Program(
        policy, config, mesh, forward_config(policy, config, mesh), objective, sequence, aggregate, optimizer, state
    )


class Update:
    """A jitted update that donates the state but for its frozen parts, which other arrays may share.

    Args:
        update: (state, …) -> (state, metrics).
        program: its static part.
    """

    def __init__(self, update: Callable[..., tuple[TrainState, Metrics]], program: Program) -> None:
        def update_trainable(state: TrainState, frozen: Params, *inputs: Any, **named: Any):
            state, metrics = update(replace(state, frozen=frozen), *inputs, **named)
            return state.without_frozen(), metrics

        out_shardings = program.state, replicated(program.mesh)
        self._jitted: Any = jax.jit(update_trainable, out_shardings=out_shardings, donate_argnums=0)

    def __call__(self, state: TrainState, *inputs: Any, **named: Any) -> tuple[TrainState, Metrics]:
        """The next state, with the same frozen parts, and metrics."""
        updated, metrics = self._jitted(state.without_frozen(), state.frozen, *inputs, **named)
        return replace(updated, frozen=state.frozen), metrics

    def lower(self, state: TrainState, *inputs: Any, **named: Any) -> jax.stages.Lowered:
        """The program of a call, to be compiled; arguments may be abstract. It takes the frozen parts after the state
        without them."""
        return self._jitted.lower(state.without_frozen(), state.frozen, *inputs, **named)

    @property
    def compilations(self) -> int:
        """Number of programs compiled so far; constant after warm-up."""
        return self._jitted._cache_size()


class Inputs(NamedTuple):
    """The arrays that an update reads, the same in all its optimizer steps.

    Attributes:
        batch: the batch.
        frozen: the parts of the parameters that are not trained.
        advantages: f32[M, b, T]; None for supervised learning.
        reference: f32[M, b, T], logprobs of the reference policy, nats; None without one.
        values: targets of the value head; None without one.
        old_logprobs: f32[M, b, T], logprobs of the policy before the update, nats; None if no loss needs them.
        selected: bool[M, b, T], tokens of high covariance; None without the control.
    """

    batch: Batch
    frozen: Params
    advantages: Array | None = None
    reference: Array | None = None
    values: ValueTargets | None = None
    old_logprobs: Array | None = None
    selected: Array | None = None


class Minibatch(NamedTuple):
    """One minibatch, as tables of the batch's responses.

    Attributes:
        response_tokens: i32[R], length of each response; 0 outside the minibatch.
        weights: f32[R], weight of each token of a response in the loss.
        value_weights: f32[R], weight of each response in the value loss.
        start: i32[], its first microbatch.
        end: i32[], one after its last.
        log_ratios: f32[R], log-ratio of each response's sequence, nats; None if no separate pass computes it.
        balance: f32[], weight of each token in the balancing loss; None without one.
    """

    response_tokens: Array
    weights: Array
    value_weights: Array
    start: Array
    end: Array
    log_ratios: Array | None = None
    balance: Array | None = None


class Gradient(NamedTuple):
    """Sums over a minibatch's microbatches, or over some of them.

    Attributes:
        gradient: of the trainable parts, float32, in their shardings.
        loss: f32[].
        stats: see `Stats`.
    """

    gradient: Params
    loss: Array
    stats: Stats


def update_step(program: Program, state: TrainState, inputs: Inputs) -> tuple[TrainState, Metrics]:
    """All optimizer steps on one batch, in one scan; see `make_update`."""
    config, num_minibatches = program.config, inputs.batch.minibatch_ends.shape[0]
    if num_minibatches != config.num_minibatches:
        raise ValueError(
            f"expected a batch of {config.num_minibatches} minibatches (LearnerConfig.num_minibatches), got "
            f"{num_minibatches}; set BatchLayout.num_minibatches to the same number"
        )
    batch = constrained(inputs.batch, program.mesh)
    inputs = inputs._replace(batch=batch)
    uses_old = inputs.advantages is not None and (config.importance_cap or config.covariance == "kl")
    if uses_old and config.num_epochs * num_minibatches > 1:
        inputs = inputs._replace(old_logprobs=token_logprobs(program.policy, program.forward, state.params, batch))
    inputs = inputs._replace(selected=selected_tokens(config, batch, inputs.advantages, state.step))
    steps = jnp.arange(config.num_epochs * num_minibatches)
    step = partial(optimizer_step, program, inputs)
    (trainable, opt_state), metrics = jax.lax.scan(step, (state.trainable, state.opt_state), steps)
    state = replace(state, trainable=trainable, opt_state=opt_state, step=state.step + 1)
    return state, summarize(metrics, config.num_epochs)


def optimizer_step(
    program: Program, inputs: Inputs, state: tuple[Params, Any], index: Array
) -> tuple[tuple[Params, Any], Metrics]:
    """One optimizer step on minibatch `index` modulo their number; skipped if its gradient is not finite.

    Returns:
        ((trainable, opt_state), metrics), where means over tokens are still sums.
    """
    trainable, opt_state = state
    minibatch = index % inputs.batch.minibatch_ends.shape[0]
    (gradient, loss, stats), count = minibatch_gradient(program, trainable, inputs, minibatch)
    norm = optax.tree_utils.tree_norm(gradient)
    good = (count > 0) & jnp.isfinite(norm)
    updates, next_opt_state = program.optimizer.update(gradient, opt_state, trainable)
    keep = lambda new, old: jnp.where(good, new, old)
    metrics = {
        **stats.sums,
        **stats.maxima,
        **{name: value * count for name, value in stats.means.items()},
        "loss": loss * count,
        "grad_norm": norm * count,
        "tokens": count,
        "skipped": (~good).astype(jnp.float32),
        "learning_rate": make_schedule(program.config)(num_updates(opt_state)),
    }
    trainable = jax.tree.map(keep, optax.apply_updates(trainable, updates), trainable)
    return (trainable, jax.tree.map(keep, next_opt_state, opt_state)), metrics


def minibatch_gradient(program: Program, trainable: Params, inputs: Inputs, index: Array) -> tuple[Gradient, Array]:
    """Gradient of one minibatch, and its number of sampled tokens, f32[]."""
    minibatch = minibatch_of(program, inputs.batch, index)
    if program.sequence is not None and not program.sequence.in_one_row:
        params = combine(trainable, inputs.frozen)
        minibatch = minibatch._replace(log_ratios=sequence_log_ratios(program, params, inputs, minibatch))
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, program.state.trainable)

    def loss(trainable: Params, m: Array) -> tuple[Array, Stats]:
        return microbatch_loss(program, inputs, minibatch, combine(trainable, inputs.frozen), m)

    def accumulate(m: Array, total: Gradient) -> Gradient:
        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(trainable, m)
        sums = jax.tree.map(jnp.add, total.stats.sums, stats.sums)
        means = jax.tree.map(jnp.add, total.stats.means, stats.means)
        maxima = jax.tree.map(jnp.maximum, total.stats.maxima, stats.maxima)
        gradient = jax.tree.map(jnp.add, total.gradient, gradient)
        return Gradient(constrain(gradient), total.loss + value, Stats(sums, maxima, means))

    _, stats = jax.eval_shape(loss, trainable, jnp.int32(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), Gradient(trainable, jnp.float32(0), stats))
    zeros = zeros._replace(gradient=constrain(zeros.gradient))
    total = jax.lax.fori_loop(minibatch.start, minibatch.end, accumulate, zeros)
    return total, jnp.sum(minibatch.response_tokens).astype(jnp.float32)


def minibatch_of(program: Program, batch: Batch, index: Array) -> Minibatch:
    """Minibatch `index` of a batch: the weights of its tokens depend only on the lengths of its responses."""
    inside = batch.response_valid & (batch.trajectory_minibatch[batch.response_trajectory] == index)
    tokens = jnp.where(inside, batch.response_tokens, 0)
    weights = program.aggregate(tokens, batch.response_trajectory, batch.valid.shape[0])
    value_weights = (tokens > 0) / jnp.maximum(jnp.sum(tokens > 0), 1)
    ends = batch.minibatch_ends
    start, end, balance = jnp.where(index > 0, ends[index - 1], 0), ends[index], None
    if program.config.balance_coefficient:
        own = jnp.arange(batch.segment_ids.shape[0])[:, None, None]
        count = jnp.sum((batch.segment_ids > 0) & (own >= start) & (own < end))
        balance = program.config.balance_coefficient / jnp.maximum(count, 1)
    return Minibatch(tokens, weights, value_weights, start, end, balance=balance)


def sequence_log_ratios(program: Program, params: Params, inputs: Inputs, minibatch: Minibatch) -> Array:
    """Log-ratio of each response's sequence, f32[R], nats, by a forward pass over the minibatch."""
    batch = inputs.batch
    assert program.sequence is not None

    def add_sums(m: Array, sums: Array) -> Array:
        rows = rows_of(batch, m)
        logprobs, _ = row_statistics(program.policy, params, rows, program.forward)
        return sums + response_sums(logprobs, microbatch(batch.logprobs, m), rows.response_ids, sums.shape[0])

    zeros = jnp.zeros(minibatch.weights.shape)
    sums = jax.lax.fori_loop(minibatch.start, minibatch.end, add_sums, zeros)
    table = minibatch.response_tokens, batch.response_trajectory, batch.valid.shape[0]
    return program.sequence.log_ratios(sums, *table)


def microbatch_loss(
    program: Program, inputs: Inputs, minibatch: Minibatch, params: Params, m: Array
) -> tuple[Array, Stats]:
    """Microbatch m's part of its minibatch's loss, and its stats."""
    batch = inputs.batch
    rows = rows_of(batch, m)
    optional = lambda packed: None if packed is None else microbatch(packed, m)
    weights = to_tokens(minibatch.weights, rows.response_ids)
    tokens = Tokens(
        mask=weights > 0,
        weights=weights,
        logprobs=microbatch(batch.logprobs, m),
        advantages=optional(inputs.advantages),
        reference=optional(inputs.reference),
        old_logprobs=optional(inputs.old_logprobs),
        sequence=None if minibatch.log_ratios is None else to_tokens(minibatch.log_ratios, rows.response_ids),
        ages=optional(batch.ages),
        selected=optional(inputs.selected),
    )

    def row_log_ratios(logprobs: Array, sampled: Array, response_ids: Array) -> Array:
        """Log-ratio of each token's sequence, computed from the row that contains the sequence."""
        assert program.sequence is not None
        table = minibatch.response_tokens, batch.response_trajectory, batch.valid.shape[0]
        sums = response_sums(logprobs, sampled, response_ids, minibatch.response_tokens.shape[0])
        return to_tokens(program.sequence.log_ratios(sums, *table), response_ids)

    value = None
    if inputs.values is not None:
        tables = minibatch.value_weights, *inputs.values
        value_weights, *targets = (to_tokens(table, rows.response_ids) for table in tables)
        value_tokens = ValueTokens(value_weights * first_tokens(rows.response_ids), *targets)
        value = value_objective(program.config), value_tokens
    return row_loss(
        program.policy,
        params,
        rows,
        tokens,
        program.objective,
        program.forward,
        row_log_ratios if program.sequence is not None and program.sequence.in_one_row else None,
        value,
        minibatch.balance,
    )


def summarize(metrics: Metrics, num_epochs: int) -> Metrics:
    """[optimizer steps] sums over tokens → the update's means, maxima and last values; NaN without tokens."""
    count = jnp.sum(metrics["tokens"])
    measured = lambda value: jnp.where(count > 0, value, jnp.nan)
    experts = {name: measured(value) for name, value in expert_metrics(metrics).items()}
    metrics = {name: value for name, value in metrics.items() if not name.startswith("expert_")}
    summary = {name: jnp.sum(value) / count for name, value in metrics.items() if not name.startswith("parity_")}
    summary |= {
        "tokens": count / num_epochs,
        "skipped": jnp.sum(metrics["skipped"]),
        "learning_rate": metrics["learning_rate"][-1],
    }
    if "parity_mean" in metrics:
        summary |= {"ratio_max": measured(jnp.max(metrics["ratio_max"])), **_parity(metrics)}
    return summary | experts


def _parity(metrics: Metrics) -> Metrics:
    """Parity of the first optimizer step, by age where tokens have one; NaN without tokens."""
    first = {name: value[0] for name, value in metrics.items()}
    first.setdefault("parity_tokens", first["tokens"])
    result = {}
    for name in (name.removesuffix("_tokens") for name in first if name.startswith("parity_") and "_tokens" in name):
        count = first[f"{name}_tokens"]
        result[f"{name}_mean"] = first[f"{name}_mean"] / count
        result[f"{name}_max"] = jnp.where(count > 0, first[f"{name}_max"], jnp.nan)
    return result


def to_tokens(per_response: Array, response_ids: Array) -> Array:
    """f32[R] → f32[b, T]: each token has the number of its response, 0 outside responses."""
    return token_advantages(per_response, response_ids)
