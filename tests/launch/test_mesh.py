"""The mesh of a run: the configured one, otherwise one that divides and fits."""

from dataclasses import replace

import jax
import pytest

from aem_jax.config.components import model_config
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.launch.context import open_mesh
from aem_jax.sharding import MeshConfig

TINY = read_preset("alfworld-tiny")
MODEL = model_config(TINY.model, 1024)


def sizes(config: RunConfig, model=MODEL) -> tuple[int, ...]:
    return tuple(open_mesh(config, model).shape.values())


def test_a_given_mesh_is_kept():
    assert jax.device_count() == 8
    assert sizes(replace(TINY, mesh=MeshConfig(2, 4, 1))) == (2, 4, 1, 1)


def test_the_least_tensor_parallelism_that_divides_is_chosen():
    assert sizes(replace(TINY, batch=replace(TINY.batch, rows=8))) == (8, 1, 1, 1)  # shards below 128 are inefficient
    assert sizes(TINY) == (4, 1, 1, 2)  # four rows use four devices, tensor uses the rest
    wide = replace(MODEL, hidden_size=1024)
    assert sizes(replace(TINY, batch=replace(TINY.batch, rows=8)), wide) == (1, 8, 1, 1)


def test_rows_that_no_mesh_divides_are_refused():
    with pytest.raises(ValueError, match=r"got 8 devices; make rows and slots multiples of \d"):
        open_mesh(replace(TINY, batch=replace(TINY.batch, rows=3)), MODEL)
