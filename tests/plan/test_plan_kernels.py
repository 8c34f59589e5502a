"""Kernels in compiled programs: XLA counts them as zero, so they are counted in closed form, or named."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from aem_jax.config.presets import read_preset
from aem_jax.launch import cli
from aem_jax.plan.analytic import attention_flops, learn_flops
from aem_jax.plan.config import PlanConfig, plan_config
from aem_jax.plan.costs import costs
from aem_jax.plan.devices import estimate, parse_topology
from aem_jax.plan.hlo import parse
from aem_jax.plan.make import make_plan
from aem_jax.plan.page import print_plan
from aem_jax.plan.workload import workload

# As libtpu prints a kernel: with line breaks inside the instruction.
KERNEL = """\
  %splash.2 = (f32[4,512,128]{2,1,0}, bf16[4,12,1024,128]{3,2,1,0}) custom-call(%mask, %q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q_dq\\": 512}"
}}, metadata={op_name="jit(update)/while/body/shard_map/splash_mha_dq_segmented_no_residuals/pallas_call"}
"""
PROGRAM = f"""\
ENTRY %main (mask: s8[1,2,2], q: bf16[4,12,1024,128], k: bf16[4,2,1024,128]) -> bf16[4,12,1024,128] {{
  %mask = s8[1,2,2]{{2,1,0}} parameter(0)
  %q = bf16[4,12,1024,128]{{3,2,1,0}} parameter(1)
  %k = bf16[4,2,1024,128]{{3,2,1,0}} parameter(2)
  %twice = bf16[4,12,1024,128]{{3,2,1,0}} fusion(%q), calls=%none, backend_config={{"estimated_cycles":"175"}}
{KERNEL}
  %other = bf16[8]{{0}} custom-call(%mask), custom_call_target="tpu_custom_call", metadata={{op_name="a/b/pallas_call"}}
  %hint = bf16[8]{{0}} custom-call(%mask), custom_call_target="Sharding"
  ROOT %out = bf16[4,12,1024,128]{{3,2,1,0}} get-tuple-element(%splash.2), index=1
}}
"""


def test_known_kernels_are_counted_and_unknown_ones_named():
    cost = costs(parse(PROGRAM))
    # 4 rows, 12 heads of 128, three products of 2 FLOPs, 3 of the 4 pairs of blocks of 512
    flops = 4 * 12 * 128 * 3 * 2 * 3 * 512**2
    assert cost.flops == flops
    known, other = cost.kernels
    assert (known.name, known.flops, known.known) == ("splash_mha_dq_segmented_no_residuals", flops, True)
    numbers = 4 * 1024 * 128
    assert known.bytes == 2 * numbers * (12 + 12 + 2) + 4 * 4 * 512 * 128 + 4
    assert (other.name, other.flops, other.known) == ("b", 0, False)
    # a kernel adds the time given by the peaks to the compiler's estimate
    v5p = parse_topology("v5p:2x2x1")
    assert flops / v5p.peak > known.bytes / v5p.bandwidth
    seconds = estimate(cost, v5p).compiler
    assert seconds == pytest.approx(175 / v5p.chip.clock + flops / v5p.peak + other.bytes / v5p.bandwidth)


def test_a_kernel_of_one_row_has_no_row_dimension():
    assert PROGRAM.count("[4,12,1024,128]")
    one = PROGRAM.replace("[4,12,1024,128]{3,2,1,0}", "[12,1024,128]{2,1,0}")
    assert costs(parse(one)).flops == costs(parse(PROGRAM)).flops / 4


CUDNN = """\
ENTRY %main (q: bf16[2,1024,6,128], k: bf16[2,1024,1,128], bias: bf16[2,1,1024,1024]) -> bf16[2,6,1024,128] {
  %q = bf16[2,1024,6,128]{3,2,1,0} parameter(0)
  %k = bf16[2,1024,1,128]{3,2,1,0} parameter(1)
  %bias = bf16[2,1,1024,1024]{3,2,1,0} parameter(2)
  %call = (bf16[2,6,1024,128]{3,1,2,0}, f32[2,6,1024]{2,1,0}, u8[16384]{0}) custom-call(%q, %k, %k, %bias), \
custom_call_target="__cudnn$fmhaScaleBiasSoftmax", metadata={op_name="jit(f)/shard_map/dot_product_attention_fwd"}, \
backend_config={"cudnn_fmha_backend_config": {"fmha_scale": 0.09, "intermediate_tensor_shape": {"tuple_shapes": [], \
"dimensions": ["2", "6", "1024", "1024"]}, "mask_type": "CAUSAL"}}
  ROOT %out = bf16[2,6,1024,128]{3,1,2,0} get-tuple-element(%call), index=0
}
"""


def test_cudnns_attention_is_counted():
    (kernel,) = costs(parse(CUDNN)).kernels
    # 2 rows, 6 heads of 128, two products of 2 FLOPs; of tiles of 128 a query visits 4.5 of 8 on average
    forward = 2 * 6 * 128 * 2 * 2 * 1024 * 4.5 * 128
    assert (kernel.name, kernel.flops, kernel.known) == ("fmhaScaleBiasSoftmax", forward, True)
    # queries, output, keys, values and bias in 2 bytes, log-sums in 4; the workspace is no result
    assert kernel.bytes == 2 * 2 * 1024 * (2 * 6 * 128 + 2 * 128 + 1024) + 4 * 2 * 6 * 1024
    backward = CUDNN.replace("fmhaScaleBiasSoftmax", "fmhaScaleBiasSoftmaxBackward")
    assert costs(parse(backward)).flops == 5 / 2 * forward
    whole = CUDNN.replace('"mask_type": "CAUSAL"', '"mask_type": "PADDING"')
    assert costs(parse(whole)).flops == 8 / 4.5 * forward
    unknown = CUDNN.replace("fmhaScaleBiasSoftmax", "norm")
    assert [(one.name, one.known, one.bytes) for one in costs(parse(unknown)).kernels] == [
        ("norm", False, kernel.bytes)
    ]


@pytest.mark.parametrize("target", ["__gpu$xla.gpu.triton", "triton_kernel_call_ffi", "mosaic_gpu_v2"])
def test_pallas_kernels_on_gpus_are_named(target: str):
    text = PROGRAM.replace('custom_call_target="tpu_custom_call"', f'custom_call_target="{target}"')
    assert [kernel.name for kernel in costs(parse(text)).kernels] == ["splash_mha_dq_segmented_no_residuals", "b"]


def test_attention_to_a_cache_is_counted_in_full():
    text = PROGRAM.replace("splash_mha_dq_segmented_no_residuals", "ragged_attention")
    text = text.replace("k: bf16[4,2,1024,128]", "k: bf16[4,12,128,640]").replace(
        "bf16[4,2,1024,128]", "bf16[4,12,128,640]"
    )
    assert costs(parse(text)).flops == 4 * 4 * 12 * 1024 * 128 * 640


def test_the_closed_form_is_that_of_the_targets_attention():
    """Splash's backward pass has seven products, XLA's has five.

    One of the five is already made by a recomputed layer. The forward pass has two products.
    """
    config = plan_config(read_preset("alfworld-paper", "qwen2.5-1.5b"))
    work = workload(config)
    length = work.layout.row_length
    blocks = length // 512
    assert length % 512 == 0
    attention = attention_flops(work.model, (blocks + 1) / 2 * 512)
    assert learn_flops(work, kernel="splash") - learn_flops(work) == pytest.approx((7 - 4) / 2 * attention)
    topology = parse_topology("v5p:2x2x1")
    tokens = work.microbatch_tokens * work.rounds / topology.num_devices
    for name, kernel in (("auto", "splash"), ("xla", "xla")):
        plan = make_plan(_with(config, name), topology, by_hand=False)
        assert plan.closed_flops["update"] == pytest.approx(learn_flops(work, kernel=kernel) * tokens)
        assert plan.costs["update"].flops == pytest.approx(plan.closed_flops["update"])


def _with(config: PlanConfig, attention: str) -> PlanConfig:
    learner = replace(config.learner, attention=attention)  # pyright: ignore[reportArgumentType]
    return replace(config, analytic=True, learner=learner)


def test_the_page_names_counted_and_uncounted_kernels():
    config = plan_config(read_preset("alfworld-paper", "qwen2.5-1.5b"))
    plan = make_plan(_with(config, "auto"), parse_topology("v5p:2x2x1"), by_hand=False)
    plan = replace(plan, costs={**plan.costs, "update": costs(parse(PROGRAM))})
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=200))
    assert "in closed form and timed at the peaks (splash_mha_dq_segmented_no_residuals)" in text.getvalue()
    assert "not counted in learning, a microbatch: FLOPs of the kernels b" in text.getvalue()


def test_a_kernel_of_another_device_is_refused_in_one_line(capsys):
    words = ["plan", "--preset", "alfworld-paper", "qwen2.5-7b", "--topology", "gpu:h100:8"]
    assert cli.main([*words, "--learner.attention", "splash"]) == 2
    assert "--learner.attention: expected auto, cudnn or xla on a GPU, got splash" in capsys.readouterr().err
