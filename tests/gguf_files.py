"""GGUF files for tests, written with the package's own writer, names and quantisers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

TOP = "general.architecture"


def stored(numbers: np.ndarray, kind: str, seed: int = 0) -> tuple[np.ndarray, Kind]:
    """Numbers in a type, as in a file, and the type that they have: F32 where rows are no multiple of its block.

    The package has no quantiser for K types: their blocks are random bytes with scales of order 0.01.
    """
    block, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    if numbers.ndim == 1 or numbers.shape[-1] % block:
        return numbers.astype(np.float32), Kind.F32
    if not kind.endswith("_K"):
        return gguf.quantize(numbers.astype(np.float32), Kind[kind]), Kind[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (len(numbers), numbers.shape[-1] // block, size), dtype=np.uint8)
    places = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for at in places:
        scales = rng.uniform(1e-4, 1e-3, blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(len(numbers), -1), Kind[kind]


def neighbouring(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's queries or keys in llama.cpp's order, moved one by one."""
    width = len(rows) // heads
    moved = np.empty_like(rows)
    for head in range(heads):
        for pair in range(width // 2):
            for half in range(2):
                moved[head * width + 2 * pair + half] = rows[head * width + half * (width // 2) + pair]
    return moved


def model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that llama.cpp's converter makes of a config.json."""
    kind = config["model_type"]
    own: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    if kind == "llama":
        own |= {"vocab_size": config["vocab_size"], "rope.dimension_count": config["head_dim"]}
    if config.get("head_dim"):
        own |= {"attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"]}
    return {TOP: kind, **{f"{kind}.{name}": value for name, value in own.items()}}


def write_gguf(path: Path, fields: Mapping[str, Any], tensors: Mapping[str, tuple[np.ndarray, Kind]] = {}) -> Path:
    """Writes a file; a field of None is left out."""
    writer = gguf.GGUFWriter(path, fields[TOP])
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for name, value in fields.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None and name != TOP:
            writer.add_key_value(name, value, gguf.GGUFValueType[kinds[type(value)]])
    for name, (numbers, kind) in tensors.items():
        writer.add_tensor(name, numbers, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def model_tensors(
    config: Mapping[str, Any], held: Mapping[str, np.ndarray], kind: str
) -> tuple[dict[str, tuple[np.ndarray, Kind]], dict[str, np.ndarray]]:
    """(tensors of a GGUF file, the numbers that a reader must find, by Hugging Face's names) of a model's tensors."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config["model_type"].upper()], config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    written, expected = {}, {}
    for seed, (name, numbers) in enumerate(held.items()):
        module = name.split(".")[-2]
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        raw, used = stored(numbers, kind, seed)
        expected[name] = gguf.dequantize(raw, used)
        if config["model_type"] == "llama" and module in heads:  # the rows of a quantised matrix can be moved, too
            raw = neighbouring(raw, heads[module])
        written[theirs] = (raw, used)
    return written, expected


def convert(folder: Path, path: Path, kind: str = "F32", **fields: Any) -> dict[str, np.ndarray]:
    """Writes a model in Hugging Face's files as GGUF; returns the numbers that a reader must find."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    written, expected = model_tensors(config, load_file(folder / "model.safetensors"), kind)
    write_gguf(path, {**model_fields(config), **fields}, written)
    return expected
