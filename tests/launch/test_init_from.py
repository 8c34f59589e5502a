"""Unusable starting points are named in the error. `test_experiments.py` tests a run that starts from another run."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from aem_jax.checkpoint import Checkpoints
from aem_jax.config import components, saved
from aem_jax.config.algorithms import AlgorithmConfig
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.launch import init_from
from aem_jax.learner import init_state
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.warmstart import WarmstartConfig

SMALL = read_preset(str(Path(__file__).with_name("small.toml")))


def beginning(run: Path) -> RunConfig:
    return replace(SMALL, warmstart=WarmstartConfig(init_from=str(run)))


def parameters(config: RunConfig):
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return init_from.parameters(config, components.make_policy(config, 100), 100, mesh)


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a run's folder with a tokenizer, got none in"):
        init_from.tokenizer(beginning(tmp_path))
    with pytest.raises(ConfigError, match="no run in"):
        parameters(beginning(tmp_path))


def test_a_run_of_another_model(tmp_path: Path):
    saved.save(replace(SMALL, model=replace(SMALL.model, num_layers=2)), tmp_path)
    with pytest.raises(ConfigError, match="give the same --model and --tokenizer"):
        parameters(beginning(tmp_path))


def test_a_run_that_has_not_kept_step_0(tmp_path: Path):
    saved.save(SMALL, tmp_path)
    with pytest.raises(ConfigError, match="expected a checkpoint of step 0 in .*, got steps \\[\\]"):
        parameters(beginning(tmp_path))


def test_a_value_head_is_left_behind(tmp_path: Path):
    valued = replace(SMALL, algorithm=AlgorithmConfig("gae"))
    mesh, policy = make_mesh(MeshConfig(), jax.devices()[:1]), components.make_policy(valued, 100)
    state = init_state(policy, valued.learner, mesh, jax.random.key(0))
    assert set(state.params) == {"base", "value"}
    saved.save(valued, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", valued.checkpoint) as checkpoints:
        checkpoints.save(0, state)
    found = parameters(beginning(tmp_path))  # for a run without a value head
    jax.tree.map(np.testing.assert_array_equal, found, {"base": state.params["base"]})
