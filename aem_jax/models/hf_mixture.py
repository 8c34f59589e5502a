"""A mixture of experts from the fields of a `config.json`, and back. Every layer is one."""

from collections.abc import Mapping, Sequence
from typing import Any

from aem_jax.models.config import brief
from aem_jax.models.hf_fields import FLAG, SIZE, one_of, take
from aem_jax.models.parameters import ExpertNames, Mixture

_SPARSE: Mapping[ExpertNames, Mapping[str, Sequence[Any]]] = {
    "qwen": {"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    "mixtral": {"router_jitter_noise": (0.0,)},
}
"""Names of the experts' tensors -> fields that are supported in one form only, and their accepted values."""


def mixture_from_hf(theirs: Mapping[str, Any], names: ExpertNames) -> tuple[Mixture, int]:
    """The mixture of a `config.json`, and the width of an expert.

    Args:
        theirs: the `config.json`, with the family's defaults.
        names: of the experts' tensors.
    """
    for name, values in _SPARSE[names].items():
        one_of(theirs, name, values)
    # In transformers these are one field.
    counts = [name for name in ("num_experts", "num_local_experts") if name in theirs]
    if len({theirs[name] for name in counts if type(theirs[name]) is int}) > 1:
        raise ValueError(f"expected num_experts or num_local_experts, got both: {brief([theirs[n] for n in counts])}")
    default, k, width = {"qwen": (128, 8, 768), "mixtral": (8, 2, None)}[names]
    width_of = {"qwen": "moe_intermediate_size", "mixtral": "intermediate_size"}[names]
    return Mixture(
        num_experts=min(take(theirs, name, SIZE, default) for name in counts or ("num_experts",)),
        experts_per_token=take(theirs, "num_experts_per_tok", SIZE, k),
        norm_topk=names == "mixtral" or take(theirs, "norm_topk_prob", FLAG, False),
        names=names,
    ), take(theirs, width_of, SIZE, width)


def mixture_to_hf(mixture: Mixture, width: int) -> dict[str, Any]:
    """The fields of a mixture whose experts have this width."""
    common = {"num_experts_per_tok": mixture.experts_per_token, "output_router_logits": False}
    if mixture.names == "mixtral":
        if not mixture.norm_topk:
            raise ValueError(
                "expected norm_topk True of Mixtral's mixture, got False; no family combines these options"
            )
        return common | {"num_local_experts": mixture.num_experts}
    return common | {
        "num_experts": mixture.num_experts,
        "moe_intermediate_size": width,
        "norm_topk_prob": mixture.norm_topk,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
