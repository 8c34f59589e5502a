"""An adapter in PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

    lora_A.weight [rank, inputs] = Aᵀ, lora_B.weight [outputs, rank] = Bᵀ, W_eff = W + lora_alpha / r · lora_B lora_A

of https://huggingface.co/docs/peft/developer_guides/checkpoint. `PeftModel.from_pretrained(model, folder)` reads them.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from aem_jax.models.lora import Adapter, targets
from aem_jax.models.policy import LoraPolicy
from aem_jax.models.pretrained import check_free

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(folder: str | Path, policy: LoraPolicy, adapter: Adapter, *, base: str) -> None:
    """Writes an adapter, whole or not at all.

    Args:
        folder: to write to; new or empty.
        policy: that the adapter is of.
        adapter: on any mesh of this process; saved in its own dtype, float32.
        base: folder or name of the model that it stands on.

    Raises:
        ValueError: the folder holds something.
    """
    folder = Path(folder)
    check_free(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(_config(policy, base), indent=2) + "\n", encoding="utf-8")
    save_file(tensors(policy, adapter), partial / WEIGHTS, metadata={"format": "pt"})
    os.replace(partial, folder)


def tensors(policy: LoraPolicy, adapter: Adapter) -> dict[str, np.ndarray]:
    """PEFT's tensors by their names."""
    found = {}
    for name in targets(policy.config, policy.lora):
        module = f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        a, b = (np.asarray(adapter[name][each]) for each in ("a", "b"))
        for layer in range(policy.config.num_layers):
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            found[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, policy.lora.rank).T)
            found[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(policy.lora.rank, -1).T)
    return found


def _config(policy: LoraPolicy, base: str) -> dict[str, object]:
    lora = policy.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "target_modules": list(targets(policy.config, lora)),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
