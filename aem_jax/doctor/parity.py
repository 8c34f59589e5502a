"""Sampler = learner: the log-probability of every sampled token, as recorded and as the learner computes it.

Episodes are played by the rollout (KV cache, chunks, several turns) and packed into the learner's rows. In float32, at
full precision, both must agree to rounding, whatever the way of sampling:

    int8 weights      the learner has the same weights, decoded: W = codes · scales
    int8 cache        the learner has no counterpart, so the gap is the error of 8 bits; it is only bounded
    LoRA              the learner keeps the adapter separate from frozen weights, the sampler too, or it merges them

In bfloat16 both round, in different orders. The allowed gap is measured with the learner, in bfloat16 against float32:
the sampler's gap may be `BFLOAT16_FACTOR` times as large. `BFLOAT16` bounds it, because an error of the learner raises
what is measured.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from aem_jax.batch import Batch
from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.episodes import SLOTS, make_sampler, packed, play, random_params
from aem_jax.doctor.finding import Finding, judge
from aem_jax.learner import LearnerConfig, make_token_logprobs
from aem_jax.models import LoraConfig, ModelConfig, Params, Policy
from aem_jax.models.int8 import quantized_matrices, scale_of
from aem_jax.sampler import SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import TRAIN, MeshConfig, make_mesh, shardings

RANK = 4
EXACT = 1e-4
"""Nats: the largest gap of one token in float32. Rounding costs 1e-6 to 1e-5, for any width."""
INT8_CACHE = (0.02, 0.2)
"""Nats: mean and largest gap with a cache in 8 bits; measured are 0.005 and 0.02, at widths of 128 and 896."""
BFLOAT16_FACTOR = 3.0
BFLOAT16 = (0.1, 0.5)
"""Nats: most that is allowed as mean and as largest gap in bfloat16; measured are 0.007 and 0.03 at a width of 128,
0.005 and 0.02 at a width of 896."""
TIE = 1e-3
"""Largest difference of logits that count as equal for an argmax."""

ADVICE = (
    "sampler and learner disagree on the same tokens, so training would learn from wrong ratios: unset XLA_FLAGS, "
    "take the versions of constraints.txt, and see which attention-… fails (--learner.attention xla goes without it)"
)


class Gap(NamedTuple):
    """|learner's − sampler's log-probability| of the sampled tokens, in nats."""

    mean: float
    largest: float
    tokens: int


class Sampled(NamedTuple):
    """Sampled episodes, and the policy that they are compared with.

    Attributes:
        batch: the episodes, packed.
        learner: the policy as the learner has it.
        params: its parameters.
    """

    batch: Batch
    learner: Policy
    params: Params


@cache
def one_device() -> Mesh:
    """A mesh of the first device."""
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def full_precision(dtype: str = "float32") -> AbstractContextManager[None]:
    """While a program is traced: float32 products at full precision. Accelerators round them to fewer bits by default,
    which would hide a gap. Other dtypes do not change."""
    return jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()


def float32(config: DoctorConfig) -> Finding:
    """The plain policy, in float32."""
    return _exact(sample(config.shallow("float32")))


def int8_weights(config: DoctorConfig) -> Finding:
    """Layers' matrices in 8 bits while sampling."""
    return _exact(sample(config.shallow("float32"), weights="int8"))


def lora_apart(config: DoctorConfig) -> Finding:
    """An adapter beside frozen weights while sampling."""
    return _exact(sample_lora(config.shallow("float32"), merge=False))


def lora_merged(config: DoctorConfig) -> Finding:
    """An adapter merged into the weights for sampling."""
    return _exact(sample_lora(config.shallow("float32"), merge=True))


def int8_cache(config: DoctorConfig) -> Finding:
    """Keys and values in 8 bits while sampling."""
    with full_precision():
        measured = gap(sample(config.shallow("float32"), cache="int8"), "xla")
    mean, largest = INT8_CACHE
    return _judge(measured, mean, largest, "8 bits keep ")


def bfloat16(config: DoctorConfig) -> Finding:
    """In bfloat16, with the attentions of this device."""
    model = config.shallow("bfloat16")
    sampled = sample(model)
    measured = gap(sampled, "auto")
    with full_precision():
        exact = logprobs(_masters(model), sampled.params, sampled.batch, "xla")
    own = _gap(logprobs(sampled.learner, sampled.params, sampled.batch, "auto"), exact, sampled.batch)
    mean, largest = (min(BFLOAT16_FACTOR * cost, most) for cost, most in zip((own.mean, own.largest), BFLOAT16))
    return _judge(measured, mean, largest, "", f"; bfloat16 itself costs the learner {own.mean:.1e}, {own.largest:.1e}")


def greedy(config: DoctorConfig) -> Finding:
    """At temperature 0 every token is the argmax of one pass without a cache."""
    # With a tied head, random weights repeat the last token, whatever they attend to.
    policy, mesh = Policy(replace(config.shallow("float32"), tied_head=False)), one_device()
    with full_precision():
        params = random_params(policy, mesh)
        reshard = make_reshard(policy, mesh)
        sampler = make_sampler(policy, SamplingConfig(0.0), SLOTS, mesh)
        trajectories, _ = play(sampler, reshard(params), SLOTS)
        batch = packed(trajectories, SLOTS, mesh)
        behind = jax.jit(lambda *arrays: _behind_the_best(policy, *arrays))
        parts = [np.asarray(getattr(batch, name)) for name in ("tokens", "positions", "segment_ids", "response_ids")]
        gaps = np.asarray([behind(params, *rows) for rows in zip(*parts, strict=True)])
    count = int(np.sum(parts[3] >= 0))
    # Negated, so that NaN is wrong, too.
    wrong = int(np.sum(~(gaps <= TIE)))
    faults = [f"{wrong} of {count} tokens are not the argmax"] if wrong else []
    if not count:
        faults.append("nothing was sampled")
    facts = {"tokens": count, "wrong": wrong, "largest_behind": float(gaps.max())}
    return judge(faults, f"{count} greedy tokens against the argmax of a pass without a cache", ADVICE, facts)


def sample(
    model: ModelConfig,
    *,
    weights: Literal["model", "int8"] = "model",
    cache: Literal["model", "int8"] = "model",
) -> Sampled:
    """Plays episodes with all weights trained."""
    policy, mesh, int8 = Policy(model), one_device(), weights == "int8"
    with full_precision(model.dtype):
        params = random_params(_masters(model), mesh)
        sampled = make_reshard(policy, mesh, int8=int8)(params)
        sampler = make_sampler(
            policy.quantized if int8 else policy, SamplingConfig(weights=weights, cache=cache), SLOTS, mesh
        )
        trajectories, _ = play(sampler, sampled, SLOTS)
    return Sampled(packed(trajectories, SLOTS, mesh), policy, decoded(policy, sampled) if int8 else params)


def sample_lora(model: ModelConfig, *, merge: bool) -> Sampled:
    """Plays episodes with an adapter in the midst of training."""
    mesh = one_device()
    learner = Policy(model, LoraConfig(rank=RANK, merge=False))  # its programs are the same for both
    policy = Policy(model, LoraConfig(rank=RANK, merge=merge))
    with full_precision(model.dtype):
        params = random_params(learner, mesh)
        sampled = make_reshard(policy, mesh)(params)
        trajectories, _ = play(make_sampler(policy.sampled, SamplingConfig(), SLOTS, mesh), sampled, SLOTS)
    return Sampled(packed(trajectories, SLOTS, mesh), learner, params)


def gap(sampled: Sampled, attention: Literal["auto", "xla"]) -> Gap:
    """The gap between sampler and learner."""
    learned = logprobs(sampled.learner, sampled.params, sampled.batch, attention)
    return _gap(learned, np.asarray(sampled.batch.logprobs), sampled.batch)


def logprobs(policy: Any, params: Params, batch: Batch, attention: Literal["auto", "xla"]) -> np.ndarray:
    """The learner's log-probabilities of all sampled tokens, f32[M, b, T], 0 elsewhere."""
    return np.asarray(_learner(policy, attention)(params, batch))


def decoded(policy: Policy, params: Params) -> Params:
    """`policy.quantize`'s parameters as float32 matrices, codes times scales, in the learner's layout."""

    def decode(params: Params) -> Params:
        base = params["base"]
        layers = {name: jnp.stack([layer[name] for layer in base["layers"]]) for name in base["layers"][0]}
        for name, row in quantized_matrices(policy.config).items():
            scales = jnp.expand_dims(layers.pop(scale_of(name)), row.input_axes)
            layers[name] = layers[name].astype(jnp.float32) * scales
        return {"base": {**base, "layers": layers}}

    return jax.jit(decode, out_shardings=shardings(one_device(), policy.axes, TRAIN))(params)


def _masters(model: ModelConfig) -> Policy:
    """The policy in float32, in which masters are kept: other dtypes share them."""
    return Policy(replace(model, dtype="float32"))


@cache
def _learner(policy: Any, attention: Literal["auto", "xla"]) -> Callable[[Params, Batch], jax.Array]:
    """Cached, so that checks of one policy share its program."""
    return make_token_logprobs(policy, LearnerConfig(attention=attention), one_device())


def _exact(sampled: Sampled) -> Finding:
    with full_precision():
        return _judge(gap(sampled, "xla"), EXACT, EXACT)


def _gap(actual: np.ndarray, expected: np.ndarray, batch: Batch) -> Gap:
    mask = np.asarray(batch.response_ids) >= 0
    gaps = np.abs(actual - expected)[mask]
    return Gap(float(gaps.mean()), float(gaps.max()), len(gaps)) if len(gaps) else Gap(0.0, 0.0, 0)


def _judge(measured: Gap, mean: float, largest: float, before: str = "", after: str = "") -> Finding:
    faults = []
    if not measured.tokens:
        faults.append("nothing was sampled")
    if not (measured.mean <= mean and measured.largest <= largest):  # false for NaN, too
        faults.append(f"expected a gap of at most {mean:.1e} on average and {largest:.1e} for one token")
    gaps = f"mean {measured.mean:.1e}, largest {measured.largest:.1e} nats"
    text = f"{before}sampler and learner apart by {gaps} over {measured.tokens} tokens{after}"
    facts = {"mean_nats": measured.mean, "largest_nats": measured.largest, "tokens": measured.tokens}
    return judge(faults, text, ADVICE, {**facts, "most_mean_nats": mean, "most_largest_nats": largest})


def _behind_the_best(policy: Policy, params: Params, tokens, positions, segment_ids, response_ids) -> jax.Array:
    """Largest logit minus the logit of each sampled token, f32[b, T]; 0 elsewhere."""
    logits = policy.logits(params, policy.hidden(params, tokens, positions, segment_ids)[0])[:, :-1]
    own = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    behind = jnp.max(logits, axis=-1) - own
    return jnp.where(response_ids[:, 1:] >= 0, behind, 0.0)
