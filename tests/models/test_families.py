"""`config.json` as transformers reads it: the same values, or a refusal that names the field."""

import copy
import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import CONFIG_MAPPING
from transformers_config import in_transformers

from aem_jax.models import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from aem_jax.models.config import CONFIGS
from aem_jax.models.families import config_from_hf, config_to_hf

GOLDEN = Path(__file__).resolve().parent / "golden"
PLAIN, LAYERED = ("qwen2", "qwen3", "llama", "olmo2"), ("gemma3", "smollm3", "mistral", "ministral")
"""Families whose layers are usually the same, and others."""
MIXTURES = ("qwen3-moe", "mixtral")
FILES = {name: json.loads((GOLDEN / name / "config.json").read_text()) for name in (*PLAIN, *LAYERED, *MIXTURES)}
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
    "is_causal": (True, False, None),
    "mlp_bias": (False, True),
    "use_sliding_window": (False, True),
    "sliding_window": (4096, 8, None),
    "max_window_layers": (0, 1, 28),
    "no_rope_layers": ([1, 0], [1, 1, 0, 0], [0], [1, 0, 1, 1, 1], None),
    "no_rope_layer_interval": (1, 2, 4),
    "sliding_window_pattern": (1, 2, 6),
    "query_pre_attn_scalar": (8, 12),
    "final_logit_softcapping": (None, 30.0),
    "use_bidirectional_attention": (False, True),
    "hidden_activation": ("gelu_pytorch_tanh", "silu", "gelu"),
    "rope_local_base_freq": (1e4, 500),
    "layer_types": (["full_attention"] * 2, ["full_attention", "sliding_attention"], ["full_attention"]),
    "model_type": ("qwen2", "qwen3", "llama", "olmo2", "mistral", "ministral", "smollm3", "gemma3_text", "mixtral"),
    "num_local_experts": (8, 4, 1),
    "num_experts": (8, 4),
    "num_experts_per_tok": (1, 2, 3),
    "moe_intermediate_size": (20,),
    "norm_topk_prob": (True, False),
    "mlp_only_layers": ([], [1]),
    "decoder_sparse_step": (1, 2),
    "router_jitter_noise": (0.0, 0.1),
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
        {"rope_type": "yarn", "factor": 8, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_slow": None, "truncate": False},
        *({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_fast": 16}, {"type": "linear"}),
        *({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, {"factor": 2.0}),
        *({"type": "default"}, {"rope_type": "default", "rope_theta": 7.0}, {"rope_type": None}),
        *(LLAMA3, LLAMA3 | {"type": "yarn"}, LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 9.0}),
        *(LLAMA3 | {"factor": "8"}, LLAMA3 | {"high_freq_factor": 1.0}, LLAMA3 | {"factor": 0.5}),
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
        {"sliding_attention": {"rope_theta": 9.0}, "full_attention": {"rope_type": "linear", "factor": 8.0}},
        {"sliding_attention": {"rope_type": "linear", "factor": 8.0}, "full_attention": None},
    ),
}
UNREAD = {"sliding_window", "max_window_layers", "no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern"}
UNREAD |= {"query_pre_attn_scalar", "use_bidirectional_attention", "hidden_activation", "rope_local_base_freq"}
UNREAD |= {"final_logit_softcapping"}
"""Fields that mean nothing in some of the files, and are not read there."""
LIKELY["rope_parameters"] = LIKELY["rope_scaling"]
LIKELY |= {f"rope_parameters.{name}": LIKELY[name] for name in ("rope_theta", "partial_rotary_factor")}


def mutated(rng: random.Random, families: tuple[str, ...]) -> dict[str, Any]:
    """A config with one to three fields changed, dropped, or of another kind."""
    theirs = copy.deepcopy(FILES[rng.choice(families)])
    if rng.random() < 0.3 and "rope_theta" in theirs["rope_parameters"]:  # as transformers 4 writes it
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


@pytest.mark.parametrize("families", [PLAIN, LAYERED, MIXTURES])
@pytest.mark.parametrize("seed", range(3))
def test_a_changed_config_is_read_as_in_transformers_or_refused(
    seed: int, families: tuple[str, ...], caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.ERROR)
    rng, read, refused = random.Random(seed), 0, 0
    for _ in range(500):
        theirs = mutated(rng, families)
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
    assert read > 120 and refused > 150


QWEN2, LLAMA = FILES["qwen2"], FILES["llama"]
GEMMA, SMOLLM3, MISTRAL = FILES["gemma3"], FILES["smollm3"], FILES["mistral"]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
SLIDES = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
OLD_GEMMA = {
    "rope_parameters": None,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_local_base_freq": 500.0,
}


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
        (QWEN2, {"sliding_window": 8, "max_window_layers": 0, "torch_dtype": "float16"}, {"sliding_windows": ()}),
        (QWEN2, SLIDES | {"sliding_window": 8}, {"sliding_windows": (0, 8)}),
        (QWEN2, SLIDES | {"sliding_window": None}, {"sliding_windows": ()}),
        (QWEN2, {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": LinearScaling(2.0)}),
        (QWEN2, {"rope_scaling": YARN}, {"rope_scaling": YarnScaling(4.0, 8, 0.1 * math.log(4.0) + 1)}),
        (MISTRAL, {"sliding_window": None}, {"sliding_windows": ()}),
        (MISTRAL, {"head_dim": None}, {"sliding_windows": (5, 5), "head_dim": 8}),
        (SMOLLM3, {"no_rope_layers": [1, 0, 1, 0, 0]}, {"unrotated_layers": (1, 3)}),
        (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 2}, {"unrotated_layers": (1, 3)}),
        (
            SMOLLM3,
            {"no_rope_layers": [0, 1, 1, 1], "layer_types": None, "use_sliding_window": True, "sliding_window": 6},
            {"unrotated_layers": (0,), "sliding_windows": (6, 0, 0, 0)},
        ),
        (GEMMA, {"layer_types": None, "sliding_window_pattern": 2}, {"sliding_windows": (6, 0, 6, 0)}),
        (GEMMA, {"query_pre_attn_scalar": 8}, {"score_dim": None}),
        (FILES["mixtral"], {"sliding_window": 8}, {"sliding_windows": (8, 8)}),
        (FILES["qwen3-moe"], {"sliding_window": 8}, {"sliding_windows": ()}),
        (FILES["qwen3-moe"], {"sliding_window": 8, "use_sliding_window": True}, {"sliding_windows": (8, 8)}),
        (GEMMA, OLD_GEMMA, {"rope_theta": 1e6, "rope_scaling": LinearScaling(8.0), "sliding_rope_theta": 500.0}),
    ],
)
def test_variants_of_a_config_mean_what_they_mean_in_transformers(theirs: dict, change: dict, expected: dict):
    ours = config_from_hf(theirs | change, "float32")
    assert {name: getattr(ours, name) for name in expected} == expected
    assert ours == ModelConfig(**in_transformers(theirs | change), dtype="float32")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["PhiForCausalLM"]}, "expected one of Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCaus"),
        ({"architectures": ["PhiForCausalLM"]}, "a family is a row of FAMILIES in aem_jax/models/families.py"),
        ({"architectures": None, "model_type": "gpt2"}, r"got \[\] and 'gpt2'"),
        ({"architectures": None, "model_type": None}, r"got \[\] and None"),
        ({"model_type": "llama"}, r"its model_type, got \['Qwen2ForCausalLM'\] and 'llama'"),  # transformers: a Llama
        ({"architectures": "Qwen2ForCausalLM"}, "expected architectures to be a list of strings"),
        ({"use_sliding_window": 1}, "expected use_sliding_window to be true or false, got 1"),
        (SLIDES | {"sliding_window": 0}, "expected sliding_window to be a whole number from 1 .*, got 0"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types to be .*, got .*'sliding_attention'"),
        ({"layer_types": ["full_attention"]}, "expected layer_types to be 'full_attention' for each of 2 layers"),
        ({"hidden_act": "gelu"}, "expected hidden_act to be 'silu' or 'swish' or 'gelu_pytorch_tanh', got 'gelu'"),
        ({"attention_bias": True}, "expected attention_bias = False"),
        ({"is_causal": False}, "expected is_causal = True, got False"),
        ({"is_causal": None}, "expected is_causal = True, got None"),
        ({"quantization_config": {"quant_method": "fp8"}}, "expected quantization_config = None, got {'quant_method'"),
        ({"text_config": {"hidden_size": 8}}, "expected text_config = None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "expected factor to be a number above 0, got no such field"),
        ({"rope_scaling": YARN | {"beta_slow": 99}}, "expected .* beta_fast > beta_slow > 0"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "expected a rope factor >= 1, got 0.5"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type 'default' or 'linear' or 'llama3' or 'yarn', got 'dynamic'"),
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


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("qwen3-moe", {"mlp_only_layers": [0]}, r"expected mlp_only_layers = \[\], got \[0\]"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "expected decoder_sparse_step = 1, got 2"),
        ("qwen3-moe", {"num_experts": 4}, r"expected num_experts or num_local_experts, got both: \[4, 8\]"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "expected 1 <= experts_per_token <= num_experts, got 9 and 8"),
        ("qwen3-moe", {"norm_topk_prob": 1}, "expected norm_topk_prob to be true or false, got 1"),
        ("qwen3-moe", {"moe_intermediate_size": "20"}, "expected moe_intermediate_size to be a whole number"),
        ("mixtral", {"sliding_window": 0}, "expected sliding_window to be a whole number from 1 .*, got 0"),
        ("mixtral", {"layer_types": ["full_attention", "sliding_attention"]}, "expected layer_types = None"),
        ("mixtral", {"router_jitter_noise": 0.1}, "expected router_jitter_noise = 0.0, got 0.1"),
    ],
)
def test_what_a_mixture_cannot_do_is_refused(name: str, change: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(FILES[name] | change)


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


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"final_logit_softcapping": 30.0}, "expected final_logit_softcapping = None, got 30.0"),
        ({"use_bidirectional_attention": True}, "expected use_bidirectional_attention = False"),
        ({"sliding_window": None}, "expected sliding_window to be a whole number .*, got None"),
        (
            {"rope_parameters": {"rope_type": "default"}},
            r"to have full_attention and sliding_attention, got \['rope_type",
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "expected rope_parameters.sliding_attention.rope_type 'default', got 'linear'",
        ),
        ({"hidden_size": 33}, "expected hidden_size divisible by num_attention_heads"),
    ],
)
def test_what_the_decoder_cannot_do_of_gemma_is_refused(change: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        config_from_hf(GEMMA | change)


def test_the_text_part_of_a_model_that_reads_images_is_read():
    published = {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "sliding_window": 1024}
    published |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    both = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": published}
    assert config_from_hf(both) == CONFIGS["gemma-3-4b"]
    assert ModelConfig(**in_transformers(both), dtype="bfloat16") == CONFIGS["gemma-3-4b"]
    with pytest.raises(ValueError, match="expected quantization_config = None"):
        config_from_hf(both | {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match="expected text_config to be an object, got None"):
        config_from_hf(both | {"text_config": None})
    with pytest.raises(ValueError, match="expected text_config.model_type 'gemma3_text', got 'llama'"):
        config_from_hf(both | {"text_config": {"model_type": "llama"}})


def test_absent_ids_of_special_tokens_are_written_as_null():
    """transformers' SmolLM3 pads with id 128,004, and cannot load a smaller vocabulary without the field."""
    small = replace(CONFIGS["smollm3-3b"], vocab_size=300)
    written = config_to_hf(small, "bfloat16", {"eos_token_id": 7})
    assert [written[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")] == [None, None, 7]
    theirs: Any = CONFIG_MAPPING["smollm3"].from_dict(written)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (None, 7)


def test_truncate_is_not_written_where_transformers_does_not_read_it():
    scaled = replace(CONFIGS["gemma-3-1b"], rope_scaling=YarnScaling(4.0, 32_768, 1.1))
    theirs = config_to_hf(scaled, "bfloat16")
    assert "truncate" not in theirs["rope_parameters"]["full_attention"]
    assert config_from_hf(theirs) == scaled == ModelConfig(**in_transformers(theirs), dtype="bfloat16")
    theirs["rope_parameters"]["full_attention"]["truncate"] = True
    assert config_from_hf(theirs) == scaled
    with pytest.raises(ValueError, match="expected the options of a family .*truncate=False"):
        config_to_hf(replace(scaled, rope_scaling=YarnScaling(4.0, 32_768, 1.1, truncate=False)), "bfloat16")
    theirs["rope_parameters"]["full_attention"]["truncate"] = False
    with pytest.raises(ValueError, match="expected truncate = True, got False"):
        config_from_hf(theirs)


def test_an_exported_model_keeps_its_family():
    """Also where another family has the same options; a config of no file gets the first family that can say it."""
    for name, theirs in FILES.items():
        config = config_from_hf(theirs, "float32")
        assert config_to_hf(config, "float32")["architectures"] == theirs["architectures"], name
    plain = replace(config_from_hf(FILES["mistral"] | {"sliding_window": None}, "float32"), architecture="")
    changes: tuple[dict[str, Any], ...] = (
        *({}, {"sliding_windows": (8, 8)}, {"sliding_windows": (8, 0)}, {"unrotated_layers": (1,)}),
    )
    written = [config_to_hf(replace(plain, **change), "float32")["model_type"] for change in changes]
    assert written == ["llama", "mistral", "ministral", "smollm3"]
    for name in MIXTURES:
        windowed = replace(config_from_hf(FILES[name], "float32"), sliding_windows=(8, 8), architecture="")
        assert config_from_hf(config_to_hf(windowed, "float32"), "float32") == windowed
        with pytest.raises(ValueError, match="expected the options of a family .*'experts': '.*'sliding_windows': "):
            config_to_hf(replace(windowed, sliding_windows=(8, 0)), "float32")


def test_options_of_no_family_are_not_written():
    config = replace(CONFIGS["tiny"], qkv_bias=True)
    with pytest.raises(ValueError, match=r"expected the options of a family \(Qwen2.*got .*'head', 'qkv_bias': True"):
        config_to_hf(config, "float32")
    changes: tuple[dict[str, Any], ...] = (
        {"sliding_windows": (4, 0, 8, 4)},
        {"unrotated_layers": (1,)},
        {"score_dim": 8},
        {"sliding_windows": (4, 0, 4, 4), "sliding_rope_theta": 7.0},
    )
    for change in changes:
        with pytest.raises(ValueError, match=r"got .*'sliding_windows': .*'unrotated_layers': .*'score_dim': "):
            config_to_hf(replace(CONFIGS["tiny"], **change), "float32")
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
