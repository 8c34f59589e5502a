"""Facts of GPUs that XLA needs to compile for one that is not there, in the text form of its `GpuTargetConfigProto`.

Sources: the target configs that XLA publishes (xla/backends/gpu/target_config/specs in openxla/xla: a100_sxm_80,
h100_sxm, h200, b200); for L4, L40S and RTX 4090, of which it has none, NVIDIA's Ada architecture paper and the table of
compute capabilities in the CUDA programming guide. The rates of XLA's cost model are left out: without a device nothing
is autotuned, and the programs are the same without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from aem_jax.plan.devices import GPUS


@dataclass(frozen=True)
class GpuTarget:
    """Facts of a GPU beside those of `devices.Chip`.

    Attributes:
        kind: its name, as jax calls the device.
        capability: CUDA compute capability, major and minor.
        cores: streaming multiprocessors.
        core_threads: most resident threads of one.
        core_memory: bytes of shared memory of one; a block may have 1 KiB less.
        l2: bytes of L2 cache.
        clock: GHz, boosted.
        fpus: float32 units of a core.
        nvlinks: active links of NVLink; 0 for none. They decide which kernels of collectives XLA takes.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    core_threads: int
    core_memory: int
    l2: int
    clock: float
    fpus: int = 128
    nvlinks: int = 0


_MIB = 2**20
GPU_TARGETS: Mapping[str, GpuTarget] = {
    "a100": GpuTarget("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2048, 167936, 40 * _MIB, 1.41, 64, nvlinks=12),
    "h100": GpuTarget("NVIDIA H100 80GB HBM3", (9, 0), 132, 2048, 233472, 50 * _MIB, 1.98, nvlinks=18),
    "h200": GpuTarget("NVIDIA H200 141GB HBM3e", (9, 0), 132, 2048, 233472, 50 * _MIB, 1.98, nvlinks=18),
    "b200": GpuTarget("NVIDIA B200", (10, 0), 148, 2048, 233472, 132644864, 1.965, nvlinks=18),
    "l4": GpuTarget("NVIDIA L4", (8, 9), 58, 1536, 102400, 48 * _MIB, 2.04),
    "l40s": GpuTarget("NVIDIA L40S", (8, 9), 142, 1536, 102400, 96 * _MIB, 2.52),
    "rtx4090": GpuTarget("NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 102400, 72 * _MIB, 2.52),
}
"""Name in `devices.GPUS` -> facts."""

_CUDNN = "major: 9 minor: 10 patch: 0"
"""The oldest cuDNN of jax 0.10's plugins."""


def target_config(model: str) -> str:
    """The text of XLA's target config of a GPU.

    Args:
        model: a name in `GPU_TARGETS`.
    """
    gpu, chip = GPU_TARGETS[model], GPUS[model]
    major, minor = gpu.capability
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {gpu.core_threads}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {gpu.core_memory - 1024}
  shared_memory_per_core: {gpu.core_memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  clock_rate_ghz: {gpu.clock}
  l2_cache_size: {gpu.l2}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {chip.memory:.0f}
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {"ACCELERATED_FEATURES" if major >= 9 else "NONE"}
  }}
  device_interconnect_info {{ active_links: {gpu.nvlinks} }}
  name: "{gpu.kind}"
  device_vendor: "NVIDIA Corporation"
}}
platform_name: "CUDA"
dnn_version_info {{ {_CUDNN} }}
device_description_str: "{gpu.kind}"
"""
