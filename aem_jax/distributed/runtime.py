"""Set-up of the machine before the first computation: platform, devices, compilation cache, memory, logging."""

import ctypes
import logging
import os
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from aem_jax.distributed.clusters import expected_count
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.join import initialize
from aem_jax.errors import ConfigError
from aem_jax.files import user_cache

SHARED_CACHE = ".xla"
"""Folder in `runs_dir` that keeps the compiled programs of several processes."""


def cache_folder(config: RuntimeConfig, runs_dir: Path | None = None) -> Path | None:
    """The folder that keeps compiled programs; None for none.

    Of several processes only the first writes, so that a cache on each host's own disk would stay empty on the others.
    They share one in `runs_dir`, if there is one.
    """
    if config.compilation_cache == "off":
        return None
    if config.compilation_cache == "auto":
        if runs_dir and expected_count(config) != 1:
            return runs_dir / SHARED_CACHE
        return user_cache("xla")
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
"""JAX settings that change a run's numbers or break its programs. The environment does not override them."""


def fix_settings() -> None:
    """Applies `FIXED`, and warns of each setting that the environment has changed."""
    import jax

    log = logging.getLogger(__name__)
    for name, value in FIXED.items():
        current = getattr(jax.config, name, value)
        if current != value:
            log.warning("%s=%s has no effect on a run, which uses %s", name.upper(), current, value)
            jax.config.update(name, value)
    precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if precision is not None:
        log.warning("JAX_DEFAULT_MATMUL_PRECISION=%s changes the numbers of this run", precision)


GPU_MEMORY_SHARE = 0.9
"""Fraction of a GPU's memory for JAX, which takes 0.75 by default. CUDA's context, NCCL and libraries need the rest."""

_MEMORY_VARIABLES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


def gpu_memory_share() -> float:
    """The fraction of a GPU's memory that a run has: the user's environment variable, else `GPU_MEMORY_SHARE`.

    Raises:
        ConfigError: the variable is no number.
    """
    name = next((name for name in _MEMORY_VARIABLES if os.environ.get(name)), None)
    if name is None:
        return GPU_MEMORY_SHARE
    try:
        return float(os.environ[name])
    except ValueError:
        message = f"{name}: expected a fraction such as {GPU_MEMORY_SHARE}, got {os.environ[name]!r}"
        raise ConfigError(message) from None


def set_up(config: RuntimeConfig, runs_dir: Path | None = None) -> None:
    """Applies the settings to JAX and to logging. JAX's own environment variables win, but for those of `FIXED`.

    Args:
        config: the settings.
        runs_dir: a folder that all processes of the run see.

    Raises:
        ConfigError: the devices are missing, the other processes of the run cannot be found, or the folder of the
            compilation cache cannot be written.
    """
    import jax

    # force: an earlier import may have configured logging already.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("aem_jax").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs tracebacks of errors that it also raises
    fix_settings()
    if config.platform:
        jax.config.update("jax_platforms", config.platform)
    if config.cpu_devices:
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    folder = cache_folder(config, runs_dir)
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
            # JAX keeps only programs that took a second to compile by default; a CPU run has many smaller ones
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
            jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    share = gpu_memory_share()
    if not any(os.environ.get(name) for name in _MEMORY_VARIABLES):  # JAX refuses both names at once
        os.environ[_MEMORY_VARIABLES[0]] = str(share)
    if computes_on_cpu(config.platform):
        keep_freed_memory()
    initialize(config)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a plugin is installed without its devices
        reason = str(error) or "jax finds no such device"
        raise ConfigError(f"--runtime.platform {config.platform or 'auto'}: {reason}") from None


def versions() -> dict[str, str]:
    """What a result depends on: the versions of this package, JAX and Python, and the devices."""
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


# Memory. XLA allocates its temporary buffers anew at every call, and a pass of the learner takes hundreds of megabytes.
# glibc maps blocks of that size each time, and the kernel then zeroes every page again: a quarter of a pass on two
# cores. This does not matter where buffers live on an accelerator, or with another C library.

# Names and numbers of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_MALLOC_SETTINGS = (
    (_M_MMAP_MAX, 0),  # large blocks come from the heap, too
    (_M_ARENA_MAX, 1),  # and from one heap: those of other threads are small, and fall back to mapping
    (_M_TRIM_THRESHOLD, 2**31 - 1),  # the heap never shrinks
    (_M_TOP_PAD, 64 * 2**20),  # it grows in large steps
)


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory, for threads that start later. Call it before JAX's first computation.

    The process then keeps its largest size until it ends.

    Returns:
        Whether the C library has these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _MALLOC_SETTINGS)


def computes_on_cpu(platform: str | None) -> bool:
    """Whether JAX will compute on the CPU, as far as is known before it looks for devices (and starts threads)."""
    platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if platform:
        return platform == "cpu"
    return not entry_points(group="jax_plugins") and not find_spec("jax_plugins") and not find_spec("libtpu")
