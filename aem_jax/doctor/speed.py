"""Speed of this machine, measured by `bench`. A low speed is not a fault."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from aem_jax.bench.config import BenchConfig
from aem_jax.bench.learner import measure_update
from aem_jax.bench.measure import Measurement, ceilings
from aem_jax.bench.page import number
from aem_jax.bench.sampler import measure_sampler
from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.episodes import fits, random_params
from aem_jax.doctor.finding import Finding
from aem_jax.plan.devices import GIB, GPUS, Chip

LEARN_BYTES = 18
"""Bytes of a parameter during learning: master, both moments, gradient, and the weights in the model's dtype."""
DECODE_BYTES = 6
"""Bytes of a parameter while the weights are created: master, and the weights in the model's dtype."""
PLAIN_WORDS = {"nvidia", "geforce", "80gb", "hbm3", "sxm4"}
"""Words beside the model in the names of the cards of `GPUS`. Any other, as PCIe, NVL, 40GB or MIG, is a variant with a
data sheet of its own."""


def peaks(config: DoctorConfig) -> Finding:
    """The measured speed of a copy and of a matrix product, and their share of the data sheet."""
    dtype = config.shape.dtype
    measured = ceilings(dtype)
    bandwidth, peak = measured.bandwidth / 1e9, measured.peak / 1e12
    facts = {"copy_gb_s": bandwidth, f"product_{dtype}_tflop_s": peak}
    text = f"a copy moves {number(bandwidth)} GB/s, a {dtype} product does {number(peak)} TFLOP/s"
    chip = data_sheet(jax.devices()[0].device_kind)
    if chip is not None:
        facts["share_of_bandwidth"] = measured.bandwidth / chip.bandwidth
        text += f"; of the data sheet {facts['share_of_bandwidth']:.0%}"
        if dtype == "bfloat16":
            facts["share_of_peak"] = measured.peak / chip.peak
            text += f" and {facts['share_of_peak']:.0%}"
    return Finding(True, text, facts=facts)


def data_sheet(kind: str) -> Chip | None:
    """Published facts of a GPU, from jax's name of it (NVIDIA H100 80GB HBM3); None for a variant, as H100 PCIe."""
    words = re.findall(r"\w+", kind.lower().replace("rtx ", "rtx"))
    chips = [GPUS[word] for word in words if word in GPUS]
    is_plain = all(word in GPUS or word in PLAIN_WORDS for word in words)
    return chips[0] if chips and is_plain else None


def decode(config: DoctorConfig) -> Finding:
    """Prompt tokens and sampled tokens per second, on one device."""
    if too_large := _too_large(config, DECODE_BYTES, 1):
        return too_large
    extend, decode = measure_sampler(_bench(config, 64, 512))
    return _rates([decode, extend])


def learn(config: DoctorConfig) -> Finding:
    """Learned tokens per second, on all devices."""
    if too_large := _too_large(config, LEARN_BYTES, jax.device_count()):
        return too_large
    return _rates(measure_update(_bench(config, 8 * jax.device_count(), 512)))


def _bench(config: DoctorConfig, rows: int, tokens: int) -> BenchConfig:
    """Rows (or slots) and tokens of each on an accelerator; smaller sizes on a CPU."""
    if jax.default_backend() == "cpu":
        rows, tokens = math.lcm(8, jax.device_count()), tokens // 4
    new = max(tokens // 4, 1)
    return BenchConfig(
        model=config.model, slots=rows, prompt_tokens=tokens, new_tokens=new, row_length=2 * tokens, repeats=3
    )


def _too_large(config: DoctorConfig, width: int, devices: int) -> Finding | None:
    """The reason why the model is not measured, if it does not fit."""
    random_params.cache_clear()  # frees the parameters of earlier checks
    if fits(config.shape, width, devices):
        return None
    need = width * config.shape.num_parameters / devices / GIB
    text = f"{config.model} takes {need:.0f} GiB of each device, more than there is"
    return Finding(None, text, "measure a smaller --model; `plan` shows on which devices this one fits")


def _rates(results: Sequence[Measurement]) -> Finding:
    texts, facts = [], dict[str, Any]()
    for result in results:
        text = f"{result.what} {number(result.median)} {result.unit}"
        facts[result.what] = {"tokens_s": result.median, "shape": result.shape, **result.facts}
        if line := result.roofline:
            facts[result.what] |= {"share": line.share, "bound": line.bound, "mfu": line.mfu}
            text += f", {line.share:.0%} of what {line.bound} allows"
            text += f", MFU {line.mfu:.0%}" if line.mfu is not None else ""
        texts.append(text)
    return Finding(True, f"{'; '.join(texts)} ({results[0].shape})", facts=facts)
