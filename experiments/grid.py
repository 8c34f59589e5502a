"""A grid of runs, read from a TOML file: shared settings, variants of them, and seeds.

[grid]
preset = "alfworld-tiny"
seeds = [0, 1, 2, 3, 4]
bins = 15                   # of each saved curve; 30 if it is missing

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
rule = "aem"                # its name in `analyze --efficiency`
seeds = [0, 1, 2]           # only if the variant needs fewer seeds
cells = ["short-free"]      # only if it needs fewer cells

[[factors]]                 # every combination of levels is a cell; each cell has all variants and seeds
name = "responses"
[factors.levels.short]      # options of a level, in the format of a preset
[factors.levels.long]
warmstart.expert_thinks = true

[[factors]]
name = "invalid actions"
start = false               # its options are of the training alone: its levels share their start runs

[efficiency]                # checkpoints to measure with `analyze --efficiency`, after each run of some variants
variants = ["grpo"]
steps = [0, 60]
groups = 24
rules = ["aem", "sign"]     # credit rules beside the base rule; all if it is missing
sketch = 65536              # numbers that a gradient is projected to; exact gradients if it is missing
"""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.config.validate import check
from aem_jax.errors import ConfigError
from aem_jax.overrides import flag, flatten, override

START = "start"
"""Name of the variant that the others begin from."""
BINS = 30
"""Default number of bins of a saved curve."""


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
        rule: its credit rule's name in `analyze --efficiency`; empty for none.
        cells: names of the cells in which it runs; empty for all.
    """

    name: str
    options: Mapping[str, Any]
    seeds: tuple[int, ...]
    title: str = ""
    family: str = ""
    against: str = ""
    rule: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Factor:
    """A property in which cells differ.

    Attributes:
        name: its name in tables.
        levels: name of a level → its options, by dotted name.
        start: whether the options apply to start runs, too.
    """

    name: str
    levels: Mapping[str, Mapping[str, Any]]
    start: bool = True


@dataclass(frozen=True)
class Cell:
    """A combination of levels, one of each factor. A grid without factors has one cell, without a name.

    Attributes:
        levels: names of the levels, in the order of the factors.
        options: their settings, by dotted name.
        start: name of the combination that its start runs belong to.
        start_options: settings of the start runs.
    """

    levels: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    start_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The names of the levels, joined."""
        return "-".join(self.levels)


@dataclass(frozen=True)
class Measured:
    """Checkpoints to measure with `analyze --efficiency`.

    Attributes:
        variants: names of the variants whose runs are measured.
        steps: steps of the checkpoints.
        groups: number of rollout groups to play.
        rules: credit rules to compare with the base rule; empty for all.
        sketch: numbers that a gradient is projected to; 0: exact.
    """

    variants: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    groups: int = 0
    rules: tuple[str, ...] = ()
    sketch: int = 0


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        variant: name of its setting, or `START`.
        seed: its seed.
        options: settings that differ from the preset, by dotted name.
        cell: name of its cell; of a start run, of the combination that it belongs to.
        start: name of the run that it begins from; empty for a start run.
    """

    variant: str
    seed: int
    options: Mapping[str, Any]
    cell: str = ""
    start: str = ""

    @property
    def name(self) -> str:
        """Name of its folder in the grid's folder."""
        return _run_name(self.cell, self.variant, self.seed)


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
        factors: the properties in which cells differ.
        measured: checkpoints to measure.
        bins: number of bins of a saved curve.
    """

    name: str
    preset: str
    seeds: tuple[int, ...]
    shared: Mapping[str, Any]
    start: Mapping[str, Any]
    variants: tuple[Variant, ...]
    factors: tuple[Factor, ...] = ()
    measured: Measured = Measured()
    bins: int = BINS

    @property
    def cells(self) -> list[Cell]:
        """The combinations of levels, the last factor's levels fastest."""
        cells = []
        for levels in itertools.product(*(factor.levels for factor in self.factors)):
            options, start_options, start = {}, {}, []
            for factor, level in zip(self.factors, levels, strict=True):
                options |= factor.levels[level]
                if factor.start:
                    start_options |= factor.levels[level]
                    start.append(level)
            cells.append(Cell(levels, options, "-".join(start), start_options))
        return cells

    def starts(self, folder: Path) -> list[Run]:
        """Returns the start runs, one per seed and warm start: a warm start and its evaluation only."""
        own = {"train.num_steps": 0, "checkpoint.keep_first": True}
        cells = {cell.start: cell.start_options for cell in self.cells}
        return [
            Run(START, seed, self._options(folder, cell, START, seed, {**own, **options, **self.start}), cell)
            for seed in sorted({seed for variant in self.variants for seed in variant.seeds})
            for cell, options in cells.items()
        ]

    def runs(self, folder: Path) -> list[Run]:
        """Returns the runs of all cells and variants, seed by seed, so that the first seeds are complete early."""
        runs = []
        for seed in sorted({seed for variant in self.variants for seed in variant.seeds}):
            for cell, variant in itertools.product(self.cells, self.variants):
                if seed not in variant.seeds or (variant.cells and cell.name not in variant.cells):
                    continue
                start = _run_name(cell.start, START, seed)
                own = {**cell.options, **variant.options, "warmstart.init_from": str(folder / start)}
                options = self._options(folder, cell.name, variant.name, seed, own)
                runs.append(Run(variant.name, seed, options, cell.name, start))
        return runs

    def _options(self, folder: Path, cell: str, variant: str, seed: int, own: Mapping[str, Any]) -> dict[str, Any]:
        name = _run_name(cell, variant, seed)
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
        head = _only(values.pop("grid"), "preset", "seeds", "bins")
        shared, start = flatten(values.pop("shared", {})), flatten(values.pop("start", {}))
        seeds = tuple(head["seeds"])
        listed: Sequence[Mapping[str, Any]] = values.pop("variants")
        variants = tuple(_variant(table, seeds) for table in listed)
        factors = tuple(map(_factor, values.pop("factors", ())))
        measured = _measured(values.pop("efficiency")) if "efficiency" in values else Measured()
    except KeyError as error:
        raise ConfigError(f"{path}: expected {error.args[0]!r}, got none") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if values:
        expected = "grid, shared, start, variants, factors and efficiency"
        raise ConfigError(f"{path}: expected {expected}, got {next(iter(values))!r} too")
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names) or START in names:
        raise ConfigError(f"{path}: expected distinct names of variants, none of them {START!r}, got {names}")
    for variant in variants:
        if variant.against and variant.against not in names:
            raise ConfigError(f"{path}: expected a variant to compare {variant.name!r} with, got {variant.against!r}")
    if unknown := set(measured.variants) - set(names):
        raise ConfigError(f"{path}: expected variants to measure, got {', '.join(sorted(unknown))}")
    grid = Grid(path.stem, head["preset"], seeds, shared, start, variants, factors, measured, head.get("bins", BINS))
    if unknown := {name for variant in variants for name in variant.cells} - {cell.name for cell in grid.cells}:
        raise ConfigError(f"{path}: expected names of cells, got {', '.join(sorted(unknown))}")
    return grid


def _variant(values: Mapping[str, Any], seeds: tuple[int, ...]) -> Variant:
    _only(values, "name", "options", "seeds", "title", "family", "against", "rule", "cells")
    texts = {name: values.get(name, "") for name in ("title", "family", "against", "rule")}
    seeds, cells = tuple(values.get("seeds", seeds)), tuple(values.get("cells", ()))
    return Variant(values["name"], flatten(values.get("options", {})), seeds, **texts, cells=cells)


def _factor(values: Mapping[str, Any]) -> Factor:
    _only(values, "name", "start", "levels")
    levels = {name: flatten(options) for name, options in values["levels"].items()}
    return Factor(values["name"], levels, values.get("start", True))


def _measured(values: Mapping[str, Any]) -> Measured:
    _only(values, "variants", "steps", "groups", "rules", "sketch")
    return Measured(
        variants=tuple(values["variants"]),
        steps=tuple(values["steps"]),
        groups=values["groups"],
        rules=tuple(values.get("rules", ())),
        sketch=values.get("sketch", 0),
    )


def _only(values: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    if unknown := set(values) - set(names):
        raise ValueError(f"expected {', '.join(names)}, got {', '.join(sorted(unknown))}")
    return values


def _run_name(cell: str, variant: str, seed: int) -> str:
    return f"{cell}-{variant}-seed{seed}" if cell else f"{variant}-seed{seed}"
