"""The grammar of thoughts: phrasings that carry their conditions."""

import random

import pytest

from aem_jax.envs.actions import as_thought, extract_action
from aem_jax.envs.thoughts import a, listed, think
from aem_jax.rollout.context import without_thinking

GRAMMAR = {
    "thought": ("{weather} {plan}",),
    "weather": ("it rains.", "{sun}the sun shines.", "it is {degrees} degrees."),
    "plan": ("{night}let me sleep.", "I take {thing}."),
}


def wordings(facts, words=(1, 20), symbol="thought"):
    return {think(symbol, facts, GRAMMAR, random.Random(seed), words) for seed in range(60)}


def test_a_phrasing_is_said_only_if_its_names_are_known():
    assert wordings({"thing": "a hat"}) == {"It rains. I take a hat."}
    assert wordings({"sun": "", "degrees": "9", "night": ""}) == {
        "It rains. Let me sleep.",
        "The sun shines. Let me sleep.",
        "It is 9 degrees. Let me sleep.",
    }
    with pytest.raises(ValueError, match=r"expected a phrasing of 'thought' for the facts \['sun'\], got none"):
        wordings({"sun": ""})


def test_a_fact_is_no_symbol():
    with pytest.raises(ValueError, match="got \\['plan'\\] as both"):
        wordings({"plan": "", "thing": "a hat"})


def test_text_of_a_fact_is_not_read_as_a_phrasing():
    assert wordings({"thing": "the {weather}"}) == {"It rains. I take the {weather}."}


def test_the_length_is_within_the_range_if_a_wording_has_it():
    facts = {"degrees": "9", "thing": "a hat"}
    assert wordings(facts, words=(8, 8)) == {"It is 9 degrees. I take a hat."}
    assert wordings(facts, words=(20, 30)) == {"It is 9 degrees. I take a hat."}  # the closest


def test_words():
    assert (a("egg"), a("mug")) == ("an egg", "a mug")
    assert (listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])) == ("a", "a and b", "a, b and c")


def test_the_action_follows_the_thought_on_a_line_of_its_own():
    response = as_thought("It rains.", "take hat 1")
    assert response == "<think>It rains.</think>\n<action>take hat 1</action>"
    assert extract_action(response) == "take hat 1"
    assert without_thinking(response) == "<action>take hat 1</action>"
