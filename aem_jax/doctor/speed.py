"""How fast this machine is, by the benchmarks of `bench`: slow is no fault, a number that cannot be is."""

import math
from typing import Any

import jax

from aem_jax.bench import learner as bench_learner
from aem_jax.bench import sampler as bench_sampler
from aem_jax.bench.ceilings import ceilings
from aem_jax.bench.config import BenchConfig
from aem_jax.bench.measure import Measurement
from aem_jax.bench.page import number
from aem_jax.doctor.config import DoctorConfig
from aem_jax.doctor.episodes import fits, random_params
from aem_jax.doctor.finding import Finding
from aem_jax.plan.devices import GPUS, Chip

STATE_BYTES = 18
"""Of a parameter while learning: master, both means, gradient, and the weights as used."""


def peaks(config: DoctorConfig) -> Finding:
    """What a copy and a matrix product reach."""
    dtype = config.shape.dtype
    found = ceilings(dtype)
    facts = {"copy_gb_s": found.bandwidth / 1e9, f"product_{dtype}_tflop_s": found.peak / 1e12}
    text = f"a copy moves {number(facts['copy_gb_s'])} GB/s, a {dtype} product does {number(found.peak / 1e12)} TFLOP/s"
    chip = data_sheet(jax.devices()[0].device_kind)
    if chip is not None:
        facts["share_of_bandwidth"] = found.bandwidth / chip.bandwidth
        text += f"; of the data sheet {facts['share_of_bandwidth']:.0%}"
        if dtype == "bfloat16":
            facts["share_of_peak"] = found.peak / chip.peak
            text += f" and {facts['share_of_peak']:.0%}"
    return Finding(True, text, facts=facts)


def data_sheet(kind: str) -> Chip | None:
    """What is published of a GPU, by jax's name of it: NVIDIA H100 80GB HBM3."""
    joined = kind.lower().replace(" ", "").replace("geforce", "")
    return next((chip for name, chip in GPUS.items() if name in joined), None)


def decode(config: DoctorConfig) -> Finding:
    """Prompt tokens and sampled tokens a second, on one device."""
    if lacking := _lacking(config, 6, 1):  # masters, while the weights are made, and these
        return lacking
    extended, decoded = bench_sampler.run(_bench(config, 64, 512))
    return _finding([decoded, extended])


def learn(config: DoctorConfig) -> Finding:
    """Learned tokens a second, on all devices."""
    if lacking := _lacking(config, STATE_BYTES, jax.device_count()):
        return lacking
    return _finding(bench_learner.run(_bench(config, 8 * jax.device_count(), 512)))


def _bench(config: DoctorConfig, rows: int, tokens: int) -> BenchConfig:
    """Shapes: rows (or slots) a device on an accelerator and tokens of each; a fraction of that on a CPU."""
    if jax.default_backend() == "cpu":
        rows, tokens = math.lcm(8, jax.device_count()), tokens // 4
    new = max(tokens // 4, 1)
    return BenchConfig(
        model=config.model, slots=rows, prompt_tokens=tokens, new_tokens=new, row_length=2 * tokens, repeats=3
    )


def _lacking(config: DoctorConfig, width: int, devices: int) -> Finding | None:
    """Why the model is not measured here, if it does not fit."""
    random_params.cache_clear()  # the checks before are done with them
    if fits(config.shape, width, devices):
        return None
    need = width * config.shape.num_parameters / devices / 2**30
    return Finding(
        None,
        f"{config.model} takes {need:.0f} GiB of each device, more than there is",
        "measure a smaller --model; `plan` says on what this one fits",
    )


def _finding(found: list[Measurement]) -> Finding:
    texts, facts = [], dict[str, Any]()
    for each in found:
        text = f"{each.what} {number(each.median)} {each.unit}"
        facts[each.what] = {"tokens_s": each.median, "shape": each.shape, **each.facts}
        if each.roofline is not None:
            facts[each.what] |= {"share": each.roofline.share, "bound": each.roofline.bound, "mfu": each.roofline.mfu}
            text += f", {each.roofline.share:.0%} of what {each.roofline.bound} allows"
            text += f", MFU {each.roofline.mfu:.0%}" if each.roofline.mfu is not None else ""
        texts.append(text)
    return Finding(True, f"{'; '.join(texts)} ({found[0].shape})", facts=facts)
