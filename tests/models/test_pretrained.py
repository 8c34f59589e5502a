"""Checkpoints written by transformers: read, compared with its own logits and greedy words, and written back."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers_logits import sketch, token_weights

from aem_jax.learner import LearnerConfig
from aem_jax.models import Llama3Scaling, ModelConfig, Policy, from_pretrained, save_pretrained
from aem_jax.models.config import dtype_name
from aem_jax.models.families import config_from_hf, config_to_hf
from aem_jax.models.pretrained import config_text, read_config, resolve
from aem_jax.models.weights import load_params, save_params, tensors
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.tokenizer import ChatTokenizer

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = [
    *("qwen2", "qwen2-tied", "qwen3", "llama", "llama-tied", "olmo2"),
    *("gemma3", "smollm3", "mistral", "ministral", "qwen3-yarn", "qwen3-moe", "mixtral"),
]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param


def outputs(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "outputs.npz"))


def test_logits_equal_transformers(folder: Path):
    recorded = outputs(folder)
    model = from_pretrained(folder, dtype="float32")
    logits = model.logits(recorded["tokens"])
    assert logits.dtype == jnp.float32 and recorded["logits"].std() > 1
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-4, rtol=0)


def test_gradients_equal_transformers(folder: Path):
    """Of a weighted mean of log-probabilities, in packed rows; `sketch` of every tensor, the tied head's included."""
    model, tokens = from_pretrained(folder, dtype="float32"), jnp.asarray(outputs(folder)["tokens"], jnp.int32)
    weights = jnp.asarray(token_weights((len(tokens), tokens.shape[1] - 1)))

    def loss(params):
        logprobs = jax.nn.log_softmax(model.policy.forward(params, tokens)[:, :-1])
        return jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0] * weights)

    gradients = jax.jit(jax.grad(loss))(model.params)["base"]
    recorded = dict(np.load(folder / "gradients.npz"))
    for tensor in tensors(model.config):
        array = np.asarray(
            gradients["layers"][tensor.path[-1]] if "layers" in tensor.path else gradients[tensor.path[-1]]
        )
        block = array[tuple(slice(at, at + size) for at, size in zip(tensor.start, tensor.block, strict=True))]
        sketched = recorded.pop(tensor.name)
        np.testing.assert_allclose(sketch(tensor.to_theirs(block)), sketched, atol=1e-4, rtol=1e-4, err_msg=tensor.name)
    assert not recorded


def test_greedy_words_equal_transformers(folder: Path):
    """64 tokens through the sampler's cache."""
    recorded = outputs(folder)
    model = from_pretrained(folder, dtype="float32")
    prompts, greedy = recorded["tokens"][:, :8].astype(np.int32), recorded["greedy"]
    sampler = Sampler(model.policy, SamplingConfig(0.0), [-1], capacity=72, slack=64)
    state = sampler.extend(model.params, sampler.init(2), prompts, np.full(2, 8, np.int32))
    _, decoded = sampler.decode(model.params, state, np.full(2, 64, np.int32), 64)
    assert greedy.shape == (2, 64) and len(np.unique(greedy)) > 4
    np.testing.assert_array_equal(decoded.tokens, greedy)


def test_what_was_read_is_written_back_bit_by_bit(folder: Path, tmp_path: Path):
    model = from_pretrained(folder, dtype="float32")
    model.save_pretrained(tmp_path / "out")
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    again = from_pretrained(tmp_path / "out", dtype="float32")
    assert again.config == model.config
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert not list(tmp_path.glob(".*"))


def test_half_precision_comes_back_bit_by_bit(tmp_path: Path):
    first = from_pretrained(GOLDEN / "qwen3")  # bfloat16 by default
    assert {leaf.dtype for leaf in jax.tree.leaves(first.params)} == {jnp.dtype("bfloat16")}
    first.save_pretrained(tmp_path / "half")
    with safe_open(tmp_path / "half" / "model.safetensors", framework="np") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118 (it cannot be iterated)
    masters = from_pretrained(tmp_path / "half", dtype="float32")
    masters.save_pretrained(tmp_path / "again", dtype="bfloat16")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "again"))
    assert all(np.array_equal(one[name].view(np.uint16), other[name].view(np.uint16)) for name in one)


def test_several_files_and_an_index(tmp_path: Path):
    model = from_pretrained(GOLDEN / "llama", dtype="float32")
    save_pretrained(tmp_path / "parts", model.config, model.params, max_file_bytes=30_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors")) == files
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    again = from_pretrained(tmp_path / "parts", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (tmp_path / "parts" / files[1]).unlink()
    with pytest.raises(ValueError, match=rf"'{files[1]}' missing"):
        from_pretrained(tmp_path / "parts")


def test_nothing_is_written_over(tmp_path: Path):
    model = from_pretrained(GOLDEN / "llama", dtype="float32")
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "mesh", "leaf"), [("qwen2-tied", (2, 2, 2), "gate_up"), ("qwen3-moe", (1, 2, 2, 2), "experts_up")]
)
def test_every_tensor_goes_to_its_shards(name: str, mesh: tuple[int, ...], leaf: str):
    alone = from_pretrained(GOLDEN / name, dtype="float32")
    spread = from_pretrained(GOLDEN / name, mesh=make_mesh(MeshConfig(*mesh), jax.devices()[:8]), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, spread.params, alone.params)
    weights = spread.params["base"]["layers"][leaf]
    assert weights.addressable_shards[0].data.size * math.prod(mesh[1:]) == weights.size  # over fsdp, tensor and expert


def test_written_files_load_in_transformers(folder: Path, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed; recorded outputs are compared instead")
    from transformers import AutoModelForCausalLM

    recorded = outputs(folder)
    from_pretrained(folder, dtype="float32").save_pretrained(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = theirs(torch.tensor(recorded["tokens"])).logits
    np.testing.assert_allclose(logits, recorded["logits"], atol=1e-5, rtol=0)


def test_configs_go_both_ways(folder: Path):
    theirs = json.loads((folder / "config.json").read_text())
    config = config_from_hf(theirs, "float32")
    assert config_from_hf(config_to_hf(config, "float32"), "float32") == config
    assert sum(int(np.prod(tensor.shape)) for tensor in tensors(config)) == config.num_parameters
    assert sum(leaf.size for leaf in jax.tree.leaves(Policy(config).shapes)) == config.num_parameters
    old = {name: value for name, value in theirs.items() if name != "rope_parameters"}  # as transformers 4 wrote it
    rope = dict(theirs["rope_parameters"])
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert config_from_hf(old, "float32") == config


def test_llama_3_stretches_its_positions():
    config = config_from_hf(json.loads((GOLDEN / "llama" / "config.json").read_text()))
    assert config.rope_scaling == Llama3Scaling(4.0, 1.0, 4.0, 32)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_that_reads_images_is_read_and_written_alone(prefix: str, tmp_path: Path):
    """The two ways in which transformers has named its tensors."""
    theirs, text = load_file(GOLDEN / "gemma3" / "model.safetensors"), GOLDEN / "gemma3"
    named = {prefix + name.removeprefix("model."): tensor for name, tensor in theirs.items()}
    named |= {f"{'model.' * prefix.startswith('model')}vision_tower.patch.weight": np.ones(3, np.float32)}
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    config["text_config"] = json.loads((text / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = from_pretrained(tmp_path, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, model.params, from_pretrained(text, dtype="float32").params)
    model.save_pretrained(tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]


@pytest.fixture
def damaged(tmp_path: Path):
    """A copy of a checkpoint, and a function that changes its tensors."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "qwen3", folder)

    def change(function) -> Path:
        held = load_file(folder / "model.safetensors")
        function(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def test_tensors_that_do_not_fit_are_named_with_both_shapes(damaged):
    def change(held):
        del held["model.layers.1.mlp.up_proj.weight"]
        held["model.norm.weight"] = np.ones(31, np.float32)
        held["model.layers.2.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)

    with pytest.raises(ValueError) as caught:
        from_pretrained(damaged(change))
    message = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight [48, 32] is missing" in message
    assert "model.norm.weight has shape [31] instead of [32]" in message
    assert "model.layers.2.mlp.up_proj.weight [48, 32] is not known" in message


def model_with(folder: Path, family: str, config: dict | None = None, **changed: np.ndarray | None) -> Path:
    """A golden checkpoint with fields of its config and tensors changed (None: left out); "__" is a dot."""
    shutil.copytree(GOLDEN / family, folder)
    theirs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(theirs | (config or {})))
    held = load_file(folder / "model.safetensors")
    held |= {name.replace("__", "."): tensor for name, tensor in changed.items() if tensor is not None}
    kept = {name: tensor for name, tensor in held.items() if changed.get(name.replace(".", "__"), tensor) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("aem_jax")]


def test_a_head_of_its_own_is_kept_whatever_the_flag(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """As in transformers (`tie_weights`), which warns."""
    recorded = outputs(GOLDEN / "llama")
    folder = model_with(tmp_path / "model", "llama", {"tie_word_embeddings": True})
    model = from_pretrained(folder, dtype="float32")
    np.testing.assert_allclose(model.logits(recorded["tokens"]), recorded["logits"], atol=1e-4, rtol=0)
    (message,) = warnings_of(caplog)
    assert "tie_word_embeddings true, but lm_head.weight differs" in message and str(folder) in message
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    with pytest.raises(ValueError, match="expected a policy with tied_head False for .*, whose lm_head.weight is its"):
        load_params(folder, Policy(replace(model.config, tied_head=True)), mesh=None, dtype="float32")


def test_a_head_of_its_own_is_in_the_copied_config_of_a_family_that_ties_by_default(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "smollm3", folder)
    theirs = json.loads((folder / "config.json").read_text())
    theirs.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(theirs))
    assert json.loads(config_text(folder)) == theirs
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    assert json.loads(config_text(folder)) == {**theirs, "tie_word_embeddings": False}


def test_the_ids_of_special_tokens_are_the_tokenizers(tmp_path: Path):
    chat = ChatTokenizer.train(["a cup"] * 4, vocab_size=300)
    chat.save_pretrained(tmp_path / "tokenizer")
    model = from_pretrained(GOLDEN / "llama", dtype="float32")
    for size, known in ((chat.vocab_size, True), (chat.stop_ids[0], False)):
        params = Policy(config := replace(model.config, vocab_size=size)).init(jax.random.key(0))
        save_pretrained(tmp_path / f"{size}", config, params, source=tmp_path / "tokenizer")
        written = json.loads((tmp_path / f"{size}" / "config.json").read_text())
        ids = [written[f"{name}_token_id"] for name in ("pad", "bos", "eos")]
        assert ids == ([chat.pad_id, None, *chat.stop_ids] if known else [chat.pad_id, None, None])


@pytest.mark.parametrize("only", [False, True])
def test_a_tied_head_that_is_saved_twice_or_alone_is_tied(only: bool, tmp_path: Path, caplog):
    recorded, embed = outputs(GOLDEN / "llama-tied"), load_file(GOLDEN / "llama-tied" / "model.safetensors")
    table = embed["model.embed_tokens.weight"].copy()
    left = None if only else table
    old: Any = {"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(4, np.float32)}  # ignored, too
    folder = model_with(
        tmp_path / "model", "llama-tied", lm_head__weight=table, model__embed_tokens__weight=left, **old
    )
    model = from_pretrained(folder, dtype="float32")
    assert model.config.tied_head and not warnings_of(caplog)
    np.testing.assert_allclose(model.logits(recorded["tokens"]), recorded["logits"], atol=1e-4, rtol=0)


def test_a_single_file_goes_before_an_index_as_in_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = from_pretrained(GOLDEN / "llama", dtype="float32")
    newer = jax.tree.map(lambda leaf: leaf * 2, model.params)
    save_pretrained(tmp_path / "model", model.config, model.params, max_file_bytes=30_000)
    save_pretrained(tmp_path / "new", model.config, newer)
    shutil.copy(tmp_path / "new" / "model.safetensors", tmp_path / "model")
    again = from_pretrained(tmp_path / "model", dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, again.params, newer)
    (message,) = warnings_of(caplog)
    assert "read from model.safetensors alone" in message and "model.safetensors.index.json" in message
    assert "model-00001-of-00004.safetensors" in message
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")  # never read
    jax.tree.map(np.testing.assert_array_equal, from_pretrained(tmp_path / "model", dtype="float32").params, newer)


@pytest.mark.parametrize(
    ("config", "changed", "complaint"),
    [
        ({}, {"lm_head__weight": None}, r"lm_head.weight \[64, 32\] is missing; is the head tied"),
        (
            {"tie_word_embeddings": True},
            {"lm_head__weight": np.ones((64, 8), np.float32)},
            r"has shape \[64, 8\] instead",
        ),
        ({}, {"model__norm__weight": np.ones(32, np.int32)}, "model.norm.weight holds I32 instead of one of F64, F32"),
        ({}, {"model__norm__weight": np.full(32, np.nan, np.float32)}, "got NaN or infinity in model.norm.weight$"),
        ({}, {"lm_head__weight": np.full((64, 32), np.inf, np.float16)}, "got NaN or infinity in lm_head.weight$"),
        (
            {"num_hidden_layers": 2**31 - 1, "layer_types": None},
            {},
            "model.layers.2.self_attn.q_proj.weight .* is missing; .*, and more$",
        ),
    ],
)
def test_weights_that_are_not_those_of_the_config_are_refused(config, changed, complaint: str, tmp_path: Path):
    with pytest.raises(ValueError, match=complaint):
        from_pretrained(model_with(tmp_path / "model", "qwen2", config, **changed), dtype="float32")


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path):
    model = from_pretrained(GOLDEN / "qwen2", dtype="float32")
    large = {"base": {**model.params["base"], "norm": model.params["base"]["norm"] * 1e6}}
    with pytest.raises(ValueError, match="expected finite numbers in weights to write to .* in model.norm.weight"):
        save_pretrained(tmp_path / "half", model.config, large, dtype=np.float16)
    save_pretrained(tmp_path / "whole", model.config, large, dtype=jnp.bfloat16)
    assert not (tmp_path / "half").exists()
    with pytest.raises(OSError, match=r"nowhere/part-0.safetensors cannot be written: "):
        save_params(tmp_path / "nowhere", model.config, large, dtype=None, max_file_bytes=10**9)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def test_broken_files_are_named(damaged, tmp_path: Path):
    file = damaged(lambda held: None) / "model.safetensors"
    complete = file.read_bytes()
    for content in (complete[: len(complete) // 2], complete[:4], b"\xff" * 64, b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected safetensors in .*model\.safetensors, got") as caught:
            from_pretrained(file.parent)
        assert "\n" not in str(caught.value)
    file.write_text(POINTER)
    with pytest.raises(ValueError, match=r"got a Git LFS pointer: the file is not downloaded; run git lfs pull"):
        from_pretrained(file.parent)
    file.unlink()
    with pytest.raises(
        ValueError, match=r"expected model\.safetensors or model\.safetensors\.index\.json in .* neither"
    ):
        from_pretrained(file.parent)
    file.with_name("pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(
        ValueError, match="got pytorch_model.bin; other formats are not read, convert it to safetensors"
    ):
        from_pretrained(file.parent)
    assert read_config(file.parent) == read_config(GOLDEN / "qwen3")  # planning needs no weights


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ("{", "expected an index of weights in .*index.json, got .*: expected JSON"),
        (POINTER, "got a Git LFS pointer"),
        ('{"weight_map": ["a"]}', "expected a weight_map of tensors to files"),
        ("[]", "expected a weight_map of tensors to files"),
        ('{"weight_map": {}}', "expected the files that .* names in .*, all missing"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "'../one.safetensors' missing"),
        (
            '{"weight_map": {"a": "' + "x" * 300 + '"}}',
            "expected names of files in .*index.json, got File name too long",
        ),
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "in one.safetensors and two.safetensors"),
    ],
)
def test_a_broken_index_is_named(index: str, complaint: str, damaged):
    folder = damaged(lambda held: None)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=complaint) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "config.json: expected JSON, got nothing"),
        (b"[1]", r"config.json: expected an object, got \[1\]"),
        (b"null", "config.json: expected an object, got None"),
        (b'{"rms_norm_eps": NaN}', "config.json: expected JSON, got NaN"),
        ("{}".encode("utf-16"), "config.json: expected text in UTF-8"),
        (b'{"model_type": "qwen2", "rope_scaling": [1]}', "config.json: expected "),
        (None, "expected a config.json in .*, got No such file or directory"),
    ],
)
def test_a_broken_config_is_named(content: bytes | None, complaint: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_byte_order_mark_is_no_harm_and_an_adapter_is_no_model(tmp_path: Path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + (GOLDEN / "qwen3" / "config.json").read_bytes())
    assert read_config(tmp_path) == read_config(GOLDEN / "qwen3")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"expected a whole model in .*, got an adapter \(adapter_config.json\)"):
        from_pretrained(tmp_path)


def test_a_dtype_is_a_name_or_what_jax_and_numpy_call_one(tmp_path: Path):
    for dtype in (
        "bfloat16",
        jnp.bfloat16,
        np.dtype("bfloat16"),
        jnp.dtype(jnp.bfloat16),
        jnp.zeros(1, "bfloat16").dtype,
    ):
        assert dtype_name(dtype) == "bfloat16" == read_config(GOLDEN / "qwen2", dtype).dtype
    model = from_pretrained(GOLDEN / "qwen2", dtype=np.float32)
    assert model.config.dtype == "float32" and model.params["base"]["embed"].dtype == jnp.float32
    model.save_pretrained(tmp_path / "half", dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    bfloat16: Any = jnp.bfloat16
    int8: Any = jnp.int8
    odd_ones: Any = ("bf16", None, float, jnp.float16, np.dtype("int8"), object())
    assert ModelConfig(64, 32, 48, 2, 4, 2, 8, dtype=jnp.bfloat16).dtype == "bfloat16"
    assert SamplingConfig(cache=int8) == SamplingConfig(cache="int8")
    assert LearnerConfig(moments=bfloat16).moments == "bfloat16"
    for odd in odd_ones:
        with pytest.raises(
            ValueError, match=r"expected dtype bfloat16 or float32 \(a name, a jax or a numpy dtype\), got"
        ):
            from_pretrained(GOLDEN / "qwen2", dtype=odd)
    with pytest.raises(ValueError, match="expected weights model or int8 .*, got .*bfloat16"):
        SamplingConfig(weights=bfloat16)


def test_a_name_on_the_hub_fetches_the_weights_once(monkeypatch, tmp_path: Path):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    there = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    others = ["consolidated.safetensors", "original/model.safetensors", "model.gguf", "README.md"]
    fetched = []

    def download(name: str, **patterns: Any) -> str:
        fetched.extend(filter_repo_objects([*there, *others], **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("mistralai/a-model") == tmp_path and fetched == there


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c", "~nobody-of-that-name/model"])
def test_a_missing_model_is_refused_with_what_was_expected(name: str):
    with pytest.raises(ValueError, match="expected a folder, a GGUF file, or a name on the Hub"):
        from_pretrained(name)


READ = """
import json, resource, sys
from pathlib import Path

import jax

from aem_jax.models import from_pretrained, Policy
from aem_jax.models.pretrained import read_config

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

jax.block_until_ready(jax.numpy.zeros(1) + 1)
before = peak()
model = from_pretrained(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
one = float(model.params["base"]["layers"]["down"][-1, 3, 5])
print(json.dumps({"extra": peak() - before - size, "size": size, "one": one}))
"""


@pytest.mark.slow
def test_a_model_is_read_one_tensor_at_a_time(tmp_path: Path, user_environment: dict[str, str]):
    """Beyond the parameters (here in host memory), at most two tensors and 192 MiB are used."""
    theirs = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    theirs |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 30, "vocab_size": 32_000}
    theirs |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    held, weight_map = {}, {}
    for number, tensor in enumerate(tensors(config_from_hf(theirs))):
        held[tensor.name] = np.full(tensor.shape, number % 256, jnp.bfloat16)
        if len(held) == 40 or tensor.name == "lm_head.weight":
            save_file(held, tmp_path / f"{number}.safetensors")
            weight_map |= dict.fromkeys(held, f"{number}.safetensors")
            held.clear()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    environment = {**user_environment, "XLA_FLAGS": ""}  # 134 million parameters cost more to convert than to compile
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True, env=environment
    )
    measured = json.loads(done.stdout)
    largest = 32_000 * 512 * 2
    assert measured["size"] > 2**28
    assert measured["extra"] <= 2 * largest + 192 * 2**20, measured
    names = [tensor.name for tensor in tensors(config_from_hf(theirs))]
    assert measured["one"] == names.index("model.layers.29.mlp.down_proj.weight") % 256
