"""Row attention on GPUs: cuDNN's flash attention through jax, and the Triton kernel that ships with jax.

Three alternatives are not used. jax offers cuDNN's packed layout only in a private function, and it needs the number of
segments of each row. jax's Mosaic kernel has no segments and no causal backward pass. jax 0.12 recommends tokamax
instead of its Triton kernel, but tokamax needs Python 3.12 and, like cuDNN, takes segments as a mask of T² numbers per
row.
"""

import warnings

import jax
import jax.numpy as jnp

Array = jax.Array

TRITON_MODULE = "jax.experimental.pallas.ops.gpu.attention"

TRITON_BLOCK = 128
"""Block of queries and keys in the forward pass; a row's length is a multiple of it."""


def cudnn_attention(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """See `row_attention`. cuDNN reads the segment mask as a bias: T² numbers per row, in the inputs' dtype."""
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True, implementation="cudnn")


def triton_attention(q: Array, k: Array, v: Array, segment_ids: Array, *, interpret: bool = False) -> Array:
    """See `row_attention`. The kernel has no grouped queries: keys and values are repeated for each query head."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # `kernels.choose` reports a jax without it
        from jax.experimental.pallas.ops.gpu import attention as triton  # experimental; other runs do not import it

    head_dim, shared = q.shape[-1], q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, shared, axis=2) for x in (k, v))
    return triton.mha(q, k, v, segment_ids, sm_scale=head_dim**-0.5, causal=True, interpret=interpret)
