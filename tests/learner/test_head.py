"""The head's loop over chunks on several devices, read from the compiled programs."""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from toys import ONE_DEVICE, Bigram, random_trajectories

from aem_jax.batch import BatchLayout, collate, place
from aem_jax.learner import LearnerConfig, head, init_state, make_token_logprobs, make_update
from aem_jax.learner.head import HeadLayout
from aem_jax.plan.hlo import Instruction, Module, parse
from aem_jax.sharding import MeshConfig, make_mesh

TOY = Bigram(vocab_size=24, width=16)
LAYOUT = BatchLayout(num_microbatches=2, rows=8, row_length=40, max_responses=64, max_trajectories=16)
CONFIG = LearnerConfig(head_chunk=8)  # five chunks a row
COLLECTIVES = {"all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"}


def compiled(which: str, mesh) -> Module:
    state = init_state(TOY, CONFIG, mesh, jax.random.key(0))
    batch = place(collate([], LAYOUT), mesh)
    if which == "update":
        lowered = make_update(TOY, CONFIG, mesh).lower(state, batch, np.zeros(batch.tokens.shape, np.float32))
    else:
        lowered = make_token_logprobs(TOY, CONFIG, mesh).lower(state.params, batch)
    return parse(lowered.compile().as_text() or "")


def instructions(
    module: Module, name: str, loops: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Instruction]]:
    """Every instruction of a computation, direct or in called computations, with its enclosing loop bodies."""
    for instruction in module.computations[name].instructions:
        yield loops, instruction
        if instruction.opcode == "while":
            yield from instructions(module, instruction.called("body"), (*loops, instruction.called("body")))
        for inner in [*instruction.branches, instruction.called("calls"), instruction.called("to_apply")]:
            if inner in module.computations:
                yield from instructions(module, inner, loops)


def collectives(module: Module) -> tuple[list[Instruction], list[Instruction]]:
    """The collectives inside the head's loop, which is the loop that skips chunks, and those outside."""
    nested = list(instructions(module, module.entry))
    (body,) = {loops[-1] for loops, instruction in nested if instruction.opcode == "conditional"}
    moved = [
        (loops, instruction)
        for loops, instruction in nested
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]
    return [instruction for loops, instruction in moved if body in loops], [
        instruction for loops, instruction in moved if body not in loops
    ]


def sizes(selected: list[Instruction]) -> list[tuple[int, ...]]:
    return [shape.dims for instruction in selected for shape in instruction.shapes]


@pytest.mark.parametrize("which, mesh", [("update", MeshConfig(2, 4, 1)), ("token_logprobs", MeshConfig(1, 8, 1))])
def test_the_loop_over_chunks_moves_nothing_between_devices(which, mesh):
    inside, outside = collectives(compiled(which, make_mesh(mesh, jax.devices()[:8])))
    assert not inside, sizes(inside)
    # the head once on its way in, and its gradient once on its way out
    assert sizes([instruction for instruction in outside if "gather" in instruction.opcode]).count((16, 24)) == 1
    if which == "update":
        reduced = sizes([instruction for instruction in outside if "reduce" in instruction.opcode])
        assert reduced.count((16, 24)) + reduced.count((16 // mesh.fsdp, 24)) == 1


def test_a_vocabulary_that_is_split_costs_a_few_numbers_a_token():
    inside, _ = collectives(compiled("update", make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])))
    # maximum and sum of exponentials, the target's logit, the entropy; and d_hidden [1, 2, 8, 16]: 2 rows, 8 positions
    assert inside and {dims[:3] for dims in sizes(inside)} == {(1, 2, 8)}
    assert max(map(len, sizes(inside))) == 4 and {dims[3] for dims in sizes(inside) if len(dims) > 3} <= {1, 16}


def test_left_to_itself_the_partitioner_moves_the_head_in_every_chunk(monkeypatch):
    """The effect of the layout, and a check that these tests detect its absence."""
    monkeypatch.setattr("aem_jax.learner.forward.HeadLayout", lambda **_: HeadLayout())
    inside, _ = collectives(compiled("update", make_mesh(MeshConfig(1, 8, 1), jax.devices()[:8])))
    assert [dims[-2:] for dims in sizes(inside)].count((16, 24)) == 2  # the head gathered, its gradient reduced


def test_every_device_skips_and_counts_as_one_device_would():
    """In one chunk, the rows of one device may have no tokens while another's have some."""
    trajectories = random_trajectories(3, 3, TOY.vocab_size)  # 8 rows: most are empty
    batch = collate(trajectories, dataclasses.replace(LAYOUT, row_length=30))
    advantages = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    results = []
    for mesh in (ONE_DEVICE, make_mesh(MeshConfig(2, 4, 1), jax.devices()[:8])):
        state, placed = init_state(TOY, CONFIG, mesh, jax.random.key(0)), place(batch, mesh)
        logprobs = make_token_logprobs(TOY, CONFIG, mesh)(state.params, placed)
        state, stats = make_update(TOY, CONFIG, mesh)(state, placed, advantages)
        results.append(jax.device_get((logprobs, state.opt_state[1][0].mu, stats)))
    assert np.abs(results[0][1]["base"]["head"]).max() > 1e-4
    jax.tree.map(lambda one, many: np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-7), *results)


@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)])
def test_parts_of_the_vocabulary_change_nothing(mesh: MeshConfig, monkeypatch: pytest.MonkeyPatch):
    """Loss, statistics and gradients, with an entropy bonus; the parts of 24 or 2 x 12 words overlap at the end."""
    config = dataclasses.replace(CONFIG, entropy_coefficient=0.3)
    devices = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    batch = place(collate(random_trajectories(3, 3, TOY.vocab_size), LAYOUT), devices)
    advantages = np.random.default_rng(0).standard_normal(batch.tokens.shape).astype(np.float32)
    results, looped = [], []
    for limit in (head.LOGIT_BYTES, 4 * 8 * 24 * LAYOUT.rows // (mesh.data * mesh.fsdp) // mesh.tensor // 5 + 1):
        monkeypatch.setattr(head, "LOGIT_BYTES", limit)
        state = init_state(TOY, config, devices, jax.random.key(0))
        logprobs, update = make_token_logprobs(TOY, config, devices), make_update(TOY, config, devices)
        looped.append(update.lower(state, batch, advantages).as_text().count("stablehlo.while"))
        both = logprobs(state.params, batch)
        state, stats = update(state, batch, advantages)
        results.append(jax.device_get((both, state.opt_state[1][0].mu, stats)))
    assert looped[0] < looped[1]
    assert np.abs(results[0][1]["base"]["head"]).max() > 1e-4
    jax.tree.map(lambda one, parts: np.testing.assert_allclose(parts, one, rtol=1e-5, atol=1e-6), *results)


def test_parts_of_a_split_vocabulary_move_a_few_numbers_a_token(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(head, "LOGIT_BYTES", 4 * 8 * 12 * 2 // 3)
    inside, _ = collectives(compiled("update", make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])))
    assert inside and max(int(np.prod(dims)) for dims in sizes(inside)) <= 2 * 8 * 16  # d_hidden; never the head
