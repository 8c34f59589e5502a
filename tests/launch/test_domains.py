"""The table of environments, as the command line knows them."""

import dataclasses
import typing

import pytest

from aem_jax.config.run import RunConfig
from aem_jax.envs.table import ENVIRONMENTS
from aem_jax.launch.domains import DOMAINS, texts
from aem_jax.launch.domains.alfworld import alfworld


def test_every_name_of_the_config_has_a_domain_and_a_server():
    names = typing.get_args(typing.get_type_hints(RunConfig)["environment"])
    assert set(names) == set(DOMAINS)
    assert set(names) - {"openenv"} <= set(ENVIRONMENTS)  # which is served by others, or by a path


def test_with_nobody_to_play_there_is_nothing_to_train_a_tokenizer_on():
    domain = dataclasses.replace(alfworld(RunConfig()), demonstrator=None, baselines={})
    with pytest.raises(ValueError, match=r"expected --model.path.* with alfworld"):
        next(texts(domain, 1, 1))
