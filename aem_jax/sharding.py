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
}
TRAIN: Rules = {**_SHARED, "embed": "fsdp"}
"""Learning: each weight split over fsdp along its embedding dimension and over tensor along the other."""
DECODE: Rules = {**_SHARED, "embed": None}
"""Sampling: no weight is split over data or fsdp."""


@dataclass(frozen=True)
class MeshConfig:
    """Shape of the device mesh. One entry may be -1: it takes the devices that the others leave."""

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
    sizes = [config.data, config.fsdp, config.tensor]
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"expected positive mesh sizes and at most one -1, got data, fsdp, tensor = {sizes}")
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    total = sizes[0] * sizes[1] * sizes[2]
    if total != len(devices):
        raise ValueError(
            f"expected data x fsdp x tensor = {len(devices)} devices, "
            f"got {config.data} x {config.fsdp} x {config.tensor};"
            " set --mesh.data, --mesh.fsdp or --mesh.tensor so that the product fits, or one of them to -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


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

    is_axes = lambda node: isinstance(node, tuple) and all(n is None or isinstance(n, str) for n in node)  # noqa: E731
    if shapes is None:
        return jax.tree.map(leaf, axes, is_leaf=is_axes)
    return jax.tree.map(leaf, axes, shapes, is_leaf=is_axes)


def slot_shards(mesh: Mesh) -> int:
    """Into how many parts slots and rows are split."""
    return math.prod(mesh.shape[axis] for axis in _SHARED["slots"] or ())


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())
