"""The action of a response, compared with a regular expression."""

import random
import re

from aem_jax.envs.actions import extract_action


def test_the_last_action_counts_as_a_regular_expression_finds_it():
    rng = random.Random(0)
    parts = ["<action>", "</action>", "<action", "/action>", "\n", " go ", "<", ">"]
    for _ in range(20_000):
        text = "".join(rng.choices(parts, k=rng.randrange(9)))
        found = re.findall("(?s)<action>(.*?)</action>", text)
        assert extract_action(text) == (found[-1].strip() if found else None), text


def test_tags_that_are_not_closed_are_no_action():
    """In as many as here, a regular expression would search for seconds."""
    assert extract_action("<action>" * 2**14) is None
    assert extract_action("<action>go</action>" + "<action>" * 2**14) == "go"
