"""ALFWorld as an `Environment`: a response becomes a command, and its outcome a reward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from aem_jax.envs.actions import extract_action, has_thought
from aem_jax.envs.alfworld.engine import NOTHING_HAPPENS, Game, Player, damage_named
from aem_jax.envs.alfworld.generator.config import GeneratorConfig
from aem_jax.envs.alfworld.tasks import load_game
from aem_jax.envs.protocol import StepResult


@dataclass(frozen=True)
class AlfworldConfig:
    """Household games, and the rules of an episode."""

    NAME: ClassVar[str] = "alfworld"

    max_steps: int = 50
    """Steps after which an episode is truncated; generated games have their own."""
    reward_won: float = 10.0
    """Reward of the step that solves the task."""
    reward_step: float = 0.0
    """Reward of every other valid step."""
    reward_invalid: float = -0.1
    """Reward of a response whose action is missing or not admissible."""
    require_thinking: bool = False
    """Whether a response without <think>…</think> is invalid, too, as in the paper; its action is executed."""
    max_invalid: int = 0
    """Invalid actions that truncate an unsolved episode; 0 sets no limit."""
    data: str = ""
    """Folder of ALFWorld's official data. If empty, the folder in $ALFWORLD_DATA; without both, games are generated."""
    skip_bad: bool = False
    """Whether to skip files of the official data that contain no game. By default the first such file is an error."""
    games: GeneratorConfig = GeneratorConfig()  # noqa: RUF009 (frozen)
    """Games to generate. With official data, only its task types are used: they select the games."""

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(f"expected max_steps of at least 1, got {self.max_steps}")
        if self.max_invalid < 0:
            raise ValueError(f"expected max_invalid of at least 0 (no limit), got {self.max_invalid}")


class AlfworldEnv:
    """An environment that plays one ALFWorld episode at a time.

    `StepResult.info` contains `won`, `valid_action`, `admissible` (sorted), `score` and `task_type`.

    Args:
        config: rules of an episode.
        load_game: payload -> game.
    """

    def __init__(
        self, config: AlfworldConfig | None = None, load_game: Callable[[Mapping[str, Any]], Game] = load_game
    ):
        self._config = config or AlfworldConfig()
        self._load = load_game
        self._player: Player | None = None
        self._steps = self._limit = self._invalid = 0

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of the game in a payload.

        Raises:
            ValueError: `load_game` refuses the payload.
        """
        game = self._load(task)
        with damage_named(game.source):
            self._player, self._steps, self._invalid = Player(game), 0, 0
        self._limit = task.get("generate", {}).get("max_steps", self._config.max_steps)
        # A game whose goal holds from the start is already over. It is skipped, not played.
        info = self._info(self._player, valid=True)
        return StepResult(self._player.observation, terminated=self._player.won, info=info)

    def step(self, action_text: str) -> StepResult:
        """Executes the command in a response. Without an admissible command in action tags: `Nothing happens.`

        Raises:
            ValueError: no episode is running.
        """
        player = self._player
        if player is None or player.won or self._limited():
            raise ValueError("expected a running episode, got none; call reset first")
        self._steps += 1
        command = extract_action(action_text)
        with damage_named(player.game.source):
            observation = NOTHING_HAPPENS if command is None else player.step(command)
        acted = command is not None and player.acted
        valid = acted and (has_thought(action_text) or not self._config.require_thinking)
        self._invalid += not valid
        return StepResult(
            observation,
            reward=self._reward(player.won, valid),
            terminated=player.won,
            truncated=not player.won and self._limited(),
            info=self._info(player, valid),
        )

    def _reward(self, won: bool, valid: bool) -> float:
        config = self._config
        if won:  # without a thought, a winning response may be invalid
            return config.reward_won if valid else config.reward_won + config.reward_invalid
        return config.reward_step if valid else config.reward_invalid

    def _limited(self) -> bool:
        """Whether the episode has reached a limit."""
        return self._steps >= self._limit or 0 < self._config.max_invalid <= self._invalid

    def close(self) -> None:
        """Ends the episode."""
        self._player = None

    def _info(self, player: Player, valid: bool) -> dict[str, Any]:
        return {
            "won": player.won,
            "valid_action": valid,
            "admissible": player.admissible,
            "score": float(player.won),
            "task_type": player.game.task_type,
        }
