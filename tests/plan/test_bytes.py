"""Bytes that programs move, against the least that they have to: closed forms by hand, and compiled programs.

The targets' compilers are not part of the tests' environment; where one is installed, its test runs.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from aem_jax.batch import BatchConfig
from aem_jax.config.run import RunConfig
from aem_jax.learner import LearnerConfig
from aem_jax.models.config import ModelChoice
from aem_jax.models.lora import LoraConfig
from aem_jax.plan.config import plan_config
from aem_jax.plan.devices import parse_topology
from aem_jax.plan.floors import decode_costs, decode_floor, learn_costs, update_floor
from aem_jax.plan.make import make_plan
from aem_jax.plan.workload import workload
from aem_jax.rollout.config import RolloutConfig
from aem_jax.sharding import MeshConfig

SMALL = RunConfig(
    model=ModelChoice(name="tiny", hidden_size=64, num_layers=9),
    rollout=RolloutConfig(
        groups_per_step=2, group_size=4, num_slots=8, max_turns=2, response_tokens=8, context_tokens=64,
        prompt_tokens=32, decode_chunk=8, extend_buckets=(16,), windows=(),
    ),
    batch=BatchConfig(rows=4),
    learner=LearnerConfig(remat="layers"),
)  # fmt: skip
MESH = MeshConfig(1, 2, 2)


def test_the_floor_of_an_update_is_the_products_inputs_and_outputs_weights_and_state():
    work = workload(SMALL)
    count, tokens = work.model.num_parameters, 4 * 64 / 2
    # Numbers a token in each of 9 layers, on half of the heads (4 of 32, keys and values 2 of 32) and of the MLP (384):
    # qkv 64 -> 128, output 64 -> 64, gate and up 64 -> 384, down 192 -> 64; attention 128 -> 64
    products, attention = (64 + 128) + (64 + 64) + (64 + 384) + (192 + 64), 128 + 64
    head = 4 * 64 + 4 * 1024 / 2
    # each forward, again, and twice backward; the head is not computed again
    activations = 4 * 9 * 4 * (products + attention) + 3 * head
    # 3 passes read half of the weights, gathered before; gradients of that half are written and read, and a quarter is
    # added to the sum (8) and cast from the masters (4)
    microbatch = tokens * activations + 3 * 2 * 4 * count / 2 + 2 * 4 * count / 2 + 12 * count / 4
    step = (8 + 8 + 16) * count / 4  # gradients twice, masters and two moments read and written
    assert update_floor(work, MESH) == pytest.approx(work.rounds * microbatch + step)
    assert learn_costs(work, MESH, 1.0).bytes == update_floor(work, MESH)

    recomputed = 4 * 9 * products, 4 * 9 * attention
    kept = update_floor(replace(work, remat="none"), MESH)
    dots = update_floor(replace(work, remat="dots"), MESH)
    assert dots - kept == pytest.approx(work.rounds * tokens * recomputed[1])
    assert update_floor(work, MESH) - dots == pytest.approx(work.rounds * (tokens * recomputed[0] + 2 * 4 * count / 2))
    # a ratio of responses computes the head once more, for one of trajectories everything
    response = update_floor(replace(work, ratio="response"), MESH) - update_floor(work, MESH)
    whole = update_floor(replace(work, ratio="trajectory"), MESH) - update_floor(work, MESH)
    assert response == pytest.approx(work.rounds * tokens * head)
    assert whole - response == pytest.approx(work.rounds * (tokens * sum(recomputed) + 2 * 4 * count / 2))


def test_frozen_weights_have_no_gradients_to_move():
    work = workload(replace(SMALL, lora=LoraConfig(rank=4)))
    full = update_floor(workload(SMALL), MESH)
    tokens, products, head = 4 * 64 / 2, 9 * 4 * 1024, 4 * 64 + 4 * 1024 / 2
    saved = work.rounds * (tokens * (products + head) + 2 * 4 * work.model.num_parameters / 2)
    state = (work.rounds * 12 + 32) * work.model.num_parameters / 4
    adapters = work.trained * (work.rounds * (2 * 4 / 2 + 12 / 4) + 32 / 4)
    assert update_floor(work, MESH) == pytest.approx(full - saved - state + adapters)


def test_the_floor_of_decode_is_the_weights_and_the_cache_in_use():
    work = workload(SMALL)
    # 4 slots of 64 tokens; keys and values of 1 of 2 heads of 32 in 9 layers, float32
    cached = 4 * 64 * 2 * 9 * 32 * 4
    assert decode_floor(work, MESH) == 4 * work.model.num_parameters / 2 + cached
    assert decode_costs(work, MESH).bytes == decode_floor(work, MESH)
    untied = replace(work, model=replace(work.model, tied_head=False))
    assert decode_floor(untied, MESH) == decode_floor(work, MESH)  # one table is read, whichever it is


def test_a_deep_decoder_reads_weights_and_cache_once_a_token():
    """24 layers, compiled for a CPU. With scores, logits and sampling it is 1.5 × the floor; a scan over layers, which
    copies each layer's weights and cache before every product, makes it 3.7 ×."""
    rollout = replace(SMALL.rollout, context_tokens=256)
    deep = replace(SMALL, model=replace(SMALL.model, num_layers=24), rollout=rollout)
    config = replace(plan_config(deep), mesh=MeshConfig(1, 1, 1), programs=("decode",))
    plan = make_plan(config, parse_topology("cpu:1"), by_hand=True)
    assert 1 < plan.costs["decode"].bytes / plan.floors["decode"] < 1.8


def _compiled_for(topology: str, *packages: str) -> dict[str, Any]:
    """The plan of decode of the 1.5B preset; skips where no compiler is installed."""
    if not any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"needs one of {', '.join(packages)} to compile for {topology}")
    return _plan(topology)


@cache
def _plan(topology: str) -> dict[str, Any]:
    words = ["--preset", "alfworld-paper", "qwen2.5-1.5b", "--topology", topology, "--programs", "decode", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-m", "aem_jax.launch", "plan", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(result.stdout.splitlines()[-1])


TARGETS = pytest.mark.parametrize(
    ("topology", "packages"),
    [("gpu:h100:8", ("jax_cuda13_plugin", "jax_cuda12_plugin")), ("v5p:2x2x2", ("libtpu",))],
)


@pytest.mark.slow
@TARGETS
def test_decode_of_a_real_model_reads_weights_and_cache_once_a_token(topology: str, packages: tuple[str, ...]):
    plan = _compiled_for(topology, *packages)
    assert not plan["analytic"] and plan["compiler"].partition(" ")[0].replace("-", "_") in packages and plan["fits"]
    assert 1 < plan["costs"]["decode"]["bytes"] / plan["floors"]["decode"] <= 1.15
    assert plan["costs"]["decode"]["flops"] == pytest.approx(plan["closed_flops"]["decode"], rel=0.1)


@pytest.mark.slow
@TARGETS
def test_decode_of_a_real_model_copies_no_cache(topology: str, packages: tuple[str, ...]):
    program = _compiled_for(topology, *packages)["programs"]["decode"]
    assert program["temporaries"] <= 0.05 * program["arguments"]
