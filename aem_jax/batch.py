"""Trajectories → fixed-shape arrays. No other module depends on the layout of a row.

A *segment* is a sequence of ids that attend to each other: a trajectory in the "append" context (prompt,
response, observation, response, …), one turn in the "window" context, a branch of its turns in the contexts "compact"
and "tree". Segments are packed first-fit-decreasing into rows of one length; rows are grouped into microbatches,
microbatches into minibatches. Shapes are fixed and only `minibatch_ends` varies, so nothing recompiles and unused
microbatches cost nothing. Responses and trajectories are numbered in the order of the input, whatever the packing, so
estimators see the same tables in every context.

Left out: padding to several row lengths (packing makes one enough) and splitting a long trajectory over rows (it would
cut attention). Nothing is dropped silently: a batch that does not fit raises an error that names the size to raise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from aem_jax.sharding import TRAIN, partition, replicated, slot_shards
from aem_jax.trajectory import Ending, Trajectory, Turn

Array: TypeAlias = Any
"""np.ndarray from `collate`, jax.Array on the mesh."""


@dataclass(frozen=True)
class BatchConfig:
    """Sizes of a microbatch: the rows that the learner computes at a time."""

    rows: int = 8
    """Rows of a microbatch; a multiple of mesh.data × mesh.fsdp."""
    tokens_per_microbatch: int = 0
    """Tokens of a microbatch, instead of rows: the number of rows follows, rounded to multiples of mesh.data ×
    mesh.fsdp where these are given; 0 uses rows."""
    row_length: int = 0
    """Tokens of a row, which holds several episodes; 0: rollout.context_tokens."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("tokens_per_microbatch", 0), ("row_length", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected batch.{name} of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class BatchLayout:
    """The static sizes of a batch."""

    num_microbatches: int
    """M: most microbatches in a step. "append" never needs more than max_trajectories / rows + num_minibatches."""
    rows: int
    """b: rows in one microbatch; a multiple of the mesh's data × fsdp."""
    row_length: int
    """T: tokens in one row; no segment may be longer."""
    max_responses: int
    """R: most responses in a step."""
    max_trajectories: int
    """N: most trajectories in a step."""
    num_minibatches: int = 1
    """K: number of minibatches, one optimizer step each; trajectories are spread evenly over them."""
    experts: int = 0
    """Recorded experts of a token, layers × experts per token; 0 for none."""
    experts_dtype: str = "uint8"
    """Dtype of recorded experts."""

    def __post_init__(self):
        for name, size in vars(self).items():
            if not name.startswith("experts") and size < 1:
                raise ValueError(f"expected {name} ≥ 1, got {size}; raise BatchLayout.{name}")
        if self.num_microbatches < self.num_minibatches:
            raise ValueError(
                f"expected at least one microbatch for each of {self.num_minibatches} minibatches, "
                f"got {self.num_microbatches}; raise BatchLayout.num_microbatches"
            )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One step's experience.

    Attributes:
        tokens: i32[M, b, T], ids; 0 in padding.
        positions: i32[M, b, T], position inside the segment, from 0.
        segment_ids: i32[M, b, T], 1, 2, … inside a row; 0 in padding.
        response_ids: i32[M, b, T], number of the response that a token belongs to, -1 elsewhere. The token at index t
            is predicted from index t - 1 of the same segment.
        logprobs: f32[M, b, T], log-probability as sampled, nats; 0 outside responses.
        entropies: f32[M, b, T], entropy as sampled, nats; 0 outside responses.
        response_trajectory: i32[R], the trajectory that a response belongs to.
        response_turn: i32[R], its turn, from 0.
        response_tokens: i32[R], its length in tokens.
        response_rewards: f32[R], its reward.
        response_anchor: i32[R], the first response of its rollout group to the same observation text; -1 in padding.
            Observations are compared, not prompts, so it is the same in both contexts. An empty text equals no other.
        response_valid: bool[R], whether the row of the table is used, by a response with at least one token.
        returns: f32[N], undiscounted sum of rewards.
        group_ids: i32[N], rollout group.
        valid: bool[N], whether the row of the table is used, by a trajectory that is not left out
            (`Trajectory.is_left_out`).
        truncated: bool[N], whether a limit ended it.
        trajectory_minibatch: i32[N], its minibatch; -1 where it is not packed.
        minibatch_ends: i32[K], minibatch j owns microbatches minibatch_ends[j - 1] … minibatch_ends[j] - 1.
        ages: i32[M, b, T], training steps since the parameters that sampled a token; -1 outside responses. None
            without carry-over, where every token is sampled in its step.
        experts: integers [M, b, T, E], the experts that the sampler routed a token to, layer by layer; 0 in padding.
            None without a mixture of experts, and in a batch that is routed by the learner.
    """

    tokens: Array
    positions: Array
    segment_ids: Array
    response_ids: Array
    logprobs: Array
    entropies: Array
    response_trajectory: Array
    response_turn: Array
    response_tokens: Array
    response_rewards: Array
    response_anchor: Array
    response_valid: Array
    returns: Array
    group_ids: Array
    valid: Array
    truncated: Array
    trajectory_minibatch: Array
    minibatch_ends: Array
    ages: Array = None
    experts: Array = None

    @property
    def num_microbatches(self):
        """i32[]: how many of the M microbatches are used."""
        return self.minibatch_ends[-1]


PACKED = ("tokens", "positions", "segment_ids", "response_ids", "logprobs", "entropies", "ages")
"""The fields of shape [M, b, T]; all others are tables."""

_FLOATS = ("logprobs", "entropies")
_TABLES = {
    "response_trajectory": ("response", np.int32),
    "response_turn": ("response", np.int32),
    "response_tokens": ("response", np.int32),
    "response_rewards": ("response", np.float32),
    "response_anchor": ("response", np.int32),
    "response_valid": ("response", np.bool_),
    "returns": ("trajectory", np.float32),
    "group_ids": ("trajectory", np.int32),
    "valid": ("trajectory", np.bool_),
    "truncated": ("trajectory", np.bool_),
    "trajectory_minibatch": ("trajectory", np.int32),
    "minibatch_ends": ("minibatch", np.int32),
}
"""Table → the meaning of a row, and the dtype."""


def packed_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays [M, b, T]: rows over the mesh's data and fsdp axes."""
    return NamedSharding(mesh, partition((None, "rows", "length"), TRAIN))


def batch_shardings(mesh: Mesh, *, ages: bool = False, experts: bool = False) -> Batch:
    """Sharding of each field: rows split, tables replicated. `ages`, `experts`: whether the batch has them."""
    packed, everywhere = packed_sharding(mesh), replicated(mesh)
    where = {field.name: packed if field.name in PACKED else everywhere for field in fields(Batch)}
    of_experts = NamedSharding(mesh, partition((None, "rows", "length", None), TRAIN)) if experts else None
    return Batch(**where | {"ages": packed if ages else None, "experts": of_experts})


def _has(batch: Batch) -> dict[str, bool]:
    """Which of the optional fields a batch has."""
    return {"ages": batch.ages is not None, "experts": batch.experts is not None}


def constrained(batch: Batch, mesh: Mesh) -> Batch:
    """The batch in its sharding, under jit."""
    return jax.lax.with_sharding_constraint(batch, batch_shardings(mesh, **_has(batch)))


def abstract_batch(layout: BatchLayout, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch without ages on the mesh, without values: to compile for in advance."""
    packed = (layout.num_microbatches, layout.rows, layout.row_length)
    rows = {
        "response": layout.max_responses,
        "trajectory": layout.max_trajectories,
        "minibatch": layout.num_minibatches,
    }
    shardings = batch_shardings(mesh, experts=layout.experts > 0)

    def struct(name: str) -> jax.ShapeDtypeStruct:
        table, dtype = _TABLES.get(name, ("", np.float32 if name in _FLOATS else np.int32))
        shape = packed if name in PACKED else (rows[table],)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(shardings, name))

    batch = Batch(
        **{field.name: struct(field.name) for field in fields(Batch) if field.name not in ("ages", "experts")}
    )
    if not layout.experts:
        return batch
    shape = (*packed, layout.experts)
    return replace(batch, experts=jax.ShapeDtypeStruct(shape, layout.experts_dtype, sharding=shardings.experts))


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Moves a batch to the mesh. Every process holds the complete batch and gives its devices their rows.

    Raises:
        ValueError: the rows of a microbatch do not divide over the mesh.
    """
    rows, ways = np.shape(batch.tokens)[1], slot_shards(mesh)
    if rows % ways:
        raise ValueError(f"expected BatchLayout.rows divisible by data × fsdp × expert = {ways}, got {rows}")
    shardings = batch_shardings(mesh, **_has(batch))
    if jax.process_count() == 1:
        return jax.device_put(batch, shardings)
    # device_put would first send every array to every process, to check that they are equal
    shard = lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.tree.map(shard, batch, shardings)


class _Segment(NamedTuple):
    tokens: np.ndarray
    response_ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray
    versions: np.ndarray
    experts: np.ndarray


def collate(
    trajectories: Sequence[Trajectory], layout: BatchLayout, *, seed: int | Sequence[int] = 0, step: int | None = None
) -> Batch:
    """Packs trajectories into rows and tables.

    Trajectories that ended in `env_error`, or without a turn because their first prompt was too long, keep their row in
    the table (valid = False) but are not packed, so none of their tokens is computed. Trajectories that are not
    `in_loss` are not packed either, but they and their responses stay valid in the tables, for the statistics of their
    group. If nothing is packed, `num_microbatches` is 0.

    Args:
        trajectories: in any order and of either context; their order numbers the tables.
        layout: static sizes.
        seed: of the assignment of trajectories to minibatches.
        step: training step; the batch then has ages, so every turn needs its versions.

    Returns:
        A batch of numpy arrays, determined by the arguments.

    Raises:
        ValueError: the batch does not fit (the message names the size to raise), or a turn is malformed.
    """
    N, R, K = layout.max_trajectories, layout.max_responses, layout.num_minibatches
    if len(trajectories) > N:
        raise ValueError(
            f"expected at most {N} trajectories, got {len(trajectories)}; raise BatchLayout.max_trajectories"
        )
    num_responses = sum(len(t.turns) for t in trajectories if t.ending is not Ending.ENV_ERROR)
    if num_responses > R:
        raise ValueError(f"expected at most {R} responses, got {num_responses}; raise BatchLayout.max_responses")

    responses = {
        "response_trajectory": np.zeros(R, np.int32),
        "response_turn": np.zeros(R, np.int32),
        "response_tokens": np.zeros(R, np.int32),
        "response_rewards": np.zeros(R, np.float32),
        "response_anchor": np.full(R, -1, np.int32),
    }
    table = {
        "returns": np.zeros(N, np.float32),
        "group_ids": np.zeros(N, np.int32),
        "valid": np.zeros(N, bool),
        "truncated": np.zeros(N, bool),
        "trajectory_minibatch": _minibatches(trajectories, N, K, seed),
    }
    segments: list[list[_Segment]] = [[] for _ in range(K)]
    first_response: dict[tuple[int, str], int] = {}
    next_response = 0
    for n, trajectory in enumerate(trajectories):
        table["returns"][n] = trajectory.total_reward
        table["group_ids"][n] = trajectory.group
        table["truncated"][n] = trajectory.ending is Ending.TRUNCATED
        if trajectory.is_left_out:
            continue
        table["valid"][n] = True
        for k, turn in enumerate(trajectory.turns):
            r = next_response + k
            responses["response_trajectory"][r] = n
            responses["response_turn"][r] = k
            responses["response_tokens"][r] = len(turn.response_ids)
            responses["response_rewards"][r] = turn.reward
            anchor = first_response.setdefault((trajectory.group, turn.observation), r)
            responses["response_anchor"][r] = anchor if turn.observation else r
        if trajectory.in_loss:
            segments[table["trajectory_minibatch"][n]] += _segments(trajectory, n, next_response, layout)
        next_response += len(trajectory.turns)

    lengths = [[len(segment.tokens) for segment in minibatch] for minibatch in segments]
    rows = [_first_fit_decreasing(minibatch, layout.row_length) for minibatch in lengths]
    ends = np.cumsum([-(-len(minibatch) // layout.rows) for minibatch in rows])
    if ends[-1] > layout.num_microbatches:
        raise ValueError(
            f"expected at most {layout.num_microbatches} microbatches, got {ends[-1]} (rows of {layout.row_length}, "
            f"{layout.rows} rows each); raise BatchLayout.num_microbatches, rows or row_length"
        )
    starts = np.concatenate([[0], ends[:-1]])
    packed = _fill(segments, rows, starts, layout)
    versions, experts = packed.pop("versions"), packed.pop("experts")
    ages = None if step is None else np.where(packed["response_ids"] >= 0, step - versions, -1).astype(np.int32)
    return Batch(
        **packed,
        ages=ages,
        experts=experts if layout.experts else None,
        **responses,
        response_valid=responses["response_tokens"] > 0,
        **table,
        minibatch_ends=ends.astype(np.int32),
    )


def _minibatches(trajectories: Sequence[Trajectory], N: int, K: int, seed: int | Sequence[int]) -> np.ndarray:
    """The minibatch of each trajectory: shuffled and assigned in turn, so that counts differ by at most one."""
    minibatch = np.full(N, -1, np.int32)
    packed = [n for n, t in enumerate(trajectories) if t.in_loss and not t.is_left_out]
    minibatch[np.random.default_rng(seed).permutation(np.array(packed, np.int64))] = np.arange(len(packed)) % K
    return minibatch


def _segments(trajectory: Trajectory, n: int, first_response: int, layout: BatchLayout) -> list[_Segment]:
    """The trajectory's segments, each cut after its last response token: later tokens are never predicted."""
    if trajectory.context not in ("append", "window", "compact", "tree"):
        raise ValueError(
            f'expected context "append", "window", "compact" or "tree", got {trajectory.context!r} in trajectory {n}'
        )
    row_length = layout.row_length
    parts = [_turn_segment(turn, n, k, first_response + k, layout) for k, turn in enumerate(trajectory.turns)]
    if trajectory.context == "append" and parts:
        parts = [_Segment(*(np.concatenate(column) for column in zip(*parts, strict=True)))]
    if trajectory.context in ("compact", "tree"):
        parts = _branches(parts)
    segments = []
    for part in parts:
        (sampled,) = np.nonzero(part.response_ids >= 0)
        if not len(sampled):
            continue
        if sampled[0] == 0:
            raise ValueError(f"expected an observation before the first response, got none in trajectory {n}")
        if sampled[-1] >= row_length:
            raise ValueError(
                f"expected segments of at most {row_length} tokens, got {sampled[-1] + 1} in trajectory {n} "
                f"({trajectory.task.id}); raise BatchLayout.row_length or lower the episode's token budget"
            )
        segments.append(_Segment(*(column[: sampled[-1] + 1] for column in part)))
    return segments


def _branches(turns: Sequence[_Segment]) -> list[_Segment]:
    """Joins each turn to the sequence that its prompt continues; one that goes on from elsewhere begins a new one.

    A sequence's prefix that belongs to another one is context alone, so that each response is learnt from once. The
    same prompt again begins a new sequence, even if the response is the same.
    """
    branches: list[_Segment] = []
    for turn in turns:
        prompt = turn.tokens[: np.count_nonzero(turn.response_ids < 0)]
        starts = lambda branch, prompt=prompt: np.array_equal(branch.tokens, prompt[: len(branch.tokens)])
        continued = max(
            filter(lambda i: starts(branches[i]), range(len(branches))),
            default=None,
            key=lambda i: len(branches[i].tokens),
        )
        if continued is None:
            branches.append(turn)
        else:
            branch = branches[continued]
            rest = _Segment(*(column[len(branch.tokens) :] for column in turn))
            branches[continued] = _Segment(*(np.concatenate(pair) for pair in zip(branch, rest, strict=True)))
    return branches


def _turn_segment(turn: Turn, n: int, k: int, response: int, layout: BatchLayout) -> _Segment:
    observed, sampled = len(turn.observation_ids), len(turn.response_ids)
    if not len(turn.logprobs) == len(turn.entropies) == sampled:
        raise ValueError(
            f"expected a logprob and an entropy for each of {sampled} sampled ids, got {len(turn.logprobs)} and "
            f"{len(turn.entropies)} in turn {k} of trajectory {n}"
        )
    zeros = np.zeros(observed, np.float32)
    versions = np.zeros(sampled) if turn.versions is None else turn.versions
    experts = np.zeros((observed + sampled, 0)) if turn.experts is None or not layout.experts else turn.experts
    if experts.shape != (observed + sampled, layout.experts):
        got = "none" if turn.experts is None else f"shape {turn.experts.shape}"
        raise ValueError(
            f"expected recorded experts [{observed + sampled}, {layout.experts}] of a turn, got {got} in turn {k} of "
            f"trajectory {n}; sample with a Sampler that records_experts, or set BatchLayout.experts to 0"
        )
    return _Segment(
        tokens=np.concatenate([turn.observation_ids, turn.response_ids]).astype(np.int32),
        response_ids=np.concatenate([np.full(observed, -1), np.full(sampled, response)]).astype(np.int32),
        logprobs=np.concatenate([zeros, turn.logprobs]).astype(np.float32),
        entropies=np.concatenate([zeros, turn.entropies]).astype(np.float32),
        versions=np.concatenate([zeros, versions]).astype(np.int32),
        experts=experts.astype(layout.experts_dtype),
    )


def _first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices: longest first, each into the first row with room. Ties keep their order."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def _fill(
    segments: Sequence[Sequence[_Segment]],
    rows: Sequence[Sequence[Sequence[int]]],
    starts: np.ndarray,
    layout: BatchLayout,
) -> dict[str, np.ndarray]:
    shape = (layout.num_microbatches * layout.rows, layout.row_length)
    arrays = {
        "tokens": np.zeros(shape, np.int32),
        "positions": np.zeros(shape, np.int32),
        "segment_ids": np.zeros(shape, np.int32),
        "response_ids": np.full(shape, -1, np.int32),
        "logprobs": np.zeros(shape, np.float32),
        "entropies": np.zeros(shape, np.float32),
        "versions": np.zeros(shape, np.int32),
        "experts": np.zeros((*shape, layout.experts), layout.experts_dtype),
    }
    for minibatch, minibatch_rows, start in zip(segments, rows, starts, strict=True):
        for row, members in enumerate(minibatch_rows, start=int(start) * layout.rows):
            offset = 0
            for number, member in enumerate(members, start=1):
                segment = minibatch[member]
                span = slice(offset, offset + len(segment.tokens))
                for name, column in segment._asdict().items():
                    arrays[name][row, span] = column
                arrays["positions"][row, span] = np.arange(len(segment.tokens))
                arrays["segment_ids"][row, span] = number
                offset = span.stop
    packed = (layout.num_microbatches, layout.rows, layout.row_length)
    return {name: array.reshape(*packed, *array.shape[2:]) for name, array in arrays.items()}
