"""A model in a GGUF file, as llama.cpp's converter writes it: its config, and its weights by Hugging Face's names.

Llama, Qwen2 and Qwen3. A field that may change the model and is not known here is refused by its name. Left out: models
in several files (`split.count`); llama-gguf-split merges them.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from aem_jax.gguf_file import GGUFHeader, TensorInfo, read_header
from aem_jax.models.checkpoint_files import Checkpoint, StoredTensor
from aem_jax.models.config import ModelConfig, brief
from aem_jax.models.families import FAMILIES, config_from_hf
from aem_jax.models.parameters import EMBED, HEAD

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture`; each is the `model_type` of a family, too."""
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
"""Types of tensors that are read."""
_PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
"""Types that are numpy's, too; all others are de-quantised to float32."""
_CHUNK = 2**22
"""Numbers that are de-quantised at a time."""

_REQUIRED = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Field, without the architecture before it -> field of `config.json`."""
_ONE_FORM: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.sliding_window": 0,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scaling.type": "none",
}
"""Options that the decoder supports in one form only."""
_OPTIONAL = (
    *("vocab_size", "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base"),
    *("rope.dimension_count", "rope.scaling.finetuned", "tensor_data_layout"),
)
"""Further fields that may be there."""

_TOP = {"token_embd.weight": EMBED, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Module of a layer -> Hugging Face's."""
_ROPE, _FLOAT32 = "rope_freqs.weight", 0
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 to 3.3 have in common. A GGUF file has only the divisors of the frequencies that follow from it."""


def config_of(path: Path) -> dict[str, Any]:
    """The `config.json` of a GGUF file's model.

    Raises:
        ValueError: not a GGUF file, another architecture, or a field that is missing or not supported.
    """
    header = read_header(path)
    try:
        return _config(header)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def open_gguf(path: Path) -> Checkpoint:
    """The weights of a GGUF file, by Hugging Face's names.

    Raises:
        ValueError: as `config_of`, or a truncated file, or the package `gguf` is not installed.
    """
    header, package = read_header(path), _package()
    try:
        return Checkpoint(path, [path], dict(_tensors(header, _config(header), package)), KINDS)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"expected the package gguf, which de-quantises GGUF files, got {error}; pip install 'aem_jax[gguf]'"
        ) from error
    return gguf


def _config(header: GGUFHeader) -> dict[str, Any]:
    kind = header.fields.get("general.architecture")
    family = next((family for family in FAMILIES if family.model_type == kind), None)
    if not isinstance(kind, str) or kind not in ARCHITECTURES or family is None:
        raise ValueError(f"expected general.architecture to be one of {', '.join(ARCHITECTURES)}, got {brief(kind)}")
    if (parts := header.fields.get("split.count", 1)) not in (0, 1):
        raise ValueError(f"expected a model in one file, got one of {brief(parts)} (split.count); merge them")
    fields = {name[len(kind) + 1 :]: value for name, value in header.fields.items() if name.startswith(f"{kind}.")}
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise ValueError(f"expected the fields of a model, got no {', '.join(f'{kind}.{name}' for name in missing)}")
    for name, value in fields.items():
        if name not in (*_REQUIRED, *_OPTIONAL, *_ONE_FORM):
            raise ValueError(f"expected no field {kind}.{name}, which is not known here, got {brief(value)}")
        if name in _ONE_FORM and value != _ONE_FORM[name]:
            raise ValueError(
                f"expected {kind}.{name} = {_ONE_FORM[name]!r}, got {brief(value)}; the decoder has no other form"
            )
    hidden, heads = fields["embedding_length"], fields["attention.head_count"]
    whole = type(hidden) is type(heads) is int and heads > 0 and hidden % heads == 0
    head_dim = fields.get("attention.key_length", hidden // heads if whole else None)
    if head_dim is None:
        raise ValueError(
            f"expected {kind}.embedding_length divisible by {kind}.attention.head_count, got {brief(hidden)} and "
            f"{brief(heads)}"
        )
    for name in ("attention.value_length", "rope.dimension_count"):
        if fields.get(name, head_dim) != head_dim:
            raise ValueError(f"expected {kind}.{name} to be the width of a head, {head_dim}, got {brief(fields[name])}")
    embed = header.tensors.get("token_embd.weight")
    config = {
        "architectures": [family.architecture],
        "model_type": kind,
        **{theirs: fields[name] for name, theirs in _REQUIRED.items()},
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": fields.get("vocab_size", embed and embed.shape[0]),
        "hidden_act": "silu",
        "rope_theta": fields.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    checked = config_from_hf(config)
    if family.model_type == "llama" and _ROPE in header.tensors:
        scaling = _rope_scaling(header, checked)
        config["rope_parameters"] = {"rope_theta": config["rope_theta"], **scaling}
    return config


def _rope_scaling(header: GGUFHeader, config: ModelConfig) -> dict[str, Any]:
    """The scaling whose divisors of the rotary frequencies the file holds: Llama 3's, of any factor."""
    info = header.tensors[_ROPE]
    if info.shape != (config.head_dim // 2,) or info.type != _FLOAT32:
        raise ValueError(
            f"expected {_ROPE} to be F32 [{config.head_dim // 2}], got type {info.type} {list(info.shape)}"
        )
    divisors = _read(header.path, info, 4 * info.shape[0], partial(_decode_plain, "F32")).astype(np.float64)
    if np.all(divisors == 1):
        return {"rope_type": "default"}
    factor, low, high = float(divisors.max()), _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = _LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    fast = np.clip((turns - low) / (high - low), 0, 1)
    if not factor > 1 or not np.allclose(divisors, 1 / (fast + (1 - fast) / factor), rtol=1e-5, atol=0):
        raise ValueError(f"expected {_ROPE} to be Llama 3's scaling with {_LLAMA3}, got {divisors.tolist()}")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _tensors(header: GGUFHeader, config: Mapping[str, Any], package: ModuleType) -> Iterator[tuple[str, StoredTensor]]:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    is_llama = config["model_type"] == "llama"
    for name, info in header.tensors.items():
        if is_llama and name == _ROPE:
            continue
        kind, row_bytes = _type(package, name, info)
        end = info.offset + math.prod(info.shape[:-1]) * row_bytes
        if end > header.file_bytes:
            raise ValueError(
                f"expected {name} to end at byte {end}, got a file of {header.file_bytes} bytes; "
                "is the download complete?"
            )
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        number, module, part = match.groups() if match else ("", "", "")
        decode = partial(_decode_plain, kind) if kind in _PLAIN else partial(_dequantise, package, info.type)
        read = partial(_read, header.path, info, row_bytes, decode)
        if is_llama and module in heads:
            read = partial(_split_pairs, read, heads[module])
        theirs = f"model.layers.{number}.{_MODULES[module]}.{part}" if module in _MODULES else _TOP.get(name, name)
        yield theirs, StoredTensor(info.shape, kind, read)


def _type(package: ModuleType, name: str, info: TensorInfo) -> tuple[str, int]:
    """(name of the type, bytes of a row) of a tensor."""
    try:
        kind = package.GGMLQuantizationType(info.type)
    except ValueError:
        raise ValueError(f"expected {name} to be one of {', '.join(KINDS)}, got type {info.type}") from None
    block, block_bytes = package.GGML_QUANT_SIZES[kind]
    if info.shape[-1] % block:
        raise ValueError(
            f"expected {name} of {kind.name} to have rows of a multiple of {block}, got {list(info.shape)}"
        )
    return kind.name, info.shape[-1] // block * block_bytes


def _split_pairs(read: Callable[[slice | None], np.ndarray], heads: int, rows: slice | None = None) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order: of each head the first of all pairs, then the second.

    llama.cpp rotates neighbouring rows of a Llama, so its converter puts the two of a pair beside each other.
    """
    pairs = read(None)
    whole = pairs.reshape(heads, -1, 2, pairs.shape[-1]).swapaxes(1, 2).reshape(pairs.shape)
    return whole if rows is None else whole[rows]


def _read(
    path: Path, info: TensorInfo, row_bytes: int, decode: Callable[[np.ndarray], np.ndarray], rows: slice | None = None
) -> np.ndarray:
    """Numbers of a tensor, or of some rows of it. The file is not mapped: see `open_safetensors`."""
    first, last, _ = (rows or slice(None)).indices(math.prod(info.shape[:-1]))
    num_bytes = max(last - first, 0) * row_bytes
    try:
        raw = np.fromfile(path, np.uint8, num_bytes, offset=info.offset + first * row_bytes)
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got {error.strerror}") from error
    if raw.size < num_bytes:
        raise ValueError(f"{path}: expected {num_bytes} bytes of a tensor, got {raw.size}; did the file change?")
    numbers = decode(raw.reshape(-1, row_bytes))
    return numbers.reshape(info.shape if rows is None else (-1, *info.shape[1:]))


def _decode_plain(kind: str, raw: np.ndarray) -> np.ndarray:
    return raw.view(_PLAIN[kind])


def _dequantise(package: ModuleType, kind: int, raw: np.ndarray) -> np.ndarray:
    """float32 rows of quantised ones, a few at a time, because `gguf.dequantize` takes several times their memory."""
    columns = package.quant_shape_from_byte_shape(raw.shape, kind)[-1]
    numbers, step = np.empty((len(raw), columns), np.float32), max(1, _CHUNK // columns)
    with np.errstate(all="ignore"):  # what is not finite is refused by the tensor's name later
        for start in range(0, len(raw), step):
            numbers[start : start + step] = package.dequantize(raw[start : start + step], kind)
    return numbers
