"""How returns become advantages, by name. A new estimator is a pure function and one line in `ESTIMATORS`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from aem_jax.advantage import (
    Estimator,
    ResponseAdvantages,
    Scope,
    by_response,
    by_token,
    by_trajectory,
    dr_grpo,
    gae,
    gigpo,
    grpo,
    of_returns,
    over_trajectories,
    over_turns,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rloo,
    value_returns,
)

ESTIMATORS: Mapping[str, Callable[["AlgorithmConfig"], ResponseAdvantages]] = {
    "grpo": lambda config: of_returns(SCOPES[config.scope], _grpo(config)),
    "dr_grpo": lambda config: of_returns(SCOPES[config.scope], dr_grpo),
    "rloo": lambda config: of_returns(SCOPES[config.scope], rloo),
    "reinforce++": lambda config: partial(reinforce_plus_plus, **_whitened(config)),
    "reinforce++-baseline": lambda config: partial(
        reinforce_plus_plus_baseline, centre_by=CENTRED[config.scope], **_whitened(config)
    ),
    "gigpo": lambda config: partial(
        gigpo,
        scope=SCOPES[config.scope],
        estimator=SCALES[config.scale](config),
        gamma=config.gamma,
        weight=config.step_weight,
    ),
    "gae": lambda config: partial(gae, gae_lambda=config.gae_lambda, **_whitened(config)),
}
"""Name → the base advantage of each response, from an `Experience`."""

VALUED: Mapping[str, Callable[["AlgorithmConfig"], ResponseAdvantages]] = {
    "gae": lambda config: partial(value_returns, gamma=config.gamma, gae_lambda=config.gae_lambda),
}
"""Name of an estimator that asks for values → the returns that they are fitted to. Such a run trains a value head."""

SCOPES: Mapping[str, Scope] = {"trajectories": over_trajectories, "turns": over_turns}
CENTRED = {"trajectories": by_trajectory, "turns": by_response}
WHITENED = {"tokens": by_token, "responses": by_response}
SCALES: Mapping[str, Callable[["AlgorithmConfig"], Estimator]] = {
    "std": lambda config: _grpo(config),
    "none": lambda config: dr_grpo,
}

if TYPE_CHECKING:
    EstimatorName = str
else:
    EstimatorName = Literal[tuple(ESTIMATORS)]  # so that help and messages know a name as soon as the table does


@dataclass(frozen=True)
class AlgorithmConfig:
    """How returns become advantages."""

    estimator: EstimatorName = "grpo"
    """Base advantage: grpo (centred and scaled in the group), dr_grpo (centred), rloo (against the others' mean),
    reinforce++ (rewards to go, whitened over the batch), reinforce++-baseline (centred in the group first), gigpo (grpo
    plus that of each turn among those that met the same observation), gae (PPO: against a value head's values, whitened
    over the batch). docs/algorithms.md has the equations."""
    scope: Literal["trajectories", "turns"] = "trajectories"
    """What a group's statistics are taken over: its trajectories, or its turns (long episodes then weigh more)."""
    ddof: Literal[0, 1] = 0
    """Where there is a standard deviation: 0 for the population's, 1 for the sample's."""
    eps: float = 1e-6
    """Added to the standard deviation, in units of reward; groups of close returns then count less."""
    gamma: float = 1.0
    """reinforce++, gigpo, gae: what a reward counts for a turn earlier. GiGPO's paper has 0.95, as the preset gigpo."""
    gae_lambda: float = 1.0
    """gae: what a turn's surprise counts for a turn earlier, beside gamma; 1 trusts rewards alone, 0 the next value."""
    whiten: Literal["tokens", "responses"] = "tokens"
    """reinforce++, gae: what counts once in the batch's mean and standard deviation."""
    step_weight: float = 1.0
    """gigpo: weight of the turn's advantage beside the episode's."""
    scale: Literal["std", "none"] = "std"
    """gigpo: divide both advantages by their groups' standard deviations, or only centre them."""

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"expected algorithm.eps >= 0, got {self.eps}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected algorithm.{name} in [0, 1], got {getattr(self, name)}")


def response_advantages(config: AlgorithmConfig) -> ResponseAdvantages:
    """The base advantage of each response."""
    return ESTIMATORS[config.estimator](config)


def has_values(config: AlgorithmConfig) -> bool:
    """Whether a value head is trained."""
    return config.estimator in VALUED


def value_targets(config: AlgorithmConfig) -> ResponseAdvantages | None:
    """What a value head is to learn of each response; None where there is none."""
    return VALUED[config.estimator](config) if has_values(config) else None


def _grpo(config: AlgorithmConfig) -> Estimator:
    return partial(grpo, ddof=config.ddof, eps=config.eps)


def _whitened(config: AlgorithmConfig) -> dict[str, Any]:
    return {"gamma": config.gamma, "whiten_by": WHITENED[config.whiten], "ddof": config.ddof, "eps": config.eps}
