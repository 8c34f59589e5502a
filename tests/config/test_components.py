"""Names become functions and numbers become sizes. Contradictions are found before the run starts."""

import dataclasses
import typing

import numpy as np
import pytest

from aem_jax.batch import BatchConfig
from aem_jax.config import components
from aem_jax.config.presets import DEFAULT, read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.protocol import Task
from aem_jax.errors import ConfigError
from aem_jax.models.config import ModelChoice
from aem_jax.overrides import apply, split
from aem_jax.selection import Rule, SelectionConfig
from aem_jax.sharding import MeshConfig
from aem_jax.trajectory import Ending, Trajectory, Turn


def test_every_name_of_a_selection_has_a_function():
    kinds = typing.get_type_hints(SelectionConfig)
    assert set(typing.get_args(kinds["outcome"])) == set(components.OUTCOMES)
    assert set(typing.get_args(kinds["overlong_of"])) == set(components.LENGTHS)
    assert set(typing.get_args(kinds["truncated"])) == set(components.TRUNCATED)


def test_a_selection_rule_has_the_functions_of_its_names():
    assert components.selection_rule(RunConfig()) == Rule(RunConfig().rollout.groups_per_step)
    words = [
        "--selection.filter-equal-outcomes",
        "True",
        "--selection.outcome",
        "success",
        "--selection.max-rounds",
        "10",
    ]
    words += ["--selection.overlong-penalty", "1", "--selection.overlong-buffer", "8"]
    rule = components.selection_rule(apply(read_preset(DEFAULT), split(words)[1]))
    # the preset's responses may have 16 tokens; one of 12 is half-way into the buffer of 8
    turn = Turn(np.ones(3), np.ones(12), np.zeros(12), np.zeros(12), 2.0, True)
    long = Trajectory(Task("t", "look", {}), 0, 0, (turn,), Ending.TERMINATED, success=True)
    assert rule.penalise is not None and rule.penalise(long).total_reward == 1.5
    assert rule.outcome is not None and (rule.outcome(long), rule.max_rounds) == (True, 10)


def test_the_constant_length_is_what_an_episode_may_say():
    preset = read_preset(DEFAULT)  # ten turns of 16 tokens, in a context of 384
    assert components.learner(preset).constant_length == 160
    short = apply(preset, split(["--rollout.context-tokens", "150"])[1])
    assert components.learner(short).constant_length == 150
    windowed = apply(short, split(["--rollout.context", "window"])[1])  # each turn has its own context
    assert components.learner(windowed).constant_length == 160
    given = apply(preset, split(["--learner.constant-length", "7"])[1])
    assert components.learner(given) == given.learner and given.learner.constant_length == 7


def test_a_model_is_a_known_size_with_changes():
    known = components.known_model("tiny")
    assert components.model_config(ModelChoice(), 512) == dataclasses.replace(known, vocab_size=512)
    changed = components.model_config(ModelChoice(num_layers=2, dtype="bfloat16"), 701)
    assert (changed.num_layers, changed.dtype, changed.hidden_size) == (2, "bfloat16", known.hidden_size)
    assert changed.vocab_size == 704  # the next multiple of 64
    gemma = [components.model_config(ModelChoice(name="tiny-gemma", num_layers=layers), 512) for layers in (3, 6)]
    assert [config.windows for config in gemma] == [(64, 64, 0), (64, 64, 0, 64, 64, 64)]
    with pytest.raises(ConfigError, match="--model: expected num_heads divisible"):
        components.model_config(ModelChoice(num_heads=3, num_kv_heads=2), 512)


@pytest.mark.parametrize("context", ["append", "window"])
def test_a_batch_layout_holds_the_worst_case(context: str):
    config = RunConfig(batch=BatchConfig(rows=4))
    config = dataclasses.replace(config, rollout=dataclasses.replace(config.rollout, max_turns=3, context=context))
    layout = components.batch_layout(config, 10, 2)
    segments = 10 if context == "append" else 30
    # two minibatches whose last microbatches are both nearly empty
    for first in range(segments + 1):
        used = -(-first // layout.rows) + -(-(segments - first) // layout.rows)
        assert used <= layout.num_microbatches
    assert (layout.max_responses, layout.max_trajectories, layout.num_minibatches) == (30, 10, 2)
    assert layout.row_length == config.rollout.context_tokens


def test_rows_follow_from_a_budget_of_tokens():
    words = ["--batch.tokens-per-microbatch", "8000", "--batch.row-length", "700"]
    config = apply(read_preset(DEFAULT), split(words)[1])
    assert components.batch_layout(config, 64, 1).rows == 11  # 11 x 700 = 7700
    assert components.batch_layout(config, 64, 1).num_microbatches == 6
    split_up = dataclasses.replace(config, mesh=MeshConfig(2, 2, 1))
    assert components.microbatch_rows(split_up) == 8
    too_few = dataclasses.replace(split_up, batch=BatchConfig(tokens_per_microbatch=2799, row_length=700))
    with pytest.raises(ConfigError, match="tokens-per-microbatch: expected at least 2800 .* got 2799"):
        components.microbatch_rows(too_few)


def test_the_warm_start_has_its_own_schedule():
    config = apply(RunConfig(), split(["--warmstart.steps", "50", "--learner.kl-coefficient", "0.1"])[1])
    learner = components.warmstart_learner(config)
    assert (learner.total_steps, learner.warmup_steps, learner.kl_coefficient) == (50, 5, 0.0)
    assert learner.learning_rate == config.warmstart.learning_rate
