"""Packing, compared with a slow reference in both contexts; each exceeded limit is named."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aem_jax.batch import BatchLayout, collate
from aem_jax.envs.protocol import Task
from aem_jax.trajectory import Ending, Trajectory, Turn

LAYOUT = BatchLayout(num_microbatches=16, rows=2, row_length=32, max_responses=64, max_trajectories=16)
TASK = Task("task-0", "look", {})


def turn(observation, response, reward=0.0):
    """A turn whose logprob and entropy follow from its ids."""
    response = np.asarray(response, np.int32)
    return Turn(
        observation_ids=np.asarray(observation, np.int32),
        response_ids=response,
        logprobs=-response / 100.0,
        entropies=response / 50.0,
        reward=reward,
        valid_action=True,
    )


def trajectory(*turns, group=0, ending=Ending.TERMINATED, context="append"):
    return Trajectory(TASK, group, 0, tuple(turns), ending, success=False, context=context)


def random_trajectories(seed, count, context="append"):
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        turns = [
            turn(rng.integers(1, 90, rng.integers(1, 6)), rng.integers(1, 90, rng.integers(0, 5)), reward=float(k))
            for k in range(rng.integers(0, 4))
        ]
        ending = list(Ending)[rng.integers(len(Ending))]
        made.append(trajectory(*turns, group=n // 2, ending=ending, context=context))
    return made


def read_back(batch):
    """{response id: (context ids before it, sampled ids, logprobs, entropies)}, read from the rows token by token."""
    responses = {}
    M, b, T = batch.tokens.shape
    for m in range(M):
        for row in range(b):
            context, segment = [], 0
            for t in range(T):
                at = (m, row, t)
                if batch.segment_ids[at] != segment:
                    segment, context = batch.segment_ids[at], []
                if segment == 0:
                    assert batch.response_ids[at] == -1 and batch.logprobs[at] == 0 and batch.entropies[at] == 0
                    continue
                assert m < batch.num_microbatches
                assert batch.positions[at] == len(context)
                response = batch.response_ids[at]
                if response >= 0:
                    _, *columns = responses.setdefault(int(response), (tuple(context), [], [], []))
                    values = batch.tokens[at], batch.logprobs[at], batch.entropies[at]
                    for column, value in zip(columns, values, strict=True):
                        column.append(value)
                else:
                    assert batch.logprobs[at] == 0 and batch.entropies[at] == 0
                context.append(int(batch.tokens[at]))
    return responses


def expected(trajectories):
    """The same mapping from the trajectories themselves."""
    responses, response = {}, 0
    for episode in trajectories:
        if episode.ending is Ending.ENV_ERROR:
            continue
        context = []
        for step in episode.turns:
            context = [] if episode.context == "window" else context
            context = context + step.observation_ids.tolist()
            if len(step.response_ids):
                responses[response] = (tuple(context), step.response_ids, step.logprobs, step.entropies)
            context = context + step.response_ids.tolist()
            response += 1
    return responses


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 16), context=st.sampled_from(["append", "window"]))
def test_every_response_keeps_its_ids_and_its_context(seed, count, context):
    trajectories = random_trajectories(seed, count, context)
    packed = read_back(collate(trajectories, LAYOUT))
    wanted = expected(trajectories)
    assert packed.keys() == wanted.keys()
    for response, (context_ids, ids, logprobs, entropies) in wanted.items():
        assert packed[response][0] == context_ids
        np.testing.assert_array_equal(packed[response][1], ids)
        np.testing.assert_allclose(packed[response][2], logprobs, rtol=1e-6)
        np.testing.assert_allclose(packed[response][3], entropies, rtol=1e-6)


def test_tables_of_a_hand_made_step():
    # Two good trajectories (2 + 1 responses, one of them empty) around a broken one that has three turns.
    first = trajectory(turn([1, 2], [3, 4, 5], 1.5), turn([6], []), group=0, ending=Ending.TRUNCATED)
    broken = trajectory(turn([1], [2]), turn([1], [2]), turn([1], [2]), group=0, ending=Ending.ENV_ERROR)
    last = trajectory(turn([7], [8, 9], -0.5), group=1)
    batch = collate([first, broken, last], LAYOUT)
    np.testing.assert_array_equal(batch.response_trajectory[:3], [0, 0, 2])
    np.testing.assert_array_equal(batch.response_turn[:3], [0, 1, 0])
    np.testing.assert_array_equal(batch.response_tokens[:3], [3, 0, 2])
    np.testing.assert_array_equal(np.flatnonzero(batch.response_valid), [0, 2])
    np.testing.assert_array_equal(np.flatnonzero(batch.valid), [0, 2])
    np.testing.assert_array_equal(np.flatnonzero(batch.truncated), [0])
    np.testing.assert_array_equal(batch.returns[:3], [1.5, 0, -0.5])
    np.testing.assert_array_equal(batch.group_ids[:3], [0, 0, 1])
    # Longest first, both in one row: [1 2 3 4 5 | 7 8 9], the unanswered observation 6 cut off.
    np.testing.assert_array_equal(batch.tokens[0, 0, :9], [1, 2, 3, 4, 5, 7, 8, 9, 0])
    np.testing.assert_array_equal(batch.segment_ids[0, 0, :9], [1, 1, 1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_array_equal(batch.response_ids[0, 0, :9], [-1, -1, 0, 0, 0, -1, 2, 2, -1])
    assert batch.num_microbatches == 1


def test_an_episode_whose_first_prompt_was_too_long_is_in_no_statistics_of_its_group():
    played = trajectory(turn([1], [2], 1.0), group=0)
    batch = collate([played, trajectory(group=0, ending=Ending.TRUNCATED), trajectory(group=0)], LAYOUT)
    assert batch.valid.tolist()[:3] == [True, False, True]  # the last one: ended by its environment, a return of 0
    assert batch.trajectory_minibatch[1] == -1


def test_an_anchor_is_the_first_response_to_an_observation_in_its_group():
    def episode(*texts, group, ending=Ending.TERMINATED):
        turns = [dataclasses.replace(turn([1], [2]), observation=text) for text in texts]
        return trajectory(*turns, group=group, ending=ending)

    steps = [
        episode("hall", "kitchen", "hall", group=0),  # responses 0, 1, 2
        episode("hall", "hall", group=0, ending=Ending.ENV_ERROR),  # in no table
        episode("kitchen", "", "", group=0),  # 3, 4, 5
        episode("kitchen", "hall", group=1),  # 6, 7: rooms of another group are different
    ]
    batch = collate(steps, LAYOUT)
    np.testing.assert_array_equal(batch.response_anchor[:9], [0, 1, 0, 1, 4, 5, 6, 7, -1])


@pytest.mark.parametrize("seed", range(5))
def test_both_contexts_give_the_same_tables(seed):
    append, window = (collate(random_trajectories(seed, 12, context), LAYOUT) for context in ("append", "window"))
    packed = {"tokens", "positions", "segment_ids", "response_ids", "logprobs", "entropies", "minibatch_ends"}
    for field in {column.name for column in dataclasses.fields(append)} - packed:
        np.testing.assert_array_equal(getattr(append, field), getattr(window, field), err_msg=field)


@pytest.mark.parametrize("context", ["compact", "tree"])
def test_the_same_prompt_again_begins_a_new_sequence(context):
    """Equal, longer and other responses to one prompt all keep their tokens; a prompt that goes on continues one."""
    turns = [turn([1, 2, 3], [7]), turn([1, 2, 3], [7]), turn([1, 2, 3], [7, 8]), turn([1, 2, 3, 7, 8, 4], [9])]
    batch = collate([trajectory(*turns, context=context)], LAYOUT)
    assert batch.response_tokens[:4].tolist() == [1, 1, 2, 1]
    read = {response: (before, ids) for response, (before, ids, *_) in read_back(batch).items()}
    assert read == {0: ((1, 2, 3), [7]), 1: ((1, 2, 3), [7]), 2: ((1, 2, 3), [7, 8]), 3: ((1, 2, 3, 7, 8, 4), [9])}


def test_rows_are_filled_first_fit_decreasing():
    # Lengths 20, 17, 15, 12 into rows of 32: {20, 12}, {17, 15}; in order of arrival they would need three.
    lengths = [12, 20, 15, 17]
    batch = collate([trajectory(turn([1], [2] * (length - 1))) for length in lengths], LAYOUT)
    assert batch.num_microbatches == 1
    np.testing.assert_array_equal((batch.segment_ids[0] > 0).sum(-1), [32, 32])


def test_a_batch_without_intact_episodes_has_no_microbatch():
    broken = trajectory(turn([1], [2]), ending=Ending.ENV_ERROR)
    for trajectories in ([], [broken, broken]):
        batch = collate(trajectories, LAYOUT)
        assert batch.num_microbatches == 0
        assert not batch.valid.any() and not batch.response_valid.any() and not batch.segment_ids.any()


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_minibatches_are_even_disjoint_and_deterministic(count):
    layout = dataclasses.replace(LAYOUT, num_minibatches=3)
    trajectories = [trajectory(turn([1], [2 + n, 3])) for n in range(count)]
    batch, repeated, other = (collate(trajectories, layout, seed=seed) for seed in (5, 5, 6))
    for field in dataclasses.fields(batch):
        np.testing.assert_array_equal(getattr(batch, field.name), getattr(repeated, field.name))
    sizes = np.bincount(batch.trajectory_minibatch[:count], minlength=3)
    assert sizes.sum() == count and sizes.max() - sizes.min() <= 1
    if count == 16:
        assert (batch.trajectory_minibatch != other.trajectory_minibatch).any()
    start = 0
    for j, end in enumerate(batch.minibatch_ends):
        responses = batch.response_ids[start:end]
        inside = np.unique(batch.response_trajectory[responses[responses >= 0]])
        np.testing.assert_array_equal(inside, np.flatnonzero(batch.trajectory_minibatch == j))
        start = end


LONG = trajectory(turn([1], [2] * 40))
SHORT = trajectory(turn([1], [2] * 20), turn([1], [2]))


@pytest.mark.parametrize(
    ("sizes", "trajectories", "named"),
    [
        (
            {"max_trajectories": 1},
            [SHORT, SHORT],
            "expected at most 1 trajectories, got 2; raise BatchLayout.max_trajectories",
        ),
        ({"max_responses": 3}, [SHORT, SHORT], "expected at most 3 responses, got 4; raise BatchLayout.max_responses"),
        ({}, [LONG], "expected segments of at most 32 tokens, got 41 in trajectory 0 .* raise BatchLayout.row_length"),
        (
            {"num_microbatches": 1},
            [SHORT] * 3,
            "expected at most 1 microbatches, got 2 .* raise BatchLayout.num_microbatches",
        ),
        ({}, [trajectory(turn([], [2]))], "expected an observation before the first response"),
        (
            {},
            [dataclasses.replace(SHORT, context="both")],
            'expected context "append", "window", "compact" or "tree", got \'both\'',
        ),
        (
            {},
            [trajectory(dataclasses.replace(SHORT.turns[0], logprobs=np.zeros(3)))],
            "expected a logprob and an entropy for each of 20 sampled ids, got 3 and 20",
        ),
    ],
)
def test_a_batch_that_does_not_fit_names_the_size_to_raise(sizes, trajectories, named):
    with pytest.raises(ValueError, match=named):
        collate(trajectories, dataclasses.replace(LAYOUT, **sizes))


def test_a_layout_refuses_invalid_sizes_by_name():
    with pytest.raises(ValueError, match="expected row_length ≥ 1, got 0"):
        dataclasses.replace(LAYOUT, row_length=0)
    with pytest.raises(ValueError, match="one microbatch for each of 3 minibatches, got 2"):
        dataclasses.replace(LAYOUT, num_microbatches=2, num_minibatches=3)


def test_a_broken_episode_needs_no_room_in_the_batch():
    broken = dataclasses.replace(LONG, ending=Ending.ENV_ERROR)
    assert collate([broken], dataclasses.replace(LAYOUT, max_responses=1)).num_microbatches == 0
