"""The one mesh and its two layouts."""

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec

from aem_jax.models import CONFIGS, Policy
from aem_jax.sharding import (
    AXES,
    DECODE,
    TRAIN,
    MeshConfig,
    decode_formats,
    make_mesh,
    partition,
    replicated,
    shardings,
)


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2)),
        (MeshConfig(data=-1, fsdp=1, tensor=4), (2, 1, 1, 4)),
        (MeshConfig(data=8, fsdp=1, tensor=-1), (8, 1, 1, 1)),
        (MeshConfig(expert=4), (1, 2, 4, 1)),
    ],
)
def test_mesh_sizes(config: MeshConfig, sizes: tuple[int, ...]):
    mesh = make_mesh(config)
    assert tuple(mesh.shape[axis] for axis in AXES) == sizes


def test_mesh_over_some_devices():
    devices = jax.devices()[2:4]
    mesh = make_mesh(MeshConfig(), devices)
    assert mesh.devices.size == 2 and set(mesh.devices.flat) == set(devices)


class Chip:
    """A fake TPU chip with the attributes that a mesh reads."""

    platform, device_kind, core_on_chip = "tpu", "TPU v5", 0

    def __init__(self, index: int):
        self.id, self.process_index = index, index // 4
        self.coords = (index % 4, index // 4 % 4, index // 16)


def test_a_mesh_axis_may_be_a_part_of_a_torus_axis():
    mesh = make_mesh(MeshConfig(data=8, fsdp=8), [Chip(index) for index in range(64)])
    assert dict(mesh.shape) == {"data": 8, "fsdp": 8, "tensor": 1, "expert": 1}
    assert sorted(device.id for device in mesh.devices.flat) == list(range(64))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (MeshConfig(data=3), "expected data x fsdp x tensor x expert = 8 devices, got 3 x -1 x 1 x 1"),
        (MeshConfig(data=16), "got 16 x -1 x 1 x 1"),
        (MeshConfig(data=2, fsdp=2, tensor=4), "got 2 x 2 x 4 x 1; set --mesh.data"),
        (MeshConfig(data=-1), "at most one -1"),
        (MeshConfig(data=0), "positive mesh sizes"),
        (MeshConfig(tensor=-2), "positive mesh sizes"),
    ],
)
def test_impossible_meshes_are_refused(config: MeshConfig, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        make_mesh(config)


def test_learning_splits_masters_and_sampling_gathers_no_weights():
    query = ("layers", "embed", "heads", "head_dim")
    assert partition(query, TRAIN) == PartitionSpec(None, ("fsdp", "expert"), "tensor", None)
    assert partition(query, DECODE) == PartitionSpec(None, None, "tensor", None)
    assert partition(("slots", None), DECODE) == PartitionSpec(("data", "fsdp", "expert"), None)
    assert partition(("rows", "length"), TRAIN) == PartitionSpec(("data", "fsdp", "expert"), None)
    weights = jax.tree.leaves(Policy(CONFIGS["tiny"]).axes, is_leaf=lambda x: isinstance(x, tuple))
    used = {axis for axes in weights for axis in partition(axes, DECODE) if axis}
    assert used == {"tensor"}


def test_experts_are_split_over_their_axis_and_all_else_over_it_with_fsdp():
    expert = ("layers", "experts", "expert_embed", "mlp")
    assert partition(expert, TRAIN) == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert partition(expert, DECODE) == PartitionSpec(None, "expert", None, "tensor")


@pytest.mark.parametrize("rules", [TRAIN, DECODE])
def test_parameters_are_split_as_the_rules_say(rules):
    """2 x 2 x 2 devices: each matrix has as many different pieces as the axes that split it."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    policy = Policy(CONFIGS["tiny"])
    params = policy.init(jax.random.key(0))
    placed = jax.device_put(params, shardings(mesh, policy.axes, rules, policy.shapes))
    jax.tree.map(np.testing.assert_array_equal, placed, params)
    ways = 4 if rules is TRAIN else 2
    for name in ("qkv", "o", "gate_up", "down"):
        leaf = placed["base"]["layers"][name]
        assert leaf.addressable_shards[0].data.size * ways == leaf.size, name
    assert placed["base"]["norm"].sharding.is_fully_replicated == (rules is DECODE or TRAIN["norm"] is None)


def test_indivisible_dimension_is_named():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    policy = Policy(CONFIGS["tiny"])  # 2 key/value heads over 4 ways of tensor
    with pytest.raises(ValueError, match=r"dimension 'kv_heads' divisible by 4 \(mesh axis 'tensor'\), got 2"):
        shardings(mesh, policy.axes, TRAIN, policy.shapes)
    with pytest.raises(ValueError, match=r"dimension 'slots' divisible by 2 .*got 3"):
        shardings(mesh, ("slots", None), DECODE, jax.ShapeDtypeStruct((3, 5), np.float32))


def test_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="colour"):
        partition(("colour",), TRAIN)


def test_replicated():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert jax.device_put(np.arange(3), replicated(mesh)).sharding.is_fully_replicated


def test_on_tpus_sampled_weights_have_contracted_and_last_dimension_innermost():
    """The weights for sampling have the dimensions of the sum and of the result last."""
    policy = Policy(CONFIGS["tiny"])
    chips = make_mesh(MeshConfig(fsdp=4), [Chip(index) for index in range(4)])
    formats = decode_formats(chips, policy.axes, policy.shapes)
    ordered = {name: leaf for name, leaf in formats["base"]["layers"].items() if isinstance(leaf, Format)}
    assert set(ordered) == {"qkv", "gate_up"}
    for name, leaf in ordered.items():
        assert isinstance(leaf.layout, Layout)
        order, axes = leaf.layout.major_to_minor, policy.axes["base"]["layers"][name]
        assert axes[order[-2]] == "embed" and order[-1] == len(axes) - 1 and sorted(order) == list(range(len(axes)))
        assert leaf.sharding == shardings(chips, policy.axes, DECODE)["base"]["layers"][name]
    mesh = make_mesh(MeshConfig())
    assert decode_formats(mesh, policy.axes) == shardings(mesh, policy.axes, DECODE)  # no layout on other platforms
