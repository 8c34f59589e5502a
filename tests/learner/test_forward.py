"""Statistics of packed rows: against whole logits of lone sequences, and what is never computed."""

import re
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Bigram, random_trajectories

from aem_jax.advantage import token_statistics
from aem_jax.batch import BatchLayout, collate
from aem_jax.learner import Rows, row_statistics
from aem_jax.learner.forward import REMAT
from aem_jax.models import ModelConfig, Policy

TINY = Policy(ModelConfig(37, 16, 32, 2, 4, 2, 8, rope_theta=10_000.0))
PARAMS = TINY.init(jax.random.key(0))
LAYOUT = BatchLayout(num_microbatches=1, rows=6, row_length=48, max_responses=64, max_trajectories=16)


def rows_of(batch, m=0):
    return Rows(*(jnp.asarray(getattr(batch, name)[m]) for name in Rows._fields))


@jax.jit
def whole_statistics(tokens):
    """Of one sequence [48], padded at its end (attention is causal, so that changes nothing), all logits at once."""
    logits = TINY.forward(PARAMS, tokens[None])[:, :-1] / 0.7
    logprobs, entropies = token_statistics(logits, tokens[None, 1:])
    return logprobs[0], entropies[0]


def slow_statistics(trajectories):
    """{response: (logprobs, entropies)}, one lone sequence at a time."""
    found, response = {}, 0
    for each in trajectories:
        ids = []
        for turn in each.turns:
            ids = ([] if each.context == "window" else ids) + turn.observation_ids.tolist()
            span = slice(len(ids) - 1, len(ids) - 1 + len(turn.response_ids))
            ids = ids + turn.response_ids.tolist()
            whole = whole_statistics(np.pad(np.asarray(ids, np.int32), (0, 48 - len(ids))))
            found[response] = [np.asarray(x)[span] for x in whole]
            response += 1
    return found


@pytest.mark.parametrize("head_chunk", [5, 1000])
@pytest.mark.parametrize("context", ["append", "window"])
def test_packed_rows_give_the_numbers_of_lone_sequences(context, head_chunk):
    trajectories = random_trajectories(0, 9, TINY.config.vocab_size, context)
    batch = collate(trajectories, LAYOUT)
    assert (batch.segment_ids > 1).any()
    compute = partial(row_statistics, TINY, temperature=0.7, head_chunk=head_chunk)
    found = jax.jit(compute)(PARAMS, rows_of(batch))
    ids = batch.response_ids[0]
    for response, wanted in slow_statistics(trajectories).items():
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(np.asarray(ours)[ids == response], theirs, rtol=1e-4, atol=1e-5)
    for ours in found:
        assert not np.asarray(ours)[ids < 0].any()


@pytest.mark.parametrize("remat", ["none", "layers"])
def test_gradient_equals_that_of_whole_logits(remat):
    batch = collate(random_trajectories(1, 9, TINY.config.vocab_size), LAYOUT)
    rows = rows_of(batch)
    weights = jnp.where(rows.response_ids >= 0, jnp.cos(jnp.arange(48.0))[None, :], 0.0)

    def chunked(params):
        logprobs, _ = row_statistics(TINY, params, rows, temperature=1.0, head_chunk=7, remat=REMAT[remat])
        return jnp.sum(weights * logprobs)

    def whole(params):
        logits = TINY.logits(params, TINY.hidden(params, rows.tokens, rows.positions, rows.segment_ids))
        logprobs, _ = token_statistics(logits[:, :-1], rows.tokens[:, 1:])
        return jnp.sum(weights[:, 1:] * logprobs)

    ours, wanted = jax.jit(jax.grad(chunked))(PARAMS), jax.jit(jax.grad(whole))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, wanted)


def test_no_gradient_through_entropies():
    rows = rows_of(collate(random_trajectories(2, 3, TINY.config.vocab_size), LAYOUT))
    entropy = lambda params: row_statistics(TINY, params, rows, temperature=1.0, head_chunk=7)[1].sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(entropy))(PARAMS)
    assert value > 0 and not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_logits_of_all_tokens_never_exist():
    rows = rows_of(collate(random_trajectories(3, 9, TINY.config.vocab_size), LAYOUT))

    def loss(params, chunk):
        return row_statistics(TINY, params, rows, temperature=1.0, head_chunk=chunk)[0].sum()

    def largest_with_vocabulary(chunk):
        text = jax.jit(jax.grad(loss), static_argnums=1).lower(PARAMS, chunk).compile().as_text() or ""
        shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
        return max(int(np.prod(shape)) for shape in shapes if 37 in shape and 16 not in shape)

    assert largest_with_vocabulary(48) >= 6 * 48 * 37  # the measure itself sees whole logits where they are
    assert largest_with_vocabulary(8) <= 6 * 8 * 37


@dataclass(frozen=True)
class Counting(Bigram):
    """Tells how often its head ran."""

    calls: list = field(default_factory=list, compare=False)

    def logits(self, params, hidden):
        jax.debug.callback(lambda: self.calls.append(1))
        return super().logits(params, hidden)


def test_chunks_without_a_sampled_token_are_skipped():
    policy = Counting()
    batch = collate(random_trajectories(4, 2, policy.vocab_size), LAYOUT)
    params, rows = policy.init(jax.random.key(0)), rows_of(batch)
    jax.jit(partial(row_statistics, policy, temperature=1.0, head_chunk=6))(params, rows)
    jax.effects_barrier()
    sampled = (batch.response_ids[0] >= 0).sum(-1).max()
    assert len(policy.calls) == -(-sampled // 6) < 48 // 6
