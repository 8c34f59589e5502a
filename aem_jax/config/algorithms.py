"""Advantage estimators by name. A new estimator is a pure function and one line in `ESTIMATORS`."""

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
    empg,
    gae,
    gagpo,
    gigpo,
    grpo,
    hgpo,
    maxrl,
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
    "maxrl": lambda config: of_returns(SCOPES[config.scope], partial(maxrl, eps=config.eps)),
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
    "hgpo": lambda config: partial(
        hgpo, estimator=SCALES[config.scale](config), gamma=config.gamma, history=config.history
    ),
    "gagpo": lambda config: partial(
        gagpo, estimator=SCALES[config.scale](config), gamma=config.gamma, gae_lambda=config.gae_lambda
    ),
    "empg": lambda config: partial(
        empg, scope=SCOPES[config.scope], estimator=SCALES[config.scale](config), bonus_weight=config.bonus_weight
    ),
    "gae": lambda config: partial(gae, gae_lambda=config.gae_lambda, **_whitened(config)),
}
"""Name → a function from an `Experience` to the base advantage of each response."""

VALUED: Mapping[str, Callable[["AlgorithmConfig"], ResponseAdvantages]] = {
    "gae": lambda config: partial(value_returns, gamma=config.gamma, gae_lambda=config.gae_lambda),
}
"""Name of an estimator with a value head → the returns that its values are fitted to."""

READ_BY: Mapping[str, tuple[str, ...]] = {
    "scope": ("grpo", "dr_grpo", "rloo", "maxrl", "reinforce++-baseline", "gigpo", "empg"),
    "ddof": ("grpo", "reinforce++", "reinforce++-baseline", "gigpo", "hgpo", "gagpo", "empg", "gae"),
    "eps": ("grpo", "maxrl", "reinforce++", "reinforce++-baseline", "gigpo", "hgpo", "gagpo", "empg", "gae"),
    "gamma": ("reinforce++", "reinforce++-baseline", "gigpo", "hgpo", "gagpo", "gae"),
    "gae_lambda": ("gagpo", "gae"),
    "whiten": ("reinforce++", "reinforce++-baseline", "gae"),
    "step_weight": ("gigpo",),
    "scale": ("gigpo", "hgpo", "gagpo", "empg"),
    "history": ("hgpo",),
    "bonus_weight": ("empg",),
}
"""Settings of `AlgorithmConfig` that not all estimators read → those that do."""

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
    EstimatorName = Literal[tuple(ESTIMATORS)]  # help and messages list the names of the table


@dataclass(frozen=True)
class AlgorithmConfig:
    """The advantage estimator."""

    estimator: EstimatorName = "grpo"
    """Base advantage of a response, from its episode's return (grpo, dr_grpo, rloo, maxrl; with entropies: empg),
    rewards to go (reinforce++, reinforce++-baseline), turns with the same observation (gigpo, hgpo, gagpo), or a value
    head (gae: PPO). docs/algorithms.md has the equations."""
    scope: Literal["trajectories", "turns"] = "trajectories"
    """Elements of a group's statistics: its trajectories, or its turns (long episodes then weigh more)."""
    ddof: Literal[0, 1] = 0
    """Delta degrees of freedom of σ: 0 for the population, 1 for the sample."""
    eps: float = 1e-6
    """Added to the standard deviation (maxrl: the mean), in units of reward."""
    gamma: float = 1.0
    """Discount of a reward per turn. The papers of GiGPO and HGPO and their presets have 0.95."""
    gae_lambda: float = 1.0
    """Discount of a temporal-difference error per turn, beside gamma; 1: rewards alone, 0: the next value."""
    whiten: Literal["tokens", "responses"] = "tokens"
    """Elements of the batch's mean and standard deviation."""
    step_weight: float = 1.0
    """Weight of a turn's advantage relative to the episode's."""
    scale: Literal["std", "none"] = "std"
    """Divide advantages by the standard deviations of their groups, or only centre them."""
    history: int = 2
    """Most observations before the current one that turns are compared by."""
    bonus_weight: float = 0.05
    """Weight of the bonus for a turn before one of low entropy, in units of the episode's advantage."""

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"expected algorithm.eps >= 0, got {self.eps}")
        for name in ("history", "bonus_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected algorithm.{name} >= 0, got {getattr(self, name)}")
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
    """The returns that a value head is fitted to; None without a value head."""
    return VALUED[config.estimator](config) if has_values(config) else None


def _grpo(config: AlgorithmConfig) -> Estimator:
    return partial(grpo, ddof=config.ddof, eps=config.eps)


def _whitened(config: AlgorithmConfig) -> dict[str, Any]:
    return {"gamma": config.gamma, "whiten_by": WHITENED[config.whiten], "ddof": config.ddof, "eps": config.eps}
