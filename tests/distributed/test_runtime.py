"""The machine is set up before the first computation, or an error explains why it cannot be."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.runtime import cache_folder, gpu_memory_share, set_up, versions
from aem_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_the_compilation_cache_has_the_chosen_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(RuntimeConfig()) == tmp_path / "aem_jax" / "xla"
    assert cache_folder(RuntimeConfig(compilation_cache="/x/y")) == Path("/x/y")
    assert cache_folder(RuntimeConfig(compilation_cache="off")) is None
    assert cache_folder(RuntimeConfig(), Path("/runs")) == tmp_path / "aem_jax" / "xla"


def test_several_processes_share_a_compilation_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Only the first writes. On a disk of its own, another host would compile everything again at each restart."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    second = RuntimeConfig(coordinator="a:1", num_processes=2, process_id=1)
    assert cache_folder(second, Path("/runs")) == Path("/runs/.xla")
    assert cache_folder(second) == tmp_path / "aem_jax" / "xla"
    assert cache_folder(replace(second, compilation_cache="/x/y"), Path("/runs")) == Path("/x/y")
    assert cache_folder(replace(second, compilation_cache="off"), Path("/runs")) is None


def test_a_cache_folder_that_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--runtime\.compilation-cache"):
        set_up(RuntimeConfig(compilation_cache=str(tmp_path / "file" / "cache")))


def test_versions_name_packages_and_devices():
    names = versions()
    assert set(names) == {"aem_jax", "jax", "jaxlib", "python", "devices", "cpus"} and all(names.values())


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_set_up_replaces_earlier_logging(user_environment):
    done = run(
        "import logging; logging.basicConfig(level=logging.WARNING, format='not ours %(message)s')\n"
        "from aem_jax.config.run import RuntimeConfig\n"
        "from aem_jax.distributed.runtime import set_up\n"
        "set_up(RuntimeConfig(compilation_cache='off'))\n"
        "for name in ('aem_jax.launch.context', 'grain'): logging.getLogger(name).info('hello')\n"
        "logging.getLogger('grain').warning('mind')",
        user_environment,
    )
    assert done.stderr.splitlines()[-2:] == ["INFO aem_jax.launch.context: hello", "WARNING grain: mind"], done.stderr


def test_simulated_devices_and_a_cache_that_fills(user_environment, tmp_path: Path):
    environment = {k: v for k, v in user_environment.items() if not k.startswith("JAX_")}
    code = f"""
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.runtime import set_up
set_up(RuntimeConfig(cpu_devices=3, platform="cpu", compilation_cache={str(tmp_path / "xla")!r}))
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(jax.device_count())
"""
    result = run(code, environment)
    assert result.stdout == "3\n", result.stderr
    assert list((tmp_path / "xla").iterdir())


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, "0.9"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".45"}, "0.45"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.6"}, "0.6"),  # JAX refuses both names at once
    ],
)
def test_gpus_get_the_memory_that_a_plan_counts(user_environment, given: dict[str, str], share: str):
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    environment = {name: value for name, value in user_environment.items() if name not in names}
    code = """
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.runtime import gpu_memory_share, set_up
set_up(RuntimeConfig(platform="cpu", compilation_cache="off"))
from jaxlib import xla_client
print(gpu_memory_share(), xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"])
"""
    result = run(code, environment | given)
    assert result.stdout.split() == [share, share], result.stderr


def test_a_share_of_memory_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "most")
    with pytest.raises(ConfigError, match="MEM_FRACTION: expected a fraction such as 0.9, got 'most'"):
        gpu_memory_share()


def test_a_missing_platform_is_refused(user_environment):
    environment = {k: v for k, v in user_environment.items() if not k.startswith("JAX_")}
    code = """
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError
from aem_jax.distributed.runtime import set_up
try:
    set_up(RuntimeConfig(platform="tpux", compilation_cache="off"))
except ConfigError as error:
    print(error)
"""
    result = run(code, environment)
    assert result.stdout.startswith("--runtime.platform tpux: "), result.stderr


def test_environment_variables_do_not_change_settings_that_affect_numbers(user_environment):
    code = (
        "import aem_jax.distributed.runtime as r, jax; r.fix_settings(); "
        "print([getattr(jax.config, name) == value for name, value in r.FIXED.items()], jax.numpy.ones(2).dtype)"
    )
    odd = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=user_environment | odd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout and "float32" in done.stdout
    assert all(name in done.stderr for name in odd)
