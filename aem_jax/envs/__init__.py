"""Environments: the protocol, servers and their pool, and the environments themselves. No JAX in here.

To write an environment: `reset` and `step` of `Environment` return a `StepResult`; `check_environment` finds what
training would stumble over; `serve` serves it. To train on it by name: a `TaskSuite`, an `EnvironmentSpec`, and a line
in `registry.py`.
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
    """Imports a name when it is asked for: a server process, which imports from this package, loads nothing more."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
