"""Memory of a run in closed form, while sampling and while learning, and the mesh that is chosen by it."""

import re
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from plan.test_bytes import SMALL as WITHOUT_KL

from aem_jax.batch import BatchLayout
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.launch import cli
from aem_jax.learner import LearnerConfig, TrainState, abstract_state, init_state
from aem_jax.models import ModelConfig, Policy
from aem_jax.models.lora import LoraConfig
from aem_jax.plan.advice import advise
from aem_jax.plan.analytic import demand, memory
from aem_jax.plan.config import plan_config
from aem_jax.plan.devices import parse_topology
from aem_jax.plan.make import make_plan
from aem_jax.plan.workload import workload
from aem_jax.rollout import Carried, Rollout, RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.selection import Rule
from aem_jax.sharding import MeshConfig, MeshDemand, choose_mesh, make_mesh
from aem_jax.train import train
from tests.rollout.fakes import POLICY, STOP, TASKS, ByteChat, LocalPool

SMALL = replace(WITHOUT_KL, learner=replace(WITHOUT_KL.learner, kl_coefficient=0.01))


def test_the_samplers_weights_are_in_memory_while_sampling_gradients_while_learning():
    size = memory(workload(SMALL), MeshConfig(1, 2, 2))
    resident = size.parameters + size.optimizer + size.reference + size.cache
    assert size.sampling == resident + size.weights
    assert size.learning == resident + size.gradients + size.working
    assert size.total == size.learning > size.sampling
    # Masters in many parts, the sampler's weights in one: sampling takes more.
    split = memory(workload(read_preset("alfworld-paper", "qwen2.5-7b")), MeshConfig(1, 256, 1))
    assert split.total == split.sampling > split.learning


def test_an_analytic_plan_has_the_memory_of_each_program():
    plan = make_plan(
        replace(plan_config(SMALL), mesh=MeshConfig(1, 2, 2), analytic=True), parse_topology("cpu:4"), by_hand=True
    )
    assert plan.phases == {"update": plan.memory.learning, "decode": plan.memory.sampling}


ROLLOUT = RolloutConfig(
    groups_per_step=3, group_size=2, num_slots=6, max_turns=6, response_tokens=4, context_tokens=96, prompt_tokens=16,
    decode_chunk=4, extend_buckets=(8,), windows=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "lora", "sizes"),
    [
        (ROLLOUT, None, MeshConfig(1, 1, 1)),
        (replace(ROLLOUT, mode="continuous", carry_min_groups=2, carry_max_age=2), None, MeshConfig(1, 1, 1)),
        (ROLLOUT, LoraConfig(rank=2, merge=False), MeshConfig(1, 2, 1)),  # the base is gathered
    ],
    ids=["lockstep", "continuous, carry-over", "adapter beside gathered weights"],
)
def test_the_samplers_weights_are_freed_before_an_update(
    settings: RolloutConfig, lora: LoraConfig | None, sizes: MeshConfig
):
    """The fact that `Memory.learning` rests on, in the loop of `train`."""
    mesh = make_mesh(sizes, jax.devices()[: sizes.fsdp])
    policy = replace(POLICY, lora=lora)
    reshard, resharded, alive = make_reshard(policy, mesh), list[weakref.ref[jax.Array]](), list[int]()
    no_credit: Any = SimpleNamespace(tokens=None, values=None)

    def watched(params: Any) -> Any:
        weights = reshard(params)
        resharded[:] = map(weakref.ref, jax.tree.leaves(weights))
        return weights

    def update(state: TrainState, *_: Any, **__: Any) -> tuple[TrainState, dict[str, Any]]:
        kept = set(map(id, jax.tree.leaves(state.params)))  # norms beside an adapter are the learner's own arrays
        alive.append(sum(leaf() is not None and id(leaf()) not in kept for leaf in resharded))
        return state, {}

    sampler = Sampler(policy.sampled, SamplingConfig(), [STOP], capacity=96, slack=ROLLOUT.slack, mesh=mesh)
    train(
        init_state(policy, LearnerConfig(), mesh, jax.random.key(0)),
        rollout=Rollout(sampler, ByteChat(), LocalPool(6), settings),
        tasks=lambda step, round: TASKS,
        rule=Rule(3),
        layout=BatchLayout(num_microbatches=9, rows=4, row_length=96, max_responses=96, max_trajectories=12),
        mesh=mesh,
        reshard=watched,
        credit=lambda *_: (no_credit, {}),
        update=update,
        key=jax.random.key(1),
        seed=0,
        num_steps=2,
        carried=Carried() if settings.carry_min_groups else None,
        on_step=lambda *_: None,
    )
    assert resharded and alive == [0, 0]


def test_memory_of_adapters_has_frozen_weights_in_the_models_dtype():
    config = replace(SMALL, lora=LoraConfig(rank=4), learner=replace(SMALL.learner, moments="bfloat16"))
    work = workload(config)
    count, adapter = work.model.num_parameters, Policy(work.model, work.lora)
    assert work.trained == sum(leaf.size for leaf in jax.tree.leaves(adapter.shapes["adapter"]))
    size = memory(work, MeshConfig(1, 1, 1))
    assert (size.frozen, size.reference) == (4 * count, 0)  # this model is used in float32
    assert (size.parameters, size.optimizer) == (4 * work.trained, 4 * work.trained)
    beside = replace(work, lora=replace(work.lora, merge=False))
    assert memory(beside, MeshConfig(1, 1, 1)).weights == 0  # the sampler uses the frozen weights
    assert memory(beside, MeshConfig(1, 2, 1)).weights == 4 * count  # the learner's layout differs


QWEN_7B = ModelConfig(  # Qwen2.5-7B
    152_064, 3584, 18_944, 28, 28, 4, 128, tied_head=False, qk_norm=None, qkv_bias=True, dtype="bfloat16"
)
GB = 10**9


def memory_of_7b(lora: LoraConfig | None = None, mesh: MeshConfig | None = None, **learner):
    config = replace(RunConfig(), lora=lora or LoraConfig(), learner=LearnerConfig(**learner))
    return memory(workload(config, model=QWEN_7B), mesh or MeshConfig(1, 1, 1))


def weight_bytes(size):
    return size.parameters + size.optimizer + size.frozen + max(size.gradients, size.weights)


def test_weights_of_a_7b_policy_with_adapters_fit_one_card_of_80_gb():
    assert QWEN_7B.num_parameters == 7_615_616_512
    merged = memory_of_7b(LoraConfig(rank=32))
    assert merged.frozen == 2 * QWEN_7B.num_parameters  # bfloat16, once; no masters
    # 2 x 32 numbers for each side of each projection: PEFT counts 80,740,352 as well
    assert merged.parameters == 4 * 80_740_352 and merged.optimizer == 2 * merged.parameters
    # merged projections; embedding, head and norms share the buffers of the frozen weights
    tables = 2 * 152_064 * 3584
    assert merged.weights == pytest.approx(2 * (QWEN_7B.num_parameters - tables), rel=1e-3)
    assert weight_bytes(merged) < 32 * GB  # which leaves 48 GB for the cache and activations
    apart = memory_of_7b(LoraConfig(rank=32, merge=False))
    assert apart.weights == 0 and weight_bytes(apart) + 2 * 80_740_352 < 18 * GB  # with the adapter in bfloat16


def test_closed_form_memory_equals_the_size_of_the_arrays():
    """Shapes and dtypes of the state of a 7B policy with adapters; nothing is allocated."""
    mesh, lora = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]), LoraConfig(rank=32)
    policy, merged = Policy(QWEN_7B, lora), memory_of_7b(lora)
    state = abstract_state(policy, LearnerConfig(), mesh)
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    assert size(state.trainable) == merged.parameters and size(state.opt_state) == merged.optimizer + 8  # two counters
    kept = jax.tree.map(lambda leaf, dtype: leaf.size * dtype.itemsize, policy.base.shapes, policy.base.dtypes)
    assert sum(jax.tree.leaves(kept)) == pytest.approx(merged.frozen, rel=1e-3)  # norms are float32


def test_all_weights_of_a_7b_policy_do_not_fit_one_card_of_80_gb():
    full = memory_of_7b(moments="bfloat16")
    assert full.frozen == 0 and full.parameters == 4 * QWEN_7B.num_parameters
    assert full.weights == 2 * QWEN_7B.num_parameters
    assert weight_bytes(full) > 100 * GB


def test_frozen_weights_that_are_split_for_learning_are_gathered_for_sampling():
    lora = LoraConfig(rank=32, merge=False)
    one, split = memory_of_7b(lora), memory_of_7b(lora, MeshConfig(1, 4, 1))
    assert split.frozen < 0.26 * one.frozen
    assert split.weights > 0.99 * one.frozen
    tensor = memory_of_7b(lora, MeshConfig(1, 1, 4))
    assert tensor.weights < 0.02 * one.frozen  # the same split for both: nothing is copied


def test_weights_in_int8_take_a_byte_of_each_of_the_layers_matrices():
    config = replace(SMALL, sampling=replace(SMALL.sampling, weights="int8"))
    work, plain = workload(config), workload(SMALL)
    layers, mesh = 9 * 64 * ((4 + 2 + 2 + 4) * 32 + 3 * 384), MeshConfig(1, 2, 2)
    assert memory(plain, mesh).weights - memory(work, mesh).weights == 3 * layers / 2  # float32 is this model's dtype
    # the arrays themselves: codes and a scale for each output (a thirtieth of the codes in a model this narrow)
    shapes, dtypes = Policy(work.model).quantized.shapes, Policy(work.model).quantized.dtypes
    total = sum(jax.tree.leaves(jax.tree.map(lambda leaf, dtype: leaf.size * dtype.itemsize, shapes, dtypes)))
    assert memory(work, MeshConfig(1, 1, 1)).weights == pytest.approx(total, rel=0.04)


def test_a_cache_in_int8_takes_a_byte_of_each_number_and_a_scale_of_each_head():
    config = replace(SMALL, sampling=replace(SMALL.sampling, cache="int8"))
    work, mesh = workload(config), MeshConfig(1, 2, 2)
    # 9 layers, 2 key heads of 32 numbers, keys and values: 32 codes and a float32, where there were 32 float32
    assert (work.cache_bytes(1, 4), workload(SMALL).cache_bytes(1, 4)) == (
        (4 + work.slack) * 2 * 9 * 2 * 36,
        (4 + work.slack) * 2 * 9 * 2 * 128,
    )
    assert memory(work, mesh).cache == work.all_cache_bytes / 4
    sampler = Sampler(Policy(work.model), config.sampling, [0], capacity=work.capacity, slack=work.slack)
    state, prompts = sampler.abstract(work.slots), sampler.abstract(work.prompt_rows, work.prompt_tokens)
    assert memory(work, MeshConfig(1, 1, 1)).cache == work.cohorts * state.cache.num_bytes + prompts.cache.num_bytes


def demand_of(state: float = 1e9, weights: float = 1e8, slots: float = 1e9, rows: int = 256) -> MeshDemand:
    """Bytes split over fsdp and tensor, over tensor alone, and over all axes."""
    bytes_of = lambda mesh: (state + slots / mesh.data) / (mesh.fsdp * mesh.tensor) + weights / mesh.tensor
    return MeshDemand(bytes_of, rows=rows, slots=256, embed=1536, split=(2, 8960))


def test_the_chosen_mesh_has_the_least_tensor_parallelism_then_wide_shards():
    assert choose_mesh(demand_of(), 8, 1e11) == MeshConfig(1, 8, 1)
    assert choose_mesh(demand_of(), 256, 1e11) == MeshConfig(32, 8, 1)  # 1536 / 16 = 96 would be padded to 128
    assert choose_mesh(demand_of(state=2e11), 32, 1e10) == MeshConfig(1, 32, 1)  # narrow shards, but it fits
    assert choose_mesh(demand_of(weights=1.5e11), 4, 1e11) == MeshConfig(1, 2, 2)  # weights must be halved
    assert choose_mesh(demand_of(rows=4), 8, 1e11) == MeshConfig(1, 4, 2)  # no more replicas than rows
    hopeless = choose_mesh(demand_of(state=1e14), 8, 1e11)
    assert hopeless.fsdp * hopeless.tensor == 8  # the least memory; the plan reports that it does not fit
    with pytest.raises(ValueError, match="make rows and slots multiples of 4"):
        choose_mesh(demand_of(rows=2), 8, 1e11)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=4), LoraConfig(rank=4, merge=False)])
def test_the_demand_of_a_run_is_its_memory_on_each_mesh(lora: LoraConfig):
    work = workload(replace(SMALL, lora=lora))
    asked = demand(work)
    for mesh in (MeshConfig(1, 1, 1), MeshConfig(1, 4, 1), MeshConfig(2, 1, 2), MeshConfig(1, 2, 2)):
        known = memory(work, mesh)
        assert asked.bytes_of(mesh) == max(known.learning, 1.2 * known.sampling)
    assert asked.split == (2, 384, work.model.vocab_size)


def test_the_chosen_mesh_counts_weights_that_sampling_gathers(capsys):
    """7.6 billion weights in 8 parts beside an adapter fit 16 GiB while learning, but not the copy to sample from."""
    words = ["plan", "--preset", "alfworld-paper", "qwen2.5-7b", "--topology", "v5e:2x4", "--analytic"]
    words += ["--lora.rank", "16", "--lora.merge", "False", "--batch.rows", "8", "--rollout.num-slots", "32"]
    assert cli.main(words) == 0
    assert "mesh, chosen: data 1 × fsdp 4 × tensor 2;" in capsys.readouterr().out
    assert cli.main([*words, "--mesh.fsdp", "8"]) == 1
    told = capsys.readouterr().out
    assert "does not fit: sampling (decode)." in told  # an update has no such copy


def planned(words: list[str], capsys) -> tuple[int, str]:
    status = cli.main(["plan", "--analytic", *words])
    output = capsys.readouterr()
    return status, output.out + output.err


@pytest.mark.parametrize(
    ("preset", "model", "topology"),
    [
        ("swe-paper", "qwen3-32b", "gpu:h100:8x4"),
        ("swe-paper", "qwen3-32b", "v5p:2x2x4"),
        ("alfworld-paper", "qwen2.5-7b", "v5e:4x4"),
    ],
)
def test_advice_can_be_followed(preset: str, model: str, topology: str, capsys):
    """Each piece of advice, alone, can be planned; what fitted still fits; and so many chips suffice."""
    words = ["--preset", preset, model, "--topology", topology]
    _, told = planned(words, capsys)
    large = set(re.findall(r"update|decode", told.partition("does not fit: ")[2].partition(". What")[0]))
    *advice, chips = [line.strip() for line in told.partition("largest saving first:\n")[2].splitlines()]
    assert advice and large
    for line in advice:
        status, then = planned([*words, *re.split(r" \(", line)[0].split()], capsys)
        assert status in (0, 1), then
        assert set(re.findall(r"update|decode", then.partition("does not fit: ")[2].partition(". What")[0])) <= large
    found = re.fullmatch(r"(\d+) chips instead of \d+( with)?(.*)", chips)
    assert found
    count, _, options = found.groups()
    larger = {("gpu:h100:8x4", "64"): "gpu:h100:8x8", ("v5p:2x2x4", "32"): "v5p:2x4x4", ("v5e:4x4", "32"): "v5e:4x8"}
    status, then = planned([*words[:-1], larger[topology, count], *options.split()], capsys)
    assert status == 0, then


def test_a_plan_refuses_what_a_run_refuses(capsys):
    words = ["--preset", "alfworld-paper", "qwen2.5-1.5b", "--topology", "gpu:h100:1"]
    status, told = planned([*words, "--rollout.num-slots", "512"], capsys)
    assert status == 2 and "--rollout.num-slots: expected at most" in told
    words[-1] = "gpu:h100:8"  # each of eight processes has servers of its own
    assert planned([*words, "--rollout.num-slots", "512"], capsys)[0] in (0, 1)
    status, told = planned([*words, "--sampling.top-k", "5"], capsys)
    assert status == 2 and "--sampling.top-k" in told


def test_advice_for_learning_alone_leaves_the_samplers_weights_out():
    config = replace(read_preset("alfworld-paper", "qwen2.5-7b"), learner=LearnerConfig(remat="none"))
    mesh, topology = MeshConfig(1, 8, 1), parse_topology("v5e:2x4")
    of = lambda *programs: "\n".join(advise(config, workload(config, 8), mesh, topology, programs))
    int8, remat = "--sampling.weights int8", "--learner.remat layers"
    assert remat in of("update") and int8 not in of("update")
    assert int8 in of("decode") and remat not in of("decode")
    assert int8 in of("update", "decode") and remat in of("update", "decode")
