"""Gymnasium's games as text: their observations, their accepted actions, and their conformance."""

import pytest

pytest.importorskip("gymnasium", reason="gymnasium (pip install gymnasium) is not installed")

from aem_jax.envs.testing.conformance import Subject, check_environment
from examples.gymnasium_text import blackjack, frozen_lake


@pytest.mark.parametrize(("make", "actions"), [(frozen_lake, ("right", "down", "sail")), (blackjack, ("hit", "stick"))])
def test_the_environments_conform(make, actions):
    assert check_environment(Subject(make, [{"seed": 1}, {"seed": 2}], actions)) == []


def lake(result):
    """(rows of the picture, its text)."""
    *rows, message, asked = result.observation.splitlines()
    assert asked == "Say one of: left, down, right, up."
    return rows, message


def test_a_path_over_the_ice_reaches_the_goal():
    env = frozen_lake()
    rows, message = lake(env.reset({"seed": 3}))
    # gymnasium's map of seed 3: one hole, in the first row
    assert rows == ["X F H F", "F F F F", "F F F F", "F F F G"] and message == "You are at X; go to G."
    rows, _ = lake(env.step("I could go left, but I go DOWN"))  # the last direction counts
    assert rows == ["S F H F", "X F F F", "F F F F", "F F F G"]
    invalid = env.step("upwards")  # not a valid word
    assert lake(invalid)[0] == rows and invalid.info["valid_action"] is False and not invalid.done
    for word in ("down", "down", "right", "right"):
        assert not env.step(word).done
    last = env.step("right")
    assert (last.reward, last.terminated, last.info["won"]) == (1.0, True, True)
    assert lake(last) == (["S F H F", "F F F F", "F F F F", "F F F X"], "You reached the goal.")


def test_a_hole_terminates_and_the_limit_truncates():
    env = frozen_lake(max_steps=2)
    env.reset({"seed": 3})
    env.step("right")
    last = env.step("right")
    assert lake(last)[1] == "You fell into a hole."
    assert (last.reward, last.terminated, last.truncated, last.info["won"]) == (0.0, True, False, False)
    env.reset({"seed": 3})
    env.step("down")
    assert env.step("nothing").truncated
    env.reset({"seed": 3})
    env.step("down")
    cut = env.step("up")
    assert (cut.terminated, cut.truncated) == (False, True)


def test_seeds_determine_lakes():
    env = frozen_lake(size=5)
    assert len({env.reset({"seed": seed}).observation for seed in range(20)}) > 10
    for task in ({}, {"seed": -1}, {"seed": "1"}):
        with pytest.raises(ValueError, match="expected a task with a seed of at least 0"):
            env.reset(task)


def test_blackjack_is_dealt_by_the_seed():
    env = blackjack()
    assert env.reset({"seed": 3}).observation == "You hold 7; the dealer shows 10.\nSay one of: stick, hit."
    assert env.step("hit me").observation.startswith("You hold 17;")
    bust = env.step("hit")  # 25
    assert (bust.reward, bust.terminated, bust.info["won"]) == (-1.0, True, False)
