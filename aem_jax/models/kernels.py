"""Chooses the attention of packed rows: the device's own kernel if it supports the shapes, else XLA's blocks.

The table below lists the kernels and their limits. A kernel runs on one device, so on a mesh it runs inside
`shard_map`, with rows over data and fsdp and heads over tensor: no device needs the rows or heads of another.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from aem_jax.models.attention import RowAttention, row_attention
from aem_jax.models.splash import BLOCKS, SPLASH_MODULE, block_size, splash_attention
from aem_jax.sharding import TRAIN, partition

log: logging.Logger = logging.getLogger(__name__)

Array = jax.Array

# GPUs: cuDNN's flash attention through jax. Three alternatives are not used. jax offers cuDNN's packed layout only in a
# private function, and it needs the number of segments of each row. jax's Triton kernel is deprecated, and its Mosaic
# kernel has no segments and no causal backward pass. tokamax, which jax recommends, needs Python 3.12 and, like cuDNN,
# takes segments as a mask of T² numbers per row.


def cudnn_attention(q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int = 0) -> Array:
    """See `row_attention`. cuDNN reads the segment mask as a bias: T² numbers per row, in the inputs' dtype."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    window = (sliding_window - 1, 0) if sliding_window else None
    return jax.nn.dot_product_attention(
        q, k, v, mask=same, is_causal=True, local_window_size=window, implementation="cudnn"
    )


@dataclass(frozen=True)
class Device:
    """The properties of a device that kernels depend on.

    Attributes:
        platform: cpu, gpu or tpu.
        is_cuda: whether it is an NVIDIA device.
        capability: CUDA compute capability, such as 9.0; 0 elsewhere.
    """

    platform: str
    is_cuda: bool = False
    capability: float = 0.0


COMPILE_ONLY = 8.0
"""Compute capability that kernels may rely on in GPUs which jax only compiles for. Whatever they are, jax lowers wider
heads of cuDNN's attention only on a machine that has a GPU for them."""


class Sizes(NamedTuple):
    """Sizes of one device's share of the rows and heads."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str


class Kernel(NamedTuple):
    """An implementation of row attention.

    Attributes:
        attend: row attention on one device.
        platform: platform that it runs on; empty for all.
        refuses: returns the reason why it does not support a device and sizes; empty if it does.
        backward: matrix products of the backward pass, in units of the forward pass; scores are recomputed.
        module: the experimental module of jax that contains it, which some versions of jax lack; empty for none.
    """

    attend: RowAttention
    platform: str
    refuses: Callable[[Device, Sizes], str]
    backward: float = 2.5
    module: str = ""


def _splash_refuses(device: Device, sizes: Sizes) -> str:
    if not block_size(sizes.length):
        return f"rows of {sizes.length} tokens are no multiple of {BLOCKS[-1]}"
    if sizes.head_dim % 64:
        return f"heads of {sizes.head_dim} are no multiple of 64"
    return ""


def _cudnn_refuses(device: Device, sizes: Sizes) -> str:
    widest = 256 if device.capability >= 9 else 128
    if not device.is_cuda or device.capability < 8:
        return f"it needs an NVIDIA GPU of compute capability 8.0 or more, this one has {device.capability:.1f}"
    if sizes.head_dim % 8 or sizes.head_dim > widest:
        return f"heads of {sizes.head_dim} are no multiple of 8 up to {widest}"
    if sizes.length % 2:
        return f"rows of {sizes.length} tokens are odd"
    return _not_half(sizes)


def _not_half(sizes: Sizes) -> str:
    return "" if sizes.dtype in ("bfloat16", "float16") else f"{sizes.dtype} is not bfloat16 (--model.dtype)"


KERNELS: Mapping[str, Kernel] = {
    "splash": Kernel(splash_attention, "tpu", _splash_refuses, backward=3.5, module=SPLASH_MODULE),
    "cudnn": Kernel(cudnn_attention, "gpu", _cudnn_refuses),
    "xla": Kernel(row_attention, "", lambda device, sizes: ""),
}
"""Name -> kernel."""

PREFERRED: Mapping[str, str] = {"tpu": "splash", "gpu": "cudnn"}
"""Platform -> the kernel of `auto`, if it supports the shapes; XLA elsewhere."""


def choose(name: str, device: Device, sizes: Sizes, kernels: Mapping[str, Kernel] = KERNELS) -> tuple[str, str]:
    """Returns the name of the chosen kernel, and the reason if it is not the requested one (empty if it is).

    Args:
        name: a name in `KERNELS`, or auto.
        device: the device that it runs on.
        sizes: sizes on one device.
        kernels: the table.

    Raises:
        ValueError: the named kernel belongs to another platform, or this version of jax does not have it.
    """
    wanted = PREFERRED.get(device.platform, "xla") if name == "auto" else name
    kernel = kernels[wanted]
    missing = f"jax {jax.__version__} has no {kernel.module}" if not _has(kernel.module) else ""
    here = kernel.platform in ("", device.platform)
    if not here or (missing and name != "auto"):
        there = [known for known, row in kernels.items() if row.platform in ("", device.platform) and _has(row.module)]
        where = f"on a {device.platform.upper()}"
        why = f"; {missing}" if here else ""
        raise ValueError(f"--learner.attention: expected auto, {' or '.join(there)} {where}, got {name}{why}")
    reason = missing or kernel.refuses(device, sizes)
    return ("xla", f"{wanted} attention: {reason}; XLA's blocks instead") if reason else (wanted, "")


@cache
def _has(module: str) -> bool:
    """Whether an optional module of jax is installed. It is imported: while a program is traced, its import would in
    jax 0.12 let every program of before compile again."""
    try:
        return not module or importlib.import_module(module) is not None
    except ImportError:
        return False


def device_of(mesh: Mesh) -> Device:
    """The device of a mesh, which may be one that jax only compiles for (`launch plan`)."""
    first: Any = mesh.devices.flat[0]
    version = str(getattr(getattr(first, "client", None), "platform_version", ""))
    if first.platform != "gpu":
        return Device(first.platform)
    if "cuda" in version.lower():
        return Device("gpu", True, float(first.compute_capability))
    # Where jax only compiles, the version of the platform is the name of the device.
    return Device("gpu", True, COMPILE_ONLY) if "NVIDIA" in version else Device("gpu")


def make_row_attention(
    name: str, mesh: Mesh, device: Device | None = None, kernels: Mapping[str, Kernel] = KERNELS
) -> RowAttention:
    """Attention of packed rows in the learner's layout on a mesh.

    The kernel is chosen by shapes while a program is traced; a fallback is logged once.

    Args:
        name: a name in `KERNELS`, or auto.
        mesh: the mesh.
        device: properties of the mesh's devices; by default those of its first device.
        kernels: the table.

    Raises:
        ValueError: the named kernel belongs to another platform.
    """
    device = device or device_of(mesh)
    choose(name, device, Sizes(BLOCKS[0], 1, 1, 128, "bfloat16"), kernels)  # an impossible name fails early
    rows = partition(("rows", "length", "heads", "head_dim"), TRAIN)
    keys = partition(("rows", "length", "kv_heads", "head_dim"), TRAIN)
    ids = partition(("rows", "length"), TRAIN)

    def attend(q: Array, k: Array, v: Array, segment_ids: Array, sliding_window: int = 0) -> Array:
        ways, dtype = mesh.shape["tensor"], jnp.dtype(q.dtype).name
        local = Sizes(q.shape[1], q.shape[2] // ways, k.shape[2] // ways, q.shape[3], dtype)
        chosen, reason = choose(name, device, local, kernels)
        if reason:
            _warn_once(reason)
        window = {"sliding_window": sliding_window} if sliding_window else {}
        run = partial(kernels[chosen].attend, **window)
        if chosen == "xla":  # the partitioner shards it
            return run(q, k, v, segment_ids)
        # The outputs of a kernel do not declare the mesh axes over which they vary.
        return jax.shard_map(run, mesh=mesh, in_specs=(rows, keys, keys, ids), out_specs=rows, check_vma=False)(
            q, k, v, segment_ids
        )

    return attend


@cache
def _warn_once(reason: str) -> None:
    log.warning(reason)
