"""The jitted update: a batch in, the next state out.

    for each epoch, for each minibatch:
        gradient = Σ over the minibatch's microbatches (a loop of dynamic length: shapes and program never change)
        clip, AdamW

The policy's update and the supervised one differ by the objective alone. There is no old-policy pass: `batch.logprobs`
are those of the sampler, and `parity_max` measures in every step that the learner agrees with them. Where it is known
not to (int8 weights, `importance_cap`), the first optimizer step has the old policy at hand; only further ones make a
pass for it. The ratio of whole sequences is measured before the loss that needs it: see `sequence.py`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from aem_jax.advantage import ValueTargets, token_advantages
from aem_jax.batch import Batch, batch_shardings, packed_sharding
from aem_jax.learner.config import LearnerConfig
from aem_jax.learner.forward import REMAT, Computation, Rows, row_loss, row_statistics, row_values
from aem_jax.learner.head import HeadLayout
from aem_jax.learner.objective import AGGREGATIONS, Measures, Objective, Tokens, policy_objective, supervised_objective
from aem_jax.learner.optimizer import make_optimizer, make_schedule, num_updates
from aem_jax.learner.sequence import LEVELS, Level, response_sums
from aem_jax.learner.state import Params, TrainablePolicy, TrainState, abstract_state
from aem_jax.learner.value import ValueTokens, add_values, first_tokens, value_objective
from aem_jax.models import ValuePolicy
from aem_jax.models.kernels import make_row_attention
from aem_jax.sharding import TRAIN, partition, replicated, slot_shards

Stats = dict[str, jax.Array]


def make_update(policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh) -> Callable[..., tuple[TrainState, Stats]]:
    """The policy's update, jitted.

    Args:
        policy: the policy.
        config: optimizer, loss and sizes.
        mesh: the mesh that state and batch lie on.

    Returns:
        update(state, batch, advantages, reference=None, frozen=None, values=None) -> (state, stats). `state` is
        donated: the old one is gone. `advantages` are f32[M, b, T]; so are `reference`, the reference policy's logprobs
        (`make_token_logprobs`), which are given exactly if kl_coefficient > 0. `frozen` are the weights that the policy
        has beside those it trains, in the train layout; they are read, never changed, and not donated. `values`, what a
        value head learns from, are given exactly if the policy has one.
        stats, f32[] each; means over tokens, of all optimizer steps unless said otherwise:
            loss, grad_norm (of all that is trained, before the clip), learning_rate (of the last optimizer step);
            clip_fraction (share of tokens whose ratio was clipped), ratio_mean, ratio_max;
            kl_sampler, kl_reference (k3 estimates, nats; the latter only with a reference), entropy (nats);
            value_loss (without its coefficient), value_clip_fraction: means over responses, with a value head alone;
            importance_mean, importance_capped (share of tokens at the cap), with importance_cap alone;
            parity_max, parity_mean: |learner's − sampler's logprob| in the first minibatch, before any step, nats;
            tokens (sampled, of the batch), skipped (optimizer steps left out: no token, or a gradient not finite).
    """
    step = _make_step(policy, config, mesh, policy_objective(config), LEVELS[config.ratio])

    def update(
        state: TrainState,
        batch: Batch,
        advantages: jax.Array,
        reference: jax.Array | None = None,
        frozen: Params | None = None,
        values: ValueTargets | None = None,
    ) -> tuple[TrainState, Stats]:
        if (reference is None) == (config.kl_coefficient > 0):
            raise ValueError(
                f"expected reference logprobs exactly when kl_coefficient > 0, got kl_coefficient = "
                f"{config.kl_coefficient} and {'no reference' if reference is None else 'a reference'}"
            )
        if (values is None) == isinstance(policy, ValuePolicy):
            raise ValueError(
                f"expected values exactly when the policy has a value head, got {type(policy).__name__} and "
                f"{'no values' if values is None else 'values'}"
            )
        return step(state, batch, advantages, reference, frozen, values)

    return _jit(update, policy, config, mesh)


def make_supervised_update(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh
) -> Callable[..., tuple[TrainState, Stats]]:
    """Cross-entropy on response tokens, jitted; everything else as in `make_update`.

    Returns:
        update(state, batch, frozen=None) -> (state, stats) with loss, grad_norm, learning_rate, entropy, tokens and
        skipped.
    """
    step = _make_step(policy, config, mesh, supervised_objective())

    def update(state: TrainState, batch: Batch, frozen: Params | None = None) -> tuple[TrainState, Stats]:
        return step(state, batch, None, None, frozen)

    return _jit(update, policy, config, mesh)


def make_token_logprobs(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh
) -> Callable[[Params, Batch], jax.Array]:
    """token_logprobs(params, batch) -> f32[M, b, T], jitted, 0 outside responses: the reference policy's pass."""

    def token_logprobs(params: Params, batch: Batch) -> jax.Array:
        batch = jax.lax.with_sharding_constraint(batch, batch_shardings(mesh))
        return _token_logprobs(policy, config, mesh, params, batch)

    return jax.jit(token_logprobs, out_shardings=packed_sharding(mesh))


def make_response_values(
    policy: ValuePolicy, config: LearnerConfig, mesh: Mesh
) -> Callable[[Params, Batch], jax.Array]:
    """response_values(params, batch) -> f32[R], jitted, in units of reward; NaN where nothing of a response is packed.

    The value of a response is that of the position which predicts its first token: of all that was said before.
    """

    def response_values(params: Params, batch: Batch) -> jax.Array:
        batch = jax.lax.with_sharding_constraint(batch, batch_shardings(mesh))

        def one(m: jax.Array, found: jax.Array) -> jax.Array:
            rows = _rows(batch, m)
            return add_values(found, row_values(policy, params, rows, _computation(config, mesh)), rows.response_ids)

        return jax.lax.fori_loop(0, batch.num_microbatches, one, jnp.full(batch.response_valid.shape, jnp.nan))

    return jax.jit(response_values, out_shardings=replicated(mesh))


def _token_logprobs(policy, config: LearnerConfig, mesh: Mesh, params: Params, batch: Batch) -> jax.Array:
    """f32[M, b, T], nats; 0 outside responses."""

    def one(m: jax.Array, found: jax.Array) -> jax.Array:
        logprobs, _ = row_statistics(policy, params, _rows(batch, m), _computation(config, mesh))
        return found.at[m].set(logprobs)

    empty = jnp.zeros(jnp.shape(batch.tokens), jnp.float32)
    return jax.lax.fori_loop(0, batch.num_microbatches, one, empty)


def _jit(update, policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh):
    abstract = abstract_state(policy, make_optimizer(config, policy.axes), mesh)
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(update, out_shardings=(state, replicated(mesh)), donate_argnums=0)


def _computation(config: LearnerConfig, mesh: Mesh) -> Computation:
    # Rows stay split over data and fsdp: left to itself the partitioner takes the weights' split of the embedding, and
    # sums activations over fsdp in every layer instead of gathering the layer's weights.
    def lies(*axes: str | None) -> Callable[[jax.Array], jax.Array]:
        sharding = NamedSharding(mesh, partition(axes, TRAIN))
        return lambda x: jax.lax.with_sharding_constraint(x, sharding)

    return Computation(
        temperature=config.temperature,
        head_chunk=config.head_chunk,
        remat=REMAT[config.remat],
        constrain=lies("rows", "length", None),
        attention=make_row_attention(config.attention, mesh),
        head=HeadLayout(
            shards=slot_shards(mesh),
            whole=lies(None, "vocab"),
            apart=lies("rows"),
            apart_head=lies("rows", None, "vocab"),
            gradient=lies("embed", "vocab"),
        ),
    )


def _rows(batch: Batch, m: jax.Array) -> Rows:
    return Rows(*(_at(getattr(batch, name), m) for name in Rows._fields))


def _at(packed: jax.Array, m: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(packed, m, keepdims=False)


def _make_step(
    policy: TrainablePolicy, config: LearnerConfig, mesh: Mesh, objective: Objective, level: Level | None = None
):
    """(state, batch, advantages, reference, frozen, values) -> (state, stats), to be jitted."""
    aggregate = AGGREGATIONS[config.aggregation](config)
    optimizer = make_optimizer(config, policy.axes)
    schedule = make_schedule(config)
    param_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(policy, optimizer, mesh).params)

    def minibatch_gradient(params, batch: Batch, advantages, reference, before, frozen, values, minibatch):
        """(gradient, loss, Measures) of one minibatch, and its number of tokens."""
        inside = batch.response_valid & (batch.trajectory_minibatch[batch.response_trajectory] == minibatch)
        response_tokens = jnp.where(inside, batch.response_tokens, 0)
        table = response_tokens, batch.response_trajectory, batch.valid.shape[0]
        weights = aggregate(*table)
        shares = (response_tokens > 0) / jnp.maximum(jnp.sum(response_tokens > 0), 1)  # of each response's value
        ends = batch.minibatch_ends
        start, end = jnp.where(minibatch > 0, ends[minibatch - 1], 0), ends[minibatch]

        def log_ratios(logprobs, sampled, response_ids):
            """log s of each token's sequence, from the sequence's own rows."""
            assert level is not None
            sums = response_sums(logprobs, sampled, response_ids, response_tokens.shape[0])
            return token_advantages(level.log_ratios(sums, *table), response_ids)  # a gather again

        def add_sums(m, sums):
            rows, whole = _rows(batch, m), params if frozen is None else (params, frozen)
            logprobs, _ = row_statistics(policy, whole, rows, _computation(config, mesh))
            return sums + response_sums(logprobs, _at(batch.logprobs, m), rows.response_ids, sums.shape[0])

        found = None  # log s of each response's sequence, where it takes a pass of its own
        if level is not None and not level.in_one_row:
            found = level.log_ratios(jax.lax.fori_loop(start, end, add_sums, jnp.zeros(weights.shape)), *table)

        def part(params, m):
            rows = _rows(batch, m)
            token_weights = token_advantages(weights, rows.response_ids)  # the same gather: 0 outside responses
            tokens = Tokens(
                mask=token_weights > 0,
                weights=token_weights,
                logprobs=_at(batch.logprobs, m),
                advantages=None if advantages is None else _at(advantages, m),
                reference=None if reference is None else _at(reference, m),
                before=None if before is None else _at(before, m),
                sequence=None if found is None else token_advantages(found, rows.response_ids),
            )
            whole = params if frozen is None else (params, frozen)
            sequence = log_ratios if level is not None and level.in_one_row else None
            value = None
            if values is not None:
                at = [token_advantages(each, rows.response_ids) for each in (shares, *values)]
                value = value_objective(config), ValueTokens(at[0] * first_tokens(rows.response_ids), *at[1:])
            return row_loss(policy, whole, rows, tokens, objective, _computation(config, mesh), sequence, value)

        def accumulate(m, total):
            (loss, measures), gradient = jax.value_and_grad(part, has_aux=True)(params, m)
            sums = jax.tree.map(jnp.add, total[2].sums, measures.sums)
            means = jax.tree.map(jnp.add, total[2].means, measures.means)
            maxima = jax.tree.map(jnp.maximum, total[2].maxima, measures.maxima)
            gradient = jax.tree.map(jnp.add, total[0], gradient)
            return constrain(gradient), total[1] + loss, Measures(sums, maxima, means)

        constrain = lambda tree: jax.lax.with_sharding_constraint(tree, param_shardings)
        _, measures = jax.eval_shape(part, params, jnp.int32(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (params, jnp.float32(0), measures))
        zeros = (constrain(zeros[0]), *zeros[1:])
        total = jax.lax.fori_loop(start, end, accumulate, zeros)
        return *total, jnp.sum(response_tokens).astype(jnp.float32)

    def step(
        state: TrainState, batch: Batch, advantages, reference, frozen, values: ValueTargets | None = None
    ) -> tuple[TrainState, Stats]:
        num_minibatches = batch.minibatch_ends.shape[0]
        if num_minibatches != config.num_minibatches:
            raise ValueError(
                f"expected a batch of {config.num_minibatches} minibatches (LearnerConfig.num_minibatches), got "
                f"{num_minibatches}; set BatchLayout.num_minibatches to the same number"
            )

        batch = jax.lax.with_sharding_constraint(batch, batch_shardings(mesh))

        before = None
        if advantages is not None and config.importance_cap and config.num_epochs * num_minibatches > 1:
            whole = state.params if frozen is None else (state.params, frozen)
            before = _token_logprobs(policy, config, mesh, whole, batch)

        def optimizer_step(carry, index):
            params, opt_state = carry
            minibatch = index % num_minibatches
            found = minibatch_gradient(params, batch, advantages, reference, before, frozen, values, minibatch)
            gradient, loss, measures, count = found
            norm = optax.tree_utils.tree_norm(gradient)
            good = (count > 0) & jnp.isfinite(norm)
            updates, next_opt_state = optimizer.update(gradient, opt_state, params)
            keep = lambda new, old: jnp.where(good, new, old)
            stats = {
                **measures.sums,
                **measures.maxima,
                **{name: value * count for name, value in measures.means.items()},
                "loss": loss * count,
                "grad_norm": norm * count,
                "tokens": count,
                "skipped": (~good).astype(jnp.float32),
                "learning_rate": schedule(num_updates(opt_state)),
            }
            params = jax.tree.map(keep, optax.apply_updates(params, updates), params)
            return (params, jax.tree.map(keep, next_opt_state, opt_state)), stats

        steps = jnp.arange(config.num_epochs * num_minibatches)
        (params, opt_state), stats = jax.lax.scan(optimizer_step, (state.params, state.opt_state), steps)
        return TrainState(params, opt_state, state.step + 1), _summary(stats, config.num_epochs)

    return step


def _summary(stats: Stats, num_epochs: int) -> Stats:
    """Of [optimizer steps] sums over tokens to the step's means, maxima and last values."""
    count = stats["tokens"]
    mean = lambda sums, counts: jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1.0)
    found = {name: mean(value, count) for name, value in stats.items()}
    found |= {
        "tokens": jnp.sum(count) / num_epochs,
        "skipped": jnp.sum(stats["skipped"]),
        "learning_rate": stats["learning_rate"][-1],
    }
    if "parity_mean" in stats:
        found |= {
            "ratio_max": jnp.max(stats["ratio_max"]),
            "parity_max": stats["parity_max"][0],
            "parity_mean": mean(stats["parity_mean"][:1], count[:1]),
        }
    return found
