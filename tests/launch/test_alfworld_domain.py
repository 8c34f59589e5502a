"""What a run knows of ALFWorld: its tasks, its experts, and what they say."""

import json

import pytest

from aem_jax.config.presets import DEFAULT, read_preset
from aem_jax.envs.alfworld.generator.files import game_data
from aem_jax.envs.alfworld.tasks import generated_game
from aem_jax.envs.play import play
from aem_jax.evaluate import evaluate_agent
from aem_jax.launch.domains import Domain, texts
from aem_jax.launch.domains.alfworld import alfworld

CONFIG = read_preset(DEFAULT)
TURNS = CONFIG.rollout.max_turns


@pytest.fixture(scope="module")
def domain() -> Domain:
    return alfworld(CONFIG)


def rooms(tasks) -> set[str]:
    """What games are made of, whatever they are called."""
    return {json.dumps(game_data(generated_game(task.payload)), sort_keys=True) for task in tasks}


def test_training_and_evaluation_share_no_game(domain: Domain):
    training = rooms(domain.training[:1500])
    assert len(training) > 1400
    for split in ("valid_seen", "valid_unseen"):
        tasks, name = domain.evaluation(split, 64)
        assert len(tasks) == 64 and name.startswith(f"{split}-64-")
        assert len(rooms(tasks)) == 64
        assert not rooms(tasks) & training
        assert {task.task_type for task in tasks} == set(CONFIG.games.task_types)


def test_an_evaluation_set_is_the_same_for_every_seed():
    import dataclasses

    names = [alfworld(dataclasses.replace(CONFIG, seed=seed)).evaluation("valid_seen", 8)[1] for seed in (0, 1)]
    assert names[0] == names[1]


def test_experts_win_and_chance_does_not(domain: Domain):
    tasks, name = domain.evaluation("valid_seen", 24)
    env = domain.make_env()
    found = {
        agent: evaluate_agent(env, make, tasks, max_turns=TURNS, name=name, split="valid_seen").rate.success
        for agent, make in domain.baselines.items()
    }
    assert found["oracle"] == 1.0
    assert found["searcher"] >= 0.8
    assert found["random"] <= 0.2


def test_a_demonstrator_speaks_as_a_policy_should(domain: Domain):
    task = domain.training[0]
    assert domain.demonstrator is not None
    for exchange in play(domain.make_env(), task.payload, domain.demonstrator(task), TURNS):
        assert exchange.response.startswith("<action>") and exchange.response.endswith("</action>")
        assert exchange.result.info["valid_action"]


def test_a_tokenizer_is_given_what_both_sides_say(domain: Domain):
    said = [text for episode in texts(domain, 4, TURNS) for text in episode]
    assert any("Your task is to:" in text for text in said) and any("<action>" in text for text in said)
