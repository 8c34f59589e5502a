"""Plans of mixtures of experts: products by groups, the exchange of tokens, the record of experts, recomputation."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from plan.test_bytes import SMALL as DENSE

from aem_jax.models import exchange as rounds
from aem_jax.models import experts
from aem_jax.models.config import ModelChoice
from aem_jax.plan.analytic import active_layer_parameters, demand, exchange, layer_parameters, learn_flops, memory
from aem_jax.plan.costs import Collective, costs
from aem_jax.plan.floors import decode_costs, decode_floor, learn_costs, update_floor
from aem_jax.plan.hlo import parse
from aem_jax.plan.programs import routed_share
from aem_jax.plan.workload import Workload, workload
from aem_jax.sampler.state import init_state
from aem_jax.sharding import MeshConfig, make_mesh

# As libtpu prints them: the borders of groups, rows times their experts' matrices, the gradient of the matrices, and
# the exchange of 48 rows for the 48 to 192 that a device may get.
PROGRAM = """\
ENTRY %main (x: bf16[192,32], w: bf16[4,32,24], d: bf16[192,24], s: s32[4]) -> bf16[192,24] {
  %x = bf16[192,32]{1,0} parameter(0)
  %w = bf16[4,32,24]{2,1,0} parameter(1)
  %d = bf16[192,24]{1,0} parameter(2)
  %s = s32[4]{0} parameter(3)
  %own = bf16[48,32]{1,0} fusion(%x), kind=kLoop, calls=%none
  %ragged-dot-metadata = (s32[5]{0}, s32[27]{0}, s32[1]{0}) custom-call(%s), custom_call_target="tpu_custom_call", \
metadata={op_name="ragged-dot-metadata"}
  %there = bf16[192,32]{1,0} ragged-all-to-all(%own, %x, %s, %s, %s, %s), channel_id=1, replica_groups={{0,1,2,3}}
  %back = bf16[48,32]{1,0} ragged-all-to-all(%x, %own, %s, %s, %s, %s), channel_id=2, replica_groups={{0,1,2,3}}
  %dw = bf16[4,32,24]{2,1,0} custom-call(%s, %s, %x, %d), custom_call_target="tpu_custom_call", \
frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,128,128"}, metadata={op_name="a/ragged-dot-none"}
  ROOT %y = bf16[192,24]{1,0} custom-call(%s, %s, %x, %w), custom_call_target="tpu_custom_call", \
frontend_attributes={mosaic_fusion_entry_point="true",ragged_dot_tiling="128,128,128"}, metadata={op_name="a/ragged-dot-none"}
}
"""  # noqa: E501

SMALL = replace(DENSE, model=ModelChoice(name="tiny-moe"))
MESH = MeshConfig(1, 2, 1, 2)
LAYERS, EMBED, MLP, EXPERTS, CHOSEN = 4, 128, 128, 8, 2
"""Sizes of `tiny-moe`: experts of a layer, and those of a token."""


def of_remat(remat: str) -> Workload:
    return replace(workload(SMALL), remat=remat)


def test_products_of_groups_count_the_rows_that_belong_to_a_group():
    """A quarter of the buffer: the device's share of the rows of four devices."""
    cost = costs(parse(PROGRAM), routed_share=1 / 4)
    product = 2 * 48 * 32 * 24
    assert cost.flops == 2 * product and {kernel.name for kernel in cost.kernels if not kernel.flops} == {
        "ragged-dot-metadata"
    }
    assert all(kernel.known for kernel in cost.kernels)
    kernels = [kernel for kernel in cost.kernels if kernel.flops]
    assert [kernel.bytes for kernel in kernels] == 2 * [2 * (48 * (32 + 24) + 4 * 32 * 24)]
    assert costs(parse(PROGRAM)).flops == 4 * cost.flops


def test_an_exchange_sends_what_fits_into_its_smaller_operand():
    """There, from a device's own rows into a buffer for those of all; back, from that buffer."""
    assert costs(parse(PROGRAM)).collectives == 2 * [Collective("all-to-all", 48 * 32 * 2, 4, (0, 1, 2, 3), 1.0)]
    line = "  %back = bf16[48,32]{1,0} ragged-all-to-all(%x, %own, %s, %s, %s, %s), channel_id=2, replica_groups"
    assert line in PROGRAM
    without = costs(parse(PROGRAM.replace(line, "  %back = bf16[48,32]{1,0} after-all(%x), groups")))
    assert costs(parse(PROGRAM)).bytes - without.bytes == 2 * 48 * 32 * 2  # read once, written once


def test_an_exchange_counts_its_first_round():
    """The loop over all rounds counts once, that over further rounds not; any other of unknown length, as often as the
    program says."""
    text = """\
%body (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%condition (x: f32[8,8]) -> pred[] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %p = pred[] custom-call(%x), custom_call_target="any"
}
ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  ROOT %z = f32[8,8]{1,0} while(%x), condition=%condition, body=%body, \
metadata={op_name="jit(update)/NAME/while" stack_frame_id=1}
}
"""
    for name in ("further_rounds", "transpose(jvp(further_rounds))", "while/body/checkpoint/further_rounds"):
        cost = costs(parse(text.replace("NAME", name)), rounds=5)
        assert (cost.flops, cost.unknown_loops) == (0, 0), name
    cost = costs(parse(text.replace("NAME", "while/body/all_rounds")), rounds=5)
    assert (cost.flops, cost.unknown_loops) == (2 * 8**3, 0)
    cost = costs(parse(text.replace("NAME", "other_rounds")), rounds=5)
    assert (cost.flops, cost.unknown_loops) == (5 * 2 * 8**3, 1)


def test_compiled_programs_name_their_loops_over_rounds(monkeypatch: pytest.MonkeyPatch):
    """With the name, forward and backward count the products of one round; without, of three more. A program without a
    gradient has one loop."""
    monkeypatch.setattr(rounds, "MEAN_LOADS", 1)
    monkeypatch.setattr(rounds, "FEW_ROWS", 1)
    mesh = make_mesh(MeshConfig(1, 1, 1, 4), jax.devices()[:4])
    compute = experts.make_experts(lambda gate, up: gate * up, mesh)

    def loss(x, gate, up, down):
        routing = experts.Routing(jnp.zeros((8, 4, 2), jnp.int32), jnp.ones((8, 4, 2)), jnp.ones((8, 4, 8)))
        matrices = experts.ExpertWeights(*map(experts.Matrices, (gate, up, down)))
        return jnp.sum(compute(x, routing, None, matrices) ** 2)

    arrays = tuple(jnp.ones(shape) for shape in ((8, 4, 6), (8, 6, 5), (8, 6, 5), (8, 5, 6)))
    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(*arrays).compile().as_text()
    assert text is not None
    unnamed = text.replace(rounds.FURTHER_ROUNDS, "other")
    one, all_rounds = (costs(parse(it), rounds=3).flops for it in (text, unnamed))
    product, combined = (16 // 8 + 2) * 8 * 2 * 6 * 5, 8 * 2 * 2 * 6  # of blocks of rows; outputs times their weights
    assert one == 3 * 3 * product + combined
    assert all_rounds == one + 3 * (3 * 3 + 2) * product  # the backward pass computes gate and up again
    text = jax.jit(loss).lower(*arrays).compile().as_text()
    assert text is not None
    one, all_rounds = (costs(parse(it), rounds=3).flops for it in (text, text.replace(rounds.ALL_ROUNDS, "other")))
    assert (one, all_rounds) == (3 * product + combined, 3 * 3 * product + combined)


def test_the_share_of_a_buffers_rows_that_an_even_load_fills():
    """Half of it, unless it is small and holds the worst case, a device's share of it."""
    work = replace(workload(SMALL), layout=replace(workload(SMALL).layout, rows=64))
    meshes = MeshConfig(1, 2, 2, 2), MeshConfig(1, 1, 1, 4), MeshConfig(1, 1, 1, 8)
    for mesh in (make_mesh(mesh, jax.devices()[: math.prod(vars(mesh).values())]) for mesh in meshes):
        assert routed_share(work, mesh, "update") == 1 / 2
        assert routed_share(work, mesh, "decode") == routed_share(work, mesh, "extend") == 1 / mesh.shape["expert"]
    assert [rounds.buffer_rows(512, shards) for shards in (1, 2, 4)] == [512, 1024, 1024]
    assert [rounds.buffer_rows(8192, shards) for shards in (1, 2, 16)] == [8192, 16384, 16384]


def test_gathers_without_an_estimate_take_as_long_as_their_bytes():
    """Those of a TPU's sparse cores have the largest integer as their cycles."""
    estimated = f'kind=kLoop, calls=%none, backend_config={{"estimated_cycles":"{2**63 - 1}"}}'
    cost = costs(parse(PROGRAM.replace("kind=kLoop, calls=%none", estimated)), routed_share=1 / 4)
    assert cost.cycles == 0 and [one.bytes for one in cost.kernels if one.name == "sparse core"] == [
        2 * 32 * (48 + 192)
    ]
    assert cost.bytes == costs(parse(PROGRAM), routed_share=1 / 4).bytes


def test_a_token_computes_the_experts_that_it_chose():
    model = workload(SMALL).model
    attention = EMBED * model.head_dim * 2 * (model.num_heads + model.num_kv_heads)
    router, expert = EMBED * EXPERTS, 3 * EMBED * MLP
    assert layer_parameters(model) == LAYERS * (attention + router + EXPERTS * expert)
    assert active_layer_parameters(model) == LAYERS * (attention + router + CHOSEN * expert)


def test_the_exchange_in_closed_form():
    work = of_remat("layers")
    tokens = work.microbatch_tokens / 4
    sent = tokens * CHOSEN * EMBED * 4

    def exchanges(of: Workload, mesh: MeshConfig) -> list[Collective]:
        return [one for one in learn_costs(of, mesh, 1.0).collectives if one.kind == "all-to-all"]

    # There and back: forward, recomputed, and backward
    assert exchanges(work, MESH) == [Collective("all-to-all", sent, 2, (0, 1), work.rounds * 6 * LAYERS)]
    assert exchanges(of_remat("dots"), MESH) == exchanges(work, MESH)  # its buffers are never kept
    (kept,) = exchanges(of_remat("none"), MESH)
    assert (kept.bytes, kept.count) == (sent, work.rounds * 4 * LAYERS)
    assert exchanges(work, MeshConfig(1, 4, 1, 1)) == []
    (decode,) = decode_costs(work, MESH).collectives
    assert (decode.kind, decode.bytes, decode.count) == ("all-to-all", 8 / 4 * CHOSEN * EMBED * 4, 2 * LAYERS)


def test_remat_of_products_recomputes_experts_where_tokens_are_exchanged():
    work = of_remat("dots")
    products = LAYERS * CHOSEN * 2 * 3 * EMBED * MLP
    assert learn_flops(work, expert=2) - learn_flops(work) == products
    assert learn_flops(of_remat("layers"), expert=2) == learn_flops(of_remat("layers"))
    # Their inputs, outputs and weights, once more; weights are gathered over fsdp before. A quarter of the tokens, half
    # of the experts.
    tokens, weights = work.microbatch_tokens / 4, LAYERS * EXPERTS * 3 * EMBED * MLP / 2
    moved = 4 * (tokens * LAYERS * CHOSEN * (2 * EMBED + 3 * MLP) + 2 * weights)
    kept = of_remat("none")
    attention = update_floor(work, MeshConfig(1, 4, 1, 1)) - update_floor(kept, MeshConfig(1, 4, 1, 1))
    assert update_floor(work, MESH) - update_floor(kept, MESH) == pytest.approx(work.rounds * moved + attention)
    # and nothing of them is kept in layers
    saved = memory(work, MeshConfig(1, 4, 1, 1)).working - memory(work, MESH).working
    products = LAYERS * CHOSEN * (EMBED + 2 * MLP) * 4
    assert saved == pytest.approx(tokens * products - exchange(work, 1) / 4)
    # The buffer has room for two mean loads, on axes of two devices and of more.
    one, both = MeshConfig(1, 1, 1, 4), memory(work, MESH)
    assert memory(work, one).working == both.working
    # The longer axis has a quarter of the experts to sample from on each device, instead of half.
    assert both.sampling - memory(work, one).sampling == pytest.approx(4 * LAYERS * EXPERTS * 3 * EMBED * MLP / 4)
    assert demand(work).bytes_of(MESH) == both.total


def test_the_sampler_has_room_for_the_record_of_experts():
    """uint8 of each layer and choice, beside keys and values: for the slots' tokens, and those of first prompts."""
    work = workload(SMALL)
    plain = replace(work, layout=replace(work.layout, experts=0))
    record = work.all_cache_bytes - plain.all_cache_bytes
    states = (
        jax.eval_shape(partial(init_state, work.model, slots, tokens + work.slack, int8=False, records_experts=True))
        for slots, tokens in ((work.slots, work.capacity), (work.prompt_rows, work.prompt_tokens))
    )
    assert record == sum(state.experts.size * state.experts.dtype.itemsize for state in states) > 0
    assert record == (8 * (64 + work.slack) + 2 * (32 + work.slack)) * LAYERS * CHOSEN
    assert memory(work, MESH).cache - memory(plain, MESH).cache == pytest.approx(record / 4)
    unrecorded = workload(replace(SMALL, learner=replace(SMALL.learner, routing_replay=False)))
    assert unrecorded.record_bytes == 0 and work.record_bytes == LAYERS * CHOSEN


def test_decode_reads_the_experts_that_have_a_token():
    """A token chooses a quarter of the experts. A device's half of them gets the tokens of 4 slots."""
    work = workload(SMALL)
    experts = 4 * LAYERS * EXPERTS * 3 * EMBED * MLP
    read = 1 - (3 / 4) ** (2 * 2)
    rest = 4 * work.model.num_parameters - experts - 4 * EMBED * work.model.vocab_size * (not work.model.tied_head)
    assert decode_floor(work, MESH) == pytest.approx(rest + experts * read / 2 + 2 * work.read_bytes)


@pytest.mark.slow
def test_a_tpus_update_has_no_product_of_all_rows_with_all_experts(tmp_path):
    """FLOPs and exchange of the compiled program are those of the closed forms."""
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu to compile for a TPU")
    words = ["--preset", "alfworld-tiny", "--model.name", "tiny-moe", "--topology", "v5e:2x2", "--mesh.fsdp", "2"]
    words += ["--mesh.expert", "2", "--batch.rows", "8", "--learner.remat", "layers", "--programs", "update", "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, "-m", "aem_jax.launch", "plan", *words]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    plan = json.loads(result.stdout.splitlines()[-1])
    update = plan["costs"]["update"]
    assert update["flops"] == pytest.approx(
        plan["closed_flops"]["update"], rel=0.25
    )  # that of a loop over blocks is 18 % more
    row = 8 * 384 / 4 * CHOSEN * EMBED * 4
    sent = sum(one["count"] for one in update["collectives"] if one["kind"] == "all-to-all" and one["bytes"] == row)
    assert sent == plan["units"]["update"] * 6 * LAYERS
