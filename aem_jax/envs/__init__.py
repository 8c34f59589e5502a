"""Environments: the protocol, servers and their pool, and the environments themselves. This package does not use JAX.

To write an environment, implement `reset` and `step` of `Environment`; both return a `StepResult`. `check_environment`
finds problems that would disturb training. `serve` serves the environment. To train on it by name, add a `TaskSuite`,
an `EnvironmentSpec`, and a line in `registry.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aem_jax.envs.protocol import EnvError, Environment, StepResult, Task
    from aem_jax.envs.serving.server import ServerConfig, serve
    from aem_jax.envs.suite import EnvironmentSpec, SuiteOptions, TaskSuite
    from aem_jax.envs.testing.conformance import Subject, check_environment

__all__ = [
    "EnvError",
    "Environment",
    "EnvironmentSpec",
    "ServerConfig",
    "StepResult",
    "Subject",
    "SuiteOptions",
    "Task",
    "TaskSuite",
    "check_environment",
    "serve",
]

_MODULES = {
    "protocol": ("EnvError", "Environment", "StepResult", "Task"),
    "serving.server": ("ServerConfig", "serve"),
    "suite": ("EnvironmentSpec", "SuiteOptions", "TaskSuite"),
    "testing.conformance": ("Subject", "check_environment"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a name on first access, so that a server process loads only the modules it needs."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
