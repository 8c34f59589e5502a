"""Settings for all tests, as environment variables, so that a test without jax never loads it.

They must be set before jax is imported, so they are at the top of this file.
"""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    # sharding tests run on 8 simulated devices; results must not depend on how many there are
    "JAX_NUM_CPU_DEVICES": "8",
    # f32[R] + f32[R, T] is usually a bug
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # compile once per checkout, not once per run and worker
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache" / "tests"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    # Most of a test's time is compiling: half of it LLVM's optimizer, half of the rest the MLIR passes of the emitters
    # of fused loops, in whose place the older ones write LLVM at once. To compile a program in 32 parts, for as many
    # cores, takes a sixth more of a core. HLO, which tests read, is the same without all three.
    # jaxlib 0.11 no longer has the last flag, and an unknown XLA flag ends the process.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
    # the lines of Python that made each operation: for profiles
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",
    # nothing is downloaded while testing
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
    "MPLBACKEND": "Agg",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

# Tracing allocates many objects, and a collection walks all that jax holds: by default, a twentieth of the CPU.
gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs files with slow tests first, so that no process still runs one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """Restores the strict settings after a test, because a command run in this process sets jax up as for a user."""
    yield
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_numpy_rank_promotion", os.environ["JAX_NUMPY_RANK_PROMOTION"])


@pytest.fixture(autouse=True, scope="module")
def no_old_programs() -> Iterator[None]:
    """Frees the programs of a finished file: otherwise a process keeps those of all files, several GB in the end."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()


@pytest.fixture
def golden() -> Path:
    """The folder of golden recordings next to the repository; the test is skipped without it."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("golden recordings (../shared) are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct; the test is skipped without it."""
    path = REPOSITORY / "models" / "smollm2-135m" / "model.gguf"
    if not path.is_file():
        pytest.skip(f"no {path.relative_to(REPOSITORY)}; make smollm2 fetches it")
    return path


@pytest.fixture
def user_environment() -> dict[str, str]:
    """The environment of a subprocess that runs like a user's: one CPU device, jax's defaults, the same cache."""
    ours = {"JAX_NUM_CPU_DEVICES", "JAX_NUMPY_RANK_PROMOTION"}
    return {name: value for name, value in os.environ.items() if name not in ours}
