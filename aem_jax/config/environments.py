"""The environment of a run: its task suite, and the files that its settings name."""

from collections.abc import Mapping
from dataclasses import replace

from aem_jax.config.run import ENVIRONMENT, RunConfig
from aem_jax.envs.registry import registered
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite


def _spec(config: RunConfig) -> EnvironmentSpec:
    return registered(config.environment.NAME)


def task_suite(config: RunConfig) -> TaskSuite:
    """The tasks and agents of a run's environment.

    Raises:
        ValueError: settings that contradict each other, or files that cannot be read.
    """
    settings, make = config.warmstart, _spec(config).suite
    assert make is not None, f"expected an environment of TRAINED, got {config.environment.NAME}"
    options = SuiteOptions(
        config.seed,
        config.evaluation.splits,
        settings.expert_noise,
        settings.expert_thinks,
        settings.expert_habit,
        config.env,
    )
    suite = make(config.environment, options)
    if suite.demonstrator is None and settings.episodes and not settings.init_from:
        raise ValueError(
            f"--warmstart.episodes: expected 0 with {config.environment.NAME}, got {settings.episodes}; "
            "with these settings, this environment has no expert that could demonstrate its tasks (WebShop has one "
            "with --webshop.mode text or text_rich)"
        )
    if suite.prompt is None and config.rollout.prompt_style == "single":
        raise ValueError(
            f"--rollout.prompt-style: expected chat with these settings of {config.environment.NAME}, got single; "
            "ALFWorld, and WebShop with the mode text or text_rich, compose such a prompt"
        )
    return suite


def from_environ(config: RunConfig) -> RunConfig:
    """Completes the environment's settings of a new run from environment variables."""
    return replace(config, environment=_spec(config).from_environ(config.environment))


def path_settings(config: RunConfig) -> set[str]:
    """Names of the environment's settings that hold paths."""
    return {f"{ENVIRONMENT.key(config.environment)}.{name}" for name in _spec(config).paths(config.environment)}


def input_files(config: RunConfig) -> Mapping[str, Files]:
    """Files of the environment that decide what a run computes, by the setting that names them."""
    files = _spec(config).inputs(config.environment)
    return {f"{ENVIRONMENT.key(config.environment)}.{name}": value for name, value in files.items()}
