"""Freed memory is kept: a warm computation with large temporary buffers causes no page faults."""

import ctypes
import subprocess
import sys

import pytest

from aem_jax.distributed.runtime import computes_on_cpu

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from aem_jax.distributed.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
f = jax.jit(lambda x, y: jnp.sum(jnp.sin(x[:, None] * y[None]) @ jnp.cos(y[:, None] + x[None])))
x, y = jnp.arange(64.0), jnp.arange(65536.0)
for _ in range(30):  # it takes some calls until the heap has its size
    f(x, y).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    f(x, y).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
@pytest.mark.slow
def test_warm_computations_fault_no_pages_in(user_environment):
    environment = {**user_environment, "XLA_FLAGS": ""}  # computing takes longer than compiling here

    def faults(mode: str) -> int:
        command = [sys.executable, "-c", PROGRAM, mode]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)

    # ten calls with two buffers of 16 MiB are 81,920 pages of 4 KiB; with larger pages there is nothing to save
    given_back = faults("give back")
    if given_back < 40_000:
        pytest.skip(f"this machine faults {given_back} pages in anyhow")
    assert faults("keep") < 0.2 * given_back


def test_the_platform_is_known_before_jax_initializes(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert computes_on_cpu("cpu") and not computes_on_cpu("tpu") and not computes_on_cpu(None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert computes_on_cpu(None) and not computes_on_cpu("cuda,cpu")
