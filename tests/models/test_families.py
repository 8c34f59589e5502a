"""`config.json` as transformers reads it: the same values, or a refusal that names the field."""

import copy
import json
import logging
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers_config import in_transformers

from aem_jax.models import ModelConfig, Llama3Scaling
from aem_jax.models.config import CONFIGS
from aem_jax.models.families import FAMILIES, config_from_hf, config_to_hf

GOLDEN = Path(__file__).resolve().parent / "golden"
FILES = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in ("qwen2", "qwen3", "llama", "olmo2")}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
JUNK = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2.5,
    -0.5,
    1e9,
    2**40,
    10**400,
    float("inf"),
    "",
    "silu",
    "32",
    [],
    [1],
    {},
    {"a": 1},
)
"""Values that a field may have by mistake."""
LIKELY: dict[str, tuple[Any, ...]] = {
    "head_dim": (8, 16, 6, 7),
    "num_key_value_heads": (1, 2, 4, 3),
    "num_attention_heads": (4, 8),
    "hidden_size": (32, 33, 64),
    "intermediate_size": (48,),
    "num_hidden_layers": (1, 2, 3),
    "vocab_size": (64,),
    "max_position_embeddings": (16, 32_768),
    "rms_norm_eps": (1e-6, 1e-5),
    "hidden_act": ("silu", "swish", "gelu_pytorch_tanh", "gelu", "relu"),
    "tie_word_embeddings": (True, False),
    "attention_bias": (False, True),
    "mlp_bias": (False, True),
    "use_sliding_window": (False, True),
    "sliding_window": (4096, 8),
    "max_window_layers": (0, 28),
    "layer_types": (["full_attention"] * 2, ["full_attention", "sliding_attention"], ["full_attention"]),
    "model_type": ("qwen2", "qwen3", "llama", "olmo2", "mistral"),
    "architectures": (
        ["Qwen2ForCausalLM"],
        ["LlamaForCausalLM"],
        ["Qwen2Model", "Qwen2ForCausalLM"],
        "LlamaForCausalLM",
    ),
    "original_max_position_embeddings": (64,),
    "partial_rotary_factor": (1.0, 0.5),
    "rope_theta": (1e4, 500_000, 1e6),
    "rope_scaling": (
        *({"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}),
        *({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
        *({"type": "default"}, {"rope_type": "default", "rope_theta": 7.0}, {"rope_type": None}),
        *(LLAMA3, LLAMA3 | {"type": "yarn"}, LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 9.0}),
        *(LLAMA3 | {"factor": "8"}, LLAMA3 | {"high_freq_factor": 1.0}, LLAMA3 | {"factor": 0.5}),
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
UNREAD = {"sliding_window", "max_window_layers"}
"""Fields that mean something with use_sliding_window alone, which is refused."""
LIKELY["rope_parameters"] = LIKELY["rope_scaling"]
LIKELY |= {f"rope_parameters.{name}": LIKELY[name] for name in ("rope_theta", "partial_rotary_factor")}


def mutated(rng: random.Random) -> dict[str, Any]:
    """A config with one to three fields changed, dropped, or of another kind."""
    theirs = copy.deepcopy(FILES[rng.choice(list(FILES))])
    if rng.random() < 0.3:  # as transformers 4 writes it
        rope = theirs.pop("rope_parameters")
        theirs |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if len(rope) > 1 else None}
    for name in rng.sample(list(LIKELY), rng.choice((1, 1, 2, 3))):
        value = copy.deepcopy(rng.choice(LIKELY[name] if rng.random() < 0.6 or name in UNREAD else JUNK))
        holder, _, inner = name.rpartition(".")
        fields = theirs.get(holder) if holder else theirs
        if not isinstance(fields, dict):
            continue
        if rng.random() < 0.15:
            fields.pop(inner, None)
        else:
            fields[inner] = value
    return theirs


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_config_is_read_as_in_transformers_or_refused(seed: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    rng, read, refused = random.Random(seed), 0, 0
    for _ in range(500):
        theirs = mutated(rng)
        given = copy.deepcopy(theirs)
        try:
            ours = config_from_hf(theirs, "float32")
        except ValueError as error:
            assert str(error).startswith("expected ") and "\n" not in str(error), error
            refused += 1
            continue
        assert theirs == given
        if theirs.get("model_type") is None:  # transformers requires one, ours needs only the architecture
            continue
        assert ours == ModelConfig(**in_transformers(theirs), dtype="float32"), theirs
        read += 1
    assert read > 150 and refused > 150


QWEN2, LLAMA = FILES["qwen2"], FILES["llama"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("theirs", "change", "expected"),
    [
        (QWEN2, {"rope_scaling": LLAMA3, "rope_theta": 9e3}, {"rope_theta": 9e3, "max_positions": 32_768}),
        (LLAMA, {"rope_scaling": {"type": "default"}}, {"rope_scaling": None, "rope_theta": 1e4}),
        (QWEN2, {"rope_scaling": None, "rope_theta": None}, {"rope_theta": 1000.0}),
        (QWEN2, {"rope_scaling": {}, "rope_theta": 9e3}, {"rope_theta": 1000.0}),
        (QWEN2, {"rope_parameters": None, "rope_theta": 500_000}, {"rope_theta": 5e5}),
        (LLAMA, {"original_max_position_embeddings": 16}, {"rope_scaling": Llama3Scaling(4.0, 1.0, 4.0, 16)}),
        (QWEN2, {"num_key_value_heads": None, "head_dim": None}, {"num_kv_heads": 4, "head_dim": 8}),
        (LLAMA, {"hidden_act": "swish", "architectures": []}, {"qkv_bias": False, "activation": "silu"}),
        (LLAMA, {"hidden_act": "gelu_pytorch_tanh"}, {"activation": "gelu_tanh"}),
        (QWEN2, {"sliding_window": 8, "max_window_layers": 0, "torch_dtype": "float16"}, {"head_dim": 8}),
    ],
)
def test_variants_of_a_config_mean_what_they_mean_in_transformers(theirs: dict, change: dict, expected: dict):
    ours = config_from_hf(theirs | change, "float32")
    assert {name: getattr(ours, name) for name in expected} == expected
    assert ours == ModelConfig(**in_transformers(theirs | change), dtype="float32")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "expected one of Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCaus"),
        ({"architectures": None, "model_type": "gpt2"}, r"got \[\] and 'gpt2'"),
        ({"architectures": None, "model_type": None}, r"got \[\] and None"),
        ({"model_type": "llama"}, r"its model_type, got \['Qwen2ForCausalLM'\] and 'llama'"),  # transformers: a Llama
        ({"architectures": "Qwen2ForCausalLM"}, "expected architectures to be a list of strings"),
        ({"use_sliding_window": True}, "expected use_sliding_window = False, got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types to be .*, got .*'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "expected layer_types to be 'full_attention' for each of 2 layers"),
        ({"hidden_act": "gelu"}, "expected hidden_act to be 'silu' or 'swish' or 'gelu_pytorch_tanh', got 'gelu'"),
        ({"attention_bias": True}, "expected attention_bias = False"),
        ({"quantization_config": {"quant_method": "fp8"}}, "expected quantization_config = None, got {'quant_method'"),
        ({"text_config": {"hidden_size": 8}}, "expected text_config = None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type .* got 'yarn'"),
        ({"rope_scaling": YARN}, "expected rope_scaling.rope_type 'default' or 'llama3', got 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "expected rope_scaling.rope_type .* got 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, r"expected rope_scaling of rope_type 'default' .* got \['factor'\]"),
        ({"rope_scaling": ["yarn"]}, r"expected rope_scaling to be an object or null, got \['yarn'\]"),
        ({"rope_parameters": []}, "expected rope_parameters to be an object or null"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"got \['full_attention'\]"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "expected low_freq_factor to be a number above"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "expected .* low_freq_factor < high_freq_factor"),
        ({"rope_parameters": {"rope_theta": None}}, "expected rope_theta to be a number above 0, got None"),
        ({"rope_parameters": None, "rope_theta": None}, "expected rope_theta to be a number above 0, got None"),
        ({"rope_parameters": None, "rope_theta": "10000"}, "expected rope_theta to be a number above 0, got '10000'"),
        ({"hidden_size": "32"}, "expected hidden_size to be a whole number from 1 to 2147483647, got '32'"),
        ({"hidden_size": 32.0}, "expected hidden_size to be a whole number"),
        ({"num_hidden_layers": 10**18}, "expected num_hidden_layers to be a whole number"),
        ({"vocab_size": -1}, "expected vocab_size to be a whole number"),
        ({"num_key_value_heads": 0}, "expected num_key_value_heads to be a whole number"),
        ({"num_key_value_heads": 3}, "expected num_heads divisible by num_kv_heads, got 4 and 3"),
        ({"head_dim": True}, "expected head_dim to be a whole number"),
        ({"rms_norm_eps": "1e-6"}, "expected rms_norm_eps to be a fraction"),
        ({"tie_word_embeddings": None}, "expected tie_word_embeddings to be true or false, got None"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(change: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(QWEN2 | change)


def test_absent_fields_mean_what_they_mean_in_transformers():
    without = lambda theirs, *names: {name: value for name, value in theirs.items() if name not in names}
    wide = FILES["qwen3"] | {"num_attention_heads": 32}
    ours = config_from_hf(without(wide, "head_dim", "num_key_value_heads"), "float32")
    assert (ours.head_dim, ours.num_kv_heads) == (128, 32)  # Qwen3's own, not those of its other sizes
    assert config_from_hf(without(LLAMA, "head_dim", "num_key_value_heads")).num_kv_heads == 4
    with pytest.raises(ValueError, match="expected num_hidden_layers to be .*, got no such field"):
        config_from_hf(without(QWEN2, "num_hidden_layers"))
    with pytest.raises(ValueError, match="expected head_dim to be a whole number from 1 to 2147483647, got null"):
        config_from_hf(wide | {"head_dim": None})


def test_what_is_written_is_read_by_transformers_as_the_same():
    for name, config in CONFIGS.items():
        theirs = config_to_hf(config, "bfloat16")
        assert (
            ModelConfig(**in_transformers(theirs), dtype=config.dtype) == config == config_from_hf(theirs, config.dtype)
        ), name


def test_options_determine_the_family():
    """Else an exported model would get the name of the first family with its options."""
    options = ("norm_placement", "qk_norm", "qkv_bias")
    assert len({tuple(getattr(family, name) for name in options) for family in FAMILIES}) == len(FAMILIES)


def test_options_of_no_family_are_not_written():
    config = replace(CONFIGS["tiny"], qkv_bias=True)
    with pytest.raises(ValueError, match=r"expected the options of a family \(Qwen2.*got .*'head', 'qkv_bias': True"):
        config_to_hf(config, "float32")
    with pytest.raises(ValueError, match=r"got .*'sliding_windows': \(4, 0, 4, 4\)"):
        config_to_hf(replace(CONFIGS["tiny"], sliding_windows=(4, 0, 4, 4)), "float32")
    gelu = replace(CONFIGS["tiny"], activation="gelu_tanh")
    assert config_from_hf(config_to_hf(gelu, "float32"), "float32") == gelu


@pytest.mark.parametrize("change", [{"num_kv_heads": 0}, {"hidden_size": -1}, {"num_layers": 2.0}, {"vocab_size": "8"}])
def test_sizes_are_whole_numbers(change: dict):
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 2,
        "num_heads": 4,
    }
    sizes |= {"num_kv_heads": 2, "head_dim": 8}
    from_numpy: dict[str, Any] = {name: np.int64(size) for name, size in sizes.items()}
    assert json.dumps(config_to_hf(ModelConfig(**from_numpy), "float32"))
    with pytest.raises(ValueError, match=f"expected {next(iter(change))} to be a whole number of at least 1"):
        ModelConfig(**(sizes | change))
