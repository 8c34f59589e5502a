"""Checks of arguments, and the two gathers that handle id -1.

Shapes and dtypes are static, so they are checked under trace, too. Values are checked only where they are concrete
(never inside `jit`), so the checks cost nothing in a compiled step.
"""

import operator

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike


def float_array(name: str, values: ArrayLike) -> jax.Array:
    """`values` as a float array of at least 32 bits; integers are refused (a sign of swapped arguments)."""
    array = jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"expected {name} of a floating dtype, got {array.dtype}; are two arguments swapped?")
    return array if jnp.finfo(array.dtype).bits >= 32 else array.astype(jnp.float32)


def real_array(name: str, values: ArrayLike) -> jax.Array:
    """As `float_array`, but integers are accepted, since returns often are."""
    array = jnp.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(jnp.float32)
    return float_array(name, array)


def id_array(name: str, ids: ArrayLike, limit: int) -> jax.Array:
    """`ids` as an integer array; where its values are known they must lie in [-1, limit). -1 stands for "none"."""
    array = jnp.asarray(ids)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"expected {name} of an integer dtype, got {array.dtype}; cast it with .astype('int32')")
    known = ids if hasattr(ids, "dtype") else array
    if not isinstance(known, Tracer) and getattr(known, "is_fully_addressable", True) and array.size:
        host = jax.device_get(known)
        low, high = int(host.min()), int(host.max())
        if low < -1 or high >= limit:
            raise ValueError(
                f"expected {name} in [-1, {limit}), got values from {low} to {high}; renumber them or raise the count"
            )
    return array


def mask_array(name: str, mask: ArrayLike) -> jax.Array:
    """`mask` as a bool array."""
    array = jnp.asarray(mask)
    if array.dtype != jnp.bool_:
        raise ValueError(f"expected {name} of dtype bool, got {array.dtype}; cast it with .astype(bool)")
    return array


def static_count(name: str, count: int) -> int:
    """`count` as a Python int: it fixes shapes, so it cannot be traced."""
    if isinstance(count, Tracer):
        raise ValueError(f"expected {name} to be a Python int, got a traced array; mark it static (static_argnames)")
    try:
        number = operator.index(count)
    except TypeError:
        raise ValueError(f"expected {name} to be an int, got {count!r}") from None
    if number < 0:
        raise ValueError(f"expected {name} >= 0, got {number}")
    return number


def same_shape(**arrays: jax.Array) -> None:
    """All of `arrays` must have one shape; nothing is broadcast."""
    if len({array.shape for array in arrays.values()}) > 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"expected equal shapes, got {shapes}; nothing is broadcast here")


def one_axis(name: str, array: jax.Array) -> None:
    """`array` must have exactly one axis."""
    if array.ndim != 1:
        raise ValueError(f"expected {name} with one axis, got shape {array.shape}; flatten it, or vmap over the others")


def not_negative(name: str, value: ArrayLike) -> None:
    """A number given on the host must be >= 0 (which a NaN is not)."""
    if isinstance(value, int | float) and not value >= 0:
        raise ValueError(f"expected {name} >= 0, got {value}")


def members(ids: jax.Array, limit: int, valid: ArrayLike | None) -> jax.Array:
    """bool, as `ids`: which entries belong to one of the `limit` segments and are valid."""
    inside = (ids >= 0) & (ids < limit)
    if valid is None:
        return inside
    valid = mask_array("valid", valid)
    same_shape(ids=ids, valid=valid)
    return inside & valid


def take(values: jax.Array, ids: jax.Array, fill: ArrayLike) -> jax.Array:
    """`values[ids]`, and `fill` where an id is outside the array (plain indexing would wrap -1 to the last entry)."""
    if values.shape[0] == 0:
        return jnp.full(ids.shape, fill, values.dtype)
    inside = (ids >= 0) & (ids < values.shape[0])
    return jnp.where(inside, values[jnp.where(inside, ids, 0)], jnp.asarray(fill, values.dtype))
