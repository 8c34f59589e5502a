"""Seeded random damage to files: each gives the right result or a one-line error, no traceback, no other numbers."""

import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import damage, put_back, snapshot

from aem_jax.checkpoint import CheckpointError, Checkpoints
from aem_jax.config import saved
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.models.config import ModelChoice

SEEDS = 200
STEPS = (1, 2)


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    sizes = {"embed": (40, 16), "scale": (16,)}
    leaves = {name: jax.numpy.asarray(rng.normal(size=shape), "float32") for name, shape in sizes.items()}
    return {**leaves, "step": jax.numpy.int32(step)}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step), extra={"step": step}, score=step / 10)
    return folder


def test_a_damaged_checkpoint_is_restored_exactly_or_replaced_by_the_previous_one(
    intact: Path, tmp_path: Path, capfd, caplog, monkeypatch
):
    # The stream of a handler that another test installed may be closed.
    monkeypatch.setattr(logging.root, "handlers", [caplog.handler])
    states = {step: state_of(step) for step in STEPS}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states[1])
    restored: Counter[int] = Counter()
    folder = tmp_path / "checkpoints"
    shutil.copytree(intact, folder)
    files = snapshot(folder)
    for seed in range(SEEDS):
        put_back(folder, files)
        description = damage(folder, seed, lambda file: file.name != ".lock")
        caplog.clear()
        with Checkpoints(folder) as checkpoints:
            if seed % 5 == 0:
                checkpoints.claim()  # a writer moves unreadable checkpoints aside
            state = checkpoints.restore(abstract)
            step = int(state["step"])
            assert all(np.array_equal(state[name], value) for name, value in states[step].items()), description
            assert checkpoints.extra(step) == {"step": step} and checkpoints.best in (step, max(STEPS)), description
            assert seed % 5 or checkpoints.latest == step, description
        lost = not list(folder.rglob("2"))  # all of the checkpoint, so no trace of it is left
        messages = [record.getMessage() for record in caplog.records if record.name == "aem_jax.checkpoint"]
        assert len(messages) <= 1 and not any("\n" in line for line in messages), description
        assert step == max(STEPS) or lost or "checkpoint of step 2 cannot be read" in messages[0], description
        restored[step] += 1
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert restored[1] >= SEEDS // 10 and restored[2] >= SEEDS // 4, restored  # both happen


@pytest.mark.parametrize("seed", range(5))
def test_damage_to_the_only_checkpoint_gives_its_numbers_or_a_one_line_error(intact: Path, tmp_path: Path, seed: int):
    shutil.copytree(intact, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged" / "1")
    damage(tmp_path / "damaged" / "2" / "state" / "ocdbt.process_0" / "d", seed)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(2))
    with Checkpoints(tmp_path / "damaged") as checkpoints:
        try:
            state = checkpoints.restore(abstract)
        except CheckpointError as error:
            assert str(error).startswith("no checkpoint in ") and "\n" not in str(error)
        else:
            jax.tree.map(np.testing.assert_array_equal, state, state_of(2))


def test_a_damaged_record_of_a_run_gives_the_same_config_or_a_one_line_error(tmp_path: Path):
    """`config.json`, `inputs.json`, the tokenizer and the model's config, read as every command reads them."""
    run, model = tmp_path / "run", tmp_path / "model"
    for folder in (run / "tokenizer", model):
        folder.mkdir(parents=True)
    (run / "tokenizer" / "tokenizer.json").write_text(json.dumps({"vocab": {str(i): i for i in range(50)}}))
    (model / "config.json").write_text(json.dumps({"rope_theta": 10000.0, "hidden_size": 64}))
    config = RunConfig(model=ModelChoice(path=str(model)))
    saved.save(config, run)
    files, refused = snapshot(run), 0
    for seed in range(SEEDS):
        put_back(run, files)
        description = damage(run, seed)
        try:
            loaded = saved.load(run)
        except ConfigError as error:
            assert "\n" not in str(error) and str(run) in str(error), description
            refused += 1
        else:
            own = [file for file in files if file.name != "inputs.json"]
            assert loaded == config and all(file.read_bytes() == files[file] for file in own), description
    assert refused > SEEDS // 2
