"""The machine, set up before the first computation: platform, simulated devices, compiled programs kept, quiet logs."""

import logging
import os
from pathlib import Path

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.join import initialize
from aem_jax.distributed.memory import computes_on_cpu, keep_freed_memory
from aem_jax.errors import ConfigError


def cache_folder(config: RuntimeConfig) -> Path | None:
    """Where compiled programs are kept; None for nowhere."""
    if config.compilation_cache == "off":
        return None
    if config.compilation_cache == "auto":
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aem_jax" / "xla"
    return Path(config.compilation_cache).expanduser()


FIXED = {
    "jax_enable_x64": False,
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_disable_jit": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
}
"""Settings of jax that change a run's numbers or break its programs: the same whatever the environment says."""


def fix_settings() -> None:
    """Puts `FIXED` in place, with a warning for each that the environment has set otherwise."""
    import jax

    log = logging.getLogger(__name__)
    for name, value in FIXED.items():
        found = getattr(jax.config, name, value)
        if found != value:
            log.warning("%s=%s has no effect on a run, which uses %s", name.upper(), found, value)
            jax.config.update(name, value)
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if precision is not None:
        log.warning("JAX_DEFAULT_MATMUL_PRECISION=%s changes the numbers of this run", precision)


def set_up(config: RuntimeConfig) -> None:
    """Applies the settings to jax and to logging. Where JAX's own environment variables are set, they win,
    but for those of `FIXED`.

    Raises:
        ConfigError: the devices asked for are not there, the other processes of the run are not to be found, or the
            cache's folder cannot be written.
    """
    import jax

    # By force: a library that is imported before has set a handler and a level of its own, and ours would be left out.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("aem_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax: tracebacks of errors that are raised all the same
    fix_settings()
    if config.platform:
        jax.config.update("jax_platforms", config.platform)
    if config.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    folder = cache_folder(config)
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"no permission to write {folder}")
        except OSError as error:
            if config.compilation_cache != "auto":
                raise ConfigError(f"--runtime.compilation-cache: {error}") from None
            logging.getLogger(__name__).warning("compiled programs are not kept: %s", error)
        else:
            jax.config.update("jax_compilation_cache_dir", str(folder))
            # jax's defaults keep what took a second to compile; on a CPU many small programs add up
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if computes_on_cpu(config.platform):
        keep_freed_memory()
    initialize(config)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts where a plugin is there and its devices are not
        reason = str(error) or "jax finds no such device"
        raise ConfigError(f"--runtime.platform {config.platform or 'auto'}: {reason}") from None


def versions() -> dict[str, str]:
    """What a result depends on: our version, jax's, Python's, and the devices."""
    import platform

    import jax
    from jaxlib.version import __version__ as jaxlib_version

    import aem_jax

    device = jax.devices()[0]
    return {
        "aem_jax": aem_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib_version,
        "python": platform.python_version(),
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
