"""Models in GGUF files that are written here with the package `gguf`, read and compared number by number."""

import json
import logging
import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_files import convert, model_fields, model_tensors, write_gguf
from safetensors.numpy import load_file, save_file

from aem_jax.gguf_file import read_header
from aem_jax.models import Llama3Scaling, ModelConfig, from_pretrained
from aem_jax.models import gguf as models_gguf
from aem_jax.models.families import config_to_hf
from aem_jax.models.gguf import KINDS
from aem_jax.models.pretrained import config_text, read_config, resolve
from aem_jax.models.weights import tensors
from aem_jax.sharding import MeshConfig, make_mesh

GOLDEN = Path(__file__).resolve().parent / "golden"
FOLDERS = ["llama-tied", "qwen2", "qwen2-tied", "qwen3"]
WIDE = {
    "llama": ModelConfig(48, 256, 512, 2, 4, 2, 64, tied_head=False, qk_norm=None, norm_eps=1e-5),
    "qwen2": ModelConfig(48, 256, 512, 2, 4, 2, 64, qk_norm=None, qkv_bias=True),
    "qwen3": ModelConfig(48, 256, 512, 2, 2, 1, 128),
}
"""Rows of a multiple of 256, the block of the K types. The head of the first is its own."""


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


def test_logits_equal_those_that_transformers_had_before_the_conversion(folder: Path, tmp_path: Path):
    convert(folder, tmp_path / "model.gguf")
    recorded = np.load(folder / "outputs.npz")
    model = from_pretrained(tmp_path / "model.gguf", dtype="float32")
    np.testing.assert_allclose(model.logits(recorded["tokens"]), recorded["logits"], atol=1e-4, rtol=0)
    assert model.config == from_pretrained(folder, dtype="float32").config


KIND_OF = {
    "llama-tied": ("F16", "Q8_0"),
    "qwen2": ("Q4_1", "Q5_0", "Q5_1"),
    "qwen2-tied": ("Q4_0",),
    "qwen3": ("BF16", "Q8_0"),
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in KIND_OF for kind in KIND_OF[name]])
def test_every_number_is_that_of_the_package(name: str, kind: str, tmp_path: Path):
    expected = convert(GOLDEN / name, tmp_path / "model.gguf", kind)
    from_pretrained(tmp_path / "model.gguf", dtype="float32").save_pretrained(tmp_path / "out", dtype="float32")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert set(ours) == set(expected)
    for name, numbers in expected.items():
        np.testing.assert_array_equal(ours[name], numbers, err_msg=name)


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q8_0"), ("qwen2", "Q4_1"), ("qwen3", "Q6_K")])
def test_transformers_reads_the_same_numbers(family: str, kind: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed; numbers of the package are compared instead")
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read GGUF files")
    from transformers import AutoModelForCausalLM, GgufConfig

    config = config_to_hf(WIDE[family], "float32")
    written, _ = model_tensors(config, random_tensors(WIDE[family]), kind)
    fields = {**model_fields(config), "tokenizer.ggml.tokens": [str(word) for word in range(48)]}  # it counts them
    path = write_gguf(tmp_path / "model.gguf", fields, written)
    settings: Any = {"gguf_file": path.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **settings).state_dict()
    from_pretrained(path, dtype="float32").save_pretrained(tmp_path / "out", dtype="float32")
    for name, numbers in load_file(tmp_path / "out" / "model.safetensors").items():
        np.testing.assert_array_equal(theirs[name], numbers, err_msg=name)


def random_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face's names, the norms around one."""
    rng, shapes = np.random.default_rng(0), {tensor.name: tensor.shape for tensor in tensors(config)}
    return {name: rng.normal(len(shape) == 1, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize(("family", "kind"), [("llama", "Q4_K"), ("qwen2", "Q5_K"), ("qwen3", "Q6_K")])
def test_k_types_and_the_logits_of_the_same_model_as_safetensors(family: str, kind: str, tmp_path: Path, caplog):
    config, held = config_to_hf(WIDE[family], "float32"), random_tensors(WIDE[family])
    written, expected = model_tensors(config, held, kind)
    path = write_gguf(tmp_path / "model.gguf", model_fields(config), written)
    with caplog.at_level(logging.INFO, "aem_jax.models.weights"):
        model = from_pretrained(path, dtype="float32")
    matrices = sum(numbers.ndim == 2 for numbers in held.values())
    assert [record.getMessage() for record in caplog.records] == [f"{path}: de-quantised tensors: {matrices} of {kind}"]
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "config.json").write_text(json.dumps(config))
    save_file(expected, tmp_path / "same" / "model.safetensors")
    same = from_pretrained(tmp_path / "same", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, same.params)
    tokens = np.random.default_rng(1).integers(0, 48, (2, 9))
    logits = model.logits(tokens)
    assert logits.std() > 0.1
    np.testing.assert_array_equal(logits, same.logits(tokens))
    assert model.config == same.config == WIDE[family]


def test_each_tensor_goes_to_its_shards_and_a_large_one_is_de_quantised_in_parts(tmp_path: Path, monkeypatch):
    convert(GOLDEN / "qwen2-tied", tmp_path / "model.gguf", "Q8_0")
    alone = from_pretrained(tmp_path / "model.gguf")
    monkeypatch.setattr(models_gguf, "_CHUNK", 96)  # three rows
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    spread = from_pretrained(tmp_path / "model.gguf", mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, spread.params, alone.params)
    gate_up = spread.params["base"]["layers"]["gate_up"]
    assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size


def test_the_header_is_that_which_the_package_reads(tmp_path: Path):
    others: dict[str, Any] = {"tokenizer.ggml.tokens": ["a", "ü", ""], "n": [1, -2], "x": [0.5, 0.25], "yes": True}
    convert(GOLDEN / "qwen3", tmp_path / "model.gguf", "Q8_0", **others)
    header, theirs = read_header(tmp_path / "model.gguf"), gguf.GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert set(header.fields) == set(fields) and others.items() <= header.fields.items()
    for name, value in fields.items():
        assert np.float32(header.fields[name]) == value if isinstance(value, float) else header.fields[name] == value
    assert header.fields["qwen3.attention.layer_norm_rms_epsilon"] == 1e-5
    places = {t.name: (tuple(reversed(t.shape.tolist())), t.tensor_type, t.data_offset) for t in theirs.tensors}
    assert header.tensors == places and set(KINDS) <= {kind.name for kind in gguf.GGML_QUANT_SIZES}


def divisors(config: ModelConfig, scaling: Llama3Scaling) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight, frequency by frequency."""
    found = []
    for pair in range(config.head_dim // 2):
        turns = scaling.original_context * config.rope_theta ** (-2 * pair / config.head_dim) / (2 * math.pi)
        if turns > scaling.high_freq_factor:
            found.append(1.0)
        elif turns < scaling.low_freq_factor:
            found.append(scaling.factor)
        else:
            fast = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
            found.append(1 / ((1 - fast) / scaling.factor + fast))
    return np.array(found, np.float32)


def test_llama_3_scaling_is_found_from_its_divisors(tmp_path: Path):
    config = replace(WIDE["llama"], rope_theta=500_000.0, num_layers=1)
    for scaling in (Llama3Scaling(8.0, 1.0, 4.0, 8192), Llama3Scaling(32.0, 1.0, 4.0, 8192)):
        path = with_divisors(tmp_path / f"{scaling.factor}.gguf", config, divisors(config, scaling))
        assert read_config(path, "float32") == replace(config, rope_scaling=scaling)
        assert "llama3" in config_text(path)
    path = with_divisors(tmp_path / "none.gguf", config, np.ones(32, np.float32))
    assert read_config(path, "float32") == config
    path = with_divisors(tmp_path / "other.gguf", config, divisors(config, Llama3Scaling(8.0, 1.0, 4.0, 4096)))
    with pytest.raises(ValueError, match=r"other.gguf: expected rope_freqs.weight to be Llama 3's scaling with .*8192"):
        read_config(path)
    path = with_divisors(tmp_path / "short.gguf", config, np.ones(16, np.float32))
    with pytest.raises(ValueError, match=r"expected rope_freqs.weight to be F32 \[32\], got type 0 \[16\]"):
        read_config(path)


def with_divisors(path: Path, config: ModelConfig, numbers: np.ndarray) -> Path:
    theirs = config_to_hf(config, "float32")
    held = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in tensors(config)}
    written, _ = model_tensors(theirs, held, "F32")
    return write_gguf(path, model_fields(theirs), {**written, "rope_freqs.weight": (numbers, Kind.F32)})


def refused(path: Path, message: str) -> None:
    for read in (read_config, from_pretrained):
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            "expected general.architecture to be one of llama, qwen2, qwen3, got",
        ),
        ({"split.count": 3}, r"expected a model in one file, got one of 3 \(split.count\); merge them"),
        ({"qwen3.block_count": None}, "expected the fields of a model, got no qwen3.block_count"),
        ({"qwen3.attention.layer_norm_rms_epsilon": None}, "got no qwen3.attention.layer_norm_rms_epsilon"),
        (
            {"qwen3.rope.scaling.type": "yarn"},
            "expected qwen3.rope.scaling.type = 'none', got 'yarn'",
        ),
        ({"qwen3.attention.sliding_window": 4096}, "expected qwen3.attention.sliding_window = 0, got 4096"),
        ({"qwen3.logit_scale": 0.5}, "expected no field qwen3.logit_scale, which is not known here, got 0.5"),
        ({"qwen3.rope.dimension_count": 6}, "expected qwen3.rope.dimension_count to be the width of a head, 12, got 6"),
        ({"qwen3.attention.head_count": 5}, "expected num_heads divisible by num_kv_heads, got 5 and 2"),
        ({"qwen3.attention.head_count": [4, 4]}, r"expected num_attention_heads to be a whole number .*, got \[4, 4\]"),
        ({"qwen3.feed_forward_length": 40}, "mlp.gate_proj.weight has shape .48, 32. instead of .40, 32."),
    ],
)
def test_a_field_that_is_missing_or_not_supported_is_named(fields: dict[str, Any], message: str, tmp_path: Path):
    theirs = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    written, _ = model_tensors(theirs, load_file(GOLDEN / "qwen3" / "model.safetensors"), "F32")
    refused(write_gguf(tmp_path / "model.gguf", {**model_fields(theirs), **fields}, written), message)


def test_other_types_and_unknown_tensors_are_named(tmp_path: Path):
    config = config_to_hf(WIDE["qwen3"], "float32")
    held = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in tensors(WIDE["qwen3"])}
    written, _ = model_tensors(config, held, "F32")
    norm = written["blk.1.attn_norm.weight"]
    coarse = np.zeros((256, 256 // 256 * 74), np.uint8)
    other = {**written, "blk.1.attn_output.weight": (coarse, Kind.IQ2_XS), "blk.1.attn_sinks.weight": norm}
    path = write_gguf(tmp_path / "model.gguf", model_fields(config), other)
    listed = ", ".join(KINDS)
    refused(path, f"model.layers.1.self_attn.o_proj.weight holds IQ2_XS instead of one of {listed}; blk.1.attn_sinks.w")
    content = bytearray(path.read_bytes())
    at = content.index(b"blk.1.attn_output.weight") + 24 + 4 + 16
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, f"expected blk.1.attn_output.weight to be one of {listed}, got type 99")


def test_another_file_is_refused_in_one_line(tmp_path: Path):
    whole, path = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    convert(GOLDEN / "qwen2-tied", whole)
    content = whole.read_bytes()
    cases = {
        b"": "expected a GGUF file, which begins with b'GGUF', got b''",
        b"GGML" + content[4:]: "expected a GGUF file, which begins with b'GGUF', got b'GGML'",
        b"version https://git-lfs.github.com/spec/v1": "got a Git LFS pointer; run git lfs pull",
        b"GGUF" + (1).to_bytes(4, "little") + content[8:]: "expected GGUF version 2 or 3, got 1",
        b"GGUF" + (3).to_bytes(4, "big") + content[8:]: "expected GGUF version 2 or 3, got big-endian numbers",
        content[:100]: "expected a complete header, got a file of 100 bytes that ends within it",
        content[:-100]: r"to end at byte \d+, got a file of \d+ bytes; is the download complete",
        content.replace(b"qwen2.block_count", b"qwen2.block_coun\xff"): "expected text in UTF-8",
    }
    for other, message in cases.items():
        path.write_bytes(other)
        refused(path, message)
    path.unlink()
    with pytest.raises(ValueError, match=f"expected a GGUF file, got none at {path}"):
        resolve(path)
    with pytest.raises(ValueError, match="smollm2-135m/model.gguf; make smollm2 fetches it"):
        resolve(tmp_path / "smollm2-135m" / "model.gguf")


def test_the_folder_of_a_file_names_the_file(tmp_path: Path):
    convert(GOLDEN / "qwen2-tied", tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="got No such file or directory; give the path of the file model.gguf itself"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((GOLDEN / "qwen2-tied" / "config.json").read_text())
    with pytest.raises(ValueError, match=r"got model.gguf; give the path of the file itself"):
        from_pretrained(tmp_path)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch):
    convert(GOLDEN / "qwen2-tied", tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"expected the package gguf, .* pip install 'aem_jax\[gguf\]'"):
        from_pretrained(tmp_path / "model.gguf")


def test_a_damaged_header_gives_one_line_or_a_model(tmp_path: Path):
    """The file has no checksum, so a changed number may go unseen. No other kind of error comes."""
    convert(GOLDEN / "llama-tied", tmp_path / "whole.gguf", "Q8_0")
    content, counts = (tmp_path / "whole.gguf").read_bytes(), Counter()
    first = min(info.offset for info in read_header(tmp_path / "whole.gguf").tensors.values())
    for seed in range(200):
        rng, path = random.Random(seed), tmp_path / "damaged.gguf"
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 8))):
            damaged[rng.randrange(first)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.randrange(first)] if seed % 5 == 0 else damaged)
        try:
            config = read_config(path)
            for tensor in models_gguf.open_gguf(path).tensors.values():
                tensor.read(None)
            assert config.num_layers == 2
            counts["read"] += 1
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), seed
            counts["refused"] += 1
    assert counts["refused"] > 60 and counts["read"] > 2, counts
