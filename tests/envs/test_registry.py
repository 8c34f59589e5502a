"""The table of environments that the command line and the servers use."""

import dataclasses
import subprocess
import sys

import pytest
from envs.servers import REPOSITORY

from aem_jax import envs
from aem_jax.config import validate
from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs import registry
from aem_jax.envs.registry import ENVIRONMENTS, SERVED, TRAINED, Entry, default_config, registered
from aem_jax.envs.suite import tokenizer_corpus
from aem_jax.overrides import apply, split


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_every_registry_entry_matches_its_environment(name: str):
    spec = registered(name)
    assert spec.description and spec.config is not None
    assert (spec.suite is not None) == (name in TRAINED)
    if name in TRAINED:
        assert default_config(name) == spec.config()
        paths = set(spec.paths(spec.config()))
        assert paths <= {field.name for field in dataclasses.fields(spec.config)} or any("." in path for path in paths)


def test_a_wrong_line_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    lines = {"echo2": Entry("aem_jax.envs.testing.echo:NOTHING"), "shop": Entry("aem_jax.envs.webshop.suite:WEBSHOP")}
    monkeypatch.setattr(registry, "ENVIRONMENTS", lines)
    with pytest.raises(ValueError, match="expected an EnvironmentSpec at aem_jax.envs.testing.echo:NOTHING"):
        registered("echo2")
    with pytest.raises(ValueError, match="NAME 'shop' for this name .*, got WebshopConfig with NAME 'webshop'"):
        default_config("shop")


def test_openenv_and_agents_are_not_served_here():
    assert set(TRAINED) - set(SERVED) == {"openenv", "harness"}


def test_no_environment_has_the_name_of_another_setting():
    """Settings of an environment are a field of the run's config, under the environment's name."""
    assert not {name.replace("-", "_") for name in TRAINED} & {field.name for field in dataclasses.fields(RunConfig)}


def test_an_environment_loads_no_other():
    """A run or a server loads only its own environment; harbor is built on the tools and sandboxes of swe."""
    below = {"harbor": {"swe"}}
    rooms = {name: ENVIRONMENTS[name].where.split(".")[2] for name in TRAINED}
    for name in TRAINED:
        code = f"import sys; from aem_jax.envs.registry import registered; registered({name!r}); print(*sys.modules)"
        command = [sys.executable, "-c", code]
        loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY).stdout.split()
        assert {module.split(".")[2] for module in loaded if module.startswith("aem_jax.envs.")} & set(
            rooms.values()
        ) == {rooms[name]} | below.get(name, set())


def test_the_package_exports_what_an_environment_is_written_with():
    for name in envs.__all__:
        assert getattr(envs, name).__module__.startswith("aem_jax.envs.")
    assert set(envs.__all__) <= set(dir(envs))
    with pytest.raises(AttributeError, match="no attribute 'Enviroment'"):
        envs.Enviroment  # pyright: ignore[reportAttributeAccessIssue]  # noqa: B018


def test_without_an_agent_there_is_nothing_to_train_a_tokenizer_on():
    suite = dataclasses.replace(task_suite(RunConfig()), demonstrator=None, baselines={})
    with pytest.raises(ValueError, match=r"expected --model.path.* with alfworld"):
        next(tokenizer_corpus(suite, 1, 1))


def test_a_tokenizer_for_agents_is_trained_on_the_texts_of_their_tasks():
    folder = REPOSITORY / "examples" / "any_agent"
    words = ["--harness.agent", f"{folder}/number_game.py:play"]
    config = apply(read_preset("harness-tiny", str(folder / "number_game.toml")), split(words)[1])
    validate.check(config)
    assert list(tokenizer_corpus(task_suite(config), 2, 1)) == [['{"seed": 0}'], ['{"seed": 1}']]
