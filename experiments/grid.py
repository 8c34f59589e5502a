"""A grid of runs, read from a TOML file: shared settings, variants of them, and seeds.

[grid]
preset = "alfworld-tiny"
seeds = [0, 1, 2, 3, 4]

[shared.train]              # options of every run, in the format of a preset
num_steps = 120

[start.warmstart]           # options of the start run; there is one per seed, and all variants begin from it
steps = 300

[[variants]]
name = "grpo"
options.aem.strength = 0.0

[[variants]]
name = "grpo-aem"
against = "grpo"            # the variant that it is compared with, seed by seed
seeds = [0, 1, 2]           # only if the variant needs fewer seeds
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.config.validate import check
from aem_jax.errors import ConfigError
from aem_jax.overrides import flag, flatten, override

START = "start"
"""Name of the variant that the others begin from."""


@dataclass(frozen=True)
class Variant:
    """One setting of the grid.

    Attributes:
        name: letters, digits and -_.
        options: settings that differ from the shared ones, by dotted name.
        seeds: seeds of its runs.
        title: its name in tables.
        family: the table that contains it.
        against: the variant that it is compared with, seed by seed; empty for none.
    """

    name: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    title: str = ""
    family: str = ""
    against: str = ""


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        variant: name of its setting, or `START`.
        seed: its seed.
        options: settings that differ from the preset, by dotted name.
    """

    variant: str
    seed: int
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of its folder in the grid's folder."""
        return f"{self.variant}-seed{self.seed}"


@dataclass(frozen=True)
class Grid:
    """The content of a grid file.

    Attributes:
        name: name of the file without its extension.
        preset: the preset of all runs.
        seeds: default seeds of the variants.
        shared: options of every run, by dotted name.
        start: options of the runs that the others begin from.
        variants: the settings, in the file's order.
    """

    name: str
    preset: str
    seeds: tuple[int, ...]
    shared: Mapping[str, Any]
    start: Mapping[str, Any]
    variants: tuple[Variant, ...]

    def starts(self, folder: Path) -> list[Run]:
        """Returns the start run of each seed, from which the others begin: a warm start and its evaluation only."""
        seeds = sorted({seed for variant in self.variants for seed in variant.seeds})
        own = {"train.num_steps": 0, "checkpoint.keep_first": True}
        return [Run(START, seed, self._options(folder, START, seed, {**own, **self.start})) for seed in seeds]

    def runs(self, folder: Path) -> list[Run]:
        """Returns the runs of all variants, seed by seed, so that the first seeds are complete early."""
        runs = []
        for start in self.starts(folder):
            for variant in self.variants:
                if start.seed in variant.seeds:
                    begin = {"warmstart.init_from": str(folder / start.name)}
                    options = self._options(folder, variant.name, start.seed, {**variant.options, **begin})
                    runs.append(Run(variant.name, start.seed, options))
        return runs

    def _options(self, folder: Path, variant: str, seed: int, own: Mapping[str, Any]) -> dict[str, Any]:
        name = Run(variant, seed, {}).name
        return {"runs_dir": str(folder), "name": name, "seed": seed, **self.shared, **own}

    def title(self, name: str) -> str:
        """Returns a variant's name in tables and plots."""
        return next(variant.title for variant in self.variants if variant.name == name) or name

    def config(self, run: Run) -> RunConfig:
        """Returns the run's complete config.

        Raises:
            ConfigError: an option is unknown, or the config cannot be run.
        """
        try:
            config = override(read_preset(self.preset), run.options, flag)
            check(config)
        except ConfigError as error:
            raise ConfigError(f"{self.name}, {run.name}: {error}") from None
        return config

    def words(self, run: Run) -> list[str]:
        """Returns the arguments of the run's command line, after `python -m aem_jax.launch`."""
        words = ["--preset", self.preset]
        for name, value in run.options.items():
            values = value if isinstance(value, list | tuple) else [value]
            words += [flag(name), *map(str, values)]
        return words


def read_grid(path: Path) -> Grid:
    """Reads a grid.

    Raises:
        ConfigError: the file does not exist, is not TOML, or has another form.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    try:
        head = _only(values.pop("grid"), "preset", "seeds")
        shared, start = flatten(values.pop("shared", {})), flatten(values.pop("start", {}))
        seeds = tuple(head["seeds"])
        listed: Sequence[Mapping[str, Any]] = values.pop("variants")
        variants = tuple(_variant(table, seeds) for table in listed)
    except KeyError as error:
        raise ConfigError(f"{path}: expected {error.args[0]!r}, got none") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values:
        raise ConfigError(f"{path}: expected grid, shared, start and variants, got {next(iter(values))!r} too")
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names) or START in names:
        raise ConfigError(f"{path}: expected distinct names of variants, none of them {START!r}, got {names}")
    for variant in variants:
        if variant.against and variant.against not in names:
            raise ConfigError(f"{path}: expected a variant to compare {variant.name!r} with, got {variant.against!r}")
    return Grid(path.stem, head["preset"], seeds, shared, start, variants)


def _variant(values: Mapping[str, Any], seeds: tuple[int, ...]) -> Variant:
    _only(values, "name", "options", "seeds", "title", "family", "against")
    texts = {name: values.get(name, "") for name in ("title", "family", "against")}
    return Variant(values["name"], flatten(values.get("options", {})), tuple(values.get("seeds", seeds)), **texts)


def _only(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    if unknown := set(values) - set(names):
        raise ValueError(f"expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return values
