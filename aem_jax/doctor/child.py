"""The process that runs the checks: `python -m aem_jax.doctor.child CONFIG NAME …` prints a JSON line for each check.

Only those lines go to standard output. Output of libraries goes to standard error.
"""

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.finding import CHECKS, Finding, first_line
from aem_jax.envs.serving.server import end_with_parent
from aem_jax.errors import ConfigError
from aem_jax.overrides import override

ON_CPU, ON_ACCELERATOR = "tiny", "qwen2.5-0.5b"
"""The default model on a CPU, and on an accelerator."""


def examine_all(names: Sequence[str], config: DoctorConfig) -> Generator[str | Finding, None, None]:
    """Yields the model's name, then the finding of each check.

    Raises:
        ConfigError: a platform that was asked for by name is not there.
    """
    config, trouble = _set_up(config)
    yield config.model
    for name in names:
        yield trouble if trouble and name == trouble.name else examine(name, config)


def examine(name: str, config: DoctorConfig) -> Finding:
    """Runs one check. An exception becomes a finding."""
    module, _, function = CHECKS[name].partition(":")
    start = time.perf_counter()
    try:
        found = getattr(importlib.import_module(f"aem_jax.doctor.{module}"), function)(config)
    except Exception as error:
        advice = f"alone: doctor {name}; with --json, facts.traceback says where"
        found = Finding(False, first_line(error), advice, {"traceback": traceback.format_exc()})
    return replace(found, name=name, seconds=time.perf_counter() - start)


def as_line(item: str | Finding) -> str:
    """An item of `examine_all` as JSON. Non-finite numbers are written by name, and keys as text."""
    return json.dumps({"model": item} if isinstance(item, str) else _plain(asdict(item)))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def _set_up(config: DoctorConfig) -> tuple[DoctorConfig, Finding | None]:
    """Sets up jax and chooses the model. Also returns the devices' fault if the other checks must run on the CPU.

    Raises:
        ConfigError: a platform that was asked for by name is not there.
    """
    import jax

    from aem_jax.distributed import runtime

    trouble = None
    try:
        runtime.set_up(replace(config.runtime, distributed="off"))
    except ConfigError as error:
        if config.runtime.platform or "--runtime.platform" not in str(error):
            raise
        advice = "install jax for the driver's CUDA (aem_jax[cuda12] or aem_jax[cuda13]), or set JAX_PLATFORMS=cpu"
        trouble = Finding(False, f"{str(error).splitlines()[0]}; all else is done on the CPU", advice, name="devices")
        jax.config.update("jax_platforms", "cpu")
    default = ON_CPU if jax.default_backend() == "cpu" else ON_ACCELERATOR
    return replace(config, model=config.model or default), trouble


def main(words: Sequence[str]) -> int:
    """Runs the checks named after the config; returns 0, or 2 for an error in the config."""
    end_with_parent()
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        for item in examine_all(words[1:], override(DoctorConfig(), json.loads(words[0]))):
            print(as_line(item), file=lines, flush=True)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), file=lines, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
