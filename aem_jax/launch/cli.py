"""The command line: `python -m aem_jax.launch [command] [--field value …]`.

Precedence: a component's defaults < preset < command line. `overrides.py` reads the words (as it reads TOML and
JSON, with errors of one line); `help.py` prints `--help` from the docstrings of the configs. Heavy imports stand inside
the commands that need them.
"""

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aem_jax.distributed.signals import StoppedError
from aem_jax.errors import ConfigError
from aem_jax.files import valid_text
from aem_jax.overrides import nearest

if TYPE_CHECKING:
    from aem_jax.config.run import RunConfig

PROGRAM = "python -m aem_jax.launch"
STEP = "--step: the checkpoint: its step, latest (the default), or best (of the highest success in an evaluation)."
ADAPTER = "--adapter True: a LoRA run's adapter, in PEFT's files; by default it is merged into the weights."


class Command(NamedTuple):
    """A command and its line of help."""

    run: Callable[[Sequence[str]], int]
    help: str


def main(words: Sequence[str]) -> int:
    """Runs a command line; returns the exit status: 0, 2 for a mistake in it, 130 or 143 when stopped by a signal, 141
    when the reader of its output is gone."""
    try:
        if broken := next((word for word in words if valid_text(word) != word), None):
            raise ConfigError(f"expected words in UTF-8, got {broken!a}; rename the file or folder that it names")
        if words and not words[0].startswith("-"):
            name, rest = words[0], words[1:]
        else:
            name, rest = "train", words
        if name not in COMMANDS:
            hint = nearest(name, COMMANDS) or f"; commands are {', '.join(COMMANDS)}"
            if name == "resume":
                hint = "; the command that started a run resumes it"
            raise ConfigError(f"unknown command {name!r}{hint}")
        return COMMANDS[name].run(rest)
    except BrokenPipeError:  # the reader of the output (head, less) is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be printed
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        return stopped.exit_status
    except KeyboardInterrupt:
        return 130
    except ConfigError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _train(words: Sequence[str]) -> int:
    from aem_jax.overrides import apply

    options = _options(words, "train")
    preset = _preset(options)
    if "help" in options:
        return _help(_chosen(preset, options), options, "train", f"{COMMANDS['train'].help}\n\n{_overview()}")

    from aem_jax.config.environments import from_environ
    from aem_jax.config.saved import absolute, run_name

    config = apply(preset, options)
    config = absolute(from_environ(replace(config, name=run_name(config, options))))

    from aem_jax.config.validate import check

    check(config)

    from aem_jax.launch.training import train

    return train(config)


def _evaluate(words: Sequence[str]) -> int:
    options = _options(words, "evaluate")
    if "help" in options:
        return _help(_chosen(_preset(options), options), options, "evaluate", f"{COMMANDS['evaluate'].help}\n\n{STEP}")

    from aem_jax.checkpoint import Choice

    step = _taken(options, "step", Choice, "latest")
    config = _trained(options)

    from aem_jax.config.validate import check

    check(config, trains=False)

    from aem_jax.launch.evaluation import evaluate

    return evaluate(config, step)


def _analyze(words: Sequence[str]) -> int:
    from aem_jax.launch.analyze import AnalyzeConfig, analyze
    from aem_jax.overrides import apply, split

    names, options = split(words)
    if "help" in options:
        return _help(AnalyzeConfig(), options, "analyze RUN", COMMANDS["analyze"].help)
    if len(names) != 1:
        raise ConfigError(f"expected one run's folder, got {len(names)}; analyze runs/NAME")
    return analyze(Path(names[0]), apply(AnalyzeConfig(), options))


def _export(words: Sequence[str]) -> int:
    from aem_jax.overrides import split

    names, options = split(words)
    if "help" in options:
        about = f"{COMMANDS['export'].help}\n\n{STEP}\n{ADAPTER}"
        return _help(_chosen(_preset({}), options), options, "export FOLDER", about)
    if len(names) != 1:
        raise ConfigError(f"expected one folder to write to, got {len(names)}; export FOLDER --name RUN")
    if not names[0] or "://" in names[0]:  # paths of the working folder, and of a folder with that name
        raise ConfigError(f"expected the path of a folder to write to, got {names[0]!r}")
    from aem_jax.checkpoint import Choice

    adapter, step = _taken(options, "adapter", bool, False), _taken(options, "step", Choice, "latest")
    config = _trained(options)

    from aem_jax.launch.export import export

    return export(config, Path(names[0]), adapter, step)


def _trim(words: Sequence[str]) -> int:
    from aem_jax.overrides import apply, split

    names, options = split(words)
    config = _preset(options)
    if "help" in options:
        return _help(_chosen(config, options), options, "trim FOLDER", COMMANDS["trim"].help)
    if len(names) != 1:
        raise ConfigError(f"expected one folder to write to, got {len(names)}; trim FOLDER --preset NAME")
    config = apply(config, options)

    from aem_jax.config.validate import check

    check(config)

    from aem_jax.launch.trim import trim

    return trim(config, Path(names[0]))


def _taken(options: dict[str, list[str]], name: str, kind: Any, default: Any) -> Any:
    """The value of an option that is no setting of a run; removes it."""
    from aem_jax.overrides import read

    try:
        return read(options.pop(name), kind) if name in options else default
    except ValueError as error:
        raise ConfigError(f"--{name}: {error}") from None


def _trained(options: dict[str, list[str]]) -> "RunConfig":
    """The config of an existing run: the saved one with the options in place, because the preset may have changed."""
    from aem_jax.config.saved import absolute, load_trained, run_name
    from aem_jax.overrides import apply

    requested = apply(_preset(options), options)
    folder = Path(requested.runs_dir).expanduser() / run_name(requested, options)
    config = absolute(load_trained(folder, options))
    return replace(config, name=folder.name, runs_dir=str(folder.parent))


def _serve(words: Sequence[str]) -> int:
    from aem_jax.launch.serve import ServeConfig, run
    from aem_jax.overrides import apply, split

    names, options = split(words)
    if "help" in options:
        from aem_jax.envs.registry import SERVED

        known = f"ENVIRONMENT: {', '.join(SERVED)}; or your own as file.py:attribute."
        return _help(ServeConfig(), options, "serve ENVIRONMENT", f"{COMMANDS['serve'].help}\n\n{known}")
    return run(names, apply(ServeConfig(), options))


def _endpoint(words: Sequence[str]) -> int:
    from aem_jax.launch.endpoint import EndpointConfig, run
    from aem_jax.overrides import apply, split

    names, options = split(words)
    if "help" in options:
        known = "MODEL: a folder of Hugging Face's files, a name on the Hub, a GGUF file, or a run's folder."
        return _help(EndpointConfig(), options, "endpoint MODEL", f"{COMMANDS['endpoint'].help}\n\n{known}")
    if len(names) != 1:
        raise ConfigError(f"expected one model or run to serve, got {len(names)}; endpoint MODEL")
    return run(names[0], apply(EndpointConfig(), options))


def _bench(words: Sequence[str]) -> int:
    from aem_jax.bench.command import BENCHMARKS, run
    from aem_jax.bench.config import BenchConfig
    from aem_jax.overrides import apply, split

    names, options = split(words)
    if "help" in options:
        text = f"{COMMANDS['bench'].help}\n\nNAMEs, all by default: {', '.join(BENCHMARKS)}."
        return _help(BenchConfig(), options, "bench [NAME …]", text)
    return run(names, apply(BenchConfig(), options))


def _doctor(words: Sequence[str]) -> int:
    from aem_jax.doctor.command import lacking, run

    if lacking():
        return 1

    from aem_jax.doctor.config import DoctorConfig
    from aem_jax.overrides import apply, split

    names, options = split(words)
    if "help" in options:
        from aem_jax.doctor.finding import CHECKS

        text = f"{COMMANDS['doctor'].help}\n\nNAMEs, all by default: {', '.join(CHECKS)}."
        return _help(DoctorConfig(), options, "doctor [NAME …]", text)
    return run(names, apply(DoctorConfig(), options))


def _plan(words: Sequence[str]) -> int:
    from aem_jax.overrides import apply
    from aem_jax.plan.command import run
    from aem_jax.plan.config import plan_config

    options = _options(words, "plan")
    config = plan_config(_preset(options))
    if "help" in options:
        return _help(_chosen(config, options), options, "plan", COMMANDS["plan"].help)
    return run(apply(config, options), options)


def _presets(words: Sequence[str]) -> int:
    from aem_jax.config.presets import algorithm_names, describe_preset, model_names, setting_names

    if list(words) in (["--help"], ["-h"]):
        print(f"usage: {PROGRAM} presets\n\n{COMMANDS['presets'].help}")
        return 0
    if words:
        raise ConfigError(f"expected nothing after presets, got {' '.join(words)!r}")
    kinds = {
        "settings": setting_names(),
        "models, for a setting that names none (--preset alfworld-paper qwen2.5-7b)": model_names(),
        "algorithms, for any of these (--preset alfworld-tiny gspo)": algorithm_names(),
    }
    for kind, names in kinds.items():
        print(f"{kind}:", *(f"  {name:22} {describe_preset(name)}" for name in names), "", sep="\n")
    return 0


COMMANDS: Mapping[str, Command] = {
    "train": Command(_train, "Trains a policy, or resumes its run; the default command."),
    "evaluate": Command(_evaluate, "Evaluates a run's checkpoint on its fixed evaluation sets."),
    "analyze": Command(_analyze, "Tests the paper's claims on a trained run; writes RUN/analysis."),
    "export": Command(_export, "Writes a run's model, or a LoRA run's adapter."),
    "trim": Command(_trim, "Writes a model with the tokens that an environment uses."),
    "serve": Command(_serve, "Serves an environment over WebSocket until interrupted."),
    "endpoint": Command(_endpoint, "Serves a model or a run through OpenAI's API."),
    "doctor": Command(_doctor, "Checks whether a new machine trains correctly, and how fast."),
    "bench": Command(_bench, "Measures components on this machine; prints a table and JSON."),
    "plan": Command(_plan, "Estimates memory, FLOPs and time on devices that need not be there."),
    "presets": Command(_presets, "Lists the presets."),
}


def _overview() -> str:
    rows = [f"  {name:9} {command.help}" for name, command in COMMANDS.items()]
    stopping = (
        "Ctrl-C or SIGTERM finishes the current step, saves, and exits with 130 or 143; the same command resumes the "
        "run. A second Ctrl-C quits at once."
    )
    names = (
        "The defaults are those of the chosen presets. --help NAME explains one setting, or a group such as rollout; "
        "--help all explains everything."
    )
    return "\n".join(["commands (each has its own --help):", *rows, "", stopping, "", names])


def _options(words: Sequence[str], command: str) -> dict[str, list[str]]:
    from aem_jax.overrides import split

    positional, options = split(words)
    if positional:
        raise ConfigError(f"expected options after {command}, got {positional[0]!r}; write --field value")
    return options


def _preset(options: dict[str, list[str]]) -> "RunConfig":
    """The config of the presets that the options name, or of the default one; removes that option."""
    from aem_jax.config.presets import read_preset

    names = options.pop("preset", None)
    if names == []:
        raise ConfigError("--preset: expected one or more names, got nothing; `presets` lists them")
    return read_preset(*names or ())


def _chosen(config: Any, options: dict[str, list[str]]) -> Any:
    """`config` with the environment that the options name: its settings are those that help lists."""
    from aem_jax.overrides import apply

    return apply(config, {"environment": options["environment"]} if "environment" in options else {})


def _help(config: Any, options: Mapping[str, Sequence[str]], usage: str, about: str) -> int:
    from aem_jax.config.run import RunConfig, without_effect
    from aem_jax.help import help_text

    unused = without_effect(config) if isinstance(config, RunConfig) else {}
    print(help_text(config, f"{PROGRAM} {usage}", about, options["help"], unused))
    return 0
