"""Statistics of packed rows, compared with the full logits of single sequences; and arrays that are never computed."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Bigram, random_trajectories

from aem_jax.advantage import token_statistics
from aem_jax.batch import BatchLayout, collate
from aem_jax.learner import LearnerConfig, Rows, row_statistics
from aem_jax.learner.forward import REMAT, ForwardConfig, row_loss
from aem_jax.learner.objective import EntropyObjective, Stats, Tokens, policy_objective
from aem_jax.models import ModelConfig, Policy
from aem_jax.plan.costs import costs
from aem_jax.plan.hlo import parse

TINY = Policy(ModelConfig(37, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
PARAMS = TINY.init(jax.random.key(0))
LAYOUT = BatchLayout(num_microbatches=1, rows=6, row_length=48, max_responses=64, max_trajectories=16)


def rows_of(batch, m=0):
    return Rows(*(jnp.asarray(getattr(batch, name)[m]) for name in Rows._fields[:4]))


@jax.jit
def whole_statistics(tokens):
    """All logits of one sequence [48], padded at its end; causal attention makes the padding harmless."""
    logits = TINY.forward(PARAMS, tokens[None])[:, :-1] / 0.7
    logprobs, entropies = token_statistics(logits, tokens[None, 1:])
    return logprobs[0], entropies[0]


def slow_statistics(trajectories):
    """{response: (logprobs, entropies)}, one sequence at a time."""
    statistics, response = {}, 0
    for trajectory in trajectories:
        ids = []
        for turn in trajectory.turns:
            ids = ([] if trajectory.context == "window" else ids) + turn.observation_ids.tolist()
            span = slice(len(ids) - 1, len(ids) - 1 + len(turn.response_ids))
            ids = ids + turn.response_ids.tolist()
            full = whole_statistics(np.pad(np.asarray(ids, np.int32), (0, 48 - len(ids))))
            statistics[response] = [np.asarray(x)[span] for x in full]
            response += 1
    return statistics


@pytest.mark.parametrize("head_chunk", [5, 1000])
@pytest.mark.parametrize("context", ["append", "window"])
def test_packed_rows_give_the_numbers_of_lone_sequences(context, head_chunk):
    trajectories = random_trajectories(0, 9, TINY.config.vocab_size, context)
    batch = collate(trajectories, LAYOUT)
    assert (batch.segment_ids > 1).any()
    compute = partial(row_statistics, TINY, config=ForwardConfig(temperature=0.7, head_chunk=head_chunk))
    packed = jax.jit(compute)(PARAMS, rows_of(batch))
    ids = batch.response_ids[0]
    for response, wanted in slow_statistics(trajectories).items():
        for ours, theirs in zip(packed, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[ids == response], theirs, rtol=1e-4, atol=1e-5)
    for ours in packed:
        assert not np.asarray(ours)[ids < 0].any()


def weighted(logprobs, entropies, tokens):
    """A nonlinear objective, so that each token has a different slope."""
    total = jnp.sum(tokens.weights * jnp.sin(logprobs), where=tokens.mask)
    return total, Stats({"entropy": jnp.sum(entropies, where=tokens.mask)}, {"top": jnp.max(entropies)})


def with_entropies(logprobs, entropies, tokens):
    """The same, with a nonlinear term of the entropies."""
    total, stats = weighted(logprobs, entropies, tokens)
    return total + jnp.sum(tokens.weights * jnp.cos(entropies), where=tokens.mask), stats


def tokens_of(rows):
    mask = rows.response_ids >= 0
    weights, unused = jnp.where(mask, jnp.cos(jnp.arange(48.0))[None, :], 0.0), jnp.zeros(mask.shape)
    return Tokens(mask, weights, unused, None, None)


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_gradient_equals_that_of_whole_logits(remat):
    batch = collate(random_trajectories(1, 9, TINY.config.vocab_size), LAYOUT)
    rows = rows_of(batch)
    tokens, config = tokens_of(rows), ForwardConfig(temperature=1.3, head_chunk=7, remat=REMAT[remat])

    def chunked(params):
        return row_loss(TINY, params, rows, tokens, weighted, config)

    def whole(params):
        logits = TINY.logits(params, TINY.hidden(params, *rows[:3])[0]) / 1.3
        statistics = token_statistics(logits[:, :-1], rows.tokens[:, 1:])
        return weighted(*statistics, jax.tree.map(lambda x: x[:, 1:], tokens))

    (loss, stats), ours = jax.jit(jax.value_and_grad(chunked, has_aux=True))(PARAMS)
    (expected, expected_stats), wanted = jax.jit(jax.value_and_grad(whole, has_aux=True))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, wanted)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(stats.sums["entropy"], expected_stats.sums["entropy"], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(PARAMS)[0], expected, rtol=1e-5)  # without a gradient, too


def test_remat_keeps_what_its_option_names():
    """In the compiled program "layers" recomputes all products of a layer, "dots" only those inside attention."""
    policy = Policy(ModelConfig(37, 64, 256, 4, 4, 2, 16))
    rows = rows_of(collate(random_trajectories(1, 9, 37), LAYOUT))

    def flops(remat: str) -> float:
        config = ForwardConfig(temperature=1.0, head_chunk=48, remat=REMAT[remat])
        loss = lambda params: row_loss(policy, params, rows, tokens_of(rows), weighted, config)[0]
        return costs(parse(jax.jit(jax.grad(loss)).lower(policy.shapes).compile().as_text() or "")).flops

    none, dots, layers = (flops(remat) for remat in ("none", "dots", "layers"))
    config = policy.config
    width, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
    products = width * heads * config.head_dim + config.num_heads * config.head_dim * width + 2 * width * 256
    again = 2.0 * 6 * 48 * config.num_layers * products  # all but the last product, which is not an input of another
    assert none <= dots < none + 0.25 * again
    assert layers - dots == pytest.approx(again, rel=0.02)


def test_no_gradient_through_measures():
    rows = rows_of(collate(random_trajectories(2, 3, TINY.config.vocab_size), LAYOUT))

    def entropy(params):
        config = ForwardConfig(temperature=1.0, head_chunk=7)
        return row_loss(TINY, params, rows, tokens_of(rows), weighted, config)[1].sums["entropy"]

    value, gradient = jax.jit(jax.value_and_grad(entropy))(PARAMS)
    assert value > 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("objective", [weighted, EntropyObjective(with_entropies)])
def test_logits_of_all_tokens_never_exist(objective):
    rows = rows_of(collate(random_trajectories(3, 9, TINY.config.vocab_size), LAYOUT))

    def loss(params, chunk):
        return row_loss(TINY, params, rows, tokens_of(rows), objective, ForwardConfig(1.0, chunk))[0]

    def largest_with_vocabulary(chunk):
        text = jax.jit(jax.grad(loss), static_argnums=1).lower(PARAMS, chunk).compile().as_text() or ""
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
        return max(int(np.prod(shape)) for shape in shapes if 37 in shape and 16 not in shape)

    assert largest_with_vocabulary(48) >= 6 * 48 * 37  # the measure does detect full logits
    assert largest_with_vocabulary(8) <= 6 * 8 * 37


def test_the_head_of_a_large_vocabulary_takes_less_than_two_gibibytes():
    """8 rows of 4096 tokens, a vocabulary of 151,936, width 1536 in float32: 1.65 GiB of temporaries.

    Read from the compiled loss and gradient, with the head less without it; nothing is allocated. The head's gradient
    takes 0.87 GiB of it and the logits of 128 positions a row 0.58.
    """
    policy, config = Bigram(151_936, 1536), LearnerConfig()
    forward = ForwardConfig(config.temperature, config.head_chunk)
    struct: Any = lambda dtype: jax.ShapeDtypeStruct((8, 4096), dtype)
    rows, numbers = Rows(*(struct(jnp.int32),) * 4), struct(jnp.float32)
    tokens = Tokens(struct(jnp.bool_), numbers, numbers, numbers, None)

    def loss(params, rows, tokens):
        return row_loss(policy, params, rows, tokens, policy_objective(config), forward)[0]

    def without(params, rows, tokens):
        return jnp.sum(policy.hidden(params, *rows[:3])[0])

    params = jax.eval_shape(policy.init, jax.random.key(0))
    programs = [
        jax.jit(jax.value_and_grad(function)).lower(params, rows, tokens).compile() for function in (loss, without)
    ]
    analyses: list[Any] = [program.memory_analysis() for program in programs]
    taken, base = (analysis.temp_size_in_bytes for analysis in analyses)
    assert taken - base < 2 * 2**30


def test_chunks_without_a_sampled_token_are_skipped():
    policy, calls = Bigram(), []

    def counted(logprobs, entropies, tokens):
        jax.debug.callback(lambda: calls.append(1))
        return weighted(logprobs, entropies, tokens)

    batch = collate(random_trajectories(4, 2, policy.vocab_size), LAYOUT)
    params, rows = policy.init(jax.random.key(0)), rows_of(batch)
    loss = lambda params: row_loss(policy, params, rows, tokens_of(rows), counted, ForwardConfig(1.0, 6))[0]
    jax.jit(jax.grad(loss))(params)
    jax.effects_barrier()
    sampled = (batch.response_ids[0] >= 0).sum(-1).max()
    assert len(calls) == -(-sampled // 6) < 48 // 6
