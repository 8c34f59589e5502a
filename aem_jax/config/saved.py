"""The name of a run's folder, the config that is kept in it, and what a resumed run may change of it."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aem_jax.config import inputs
from aem_jax.config.environments import path_settings
from aem_jax.config.options import flag
from aem_jax.config.presets import SEPARATOR
from aem_jax.config.run import RunConfig, is_harmless
from aem_jax.distributed.join import placeless
from aem_jax.errors import ConfigError
from aem_jax.files import read_json, read_text, valid_text, write_text
from aem_jax.models.pretrained import CONFIG, config_text, resolve
from aem_jax.overrides import as_values, flatten, nested_values, override

FILE = "config.json"
_PATHS = ("model.path", "warmstart.begin_from")
"""Settings that name files or folders, beside those of the environment."""
_LONGEST_NAME = 80


def run_name(config: RunConfig, options: Mapping[str, Sequence[str]]) -> str:
    """The name of a run: as given, else its presets' and each change that makes it another run.

    `--aem.strength 0` of the preset alfworld-tiny is `alfworld-tiny-aem.strength-0`, so that it and the preset as it is
    do not meet in one folder, and the same command finds the same run.

    Raises:
        ConfigError: a name that is no plain folder name.
    """
    if config.name:
        if not re.fullmatch(r"[\w.+=-]+", config.name) or config.name.startswith("."):
            raise ConfigError(
                f"--name: expected letters, digits and -_.+=, got {config.name!r}; --runs-dir is its folder"
            )
        return config.name
    changes = [
        "-".join([name.replace("_", "-"), *words]) for name, words in sorted(options.items()) if not is_harmless(name)
    ]
    presets = [Path(each).name.removesuffix(".toml") for each in config.preset.split(SEPARATOR)]
    name = re.sub(r"[^\w.+=-]+", "_", "-".join([*presets, *changes]))
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9]}-{digest}"
    return name


def absolute(config: RunConfig) -> RunConfig:
    """The config with each path absolute, so that it names the same file from every working folder.

    Raises:
        ConfigError: an address where a path should be, which would become a folder of that name; or a path that is not
            UTF-8, which the run's config.json cannot hold.
    """
    names = {*_PATHS, *path_settings(config), "runs_dir"}
    paths = {name: value for name, value in as_values(config).items() if name in names}
    for name, value in paths.items():
        if "://" in value:
            raise ConfigError(f"{flag(name)}: expected a path, got {value}; mount the storage, or copy it")
    found = {name: _absolute(name, value) for name, value in paths.items() if name != "runs_dir"}
    for name, path in found.items():
        if valid_text(path) != path:
            raise ConfigError(f"{flag(name)}: expected a path in UTF-8, got {path!a}; rename the folder")
    return override(config, found)


def _absolute(name: str, value: str) -> str:
    if name == inputs.CODE:  # file.py:attribute, or module:attribute
        file, _, attribute = value.rpartition(":")
        return f"{os.path.abspath(os.path.expanduser(file))}:{attribute}" if file.endswith(".py") else value
    if not value:
        return value
    path = os.path.abspath(os.path.expanduser(value))
    is_hub_name = name == "model.path" and value.count("/") == 1 and not value.startswith((".", "/", "~"))
    return value if is_hub_name and not os.path.isdir(path) else path


def save(config: RunConfig, folder: Path, begun: bool = False) -> None:
    """Writes what decides a run into its folder: `config.json`, the model's own config, digests of its inputs.

    Args:
        config: the run's; which process of how many wrote it is left out.
        folder: the run's.
        begun: whether there is a checkpoint, so that what is recorded is decided.

    Raises:
        ConfigError: a file that decides the run cannot be read.
    """
    config = replace(config, runtime=placeless(config.runtime))
    folder.mkdir(parents=True, exist_ok=True)
    text, copy = json.dumps(nested_values(config), indent=2) + "\n", folder / inputs.MODEL / CONFIG
    try:
        known = inputs.load(folder) if begun else {}
        if not ((folder / FILE).exists() and read_text(folder / FILE) == text):
            # A run killed between these lines has no digest of its config, rather than a wrong one.
            inputs.write(folder, {name: value for name, value in known.items() if name != FILE})
            write_text(folder / FILE, text)
        if config.model.path and not (begun and copy.exists()):
            theirs = config_text(resolve(config.model.path))
            copy.parent.mkdir(exist_ok=True)
            write_text(copy, theirs)
        known.pop(FILE, None)
        inputs.write(folder, {**known, **inputs.identify(folder, config, known)})
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def model_files(config: RunConfig, folder: Path) -> Path | None:
    """The folder with the config of the model that a run began from: the run's own; None without --model.path.

    Raises:
        ValueError: an older run without one, whose model is gone.
    """
    if (folder / inputs.MODEL / CONFIG).exists():
        return folder / inputs.MODEL
    return resolve(config.model.path) if config.model.path else None


def load(folder: Path) -> RunConfig:
    """Reads `config.json` back, exactly as it was saved.

    Raises:
        ConfigError: there is none, it is not of this version, or one of the run's own files is not what it wrote.
    """
    path = folder / FILE
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON mapping, got {type(values).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"no run in {folder}; train it first, or choose another with --name and --runs-dir") from None
    except (ValueError, OSError) as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    inputs.check_own(folder)
    try:
        return override(RunConfig(), flatten(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; is the run of another version of aem_jax?") from None


def check_resumable(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """Whether a run begun with `saved` may go on with `config`.

    Raises:
        ConfigError: a field that decides what is computed has changed; it is named.
    """
    before, after = (as_values(absolute(each)) for each in (saved, config))
    changed = [
        name
        for name in after
        if name in before  # else it belongs to another environment; that change is listed itself
        and before[name] != after[name]
        and not is_harmless(name)
        and not _is_moved(name, before[name], config, folder)
    ]
    if changed:
        name = changed[0]
        others = f" (and {', '.join(map(flag, changed[1:]))})" if changed[1:] else ""
        raise ConfigError(
            f"{folder} was begun with {flag(name)} {before[name]}, got {after[name]}{others}; "
            "give the same values to resume it, or another --name to begin a new run"
        )


def _is_moved(name: str, before: Any, config: RunConfig, folder: Path) -> bool:
    """Whether a setting names the same thing by another path."""
    after = as_values(config)[name]
    return (
        name in {*_PATHS, *path_settings(config)}
        and bool(before and after)
        and (os.path.abspath(after) == before or inputs.is_same(folder, config, name))
    )
