"""Adapters: no effect at the start, equal outputs merged or not, and PEFT's files."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_policies import DEEP, GROUPED_TIED, MOE, ONE_KV_UNTIED, POST_NORM, numpy_params, numpy_tokens

from aem_jax.models import LoraConfig, Policy, save_pretrained
from aem_jax.models.lora import projections
from aem_jax.models.peft import save_adapter
from aem_jax.models.pretrained import model_reads_images
from aem_jax.models.weights import tensors

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BIASED = replace(GROUPED_TIED, qk_norm=None, qkv_bias=True)
LORA = LoraConfig(rank=3, alpha=6.0)


def adapter_of(policy: Policy, seed: int = 1) -> Any:
    """An adapter with an effect: B is not zero."""
    adapter = policy.init(jax.random.key(seed))["adapter"]
    leaves, structure = jax.tree.flatten(adapter)
    random = np.random.RandomState(seed)
    noise = [jnp.asarray(0.1 * random.standard_normal(leaf.shape).astype(np.float32)) for leaf in leaves]
    return structure.unflatten([leaf + offset for leaf, offset in zip(leaves, noise, strict=True)])


def logits(policy: Any, params: Any) -> Any:
    tokens = jnp.asarray(numpy_tokens(policy.config, (2, 9)))
    positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
    hidden = lambda params: policy.hidden(params, tokens, positions, jnp.ones_like(tokens))[0]
    return jax.jit(lambda params: policy.logits(params, hidden(params)))(params)


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (GROUPED_TIED, 1e-5),
        (BIASED, 1e-5),
        (ONE_KV_UNTIED, 1e-5),
        (POST_NORM, 1e-5),
        (MOE, 1e-5),
        (DEEP, 5e-5),
    ],  # nine layers add up more rounding
)
def test_beside_the_weights_or_in_them(config, tolerance):
    base, policy, frozen = Policy(config), Policy(config, LORA), numpy_params(config)
    nothing = {**policy.init(jax.random.key(1)), **frozen}
    params = {**frozen, "adapter": adapter_of(policy)}
    wanted = logits(base, frozen)
    jax.tree.map(np.testing.assert_array_equal, policy.merge(nothing), frozen)  # so its logits are equal, too
    np.testing.assert_allclose(logits(policy, nothing), wanted, rtol=0, atol=tolerance)
    ours = logits(policy, params)
    np.testing.assert_allclose(ours, logits(base, policy.merge(params)), atol=tolerance)
    assert jnp.max(jnp.abs(ours - wanted)) > 0.1


def test_at_the_start_the_logits_are_the_bases_to_the_last_bit():
    policy, frozen = Policy(GROUPED_TIED, LORA), numpy_params(GROUPED_TIED)
    wanted = logits(policy.base, frozen)
    np.testing.assert_array_equal(logits(policy, {**policy.init(jax.random.key(1)), **frozen}), wanted)


@pytest.mark.parametrize("chosen", [("q_proj", "v_proj"), ("k_proj",), ("up_proj", "o_proj"), ("gate_proj",)])
def test_some_projections_alone(chosen):
    config = ONE_KV_UNTIED
    every, some = Policy(config, LORA), Policy(config, LoraConfig(3, 6.0, chosen))
    frozen, adapter = numpy_params(config), adapter_of(every)
    assert sorted(some.axes["adapter"]) == sorted(chosen)
    first, of_every = (policy.init(jax.random.key(5))["adapter"] for policy in (some, every))
    jax.tree.map(np.testing.assert_array_equal, first, {n: of_every[n] for n in chosen})
    part = {**frozen, "adapter": {name: adapter[name] for name in chosen}}
    # the others' B at zero: the same
    rest = {n: pair if n in chosen else {**pair, "b": 0 * pair["b"]} for n, pair in adapter.items()}
    ours = logits(some, part)
    np.testing.assert_allclose(ours, logits(every, {**frozen, "adapter": rest}), atol=1e-5)
    np.testing.assert_allclose(ours, logits(some.base, some.merge(part)), atol=1e-5)
    changed = {name for name in frozen["base"]["layers"] if name in some.merged_leaves}
    assert changed == {projections(config)[name].parameter for name in chosen}


def test_an_adapter_begins_as_pefts():
    # lora_A: Kaiming-uniform with a = √5, that is uniform in ±1/√inputs; lora_B: zero
    adapter = Policy(GROUPED_TIED, LoraConfig(rank=16)).init(jax.random.key(0))["adapter"]
    for name, p in projections(GROUPED_TIED).items():
        bound, a = np.prod(p.inputs) ** -0.5, np.asarray(adapter[name]["a"])
        assert 0.95 * bound < np.abs(a).max() <= bound and not np.asarray(adapter[name]["b"]).any()
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.1)


@pytest.mark.parametrize("config", [BIASED, ONE_KV_UNTIED, MOE])
def test_pefts_files_contain_the_same_weights(config, tmp_path: Path):
    """Each Hugging Face tensor of a merged model is W + alpha / r · lora_B lora_A."""
    policy, frozen = Policy(config, LORA), numpy_params(config)
    adapter = adapter_of(policy)
    save_adapter(tmp_path / "adapter", config, LORA, adapter, base="the/base")
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "adapter").iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]
    save_pretrained(tmp_path / "base", config, frozen)
    save_pretrained(tmp_path / "merged", config, policy.merge({**frozen, "adapter": adapter}))
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    d, f = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sides = dict(zip(NAMES, [(d, queries), (d, keys), (d, keys), (queries, d), (d, f), (d, f), (f, d)], strict=True))
    for tensor in tensors(config):
        module = tensor.name.removesuffix(".weight")
        prefix, name = f"base_model.model.{module}", module.rpartition(".")[2]
        if name in NAMES and not tensor.name.endswith("bias"):
            a, b = pairs.pop(f"{prefix}.lora_A.weight"), pairs.pop(f"{prefix}.lora_B.weight")
            assert (a.shape, b.shape) == ((3, sides[name][0]), (sides[name][1], 3)) and a.dtype == np.float32
            np.testing.assert_allclose(wanted[tensor.name], base[tensor.name] + 2.0 * b @ a, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(wanted[tensor.name], base[tensor.name])
    assert not pairs
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["task_type"] == "CAUSAL_LM"
    assert (written["r"], written["lora_alpha"], written["target_modules"]) == (3, 6.0, list(NAMES))
    assert written["base_model_name_or_path"] == "the/base"
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        save_adapter(tmp_path / "adapter", config, LORA, adapter, base="the/base")


def test_the_adapter_of_a_text_part_has_the_whole_models_names(tmp_path: Path):
    """The decoder of Gemma 3 4B is `model.language_model`; its vision tower has a q_proj of its own."""
    lora = LoraConfig(3, 6.0, ("q_proj", "down_proj"))
    adapter = adapter_of(Policy(GROUPED_TIED, lora))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gemma3", "text_config": {}}')
    reads_images = model_reads_images(tmp_path / "base")
    save_adapter(tmp_path / "adapter", GROUPED_TIED, lora, adapter, base="base", reads_images=reads_images)
    names = sorted(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names[0] == "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    chosen = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
    layer, tower = "layers.0.self_attn.q_proj", "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"
    assert re.fullmatch(chosen, f"model.language_model.{layer}") and not re.fullmatch(chosen, tower)
    assert not re.fullmatch(chosen, "model.language_model.layers.0.self_attn.k_proj")


@pytest.mark.parametrize("chosen", ["gate_proj", "up_proj"])
def test_an_adapter_of_gate_or_up_of_experts_is_written_with_zeros_for_the_others(chosen, tmp_path: Path):
    """PEFT fuses the two, wraps them in that of down, and loads nothing else."""
    others = {"gate_proj", "up_proj", "down_proj"} - {chosen}
    lora = LoraConfig(3, 6.0, ("q_proj", chosen))
    save_adapter(tmp_path / "adapter", MOE, lora, adapter_of(Policy(MOE, lora)), base="the/base")
    pairs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    of = lambda module: {name: pair for name, pair in pairs.items() if module in name}
    assert len(of(chosen)) == 2 * MOE.num_layers * 6 and all(pair.any() for pair in of(chosen).values())
    for other in others:
        assert set(of(other)) == {name.replace(chosen, other) for name in of(chosen)}
        assert not any(pair.any() for pair in of(other).values())
    a, b = (pairs[f"base_model.model.model.layers.0.mlp.experts.0.down_proj.lora_{side}.weight"] for side in "AB")
    assert (a.shape, b.shape) == ((3, MOE.intermediate_size), (MOE.hidden_size, 3))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "gate_proj", "up_proj", "down_proj"]
    dense = LoraConfig(3, 6.0, (chosen,))
    save_adapter(tmp_path / "dense", BIASED, dense, adapter_of(Policy(BIASED, dense)), base="the/base")
    assert all(chosen in name for name in load_file(tmp_path / "dense" / "adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("config", "chosen"),
    [(config, ("all",)) for config in (BIASED, MOE)]
    + [(MOE, chosen) for chosen in (("q_proj", "gate_proj"), ("up_proj",), ("down_proj",), ("gate_proj", "up_proj"))],
)
def test_peft_reads_them(config, chosen, tmp_path: Path):
    """A live comparison; needs torch, transformers and PEFT."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(3, 6.0, chosen)
    policy, frozen = Policy(config, lora), numpy_params(config)
    adapter = adapter_of(policy)
    save_pretrained(tmp_path / "base", config, frozen)
    save_adapter(tmp_path / "adapter", config, lora, adapter, base=str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(numpy_tokens(config, (2, 9)).astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(theirs, logits(policy, {**frozen, "adapter": adapter}), atol=1e-4)


def test_merged_weights_keep_their_dtype_and_are_rounded_once():
    policy = Policy(replace(GROUPED_TIED, dtype="bfloat16"), LORA)
    frozen, adapter = numpy_params(GROUPED_TIED), adapter_of(policy)
    half = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), frozen, policy.base.dtypes)
    merged = policy.merge({**half, "adapter": adapter})["base"]["layers"]
    exact = {**jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), "adapter": adapter}
    wanted = policy.merge(exact)["base"]["layers"]
    for name in policy.merged_leaves:
        leaf = merged[name]
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, wanted[name].astype(jnp.bfloat16))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"expected targets among all, q_proj, .*, down_proj, got qproj"):
        LoraConfig(4, targets=("qproj", "v_proj"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected rank >= 0 and alpha > 0, got -1"):
        LoraConfig(-1)
    policy = Policy(ONE_KV_UNTIED, LoraConfig(rank=12))
    with pytest.raises(ValueError, match=r"expected rank of at most 8, the smaller side of k_proj \[40, 8\], got 12"):
        policy.init(jax.random.key(0))
    assert Policy(ONE_KV_UNTIED, LoraConfig(12, targets=("q_proj",))).shapes
