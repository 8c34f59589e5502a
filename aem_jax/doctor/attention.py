"""Compares each attention kernel of the device with a plain softmax over the full mask, forward and backward.

Queries are grouped. One row has several segments and padding; a single segment fills the other. The plain softmax
computes in float32 at full precision, from the same (rounded) inputs. A token's gap is the norm of its error, divided
by the larger of its own norm and the mean norm of all tokens. The check uses the largest gap of any token.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.finding import Finding, judge
from aem_jax.doctor.parity import full_precision, one_device
from aem_jax.models import kv_cache
from aem_jax.models.attention import RowAttention
from aem_jax.models.decode_attention import CHUNKED, attend_chunked, make_decode_attention
from aem_jax.models.kernels import KERNELS, Sizes, choose, device_of, make_row_attention
from aem_jax.models.kv_cache import LayerCache

Array = jax.Array

LENGTHS: Mapping[str, tuple[int, ...]] = {"cpu": (128, 384)}
ACCELERATOR_LENGTHS = (512, 2048)
ROWS = 2
MOST: Mapping[str, float] = {"float32": 0.01, "bfloat16": 0.05}
"""Dtype -> largest allowed gap of a token. Rounding causes gaps of 0.003 to 0.01 in bfloat16 and 1e-6 in float32, or
0.001 in float32 if a kernel rounds its factors to fewer bits. A wrong mask makes a token completely wrong."""
NAMES = ("out", "d_q", "d_k", "d_v")

ADVICE = (
    "this kernel's numbers are wrong here: train with --learner.attention xla, or take the versions of constraints.txt"
)
DECODE_ADVICE = (
    "this kernel's numbers are wrong here: sample with --sampling.attention xla, or take the versions of "
    "constraints.txt"
)
XLA_ADVICE = (
    "XLA's own products are wrong here: unset XLA_FLAGS, take the versions of constraints.txt, and look for memory "
    "errors of the device (nvidia-smi -q -d ECC)"
)


def check(name: str, config: DoctorConfig) -> Finding:
    """Checks one kernel of `KERNELS`."""
    mesh, model = one_device(), config.shape
    device, platform = device_of(mesh), KERNELS[name].platform
    if platform not in ("", device.platform):
        return Finding(None, f"a kernel of {platform.upper()}s")
    facts: dict[str, Any] = {}
    faults, texts = [], []
    for length in LENGTHS.get(device.platform, ACCELERATOR_LENGTHS):
        sizes = Sizes(length, model.num_heads, model.num_kv_heads, model.head_dim, model.dtype)
        try:
            chosen, reason = choose(name, device, sizes)
        except ValueError as error:  # this version of jax lacks the kernel
            return Finding(None, str(error))
        if chosen != name:
            return Finding(None, reason)
        inputs = packed_rows(length, model.num_heads, model.num_kv_heads, model.head_dim, model.dtype)
        with full_precision(model.dtype):
            measured = gaps(make_row_attention(name, mesh), *inputs)
        facts[str(length)] = measured
        worst = max(measured, key=lambda part: measured[part] if np.isfinite(measured[part]) else np.inf)
        texts.append(f"{worst} {measured[worst]:.1e} at T {length}")
        if not all(gap <= MOST[model.dtype] for gap in measured.values()):
            faults = [f"expected gaps of at most {MOST[model.dtype]:g} from a plain softmax"]
    text = f"{model.num_heads} heads on {model.num_kv_heads}, {model.dtype}: largest gaps {', '.join(texts)}"
    return judge(faults, text, XLA_ADVICE if name == "xla" else ADVICE, facts)


xla, splash, cudnn = (partial(check, name) for name in ("xla", "splash", "cudnn"))


def decode(config: DoctorConfig) -> Finding:
    """Checks the attention of decode steps against XLA's, if the device has a kernel for it.

    Slots have no token, one, some and all. Four steps follow, so that each attends to the tokens of the ones before.
    """
    mesh, model, length, steps = one_device(), config.shape, 1024, 4
    own = make_decode_attention(model, mesh, int8=False)
    if own == CHUNKED:
        return Finding(None, "no kernel of its own for this device and model; parity covers XLA's")
    lengths = jnp.asarray([0, 1, 127, 128, 600, length - steps], jnp.int32)
    key = jax.random.key(0)
    draw = lambda part, *shape: jax.random.normal(jax.random.fold_in(key, part), shape).astype(model.dtype)
    of_layer = lambda length: kv_cache.init_chunk(model.with_layers(1), len(lengths), length)[0]
    cache = LayerCache(*(draw(part, *array.shape) for part, array in enumerate(of_layer(length))))
    chunks: dict[str, Any] = {"own": cache if own.in_place else of_layer(steps), "xla": of_layer(steps)}
    attends = {"own": jax.jit(own.attend), "xla": jax.jit(attend_chunked)}
    step_gaps = []
    for index in range(steps):
        shapes = [(len(lengths), 1, heads, model.head_dim) for heads in (model.num_heads, *[model.num_kv_heads] * 2)]
        new = [draw(10 + 3 * index + part, *shape) for part, shape in enumerate(shapes)]
        outs = {}
        for name, attend in attends.items():
            with full_precision(model.dtype):
                outs[name], chunks[name] = attend(*new, cache, lengths, chunks[name], jnp.int32(index))
        # A slot without tokens does not decode, so a kernel may skip it.
        step_gaps.append(_gap(outs["own"][1:], outs["xla"][1:].astype(jnp.float32)))
    worst = float(np.max(step_gaps))  # NaN if one of them is
    faults = [] if worst <= MOST[model.dtype] else [f"expected gaps of at most {MOST[model.dtype]:g} from XLA's"]
    text = f"{model.num_heads} heads on {model.num_kv_heads}, {model.dtype}: largest gap {worst:.1e}"
    return judge(faults, text, DECODE_ADVICE, {"gap": worst})


def plain_attention(q: Array, k: Array, v: Array, segment_ids: Array) -> Array:
    """JAX's own attention with the full mask; see `models.attention.row_attention`."""
    length = q.shape[1]
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]
    mask = causal[None] & (segment_ids[:, :, None] == segment_ids[:, None, :])
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")


def packed_rows(
    length: int, heads: int, kv_heads: int, head_dim: int, dtype: str = "float32"
) -> tuple[Array, Array, Array, Array]:
    """q, k, v and segment ids of two rows: one has several segments and padding at the end, the other one segment."""
    keys = jax.random.split(jax.random.key(length), 3)
    shapes = ((heads, keys[0]), (kv_heads, keys[1]), (kv_heads, keys[2]))
    q, k, v = (jax.random.normal(key, (ROWS, length, count, head_dim)).astype(dtype) for count, key in shapes)
    cuts = np.searchsorted([length // 5, length // 2, length - 30], np.arange(length), side="right")
    segments = np.stack([np.where(cuts == 3, 0, cuts + 1), np.ones(length)])
    return q, k, v, jnp.asarray(segments, jnp.int32)


def gaps(attend: RowAttention, q: Array, k: Array, v: Array, segment_ids: Array) -> dict[str, float]:
    """The largest gap of a token for each of `NAMES`; NaN if any number is NaN."""
    weights = jax.random.normal(jax.random.key(0), q.shape) * (segment_ids > 0)[..., None, None]

    def both(attend: RowAttention, q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
        return out * (segment_ids > 0)[..., None, None], *back(weights.astype(out.dtype))

    actual = jax.jit(partial(both, attend))(q, k, v)
    with jax.default_matmul_precision("highest"):
        exact = (array.astype(jnp.float32) for array in (q, k, v))
        expected = jax.jit(partial(both, plain_attention))(*exact)
        return {name: float(_gap(*pair)) for name, *pair in zip(NAMES, actual, expected, strict=True)}


@jax.jit
def _gap(actual: Array, expected: Array) -> Array:
    norm: Callable[[Array], Array] = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=(2, 3)))
    own = norm(expected)
    return jnp.max(norm(actual.astype(jnp.float32) - expected) / jnp.maximum(own, jnp.mean(own)))
