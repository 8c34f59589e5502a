"""Memory that a CPU run frees is kept, not given back: XLA asks for its temporary buffers again at every call.

A learner's pass takes and frees hundreds of megabytes. glibc maps blocks of that size anew each time, and the kernel
then hands out (and zeroes) every page again: a quarter of a pass on two cores. Nothing here matters where buffers live
on an accelerator, or where the C library is another one.
"""

import ctypes
import os
from importlib.metadata import entry_points
from importlib.util import find_spec

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_SETTINGS = (
    (_M_MMAP_MAX, 0),  # large blocks come from the heap, too
    (_M_ARENA_MAX, 1),  # and from one heap: those of other threads are small, and fall back to mapping
    (_M_TRIM_THRESHOLD, 2**31 - 1),  # the heap never shrinks
    (_M_TOP_PAD, 64 * 2**20),  # it grows in large steps
)


def keep_freed_memory() -> bool:
    """Sets the C library's allocator up so, for threads that start later: call it before jax's first computation.

    The process then keeps its largest size until it ends.

    Returns:
        whether the C library has these settings.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in _SETTINGS)


def computes_on_cpu(platform: str | None) -> bool:
    """Whether jax will compute on the CPU, as far as can be said before it looks for devices (and starts threads)."""
    platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if platform:
        return platform == "cpu"
    return not entry_points(group="jax_plugins") and not find_spec("jax_plugins") and not find_spec("libtpu")
