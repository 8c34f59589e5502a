"""Kernels for rows are chosen where they can run, and get the shard of their device."""

import logging
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_policies import GROUPED_TIED, numpy_params, numpy_tokens

from aem_jax.models import ModelConfig, Policy, kernels
from aem_jax.models.attention import blocked_attention
from aem_jax.models.kernels import KERNELS, Device, Sizes, choose, device_of, make_row_attention
from aem_jax.models.splash import PASSES, splash_flops
from aem_jax.sharding import MeshConfig, make_mesh

TPU, CPU = Device("tpu"), Device("cpu")
HOPPER, TURING, AMD = Device("gpu", True, 9.0), Device("gpu", True, 7.5), Device("gpu")
USUAL = Sizes(4096, 12, 2, 128, "bfloat16")


@pytest.mark.parametrize(
    ("name", "device", "sizes", "chosen", "reason"),
    [
        ("auto", TPU, USUAL, "splash", ""),
        ("auto", TPU, USUAL._replace(length=4000), "xla", "rows of 4000 tokens"),
        ("auto", TPU, USUAL._replace(head_dim=80), "xla", "heads of 80"),
        ("auto", TPU, USUAL._replace(dtype="float32"), "splash", ""),
        ("xla", TPU, USUAL, "xla", ""),
        ("auto", CPU, USUAL, "xla", ""),
        ("auto", HOPPER, USUAL, "cudnn", ""),
        ("auto", HOPPER, USUAL._replace(head_dim=256), "cudnn", ""),
        ("auto", HOPPER, USUAL._replace(dtype="float32"), "xla", "float32 is not bfloat16"),
        ("auto", HOPPER, USUAL._replace(length=4095), "xla", "4095 tokens are odd"),
        ("auto", TURING, USUAL, "xla", "has 7.5"),
        ("auto", AMD, USUAL, "xla", "NVIDIA"),
    ],
)
def test_the_choice(name: str, device: Device, sizes: Sizes, chosen: str, reason: str):
    picked, why = choose(name, device, sizes)
    assert picked == chosen and reason in why and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("platform", "version", "found"),
    [
        ("gpu", "PJRT C API\ncuda 12090", Device("gpu", True, 9.0)),
        ("gpu", "PJRT C API\nNVIDIA H100 80GB HBM3", Device("gpu", True, 8.0)),  # a target that jax compiles for
        ("gpu", "PJRT C API\nrocm 60300", Device("gpu")),
        ("tpu", "PJRT C API\nTFRT TPU v5p", Device("tpu")),
    ],
)
def test_the_device_of_a_mesh(platform: str, version: str, found: Device):
    device = SimpleNamespace(
        platform=platform, compute_capability="9.0", client=SimpleNamespace(platform_version=version)
    )
    assert device_of(cast(Any, SimpleNamespace(devices=np.array([device])))) == found
    # without a GPU jax cannot lower cuDNN's attention for wider heads
    wide = choose("auto", found, USUAL._replace(head_dim=256))[0]
    assert wide == {9.0: "cudnn", 8.0: "xla"}.get(found.capability, {"tpu": "splash"}.get(platform, "xla"))


@pytest.mark.parametrize(("name", "device"), [("splash", CPU), ("cudnn", TPU), ("splash", HOPPER), ("cudnn", CPU)])
def test_another_platforms_kernel_is_refused_by_name(name: str, device: Device):
    with pytest.raises(ValueError, match=rf"--learner.attention: expected auto, .*xla on a .PU, got {name}"):
        make_row_attention(name, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), device)


@pytest.mark.parametrize("module", ["jax.experimental.no_kernel", "jax.experimental.no_folder.no_kernel"])
def test_a_kernel_that_this_jax_does_not_have_is_refused_by_name_and_passed_over_by_auto(module: str):
    without = {**KERNELS, "splash": KERNELS["splash"]._replace(module=module)}
    message = rf"expected auto, xla on a TPU, got splash; jax {jax.__version__} has no {module}"
    with pytest.raises(ValueError, match=message):
        make_row_attention("splash", make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), TPU, without)
    picked, why = choose("auto", TPU, USUAL, without)
    assert picked == "xla" and why == f"splash attention: jax {jax.__version__} has no {module}; XLA's blocks instead"


def test_on_a_mesh_each_device_attends_to_its_rows_and_heads(caplog: pytest.LogCaptureFixture):
    """A kernel gets only its shard. XLA computes unsupported rows, with one warning, not one per layer."""
    mesh, shapes = make_mesh(MeshConfig(2, 2, 2)), []

    def fake(q, k, v, segment_ids):
        shapes.append((q.shape, k.shape, segment_ids.shape))
        return blocked_attention(q, k, v, segment_ids, block=64)

    kernel = KERNELS["splash"]._replace(attend=fake)
    attend = make_row_attention("auto", mesh, TPU, {**KERNELS, "splash": kernel})
    policy = Policy(ModelConfig(**{**vars(GROUPED_TIED), "head_dim": 64}))
    params = numpy_params(policy.config)
    kernels._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for length in (128, 100):
            tokens = jnp.asarray(numpy_tokens(policy.config, (4, length)))
            rows = (tokens, jnp.broadcast_to(jnp.arange(length), tokens.shape), jnp.ones_like(tokens))
            hidden, _ = jax.jit(partial(policy.hidden, attention=attend))(params, *rows)
            wanted, _ = policy.hidden(params, *rows)
            np.testing.assert_allclose(hidden, wanted, atol=2e-5)
    assert set(shapes) == {((1, 128, 2, 64), (1, 128, 1, 64), (1, 128))}
    messages = [record.message for record in caplog.records if "attention" in record.message]
    assert messages == ["splash attention: rows of 100 tokens are no multiple of 128; XLA's blocks instead"]


def test_splash_counts_the_blocks_that_it_visits():
    # 1024 tokens in blocks of 512: 3 of 4 blocks. Scores and values, 2 FLOPs a pair and number
    assert splash_flops("fwd", 1024, 12, 128) == 2 * 2 * 12 * 128 * 3 * 512**2
    assert [splash_flops(phase, 512, 1, 1) / (2 * 512**2) for phase in PASSES] == [2, 3, 4]
    # 2048 tokens: a window of 513 begins in the block before a block of queries, one of 514 in the block before that
    visited = lambda window: splash_flops("fwd", 2048, 1, 1, window) / (2 * 2 * 512**2)
    assert [visited(window) for window in (0, 1, 2, 513, 514, 4096)] == [10, 4, 7, 7, 9, 10]
