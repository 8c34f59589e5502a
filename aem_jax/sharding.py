"""One mesh, two layouts.

Every array dimension has a logical name. Two tables map these names to mesh axes: one for *learning* (float32 masters
are split over fsdp x tensor) and one for *sampling* (weights are split only over tensor and replicated otherwise, so
that a decode step gathers no weights). No other module of the project names a mesh axis.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]

AXES = ("data", "fsdp", "expert", "tensor")

_SHARED: Rules = {
    "rows": ("data", "fsdp", "expert"),
    "slots": ("data", "fsdp", "expert"),
    "layers": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "experts": "expert",
    "router": None,
    "length": None,
    "norm": None,
    "rank": None,
    "value": None,
}
TRAIN: Rules = {**_SHARED, "embed": ("fsdp", "expert"), "expert_embed": "fsdp"}
"""Learning: each weight is split over fsdp along its embedding dimension and over tensor along the other. The expert
axis splits experts, and the embedding dimension of all other weights."""
DECODE: Rules = {**_SHARED, "embed": None, "expert_embed": None}
"""Sampling: no weight is split over data or fsdp."""


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh. One size may be -1 and takes all remaining devices. If no size is set, a run on several
    devices chooses them from the model, the slots and rows, and the memory of the devices."""

    data: int = 1
    """Number of replicas of the parameters. Rows and slots are split over them."""
    fsdp: int = -1
    """Shards of masters and optimizer state. Rows and slots are split over them."""
    tensor: int = 1
    """Number of shards of heads, MLP and vocabulary."""
    expert: int = 1
    """Mixtures of experts: number of shards of the experts. Rows and slots are split over them, too."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh (axes data, fsdp, expert, tensor) over `devices` (default: all devices).

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    resolved = mesh_sizes(config, len(devices))
    sizes = [getattr(resolved, axis) for axis in AXES]
    # A mesh axis may use a part of a physical axis of the torus: 8 × 8 over 4 × 4 × 4 chips.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(config: MeshConfig, devices: int) -> MeshConfig:
    """Returns the sizes for a number of devices, with -1 resolved.

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor, config.expert]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"expected positive mesh sizes and at most one -1, got data, fsdp, tensor, expert = {sizes}")
    known = math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor, expert = (devices // known if size == -1 else size for size in sizes)
    if data * fsdp * tensor * expert != devices:
        raise ValueError(
            f"expected data x fsdp x tensor x expert = {devices} devices, "
            f"got {config.data} x {config.fsdp} x {config.tensor} x {config.expert};"
            " set --mesh.data, --mesh.fsdp, --mesh.tensor, --mesh.expert so that the product fits, or one of them to -1"
        )
    return MeshConfig(data, fsdp, tensor, expert)


@dataclass(frozen=True)
class MeshDemand:
    """Memory demand on a mesh, and the sizes that its axes must divide.

    Attributes:
        bytes_of: a mesh without open sizes -> bytes of each device.
        rows: rows of a microbatch; data × fsdp × expert must divide them.
        slots: slots that decode at once; data × fsdp × expert must divide them.
        embed: size that fsdp × expert must divide.
        split: sizes that tensor must divide: key/value heads, MLP, vocabulary.
        experts: number that expert must divide.
    """

    bytes_of: Callable[[MeshConfig], float]
    rows: int
    slots: int
    embed: int
    split: tuple[int, ...]
    experts: int = 1


MEMORY_SHARE = 0.9
"""Fraction of a device's memory that a mesh may fill. The rest is for the runtime and for errors of the estimate."""

_LEAST_SHARD = 128
"""Minimum shard of the embedding dimension. Below it, accelerators pad their registers."""


def choose_mesh(demand: MeshDemand, devices: int, memory: float) -> MeshConfig:
    """Chooses the mesh for a number of devices.

    Tensor parallelism is the smallest that fits, because it costs a reduction in every layer. Of the remaining devices,
    fsdp takes as many as possible while its shards stay wide enough, otherwise as few as necessary to fit. data takes
    the rest. With a mixture of experts, their axis takes as many devices of fsdp as fit: to exchange tokens costs less
    than to gather experts, and a decode step reads fewer of them. If no mesh fits, the mesh with the smallest memory
    demand is returned, and the caller must report it.

    Args:
        demand: memory demand and sizes.
        devices: number of devices.
        memory: bytes per device.

    Raises:
        ValueError: no mesh with this number of devices divides rows and slots; the message names sizes that work.
    """
    candidates = []
    for tensor in (ways for ways in range(1, devices + 1) if devices % ways == 0):
        replicas = devices // tensor
        if any(size % tensor for size in demand.split) or demand.rows % replicas or demand.slots % replicas:
            continue
        for shards in (ways for ways in range(1, replicas + 1) if replicas % ways == 0):
            if demand.embed % shards:
                continue
            narrow = demand.embed // shards < _LEAST_SHARD and shards > 1
            for expert in (n for n in range(1, shards + 1) if shards % n == 0 and demand.experts % n == 0):
                mesh = MeshConfig(replicas // shards, shards // expert, tensor, expert)
                need = demand.bytes_of(mesh)
                misfit = 0.0 if need <= MEMORY_SHARE * memory else need
                # Wide shards come before narrow ones. Among wide shards, more are better; among narrow ones, fewer.
                candidates.append(((misfit, tensor, narrow, shards if narrow else -shards, -expert), mesh))
    if not candidates:
        most = math.gcd(*demand.split)
        raise ValueError(
            f"expected a mesh whose data × fsdp × expert divides {demand.rows} rows and {demand.slots} slots and whose "
            f"tensor divides {', '.join(map(str, demand.split))}, got {devices} devices; make rows and slots "
            f"multiples of {-(-devices // math.gcd(devices, most))}"
        )
    return min(candidates, key=lambda candidate: candidate[0])[1]


def partition(axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """Returns the mesh axes of an array whose dimensions have the logical names `axes`."""
    return PartitionSpec(*(rules[axis] if axis is not None else None for axis in axes))


def shardings(mesh: Mesh | AbstractMesh, axes: Any, rules: Rules, shapes: Any = None) -> Any:
    """Maps a tree of logical-axes tuples to a tree of `NamedSharding`.

    Args:
        mesh: the mesh.
        axes: pytree whose leaves are tuples of logical names.
        rules: `TRAIN` or `DECODE`.
        shapes: matching tree of arrays or shape structs; when given, divisibility is checked.

    Raises:
        ValueError: a dimension is not divisible by the size of its mesh axes; the message names the dimension.
    """

    def leaf(names: tuple[str | None, ...], shaped: Any = None) -> NamedSharding:
        spec = partition(names, rules)
        if shaped is not None:
            for name, size, entry in zip(names, shaped.shape, spec, strict=True):
                ways = 1
                for axis in (entry,) if isinstance(entry, str) else (entry or ()):
                    ways *= mesh.shape[axis]
                if size % ways:
                    raise ValueError(
                        f"expected dimension {name!r} divisible by {ways} (mesh axis {entry!r}), "
                        f"got {size}; choose another mesh shape"
                    )
        return NamedSharding(mesh, spec)

    if shapes is None:
        return jax.tree.map(leaf, axes, is_leaf=_is_axes)
    return jax.tree.map(leaf, axes, shapes, is_leaf=_is_axes)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


def _tpu_order(names: tuple[str | None, ...]) -> tuple[int, ...] | None:
    """Order, outermost first, of a weight's dimensions in a TPU's memory while sampling; None for the array's own.

    A TPU's matrix products need tiles of the contracted dimension (embed) and the last. With another order, every
    decoded chunk starts with a copy of the QKV and MLP weights, which are most of the model, and keeps the copy until
    the chunk ends.
    """
    if "embed" not in names[:-1]:
        return None
    contracted, last = names.index("embed"), len(names) - 1
    order = (*(dimension for dimension in range(last) if dimension != contracted), contracted, last)
    return order if order != tuple(range(len(names))) else None


def decode_formats(mesh: Mesh, axes: Any, shapes: Any = None) -> Any:
    """Returns sharding and memory layout of the weights for sampling: `shardings` with `DECODE`, and on TPUs the
    dimension order that their matrix products need.

    Raises:
        ValueError: as in `shardings`.
    """
    where = shardings(mesh, axes, DECODE, shapes)
    if mesh.devices.flat[0].platform != "tpu":
        return where

    def leaf(names: tuple[str | None, ...], sharding: NamedSharding) -> NamedSharding | Format:
        order = _tpu_order(names)
        return sharding if order is None else Format(Layout(order), sharding)

    return jax.tree.map(leaf, axes, where, is_leaf=_is_axes)


def ordered(axes: Any, where: Any, order: Sequence[str]) -> Any:
    """Adds an order of dimensions in memory to a tree of shardings.

    Args:
        axes: pytree whose leaves are tuples of logical names.
        where: matching tree of shardings.
        order: logical names, outermost first in memory; empty for the arrays' own order.
    """
    if not order:
        return where
    return jax.tree.map(
        lambda names, sharding: Format(Layout(tuple(names.index(name) for name in order)), sharding),
        axes,
        where,
        is_leaf=_is_axes,
    )


def slot_shards(mesh: Mesh) -> int:
    """Returns the number of parts that slots and rows are split into."""
    return math.prod(mesh.shape[axis] for axis in _SHARED["slots"] or ())


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the complete array on every device."""
    return NamedSharding(mesh, PartitionSpec())
