"""Help of the command line: the settings of a config, explained by the docstrings under its fields.

The documentation's list of settings is made from the same `setting_groups`. This module loads no JAX, so that help is
fast.
"""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from aem_jax.errors import ConfigError
from aem_jax.overrides import annotations, as_values, flag, nearest, unions, unknown

ALL = "all"
"""Instead of the name of a group: every setting."""
_WIDEST, _LONGEST_DEFAULT = 120, 60
_LATER = " " * 8
_NONE: Mapping[str, Sequence[str]] = types.MappingProxyType({})


class Setting(NamedTuple):
    """One setting: its dotted name, type, value in the config, and explanation."""

    name: str
    kind: Any
    default: Any
    text: str


class Group(NamedTuple):
    """The settings of one config, without those of the configs inside it. The outermost config has no name."""

    name: str
    text: str
    settings: list[Setting]


@cache
def explanations(cls: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and of its bases, in one line each."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # pyright: ignore[reportAttributeAccessIssue]
        for field, after in itertools.pairwise(body):
            match field, after:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def setting_groups(config: Any) -> list[Group]:
    """The settings of a config, in order, grouped as its dataclasses are."""
    kinds, values = annotations(config), as_values(config)

    def groups(part: Any, prefix: str, text: str) -> list[Group]:
        texts, chosen = explanations(type(part)), unions(type(part))
        group, inner = Group(prefix.removesuffix("."), text, []), []
        for field in dataclasses.fields(part):
            name, value, text = field.name, getattr(part, field.name), texts.get(field.name, "")
            if name in chosen:
                group.settings.append(Setting(name, kinds[name], values[name], text))
                name, text = chosen[name].key(value), inspect.getdoc(value) or ""
            if dataclasses.is_dataclass(value):
                inner += groups(value, f"{prefix}{name}.", text.partition("\n\n")[0])
            else:
                group.settings.append(Setting(prefix + name, kinds[prefix + name], value, text))
        return [group, *inner]

    return groups(config, "", "")


def help_text(
    config: Any, usage: str, about: str, names: Sequence[str] = (), unused: Mapping[str, Sequence[str]] = _NONE
) -> str:
    """The help of a command.

    Args:
        config: the defaults of its settings.
        usage: the command line in short.
        about: what the command does.
        names: groups or settings to explain, or `all`; by default all but the unused ones.
        unused: groups and settings without an effect, by the options that would give them one; they share a line.

    Raises:
        ConfigError: a name that is neither a group nor a setting.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    wanted = [name.replace("-", "_") for name in names if name != ALL]
    hidden = [] if names else [name for group in unused.values() for name in group]
    groups, lines = setting_groups(config), [f"usage: {usage}"]
    if wanted:
        _check_names(config, wanted, groups)
    else:
        lines += ["", *(row for line in about.split("\n") for row in _wrap(line, width, later=_hang(line)) or [""])]
    is_shown = lambda name: (not wanted or _covers(wanted, name)) and not _covers(hidden, name)
    for group in groups:
        if settings := [setting for setting in group.settings if is_shown(setting.name)]:
            lines += ["", *_wrap(f"{group.name}: {group.text}", width)] if group.name else ["", "settings:"]
            lines += [line for setting in settings for line in _setting(setting, width)]
    if hidden:
        lines += ["", "without effect in this run (--help NAME explains one of them):"]
        for option, group in unused.items():
            lines += _wrap(f"with {option}: {', '.join(map(flag, group))}", width, "  ", "      ")
    return "\n".join(lines)


def describe_type(kind: Any) -> str:
    """A type as the placeholder of an option's value."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if origin in (typing.Union, types.UnionType):
        return "|".join(map(describe_type, arguments))
    if origin is tuple:
        inner = [describe_type(item) for item in arguments if item is not ...]
        return f"[{inner[0]} ...]" if arguments[1:] == (...,) else " ".join(inner)
    words = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH", type(None): "none"}
    return words.get(kind, str(kind))


def describe_value(value: Any) -> str:
    """A value as it is written on the command line."""
    return shlex.join(map(str, value if isinstance(value, tuple) else [value]))


def _setting(setting: Setting, width: int) -> list[str]:
    default = textwrap.shorten(describe_value(setting.default), _LONGEST_DEFAULT, placeholder=" …")
    kind = describe_type(setting.kind)
    if len(kind) > width - len(_LATER):
        kind = kind.replace(",", ", ")  # where a line may end
    head = f"{flag(setting.name)} {kind} (default: {default})"
    return [*_wrap(head, width, "  ", _LATER), *_wrap(setting.text, width, "    ", "    ")]


def _wrap(text: str, width: int, first: str = "", later: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(width, first, later, break_on_hyphens=False, break_long_words=False)
    return wrapper.wrap(text)


def _hang(line: str) -> str:
    """The indent of the second column of a table's line."""
    return " " * len(match[0]) if (match := re.match(r"  \S+ +", line)) else ""


def _covers(names: Sequence[str], name: str) -> bool:
    """Whether one of `names` is the setting of that name, or a group around it."""
    return any(f"{name}.".startswith(f"{outer}.") for outer in names)


def _check_names(config: Any, wanted: Sequence[str], groups: Sequence[Group]) -> None:
    known = [setting.name for group in groups for setting in group.settings]
    for name in wanted:
        if not any(_covers([name], setting) for setting in known):
            message, names = unknown(name, config, flag), [group.name for group in groups if group.name]
            if message.startswith("unknown"):
                message = f"unknown group {name!r}{nearest(name, names) or '; groups are ' + ', '.join(names)}"
            raise ConfigError(f"--help: {message}")
