"""The config of a run as it is kept beside its results, and what a resumed run may change of it."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

from aem_jax.launch.config import RunConfig, is_harmless
from aem_jax.launch.options import flag
from aem_jax.launch.overrides import ConfigError, as_values, flatten, override
from aem_jax.launch.processes import placeless
from aem_jax.metrics import write_whole

FILE = "config.json"


def save(config: RunConfig, folder: Path) -> None:
    """Writes `config.json`, whole or not at all; which process of how many wrote it is left out."""
    config = replace(config, runtime=placeless(config.runtime))
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(folder: Path) -> RunConfig:
    """Reads `config.json` back, exactly as it was saved.

    Raises:
        ConfigError: there is none, or it is not of this version.
    """
    path = folder / FILE
    try:
        return override(RunConfig(), flatten(json.loads(path.read_text())))
    except FileNotFoundError:
        raise ConfigError(f"no run in {folder}; train it first, or choose another with --name and --runs-dir") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None


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
