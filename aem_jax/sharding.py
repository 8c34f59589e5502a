"""One mesh, two layouts.

Every array dimension has a logical name; the two tables below say which mesh axes carry it while *learning* (float32
masters spread over fsdp x tensor) and while *sampling* (weights whole on every data replica, split over tensor alone,
so that a decode step gathers no weights). Nothing else in the project names a mesh axis.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, str | tuple[str, ...] | None]

AXES = ("data", "fsdp", "tensor")

_SHARED: Rules = {
    "rows": ("data", "fsdp"),
    "slots": ("data", "fsdp"),
    "layers": None,
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "length": None,
    "norm": None,
    "rank": None,
    "value": None,
}
TRAIN: Rules = {**_SHARED, "embed": "fsdp"}
"""Learning: each weight split over fsdp along its embedding dimension and over tensor along the other."""
DECODE: Rules = {**_SHARED, "embed": None}
"""Sampling: no weight is split over data or fsdp."""


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh. One entry may be -1: it takes the devices that the others leave. If none is set, a run
    on several devices chooses them from the model, the slots and rows, and the devices' memory."""

    data: int = 1
    """Replicas of the parameters; rows and slots are split over them."""
    fsdp: int = -1
    """Ways in which the float32 masters and optimizer state are split; rows and slots are split over these too."""
    tensor: int = 1
    """Ways in which heads, MLP and vocabulary are split."""


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the one mesh (axes data, fsdp, tensor) over `devices` (all of them by default).

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    # An axis may be a part of one of the torus's: 8 × 8 over 4 × 4 × 4 chips.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor) over so many devices, a -1 filled in.

    Raises:
        ValueError: the sizes don't multiply to the number of devices.
    """
    sizes = [config.data, config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"expected positive mesh sizes and at most one -1, got data, fsdp, tensor = {sizes}")
    known = math.prod(size for size in sizes if size != -1)
    data, fsdp, tensor = (devices // known if size == -1 else size for size in sizes)
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"expected data x fsdp x tensor = {devices} devices, "
            f"got {config.data} x {config.fsdp} x {config.tensor};"
            " set --mesh.data, --mesh.fsdp or --mesh.tensor so that the product fits, or one of them to -1"
        )
    return data, fsdp, tensor


@dataclass(frozen=True)
class MeshDemand:
    """What a mesh has to carry, and what its sizes have to divide.

    Attributes:
        state: bytes split over fsdp × tensor: masters, optimizer state, gradients.
        weights: bytes split over tensor alone: the weights as sampled from.
        slots_bytes: bytes split over all axes: caches, and what rows need while they are computed.
        rows: rows of a microbatch, and
        slots: slots that decode at once: data × fsdp must divide both.
        embed: size that fsdp must divide.
        split: sizes that tensor must divide: key/value heads, MLP, vocabulary.
    """

    state: float
    weights: float
    slots_bytes: float
    rows: int
    slots: int
    embed: int
    split: tuple[int, ...]


MEMORY_SHARE = 0.9
"""Share of a device's memory that a mesh is chosen for; the rest is the runtime's, and what an estimate misses."""

_LEAST_SHARD = 128
"""Fewer numbers of the embedding dimension a device, and accelerators' registers are filled up with padding."""


def choose_mesh(demand: MeshDemand, devices: int, memory: float) -> MeshConfig:
    """The mesh for so many devices: the least tensor parallelism that fits, since it costs a reduction at every layer.

    Of the rest fsdp takes what it can in shards that stay wide enough, or else what it must to fit; data takes what is
    left. If nothing fits, the mesh that needs the least memory comes back: it is for the caller to say so.

    Args:
        demand: what it has to carry.
        devices: how many there are.
        memory: bytes of each.

    Raises:
        ValueError: no mesh of so many devices divides rows and slots; says what would.
    """
    candidates = []
    for tensor in (ways for ways in range(1, devices + 1) if devices % ways == 0):
        replicas = devices // tensor
        if any(size % tensor for size in demand.split) or demand.rows % replicas or demand.slots % replicas:
            continue
        for fsdp in (ways for ways in range(1, replicas + 1) if replicas % ways == 0 and demand.embed % ways == 0):
            need = demand.state / (fsdp * tensor) + demand.weights / tensor + demand.slots_bytes / devices
            misfit = 0.0 if need <= MEMORY_SHARE * memory else need
            narrow = demand.embed // fsdp < _LEAST_SHARD and fsdp > 1
            # Wide shards before narrow ones; among the wide the most ways, among the narrow the fewest.
            order = (misfit, tensor, narrow, fsdp if narrow else -fsdp)
            candidates.append((order, MeshConfig(replicas // fsdp, fsdp, tensor)))
    if not candidates:
        most = math.gcd(*demand.split)
        raise ValueError(
            f"expected a mesh whose data × fsdp divides {demand.rows} rows and {demand.slots} slots and whose tensor "
            f"divides {', '.join(map(str, demand.split))}, got {devices} devices; make rows and slots multiples of "
            f"{-(-devices // math.gcd(devices, most))}"
        )
    return min(candidates, key=lambda each: each[0])[1]


def partition(axes: tuple[str | None, ...], rules: Rules) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have the logical names `axes`."""
    return PartitionSpec(*(rules[axis] if axis is not None else None for axis in axes))


def shardings(mesh: Mesh, axes: Any, rules: Rules, shapes: Any = None) -> Any:
    """Maps a tree of logical-axes tuples to a tree of `NamedSharding`.

    Args:
        mesh: the mesh.
        axes: pytree whose leaves are tuples of logical names.
        rules: `TRAIN` or `DECODE`.
        shapes: matching tree of arrays or shape structs; when given, divisibility is checked.

    Raises:
        ValueError: a dimension isn't divisible by the mesh axes that carry it; says which.
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
    return isinstance(node, tuple) and all(each is None or isinstance(each, str) for each in node)


_TPU_ORDERS: Mapping[tuple[str | None, ...], tuple[int, ...]] = {
    ("layers", "embed", "kv_heads", None, "head_dim"): (0, 2, 3, 1, 4),
    ("layers", "embed", None, "mlp"): (0, 2, 1, 3),
}
"""In which order, outermost first, the dimensions of some weights lie in a TPU's memory while sampling. Its products
want tiles of the summed and the last dimension; handed anything else, every decoded chunk begins with a copy of these
weights, the most of a model, and keeps it to its end."""


def decode_formats(mesh: Mesh, axes: Any, shapes: Any = None) -> Any:
    """Where and how weights lie while sampling: `shardings` by `DECODE`, and on TPUs in the order of their products.

    Raises:
        ValueError: as `shardings`.
    """
    where = shardings(mesh, axes, DECODE, shapes)
    if mesh.devices.flat[0].platform != "tpu":
        return where

    def leaf(names: tuple[str | None, ...], sharding: NamedSharding) -> NamedSharding | Format:
        order = _TPU_ORDERS.get(names)
        return sharding if order is None else Format(Layout(order), sharding)

    return jax.tree.map(leaf, axes, where, is_leaf=_is_axes)


def slot_shards(mesh: Mesh) -> int:
    """Into how many parts slots and rows are split."""
    return math.prod(mesh.shape[axis] for axis in _SHARED["slots"] or ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
