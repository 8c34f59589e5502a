"""Plain values onto nested frozen dataclasses, by dotted name: for presets, saved configs, the command line, and JSON.

Every mistake is a `ConfigError` of one line with the expected value, the given one, and the nearest known name. No JAX:
`serve` starts and stays without it.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from aem_jax.errors import ConfigError

Config = TypeVar("Config")
Options = dict[str, list[str]]
"""The words after each option of a command line, by the name of its field."""

_FEW = 20
"""Most fields that a message lists."""


def nearest(name: str, names: Iterable[str], spell: Callable[[str], str] = repr) -> str:
    """`; did you mean …?` for the closest of `names`, by the full name or by its last part; empty if none is close."""
    names = list(names)
    matches = difflib.get_close_matches(name, names, n=3)
    # Letters in another order are the most likely mistake among short names: gpro is grpo, not hgpo.
    matches.sort(key=lambda known: sorted(known) != sorted(name))
    group, _, part = name.rpartition(".")
    initials = lambda known: "".join(word[0] for word in known.rpartition(".")[2].split("_") if word)
    if short := [known for known in names if len(part) > 1 and initials(known) == part]:  # lr is learning_rate
        matches = sorted(short, key=lambda known: known.rpartition(".")[0] != group)
    if not matches:
        last = {known.rpartition(".")[2]: known for known in reversed(names)}
        # --trian is not --aem.variant.
        matches = [last[part] for part in difflib.get_close_matches(part, list(last), n=1, cutoff=0.75)]
    return f"; did you mean {spell(matches[0])}?" if matches else ""


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Marks a field that holds one of several configs (a tagged union): `environment: Annotated[Any, OneOf(…)]`.

    By dotted name the field's value is the name of the choice, and the choice's settings stand beside it under that
    name: `environment = "alfworld"` and `alfworld.max_steps`. Only fields of the outermost config may be marked.

    Attributes:
        names: of the choices.
        default: name -> the choice's default config.
        name_of: config -> its name.
    """

    names: Sequence[str]
    default: Callable[[str], Any]
    name_of: Callable[[Any], str]

    def key(self, config: Any) -> str:
        """The name under which the settings of a choice stand."""
        return _key(self.name_of(config))


def _key(name: str) -> str:
    return name.replace("-", "_")


def unions(cls: type) -> dict[str, OneOf]:
    """The marked fields of a config's class."""
    marks = {name: getattr(kind, "__metadata__", ()) for name, kind in _hints(cls).items()}
    return {name: mark[0] for name, mark in marks.items() if mark and isinstance(mark[0], OneOf)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def annotations(config: Any) -> dict[str, Any]:
    """The fields of a config and of those inside it, dotted, with their types, in order."""
    hints, chosen = _hints(type(config)), unions(type(config))
    kinds = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in chosen:
            kinds[name] = Literal[tuple(chosen[name].names)]
            name = chosen[name].key(value)
        if dataclasses.is_dataclass(value):
            kinds |= {f"{name}.{inner}": kind for inner, kind in annotations(value).items()}
        else:
            kinds[name] = hints[name]
    return kinds


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings; keys are joined by dots."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def nested_values(config: Any) -> dict[str, Any]:
    """A config as nested mappings, which JSON can hold: `dataclasses.asdict` with the choices of unions by name."""
    chosen, values = unions(type(config)), {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name in chosen:
            values[name] = chosen[name].name_of(value)
            name = chosen[name].key(value)
        values[name] = nested_values(value) if dataclasses.is_dataclass(value) else value
    return values


def as_values(config: Any) -> dict[str, Any]:
    """A config's fields by dotted name; the inverse of `override` on a config of the same class."""
    return flatten(nested_values(config))


def choose(config: Config, values: Mapping[str, Any], spell: Callable[[str], str] = repr) -> Config:
    """A copy of `config` with the choices of its unions that `values` names; a choice that it has keeps its settings.

    Raises:
        ConfigError: no such choice.
    """
    for name, union in unions(type(config)).items():
        if name in values and values[name] != union.name_of(getattr(config, name)):
            try:
                choice = conform(values[name], Literal[tuple(union.names)])
            except ValueError as error:
                raise ConfigError(f"{spell(name)}: {error}") from None
            config = dataclasses.replace(config, **{name: union.default(choice)})  # pyright: ignore[reportArgumentType]
    return config


def override(config: Config, values: Mapping[str, Any], spell: Callable[[str], str] = repr) -> Config:
    """A copy of `config` with `values` in place.

    Args:
        config: a frozen dataclass, possibly of others. One with a method `with_values` makes its copy itself.
        values: plain JSON or TOML values by dotted name.
        spell: writes a field's name as the user of these values does, for messages.

    Raises:
        ConfigError: an unknown setting, a value of another type, or one that the config itself refuses.
    """
    config = choose(config, values, spell)
    kinds, chosen = annotations(config), unions(type(config))
    checked = {}
    for name, value in values.items():
        if name not in kinds:
            raise ConfigError(unknown(name, config, spell))
        if name in chosen:
            continue
        try:
            checked[name] = conform(value, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{spell(name)}: {error}") from None
    return _replace(config, checked, "", spell)


def unknown(name: str, config: Any, spell: Callable[[str], str]) -> str:
    """The message for a name that is no field of `config`."""
    names, head = list(annotations(config)), name.partition(".")[0]
    for field, union in unions(type(config)).items():
        others = {_key(choice): choice for choice in union.names}
        current = union.name_of(getattr(config, field))
        if others.get(head, current) != current:
            return (
                f"{spell(name)} is a setting of {field} {others[head]}, and {spell(field)} is {current} here; "
                f"set {spell(field)} to {others[head]}, or leave it out"
            )
    inside = [field for field in names if field.startswith(f"{name}.")]
    if inside:
        return f"{spell(name)} is a group of fields; set one of them, as in {spell(inside[0])}"
    hint = nearest(name, names, spell)
    if not hint and len(names) <= _FEW:
        hint = f"; there are {', '.join(map(spell, names))}"
    return f"unknown setting {spell(name)}{hint}"


def _replace(config: Any, values: Mapping[str, Any], prefix: str, spell: Callable[[str], str]) -> Any:
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    fields = {union.key(getattr(config, name)): name for name, union in unions(type(config)).items()}
    for head, group in inner.items():
        field = fields.get(head, head)
        own[field] = _replace(getattr(config, field), group, f"{prefix}{head}.", spell)
    try:
        return getattr(config, "with_values", partial(dataclasses.replace, config))(**own)
    except ConfigError:
        raise
    except ValueError as error:
        # The message names the field. Fields that were set come first: a word of the message may be a value that is
        # spelled like another field.
        words = str(error).replace(",", " ").split()
        mentioned = [field.name for field in dataclasses.fields(config) if field.name in words]
        named = next((name for name in mentioned if name in own), next(iter(mentioned), next(iter(own))))
        raise ConfigError(f"{spell(prefix + named)}: {error}") from None


def conform(value: Any, kind: Any) -> Any:
    """`value` as the annotated type. An int becomes a float, a list a tuple, a text a path; nothing else is converted.

    Raises:
        ValueError: another type, or none of the choices.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise ValueError(f"expected {describe(kind)}, got {value!r}{nearest(str(value), map(str, arguments))}")
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return conform(value, alternative)
            except ValueError:
                continue
    elif origin is tuple and isinstance(value, (list, tuple)):
        inner = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(inner) == len(value):
            return tuple(conform(item, its) for item, its in zip(value, inner))
    elif kind is float and type(value) in (int, float):
        if not math.isfinite(value):  # JSON, which configs are saved in, has no word for others
            raise ValueError(f"expected a finite number, got {value}")
        return float(value)
    elif kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"expected {describe(kind)}, got {value!r}")


def describe(kind: Any) -> str:
    """A type in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is tuple:
        item = describe(arguments[0])
        return f"a list, each {item}" if arguments[1:] == (...,) else f"{len(arguments)} values, each {item}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    return words.get(kind) or ("none" if kind is type(None) else str(kind))


def read(words: Sequence[str], kind: Any) -> Any:
    """The value of a field from the words after its option. A boolean option without a word is `True`.

    Raises:
        ValueError: too many or too few words, or one that cannot be read.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        inner = [arguments[0]] * len(words) if arguments[1:] == (...,) else arguments
        # with another number of words, `conform` raises the message
        values = [read([word], kind) for word, kind in zip(words, inner)] if len(inner) == len(words) else list(words)
        return conform(values, kind)
    if origin in (typing.Union, types.UnionType):
        for alternative in arguments:
            try:
                return read(words, alternative)
            except ValueError:
                continue
        raise ValueError(f"expected {describe(kind)}, got {' '.join(words)!r}")
    if kind is bool and not words:
        return True
    if len(words) != 1:
        raise ValueError(f"expected {describe(kind)}, got {repr(' '.join(words)) if words else 'no value'}")
    word = words[0]
    if origin is Literal:
        return conform(next((choice for choice in arguments if str(choice) == word), word), kind)
    if kind is type(None) and word.lower() == "none":
        return None
    if kind is bool and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if kind in (int, float):
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"expected {describe(kind)}, got {word!r}") from None
        return conform(value, kind)
    return conform(word, kind)


def flag(name: str) -> str:
    """A field as an option of the command line."""
    return f"--{name.replace('_', '-')}"


def split(words: Sequence[str]) -> tuple[list[str], Options]:
    """(words before the first option, the words of each option). The last of two equal options counts."""
    positional: list[str] = []
    options: Options = {}
    current = positional
    for word in words:
        if re.match(r"--[A-Za-z]", word):
            name, equals, value = word[2:].partition("=")
            current = options[name.replace("-", "_")] = [value] if equals else []
        elif re.match(r"-[A-Za-z]", word) and word != "-h":
            raise ConfigError(f"unknown option {word!r}; options are written --{word.lstrip('-')}")
        elif word == "-h":
            current = options["help"] = []
        else:
            current.append(word)
    return positional, options


def apply(config: Config, options: Options) -> Config:
    """A copy of `config` with the options' values in place.

    Raises:
        ConfigError: an unknown option, or a value that cannot be read or is refused.
    """
    config = choose(config, {name: " ".join(options[name]) for name in unions(type(config)) if name in options}, flag)
    kinds = annotations(config)
    values = {}
    for name, words in options.items():
        if name not in kinds:
            raise ConfigError(unknown(name, config, flag))
        try:
            values[name] = read(words, kinds[name])
        except ValueError as error:
            raise ConfigError(f"{flag(name)}: {error}") from None
    return override(config, values, flag)
