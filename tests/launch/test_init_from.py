"""Unusable starting points are named in the error. `test_experiments.py` tests a run that starts from another run."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from aem_jax.checkpoint import Checkpoints
from aem_jax.config import components, inputs, saved, validate
from aem_jax.config.algorithms import AlgorithmConfig
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.launch import frozen_weights, init_from
from aem_jax.learner import init_state
from aem_jax.models import save_pretrained
from aem_jax.models.config import ModelChoice
from aem_jax.models.lora import LoraConfig
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.warmstart import WarmstartConfig

SMALL = read_preset(str(Path(__file__).with_name("small.toml")))


def beginning(run: Path) -> RunConfig:
    return replace(SMALL, warmstart=WarmstartConfig(init_from=str(run)))


def parameters(config: RunConfig):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return init_from.parameters(config, components.make_policy(config, 100), 100, mesh)


def test_a_folder_without_a_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a run's folder with a tokenizer, got none in"):
        init_from.tokenizer(beginning(tmp_path))
    with pytest.raises(ConfigError, match="no run in"):
        parameters(beginning(tmp_path))


def test_a_run_of_another_model_is_refused(tmp_path: Path):
    saved.save(replace(SMALL, model=replace(SMALL.model, num_layers=2)), tmp_path)
    with pytest.raises(ConfigError, match="got num_layers 2 in .*give the same --model, --lora and --tokenizer"):
        parameters(beginning(tmp_path))


def test_a_run_without_a_checkpoint_of_step_0_is_refused(tmp_path: Path):
    saved.save(SMALL, tmp_path)
    with pytest.raises(ConfigError, match="expected a checkpoint of step 0 in .*, got steps \\[\\]"):
        parameters(beginning(tmp_path))


def test_the_value_head_of_the_other_run_is_not_taken(tmp_path: Path):
    valued = replace(SMALL, algorithm=AlgorithmConfig("gae"))
    mesh, policy = make_mesh(MeshConfig(), jax.devices()[:1]), components.make_policy(valued, 100)
    state = init_state(policy, valued.learner, mesh, jax.random.key(0))
    assert set(state.params) == {"base", "value"}
    saved.save(valued, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", valued.checkpoint) as checkpoints:
        checkpoints.save(0, state)
    params = parameters(beginning(tmp_path))  # for a run without a value head
    jax.tree.map(np.testing.assert_array_equal, params, {"base": state.params["base"]})


def test_an_adapter_starts_from_that_of_a_run_on_the_same_weights(tmp_path: Path):
    model = tmp_path / "model"
    policy = components.make_policy(SMALL, 100).base
    save_pretrained(model, policy.config, policy.init(jax.random.key(1)))
    own = replace(SMALL, model=ModelChoice(path=str(model), dtype="float32"), lora=LoraConfig(2, targets=("q_proj",)))
    run, mesh = tmp_path / "run", make_mesh(MeshConfig(), jax.devices()[:1])
    adapted = components.make_policy(own, 100, model)
    state = init_state(adapted, own.learner, mesh, jax.random.key(0))
    saved.save(own, run)
    with Checkpoints(run / "checkpoints", own.checkpoint) as checkpoints:
        checkpoints.save(0, state.without_frozen())
    config = replace(own, warmstart=WarmstartConfig(init_from=str(run)))
    validate.check(config)
    start = lambda config: init_from.parameters(config, components.make_policy(config, 100, model), 100, mesh)
    jax.tree.map(np.testing.assert_array_equal, start(config), {"adapter": state.params["adapter"]})
    jax.tree.map(
        np.testing.assert_array_equal, start(replace(config, lora=replace(own.lora, merge=False))), start(config)
    )
    with pytest.raises(ConfigError, match="give the same --model, --lora and --tokenizer"):
        start(replace(config, lora=replace(own.lora, rank=3)))
    with pytest.raises(ConfigError, match="give the same --model, --lora and --tokenizer"):
        start(replace(config, lora=LoraConfig()))

    _, sums = frozen_weights.load(own, run, adapted.base, mesh, None)
    inputs.write(run, {inputs.FROZEN: sums})
    init_from.check_frozen(config, sums)
    save_pretrained(tmp_path / "other", policy.config, policy.init(jax.random.key(2)))
    other = replace(own, model=replace(own.model, path=str(tmp_path / "other")))
    _, others = frozen_weights.load(other, run, adapted.base, mesh, None)
    with pytest.raises(ConfigError, match="expected an adapter trained beside the weights of --model.path"):
        init_from.check_frozen(config, others)
