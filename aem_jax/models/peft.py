"""Saves an adapter in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

    lora_A.weight [rank, inputs] = Aᵀ, lora_B.weight [outputs, rank] = Bᵀ, W_eff = W + lora_alpha / r · lora_B lora_A

Each expert of a mixture has matrices of its own, as transformers 4 names its modules; PEFT loads them into the fused
experts of transformers 5, too. Gate and up are one matrix there, whose adapter PEFT makes of both and looks for inside
that of down; so an adapter of one or both is written with zeros for what is missing of the three.

A model that reads images, too (Gemma 3 from 4B), has its decoder in `model.language_model`. PEFT takes an adapter whose
names do not match for one that it must initialise, and only warns; so the names are those of the whole model, and
`target_modules` is a regular expression that leaves the vision tower out.

See https://huggingface.co/docs/peft/developer_guides/checkpoint. `PeftModel.from_pretrained(model, folder)` reads them.
"""

import json
from pathlib import Path

import numpy as np

from aem_jax.files import write_text
from aem_jax.models.checkpoint_files import write_tensors
from aem_jax.models.config import ModelConfig
from aem_jax.models.lora import Adapter, LoraConfig, Projection, projections, targets
from aem_jax.models.pretrained import new_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
TEXT_PART = "language_model"
"""Module of the decoder in a model that reads images, too."""


def save_adapter(
    folder: str | Path,
    config: ModelConfig,
    lora: LoraConfig,
    adapter: Adapter,
    *,
    base: str,
    reads_images: bool = False,
) -> None:
    """Writes an adapter atomically.

    Args:
        folder: output folder, new or empty.
        config: of the model.
        lora: of the adapter.
        adapter: on any mesh of this process; saved in its own dtype, float32.
        base: absolute path of the folder, or name on the Hub, of the base model; PEFT reads it on the machine where the
            adapter is loaded.
        reads_images: whether the base model reads images, too, and the policy is its text part (`reads_images`).

    Raises:
        ValueError: the folder is not empty.
        OSError: it cannot be written.
    """
    with new_folder(Path(folder)) as partial:
        write_text(partial / CONFIG, json.dumps(_config(config, lora, base, reads_images), indent=2) + "\n")
        write_tensors(partial / WEIGHTS, tensors(config, lora, adapter, reads_images))


def tensors(
    config: ModelConfig, lora: LoraConfig, adapter: Adapter, reads_images: bool = False
) -> dict[str, np.ndarray]:
    """PEFT's tensors by their names; the arguments are those of `save_adapter`."""
    rank, matrices = lora.rank, {}
    for name, projection in _written(config, lora).items():
        stack = (config.num_layers, *projection.experts)
        if name in adapter:
            a, b = (np.asarray(adapter[name][side]) for side in ("a", "b"))
        else:
            a = np.zeros((*stack, *projection.inputs, rank), np.float32)
            b = np.zeros((*stack, rank, *projection.outputs), np.float32)
        for stacked in np.ndindex(*stack):
            numbers = dict(zip(("layer", "expert"), stacked, strict=False))
            module = projection.tensor.format(**numbers).removesuffix(".weight")
            if reads_images:
                module = module.replace("model.", f"model.{TEXT_PART}.", 1)
            matrices[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(a[stacked].reshape(-1, rank).T)
            matrices[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(b[stacked].reshape(rank, -1).T)
    return matrices


def _written(config: ModelConfig, lora: LoraConfig) -> dict[str, Projection]:
    """The projections in the files: those with an adapter, and the rest of experts of which gate or up has one."""
    chosen = targets(config, lora)
    extra = ("gate_proj", "up_proj", "down_proj") if config.mixture and {"gate_proj", "up_proj"} & set(chosen) else ()
    return {name: one for name, one in projections(config).items() if name in chosen or name in extra}


def _config(config: ModelConfig, lora: LoraConfig, base: str, reads_images: bool) -> dict[str, object]:
    modules = [projection.tensor.split(".")[-2] for projection in _written(config, lora).values()]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": rf".*\.{TEXT_PART}\..*\.({'|'.join(modules)})" if reads_images else modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
