"""Carry-over: rollout groups that go on from one training step to the next, their order, and their record in JSON.

A run keeps N = `rollout.groups_per_step` groups under way. A step ends once `rollout.carry_min_groups` of them are
complete, and learns from all that are; their successors start in the next step. Groups are numbered over the whole run,
in the order in which they start: without carry-over, group n would be group n mod N of step n // N, and it has the task
and the keys of that one.

At the start of a step the caches of all episodes under way are computed again with the step's parameters. So a token
is sampled from exactly the policy of its step, given the tokens before it, and what an episode samples follows from its
tokens alone: a resumed run goes on as an uninterrupted one.
"""

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from aem_jax.envs.protocol import Task
from aem_jax.rollout.config import RolloutConfig
from aem_jax.rollout.episode import Attempt, Episode, Observation, Sampled
from aem_jax.trajectory import Ending, Trajectory, Turn

GroupAttempts = Callable[[int], Sequence[Attempt]]
"""Number of a group -> its episodes' first attempts, by member."""


@dataclass(frozen=True)
class Carried:
    """Groups under way between two steps.

    Attributes:
        started: number of groups started since the run began; the next group has this number.
        groups: number of each group under way -> the step in which it started.
        finished: their episodes that have ended.
        episodes: slot -> episode under way.
        queue: attempts that wait for a slot.
    """

    started: int = 0
    groups: Mapping[int, int] = field(default_factory=dict)
    finished: Sequence[Trajectory] = ()
    episodes: Mapping[int, Episode] = field(default_factory=dict)
    queue: Sequence[Attempt] = ()

    def fill(self, count: int, attempts: GroupAttempts, step: int) -> "Carried":
        """Starts groups until `count` are under way."""
        new = range(self.started, self.started + count - len(self.groups))
        queue = [*self.queue, *(attempt for number in new for attempt in attempts(number))]
        return replace(self, started=new.stop, groups={**self.groups, **dict.fromkeys(new, step)}, queue=queue)

    def complete(self, finished: Sequence[Trajectory], group_size: int) -> set[int]:
        """Numbers of the groups all of whose episodes are among `finished`."""
        counts = Counter(trajectory.group for trajectory in finished)
        return {number for number in self.groups if counts[number] == group_size}

    def is_enough(self, finished: Sequence[Trajectory], config: RolloutConfig, step: int) -> bool:
        """Whether a step may end with these finished episodes: enough groups, and no other would get too old."""
        complete = self.complete(finished, config.group_size)
        due = {number for number, start in self.groups.items() if step - start >= config.carry_max_age}
        return len(complete) >= config.carry_min_groups and due <= complete

    @property
    def num_sampled(self) -> int:
        """Tokens sampled so far by the groups under way."""
        ended = sum(len(turn.response_ids) for trajectory in self.finished for turn in trajectory.turns)
        return ended + sum(episode.num_sampled for episode in self.episodes.values())


def group_attempts(tasks: Callable[[int, int], Sequence[Task]], key: jax.Array, config: RolloutConfig) -> GroupAttempts:
    """The attempts of each group of a run, as a run without carry-over has them.

    Args:
        tasks: (step, round) -> tasks, `groups_per_step` of each round.
        key: the run's PRNG key.
        config: sizes.
    """
    count, size = config.groups_per_step, config.group_size

    def attempts(number: int) -> list[Attempt]:
        step, index = divmod(number, count)
        prng = np.asarray(jax.random.key_data(jax.random.split(jax.random.fold_in(key, step), count * size)))
        task = tasks(step, 0)[index]
        return [Attempt(task, number, member, prng[index * size + member]) for member in range(size)]

    return attempts


def record(carried: Carried) -> dict[str, Any]:
    """Groups under way as a JSON mapping, exact to the bit; tasks and keys follow from the groups' numbers."""
    return {
        "started": carried.started,
        "groups": [list(pair) for pair in carried.groups.items()],
        "finished": [_trajectory_record(trajectory) for trajectory in carried.finished],
        "episodes": [[slot, _episode_record(episode)] for slot, episode in carried.episodes.items()],
        "queue": [_attempt_record(attempt) for attempt in carried.queue],
    }


def from_record(values: Mapping[str, Any], attempts: GroupAttempts) -> Carried:
    """The groups of a `record`, with the tasks and keys of `attempts`."""
    groups = {int(number): int(step) for number, step in values["groups"]}
    first = {number: attempts(number) for number in groups}

    def attempt(saved: Mapping[str, int]) -> Attempt:
        fresh = first[saved["group"]][saved["member"]]
        return replace(fresh, retries=saved["retries"], server_losses=saved["server_losses"])

    return Carried(
        started=values["started"],
        groups=groups,
        finished=[_trajectory(saved, first) for saved in values["finished"]],
        episodes={int(slot): _episode(saved, attempt(saved["attempt"])) for slot, saved in values["episodes"]},
        queue=[attempt(saved) for saved in values["queue"]],
    )


_ARRAYS = {
    "observation_ids": np.int32,
    "response_ids": np.int32,
    "logprobs": np.float32,
    "entropies": np.float32,
    "versions": np.int32,
}
"""The arrays of a turn, and their dtypes."""
_SAMPLED = tuple(_ARRAYS.values())[1:]


def _encode(values: Any, dtype: Any) -> str:
    return base64.b64encode(np.asarray(values, np.dtype(dtype).newbyteorder("<")).tobytes()).decode()


def _decode(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _attempt_record(attempt: Attempt) -> dict[str, int]:
    return {name: getattr(attempt, name) for name in ("group", "member", "retries", "server_losses")}


def _experts_record(experts: Any, count: int) -> list[Any] | None:
    """Dtype, experts of a token, and the experts of the first `count` tokens."""
    if experts is None:
        return None
    array = np.asarray(experts)[:count]
    return [array.dtype.name, array.shape[1], _encode(array, array.dtype)]


def _experts(saved: Sequence[Any] | None) -> np.ndarray | None:
    if saved is None:
        return None
    dtype, width, text = saved
    return _decode(text, np.dtype(dtype)).reshape(-1, width)


def _turn_record(turn: Turn) -> dict[str, Any]:
    values = dict(vars(turn))
    arrays = {name: _encode(values[name], dtype) for name, dtype in _ARRAYS.items()}
    experts = _experts_record(turn.experts, len(turn.observation_ids) + len(turn.response_ids))
    return values | arrays | {"experts": experts}


def _turn(saved: Mapping[str, Any]) -> Turn:
    arrays = {name: _decode(saved[name], dtype) for name, dtype in _ARRAYS.items()}
    return Turn(**{**saved, **arrays, "experts": _experts(saved.get("experts"))})


def _trajectory_record(trajectory: Trajectory) -> dict[str, Any]:
    values = {name: value for name, value in vars(trajectory).items() if name != "task"}
    turns = [_turn_record(turn) for turn in trajectory.turns]
    return values | {"turns": turns, "ending": trajectory.ending.value}


def _trajectory(saved: Mapping[str, Any], first: Mapping[int, Sequence[Attempt]]) -> Trajectory:
    turns = tuple(_turn(turn) for turn in saved["turns"])
    task = first[saved["group"]][saved["member"]].task
    return Trajectory(**{**saved, "task": task, "turns": turns, "ending": Ending(saved["ending"])})


def _episode_record(episode: Episode) -> dict[str, Any]:
    observation = episode.observation
    seen = observation and {
        "text": observation.text,
        "keep": observation.keep,
        "prefill_tokens": _encode(observation.prefill_tokens, np.int32),
    }
    return {
        "attempt": _attempt_record(episode.attempt),
        "turns": [_turn_record(turn) for turn in episode.turns],
        "cached_ids": _encode(episode.cached_ids, np.int32),
        "observation": seen,
        "needs_prefill": episode.needs_prefill,
        "response": [[_encode(*pair) for pair in zip(part, _SAMPLED, strict=True)] for part in episode.response],
        "budget": episode.budget,
        "experts": _experts_record(episode.experts, episode.num_tokens),
    }


def _sampled(saved: Sequence[str]) -> Sampled:
    ids, logprobs, entropies, versions = (_decode(*pair) for pair in zip(saved, _SAMPLED, strict=True))
    return ids, logprobs, entropies, versions


def _episode(saved: Mapping[str, Any], attempt: Attempt) -> Episode:
    ids = lambda text: tuple(_decode(text, np.int32).tolist())
    seen = saved["observation"]
    return Episode(
        attempt=attempt,
        turns=tuple(_turn(turn) for turn in saved["turns"]),
        cached_ids=ids(saved["cached_ids"]),
        observation=seen and Observation(seen["text"], seen["keep"], ids(seen["prefill_tokens"])),
        needs_prefill=saved["needs_prefill"],
        response=tuple(_sampled(part) for part in saved["response"]),
        budget=saved["budget"],
        experts=_experts(saved.get("experts")),
    )
