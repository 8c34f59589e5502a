"""The name of a run's folder, the config in it, and the settings that a resumed run may change."""

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
from aem_jax.config.presets import SEPARATOR
from aem_jax.config.run import ENGINES, RunConfig, decides_shapes, may_change
from aem_jax.distributed.join import without_process
from aem_jax.errors import ConfigError
from aem_jax.files import read_json, read_text, valid_text, write_text
from aem_jax.gguf_file import is_gguf
from aem_jax.models.pretrained import CONFIG, config_text, resolve
from aem_jax.overrides import Options, apply, as_values, flag, flatten, nested_values, override

FILE = "config.json"
_PATHS = ("model.path", "warmstart.init_from")
"""Settings that name files or folders, beside those of the environment."""
_LONGEST_NAME = 80


def run_name(config: RunConfig, options: Mapping[str, Sequence[str]]) -> str:
    """The name of a run: --name, else its presets and each option that makes it another run.

    The preset alfworld-tiny with `--aem.strength 0` is `alfworld-tiny-aem.strength-0`. So it does not share a folder
    with the preset alone, and the same command finds the same run.

    Raises:
        ConfigError: a name that is not a plain folder name.
    """
    if config.name:
        if not re.fullmatch(r"[\w.+=-]+", config.name) or config.name.startswith("."):
            raise ConfigError(
                f"--name: expected letters, digits and -_.+=, got {config.name!r}; --runs-dir is its folder"
            )
        return config.name
    changes = [
        "-".join([name.replace("_", "-"), *words]) for name, words in sorted(options.items()) if not may_change(name)
    ]
    presets = [Path(preset).name.removesuffix(".toml") for preset in config.preset.split(SEPARATOR)]
    name = re.sub(r"[^\w.+=-]+", "_", "-".join([*presets, *changes]))
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9]}-{digest}"
    return name


def absolute(config: RunConfig) -> RunConfig:
    """The config with absolute paths, which name the same files from every working folder.

    Raises:
        ConfigError: an address instead of a path, which would become a folder of that name; or a path that is not
            UTF-8, which the run's config.json cannot hold.
    """
    names = {*_PATHS, *path_settings(config), "runs_dir"}
    paths = {name: value for name, value in as_values(config).items() if name in names}
    for name, value in paths.items():
        if "://" in value:
            raise ConfigError(f"{flag(name)}: expected a path, got {value}; mount the storage, or copy it")
    absolutes = {name: _absolute(name, value) for name, value in paths.items() if name != "runs_dir"}
    absolutes["runs_dir"] = os.path.expanduser(config.runs_dir)
    for name, path in absolutes.items():
        if valid_text(path) != path:
            raise ConfigError(f"{flag(name)}: expected a path in UTF-8, got {path!a}; rename it")
    return override(config, as_values(config) | absolutes)  # all values: it is the same model by another path


def _absolute(name: str, value: str) -> str:
    if name == inputs.CODE:  # file.py:attribute, or module:attribute
        file, _, attribute = value.rpartition(":")
        return f"{os.path.abspath(os.path.expanduser(file))}:{attribute}" if file.endswith(".py") else value
    if not value:
        return value
    path = os.path.abspath(os.path.expanduser(value))
    is_hub_name = name == "model.path" and value.count("/") == 1 and not value.startswith((".", "/", "~"))
    return value if is_hub_name and not os.path.isdir(path) and not is_gguf(path) else path


def save(config: RunConfig, folder: Path, begun: bool = False) -> None:
    """Writes `config.json`, the model's own config, and digests of the run's inputs into its folder.

    Args:
        config: the run's; the settings that identify this process are left out.
        folder: the run's.
        begun: whether the run has a checkpoint; then the records of its inputs stay as they are.

    Raises:
        ConfigError: an input of the run cannot be read.
    """
    config = replace(config, runtime=without_process(config.runtime))
    folder.mkdir(parents=True, exist_ok=True)
    text, copy = json.dumps(nested_values(config), indent=2, allow_nan=False) + "\n", folder / inputs.MODEL / CONFIG
    try:
        known = inputs.load(folder) if begun else {}
        if not ((folder / FILE).exists() and read_text(folder / FILE) == text):
            # A run killed between these two writes has no digest of its config, rather than a wrong one.
            inputs.write(folder, {name: value for name, value in known.items() if name != FILE})
            write_text(folder / FILE, text)
        if config.model.path and not (begun and copy.exists()):
            model_config = config_text(resolve(config.model.path))
            copy.parent.mkdir(exist_ok=True)
            write_text(copy, model_config)
        known.pop(FILE, None)
        inputs.write(folder, {**known, **inputs.identify(folder, config, known)})
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def model_files(config: RunConfig, folder: Path) -> Path | None:
    """The folder or GGUF file with the config of the model that a run started from, usually in the run; None without.

    Raises:
        ValueError: the run has no copy, and the model's files are gone.
    """
    if (folder / inputs.MODEL / CONFIG).exists():
        return folder / inputs.MODEL
    return resolve(config.model.path) if config.model.path else None


def load(folder: Path) -> RunConfig:
    """Reads a run's `config.json`.

    Raises:
        ConfigError: no such file, one of another version, or a file of the run that was changed since.
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


def load_trained(folder: Path, options: Options) -> RunConfig:
    """The config of an existing run, with options of the command line in place.

    Raises:
        ConfigError: as `load` and `apply`, or an option with which the run's checkpoints cannot be read.
    """
    trained = load(folder)
    config = apply(trained, options)
    before, after = as_values(trained), as_values(config)
    for name in filter(decides_shapes, options):
        if before[name] != after[name]:
            raise ConfigError(
                f"{flag(name)}: expected {before[name]}, with which {folder} was trained, got {after[name]}"
            )
    return config


def check_resumable(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """Checks that a run begun with `saved` may be resumed with `config`.

    Raises:
        ConfigError: a field that decides what is computed has changed; the message names it.
    """
    before, after = (as_values(absolute(version)) for version in (saved, config))
    changed = [
        name
        for name in after
        if name in before  # else it belongs to another environment, whose change is listed itself
        and before[name] != after[name]
        and not may_change(name)
        and not {before[name], after[name]} <= set(ENGINES.get(name, ()))
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
    """Whether a setting names the same files by another path."""
    after = as_values(config)[name]
    return (
        name in {*_PATHS, *path_settings(config)}
        and bool(before and after)
        and (os.path.abspath(after) == before or inputs.is_same(folder, config, name))
    )
