"""Fields of a `config.json` in which layers differ, and back: sliding windows, and rotary positions or none."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from aem_jax.models.config import ModelConfig
from aem_jax.models.hf_fields import FLAG, INDEX, SIZE, Kind, one_of, take

Windows = Literal["none", "all", "layers"]
"""Which layers of a family can have a sliding window: none, all or none of them, or those of `layer_types`."""

Slides = Callable[[Mapping[str, Any], int], bool]
"""(config.json, layer) -> whether the layer has a window, in a file without `layer_types`."""


def every_layer(theirs: Mapping[str, Any], layer: int) -> bool:
    """Every layer has a window if the file has one."""
    return theirs.get("sliding_window") is not None


def last_layers(theirs: Mapping[str, Any], layer: int) -> bool:
    """The layers from `max_window_layers` on have a window."""
    return theirs.get("sliding_window") is not None and layer >= take(theirs, "max_window_layers", INDEX, 28)


def layers_without_rope(theirs: Mapping[str, Any], layer: int) -> bool:
    """The layers without rotary positions have a window."""
    return theirs.get("sliding_window") is not None and layer in unrotated_from_hf(theirs, layer + 1)


def all_but_each_sixth(theirs: Mapping[str, Any], layer: int) -> bool:
    """All layers but each sixth one have a window."""
    return (layer + 1) % take(theirs, "sliding_window_pattern", SIZE, 6) != 0


def windows_from_hf(
    theirs: Mapping[str, Any], layers: int, *, windows: Windows, window_flag: bool, slides: Slides
) -> tuple[int, ...]:
    """The sliding window of each layer; 0 for none.

    Args:
        theirs: the `config.json`, with the family's defaults.
        layers: number of layers.
        windows: as in `Family`, like the next two.
        window_flag: see there.
        slides: see there.
    """
    flag = take(theirs, "use_sliding_window", FLAG, False)
    if windows == "none" or (window_flag and not flag):
        if not window_flag:
            one_of(theirs, "use_sliding_window", (False,))
        take(theirs, "layer_types", _layer_types(layers, "full_attention"), None)
        return ()
    if not window_flag:
        one_of(theirs, "use_sliding_window", (False,))
    if windows == "all":
        one_of(theirs, "layer_types", (None,))
    kinds = take(theirs, "layer_types", _layer_types(layers, "full_attention", "sliding_attention"), None)
    if kinds is None:
        kinds = ["sliding_attention" if slides(theirs, layer) else "full_attention" for layer in range(layers)]
    if "sliding_attention" not in kinds:
        return ()
    size = take(theirs, "sliding_window", SIZE)
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def unrotated_from_hf(theirs: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Indices of the first `layers` layers that have no rotary positions."""
    rotated = take(theirs, "no_rope_layers", _rotated(layers), None)
    if rotated is None:
        interval = take(theirs, "no_rope_layer_interval", SIZE, 4)
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    return tuple(layer for layer in range(layers) if not rotated[layer])


def layers_to_hf(config: ModelConfig, *, windows: Windows, window_flag: bool, unrotated: bool) -> dict[str, Any]:
    """The fields that say which layers have a sliding window, and which have no rotary positions; as in `Family`."""
    size = max(config.windows) or None
    kinds = ["sliding_attention" if window else "full_attention" for window in config.windows]
    rotated = [int(layer not in config.unrotated_layers) for layer in range(config.num_layers)]
    fields: dict[str, Any] = {"no_rope_layers": rotated} if unrotated else {}
    if windows == "none" or (window_flag and size is None):
        return fields
    fields |= {"sliding_window": size} | ({"use_sliding_window": True} if window_flag else {})
    return fields if windows == "all" else fields | {"layer_types": kinds}


def _layer_types(layers: int, *kinds: str) -> Kind:
    fits = lambda x: isinstance(x, list) and len(x) == layers and all(layer in kinds for layer in x)
    return Kind(f"{' or '.join(map(repr, kinds))} for each of {layers} layers", lambda x: x is None or fits(x))


def _rotated(layers: int) -> Kind:
    fits = lambda x: (
        isinstance(x, list) and len(x) >= layers and all(type(flag) is int and flag in (0, 1) for flag in x)
    )
    return Kind(f"0 or 1 for each of {layers} layers", lambda x: x is None or fits(x))
