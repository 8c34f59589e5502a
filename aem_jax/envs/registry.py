"""The environments by name: one line each, and nothing is imported before it is asked for.

An environment of yours needs no line here: `my_env.py:MyEnv` or `my_package.my_module:make` names what makes one. It
needs one to be a value of `--environment`: a folder beside this file whose `suite.py` holds an `EnvironmentSpec`.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from aem_jax.envs.protocol import Environment, describe_raised
from aem_jax.envs.suite import EnvironmentConfig, EnvironmentSpec
from aem_jax.files import parse_json
from aem_jax.overrides import nearest


class Entry(NamedTuple):
    """Where an environment is, and what it is for."""

    where: str
    """module:attribute of its `EnvironmentSpec`."""
    served: bool = True
    """Whether our servers serve it by this name."""
    trained: bool = True
    """Whether runs train on it: it has a `suite`."""


ENVIRONMENTS: Mapping[str, Entry] = {
    "alfworld": Entry("aem_jax.envs.alfworld.suite:ALFWORLD"),
    "webshop": Entry("aem_jax.envs.webshop.suite:WEBSHOP"),
    "swe": Entry("aem_jax.envs.swe.suite:SWE"),
    "swe-choices": Entry("aem_jax.envs.swe.suite:SWE_CHOICES"),
    "openenv": Entry("aem_jax.envs.openenv.suite:OPENENV", served=False),
    "echo": Entry("aem_jax.envs.testing.echo:ECHO", trained=False),
    "echo-slow": Entry("aem_jax.envs.testing.echo:ECHO_SLOW", trained=False),
    "scripted": Entry("aem_jax.envs.testing.scripted:SCRIPTED", trained=False),
}

SERVED = tuple(name for name, entry in ENVIRONMENTS.items() if entry.served)
"""Names that `serve` takes."""
TRAINED = tuple(name for name, entry in ENVIRONMENTS.items() if entry.trained)
"""Names that `--environment` takes."""


@cache
def registered(name: str) -> EnvironmentSpec:
    """Imports an environment of the registry."""
    module, _, attribute = ENVIRONMENTS[name].where.partition(":")
    return getattr(importlib.import_module(module), attribute)


def default_config(name: str) -> EnvironmentConfig:
    """The default settings of an environment of `TRAINED`."""
    config = registered(name).config
    assert config is not None and name == config.NAME, f"expected a config with NAME {name!r}, got {config}"
    return config()


def check_name(name: str) -> None:
    """Whether our servers know a name, or it has the form of a path; nothing is imported.

    Raises:
        ValueError: it is neither.
    """
    where, _, attribute = name.rpartition(":")
    if name not in SERVED and not (where and attribute):
        raise ValueError(
            f"expected an environment of {', '.join(SERVED)}, or file.py:attribute, got {name!r}{nearest(name, SERVED)}"
        )


def environment_spec(name: str) -> EnvironmentSpec:
    """The environment of a name of `SERVED`, or of a path: `file.py:attribute` or `module:attribute`.

    What a path names is called with the settings as keywords, once for each session, and returns an `Environment`; a
    class will do. Each session gets a thread.

    Raises:
        ValueError: no such environment, or nothing there that can make one.
    """
    check_name(name)
    if name in SERVED:
        return registered(name)
    where, _, attribute = name.rpartition(":")
    module = _imported(where)
    make: Any = getattr(module, attribute, None)
    if not callable(make):
        names = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise ValueError(
            f"expected something in {where} that makes an environment, got {attribute!r}{nearest(attribute, names)}"
        )
    description = (inspect.getdoc(make) or "").partition("\n")[0]
    return EnvironmentSpec(partial(_own, name, make), description=description or name)


def settings_from_json(text: str) -> dict[str, Any]:
    """Reads an environment's settings from a command line.

    Raises:
        ValueError: not a JSON mapping.
    """
    try:
        settings = parse_json(text, "settings")
    except ValueError as error:
        raise ValueError(f"expected settings as a JSON mapping, got {text!r:.200}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"expected settings as a JSON mapping, got {text!r}")
    return settings


def _own(name: str, make: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[[], Environment]:
    """The factory of an environment that is named by its path."""
    try:
        inspect.signature(make).bind(**settings)
    except TypeError as error:
        raise ValueError(f"expected settings that {name} can be called with, got {dict(settings)}: {error}") from None

    def checked() -> Environment:
        try:
            env = make(**settings)
        except KeyboardInterrupt:  # somebody's Ctrl-C
            raise
        except BaseException as error:  # some engines exit where a file or a display is missing
            raise ValueError(f"expected an environment from {name}, got {describe_raised(error)}") from error
        missing = [method for method in ("reset", "step", "close") if not callable(getattr(env, method, None))]
        if missing:
            raise ValueError(f"expected an environment with reset, step and close from {name}, got no {missing[0]}")
        return env

    return checked


def _imported(where: str) -> ModuleType:
    """A module by its name, or from its file.

    Raises:
        ValueError: there is none, or it cannot be imported.
    """
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        if not Path(where).is_file():
            raise ImportError(f"no such file in {Path.cwd()}")
        spec = importlib.util.spec_from_file_location(f"environment_{Path(where).stem}", where)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"expected a Python file or module to import, got {where!r}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(
            f"expected a Python file or module to import, got {where!r}: {describe_raised(error)}"
        ) from error
