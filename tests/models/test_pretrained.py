"""Checkpoints written by transformers: read, compared with its own logits and greedy words, and written back."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from aem_jax.models import Policy, RopeScaling, from_pretrained, save_pretrained
from aem_jax.models.families import config_from_hf, config_to_hf
from aem_jax.models.weights import tensors
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sharding import MeshConfig, make_mesh

GOLDEN = Path(__file__).resolve().parent / "golden"
FAMILIES = ["qwen2", "qwen2-tied", "qwen3", "llama", "llama-tied"]


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


def test_greedy_words_equal_transformers(folder: Path):
    """64 tokens through the sampler's cache."""
    recorded = outputs(folder)
    model = from_pretrained(folder, dtype="float32")
    prompts, greedy = recorded["tokens"][:, :8].astype(np.int32), recorded["greedy"]
    sampler = Sampler(model.policy, SamplingConfig(0.0), [-1], capacity=72, slack=64)
    state = sampler.extend(model.params, sampler.init(2), prompts, np.full(2, 8, np.int32))
    _, said = sampler.decode(model.params, state, np.full(2, 64, np.int32), 64)
    assert greedy.shape == (2, 64) and len(np.unique(greedy)) > 4
    np.testing.assert_array_equal(said.tokens, greedy)


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
    with pytest.raises(ValueError, match=rf"{files[1]} missing"):
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


def test_every_tensor_goes_to_its_shards():
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices()[:8])
    alone = from_pretrained(GOLDEN / "qwen2-tied", dtype="float32")
    spread = from_pretrained(GOLDEN / "qwen2-tied", mesh=mesh, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, spread.params, alone.params)
    gate_up = spread.params["layers"]["gate_up"]
    assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size  # over fsdp × tensor


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
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert config_from_hf(old, "float32") == config


def test_llama_3_stretches_its_positions():
    config = config_from_hf(json.loads((GOLDEN / "llama" / "config.json").read_text()))
    assert config.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "expected one of Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCaus"),
        ({"architectures": None, "model_type": "gpt2"}, "got gpt2"),
        ({"use_sliding_window": True}, "expected use_sliding_window = False, got True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"got \['sliding_attention'\]"),
        ({"hidden_act": "gelu"}, "expected hidden_act = 'silu', got 'gelu'"),
        ({"attention_bias": True}, "expected attention_bias = False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'default' or 'llama3', got 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "expected low_freq_factor, high_freq_factor"),
    ],
)
def test_what_the_decoder_cannot_do_is_refused(change: dict, complaint: str, tmp_path: Path):
    theirs = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(theirs | change))
    with pytest.raises(ValueError, match=complaint) as caught:
        from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_field_is_named(tmp_path: Path):
    theirs = json.loads((GOLDEN / "qwen2" / "config.json").read_text())
    del theirs["num_hidden_layers"]
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match="expected num_hidden_layers"):
        from_pretrained(tmp_path)


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


def test_a_tied_head_saved_twice_and_rotary_tables_are_no_harm(tmp_path: Path):
    shutil.copytree(GOLDEN / "llama-tied", tmp_path / "model")
    held = load_file(tmp_path / "model" / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].copy()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(held, tmp_path / "model" / "model.safetensors")
    from_pretrained(tmp_path / "model")


def test_broken_files_are_named(damaged, tmp_path: Path):
    file = damaged(lambda held: None) / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:4], b"\xff" * 64):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"expected safetensors in .*model\.safetensors, got"):
            from_pretrained(file.parent)
    file.unlink()
    with pytest.raises(ValueError, match=r"expected model\.safetensors or model\.safetensors\.index\.json in"):
        from_pretrained(file.parent)


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/no/where", "a/b/c"])
def test_nothing_there_says_what_was_expected(name: str):
    with pytest.raises(ValueError, match="expected a folder, or a name on the Hub"):
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
one = float(model.params["layers"]["down"][-1, 3, 5])
print(json.dumps({"extra": peak() - before - size, "size": size, "one": one}))
"""


@pytest.mark.slow
def test_a_gibibyte_is_read_one_tensor_at_a_time(tmp_path: Path, user_environment: dict[str, str]):
    """Beside the parameters themselves (here the host's memory is the device's), at most two tensors and 1 GiB."""
    theirs = json.loads((GOLDEN / "qwen3" / "config.json").read_text())
    theirs |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 30, "vocab_size": 64_000}
    theirs |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(theirs))
    held, weight_map = {}, {}
    for number, tensor in enumerate(tensors(config_from_hf(theirs))):
        held[tensor.name] = np.full(tensor.shape, number % 256, jnp.bfloat16)
        if len(held) == 40 or tensor.name == "lm_head.weight":
            save_file(held, tmp_path / f"{number}.safetensors")
            weight_map |= dict.fromkeys(held, f"{number}.safetensors")
            held.clear()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path)], capture_output=True, text=True, check=True, env=user_environment
    )
    found = json.loads(done.stdout)
    largest = 64_000 * 1024 * 2
    assert found["size"] > 2**30
    assert found["extra"] <= 2 * largest + 2**30, found
    names = [tensor.name for tensor in tensors(config_from_hf(theirs))]
    assert found["one"] == names.index("model.layers.29.mlp.down_proj.weight") % 256
