"""Rotary positions from the fields of a `config.json`, and back.

They stand in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling` (4). As in transformers,
`rope_scaling` replaces `rope_parameters`, and a `rope_theta` inside either object takes precedence over the one
outside.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from aem_jax.models.config import brief
from aem_jax.models.hf_fields import FLAG, OBJECT, POSITIVE, SIZE, one_of, take
from aem_jax.models.rotary import LinearScaling, Llama3Scaling, Rope, YarnScaling

_SCALINGS: Mapping[str, Sequence[str]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"),
        *("mscale_all_dim", "truncate"),
    ),
}
"""`rope_type` -> its fields."""


def ropes_from_hf(theirs: Mapping[str, Any], *, own_sliding: bool, max_positions: int) -> tuple[Rope, float | None]:
    """Rotary positions of most layers, and the base of those of layers with a window if they have their own.

    A family with two kinds of layers (`own_sliding`) has an object for each in `rope_parameters`.

    Args:
        theirs: the `config.json`, with the family's defaults.
        own_sliding: whether layers with a window have rotary positions of their own.
        max_positions: the original context of a scaling without one.
    """
    objects = {name: take(theirs, name, OBJECT, None) for name in ("rope_scaling", "rope_parameters")}
    if not own_sliding:
        source = "rope_scaling" if objects["rope_scaling"] else "rope_parameters"
        rope = {"rope_theta": theirs.get("rope_theta", 10_000.0), **(objects[source] or {})}
        return _rope(rope, source, max_positions, theirs), None
    parts = objects["rope_parameters"] or {}
    if unknown := [name for name in parts if name not in ("full_attention", "sliding_attention")]:
        raise ValueError(f"expected rope_parameters to have full_attention and sliding_attention, got {brief(unknown)}")
    full, sliding = (take(parts, name, OBJECT, None) or {} for name in ("full_attention", "sliding_attention"))
    full = {"rope_theta": theirs["rope_theta"], **full, **(objects["rope_scaling"] or {})}
    of_sliding = _rope(
        {"rope_theta": theirs["rope_local_base_freq"], **sliding}, "rope_parameters.sliding_attention", max_positions
    )
    if of_sliding.scaling:
        raise ValueError(
            f"expected rope_parameters.sliding_attention.rope_type 'default', got {brief(sliding.get('rope_type'))}"
        )
    return _rope(full, "rope_parameters.full_attention", max_positions), of_sliding.theta


def _rope(rope: Mapping[str, Any], source: str, max_positions: int, outside: Mapping[str, Any] | None = None) -> Rope:
    """Rotary positions of an object with a `rope_theta`.

    Args:
        rope: the object.
        source: its name.
        max_positions: the original context of an object without one.
        outside: the `config.json`, whose `original_max_position_embeddings` takes precedence in transformers; None for
            an object of one kind of layers.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(f"expected {source}.rope_type {' or '.join(map(repr, _SCALINGS))}, got {brief(kind)}")
    known = ["rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALINGS[kind]]
    if outside is None:
        one_of(rope, "truncate", (True,))  # transformers reads it outside the object alone
    if unknown := [name for name in rope if name not in known]:
        raise ValueError(
            f"expected {source} of rope_type {kind!r} to have {', '.join(known)} alone, got {brief(unknown)}"
        )
    one_of(rope, "partial_rotary_factor", (1.0, 1))
    theta = float(take(rope, "rope_theta", POSITIVE))
    if kind == "default":
        return Rope(theta)
    factor = float(take(rope, "factor", POSITIVE))
    if kind == "linear":
        return Rope(theta, LinearScaling(factor))
    name = "original_max_position_embeddings"
    context = take(outside if outside and name in outside else {name: max_positions, **rope}, name, SIZE)
    if kind == "llama3":
        bounds = (float(take(rope, bound, POSITIVE)) for bound in ("low_freq_factor", "high_freq_factor"))
        return Rope(theta, Llama3Scaling(factor, *bounds, original_context=context))
    return Rope(theta, _yarn(rope, theta, factor, context))


def _yarn(rope: Mapping[str, Any], theta: float, factor: float, context: int) -> YarnScaling:
    """YaRN's scaling; a null means the default, as in transformers."""
    if theta == 1:
        raise ValueError("expected rope_theta other than 1 with rope_type 'yarn', got 1")
    given = {name: value for name, value in rope.items() if value is not None}
    number = lambda name, default: float(take(given, name, POSITIVE, default))

    def sharpness(scale: float = 1.0) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = sharpness()
    if "mscale" in given and "mscale_all_dim" in given:
        attention_factor = sharpness(number("mscale", 1.0)) / sharpness(number("mscale_all_dim", 1.0))
    return YarnScaling(
        factor,
        context,
        number("attention_factor", attention_factor),
        number("beta_fast", 32.0),
        number("beta_slow", 1.0),
        take(rope, "truncate", FLAG, True),
    )


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of one kind of layers."""
    fields: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    match rope.scaling:
        case LinearScaling(factor):
            fields |= {"rope_type": "linear", "factor": factor}
        case Llama3Scaling(factor, low, high, context):
            values = (factor, low, high, context)
            fields |= {"rope_type": "llama3", **dict(zip(_SCALINGS["llama3"], values, strict=True))}
        case YarnScaling(factor, context, attention_factor, fast, slow, truncate):
            values = (factor, context, attention_factor, fast, slow)
            fields |= {"rope_type": "yarn", **dict(zip(_SCALINGS["yarn"], values)), "truncate": truncate}
    return fields
