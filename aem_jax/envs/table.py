"""The environments that can be served: the one literal table of names, paths to anybody's own, and how JSON settings
become a config.

An environment of yours needs no line here: `my_env.py:MyEnv` or `my_package.my_module:make` names what makes one.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from aem_jax.envs.protocol import Environment, describe_raised
from aem_jax.files import parse_json

Config = TypeVar("Config")


@dataclass(frozen=True)
class EnvironmentSpec:
    """How to make an environment.

    Attributes:
        factory: `settings -> (() -> Environment)`; checks the settings once, imports what the environment needs.
        blocking: its calls take long or wait, so each session gets a thread; else they run in the server's event
            loop, which is faster.
        description: one line.
    """

    factory: Callable[[Mapping[str, Any]], Callable[[], Environment]]
    blocking: bool
    description: str


def _echo(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.testing.echo import EchoConfig, EchoEnv

    config = config_from(EchoConfig, settings)
    return lambda: EchoEnv(config)


def _scripted(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.testing.scripted import ScriptedConfig, ScriptedEnv

    config = config_from(ScriptedConfig, settings)
    return lambda: ScriptedEnv(config)


def _alfworld(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.alfworld.env import AlfworldConfig, AlfworldEnv
    from aem_jax.envs.alfworld.tasks import load_game

    config = config_from(AlfworldConfig, settings)
    return lambda: AlfworldEnv(config, load_game=load_game)


def _swe_choices(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.swe.choices import ChoicesConfig, ChoicesEnv, make_failing

    config = config_from(ChoicesConfig, settings)
    failing = make_failing(config)  # one for all sessions of the process: it remembers verdicts
    return lambda: ChoicesEnv(config, failing)


def _shop_front(settings: Mapping[str, Any]):
    from aem_jax.envs.webshop.env import WebshopConfig, shop_front
    from aem_jax.envs.webshop.shop import ShopConfig, open_shop

    shop = config_from(ShopConfig, settings.get("shop", {}))
    config = config_from(WebshopConfig, {name: value for name, value in settings.items() if name != "shop"})
    return shop_front(config, open_shop(shop)), config


def _webshop(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.webshop.env import WebshopEnv

    front, config = _shop_front(settings)  # one for all sessions of the process
    return lambda: WebshopEnv(front, config)


def _webshop_site(settings: Mapping[str, Any]):
    from aem_jax.envs.webshop.shop import ShopConfig
    from aem_jax.envs.webshop.site import make_site

    return make_site(_shop_front(settings)[0], config_from(ShopConfig, settings.get("shop", {})).held_out)


def _swe(settings: Mapping[str, Any]) -> Callable[[], Environment]:
    from aem_jax.envs.swe.env import SweConfig, SweEnv
    from aem_jax.envs.swe.payload import load_task
    from aem_jax.envs.swe.sandbox.choose import choose_runtime
    from aem_jax.envs.swe.sandbox.workspace import SandboxError

    config = config_from(SweConfig, settings)
    try:
        runtime = choose_runtime(config.runtime, config.bubblewrap, config.container)  # one for all sessions
    except SandboxError as error:
        raise OSError(str(error)) from None  # which a server reports as what is missing on this machine
    return lambda: SweEnv(config, load_task, runtime)


ENVIRONMENTS: Mapping[str, EnvironmentSpec] = {
    "alfworld": EnvironmentSpec(_alfworld, blocking=False, description="household tasks in text (ALFWorld)"),
    "echo": EnvironmentSpec(_echo, blocking=False, description="repeats what it is told; for tests and benchmarks"),
    "echo-slow": EnvironmentSpec(_echo, blocking=True, description="the same, a thread for each session"),
    "scripted": EnvironmentSpec(_scripted, blocking=True, description="episodes of scripted length and latency"),
    "swe": EnvironmentSpec(_swe, blocking=True, description="repository bugs to fix, in a sandbox (SWE-bench style)"),
    "swe-choices": EnvironmentSpec(_swe_choices, blocking=True, description="fixing bugs by choosing among edits"),
    "webshop": EnvironmentSpec(_webshop, blocking=False, description="shopping by searching and clicking (WebShop)"),
}

SITES: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {"webshop": _webshop_site}
"""Environments that a person can use in a browser: settings -> an ASGI application."""


def check_name(name: str) -> None:
    """Whether a name is in the table or has the form of a path; nothing is imported.

    Raises:
        ValueError: it is neither.
    """
    where, _, attribute = name.rpartition(":")
    if name not in ENVIRONMENTS and not (where and attribute):
        raise ValueError(
            f"expected an environment of {', '.join(ENVIRONMENTS)}, or file.py:attribute, got {name!r}"
            f"{_nearest(name, ENVIRONMENTS)}"
        )


def environment_spec(name: str) -> EnvironmentSpec:
    """Looks a name up, or imports what a path names: `file.py:attribute` or `module:attribute`.

    What it names is called with the settings as keywords, once for each session, and returns an `Environment`; a class
    will do. Each session gets a thread.

    Raises:
        ValueError: no such environment, or nothing there that can make one.
    """
    check_name(name)
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    where, _, attribute = name.rpartition(":")
    module = _imported(where)
    make: Any = getattr(module, attribute, None)
    if not callable(make):
        found = [each for each, value in vars(module).items() if callable(value) and not each.startswith("_")]
        raise ValueError(
            f"expected something in {where} that makes an environment, got {attribute!r}{_nearest(attribute, found)}"
        )
    description = (inspect.getdoc(make) or "").partition("\n")[0]
    return EnvironmentSpec(partial(_own, name, make), blocking=True, description=description or name)


def _own(name: str, make: Callable[..., Any], settings: Mapping[str, Any]) -> Callable[[], Environment]:
    """The factory of an environment that is not in the table."""
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
        missing = [each for each in ("reset", "step", "close") if not callable(getattr(env, each, None))]
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


def config_from(cls: type[Config], settings: Mapping[str, Any]) -> Config:
    """Builds a frozen config dataclass from JSON settings (lists become tuples, mappings nested dataclasses).

    Raises:
        ValueError: a name that the config does not have, or a value that it refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    values = {}
    for name, value in settings.items():
        if name not in fields:
            raise ValueError(
                f"expected settings of {cls.__name__} among {', '.join(fields)}, got {name!r}{_nearest(name, fields)}"
            )
        nested = fields[name].type
        if isinstance(value, Mapping) and isinstance(nested, type) and dataclasses.is_dataclass(nested):
            value = config_from(nested, value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def settings_from_json(text: str) -> dict[str, Any]:
    """Reads settings given on a command line.

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


def _nearest(name: str, names: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
