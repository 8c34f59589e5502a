"""The name of a run's folder, the config that is kept in it, and what a resumed run may change of it."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from aem_jax.files import read_json, write_text
from aem_jax.launch.config import RunConfig, is_harmless
from aem_jax.launch.options import flag
from aem_jax.launch.overrides import ConfigError, as_values, flatten, override
from aem_jax.launch.preset import SEPARATOR
from aem_jax.launch.processes import placeless

FILE = "config.json"
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


def save(config: RunConfig, folder: Path) -> None:
    """Writes `config.json`, whole or not at all; which process of how many wrote it is left out."""
    config = replace(config, runtime=placeless(config.runtime))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(folder: Path) -> RunConfig:
    """Reads `config.json` back, exactly as it was saved.

    Raises:
        ConfigError: there is none, or it is not of this version.
    """
    path = folder / FILE
    try:
        saved = read_json(path)
        if not isinstance(saved, dict):
            raise ValueError(f"expected a JSON mapping, got {type(saved).__name__}")
        return override(RunConfig(), flatten(saved))
    except FileNotFoundError:
        raise ConfigError(f"no run in {folder}; train it first, or choose another with --name and --runs-dir") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def check_resumable(saved: RunConfig, config: RunConfig, folder: Path) -> None:
    """Whether a run begun with `saved` may go on with `config`.

    Raises:
        ConfigError: a field that decides what is computed has changed; it is named.
    """
    before, after = as_values(saved), as_values(config)
    changed = [name for name in after if before[name] != after[name] and not is_harmless(name)]
    if changed:
        name = changed[0]
        others = f" (and {', '.join(map(flag, changed[1:]))})" if changed[1:] else ""
        raise ConfigError(
            f"{folder} was begun with {flag(name)} {before[name]}, got {after[name]}{others}; "
            "give the same values to resume it, or another --name to begin a new run"
        )
