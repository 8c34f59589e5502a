"""The prompt of a WebShop episode in one message."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

from aem_jax.envs.prompt import Situation, compose

MODES = ("text", "text_rich")
"""Observations that the prompt and the shopper can read: texts, whose first page shows the instruction."""
ROLE = "You shop in an online shop."
_SEARCH = "search[<your words>]"
_INSTRUCTION = "Instruction:"


def prompt(situation: Situation) -> str:
    """Composes the prompt. As in verl-agent, pages are shown without the instruction, which is stated once.

    Raises:
        ValueError: the first observation contains no instruction.
    """
    texts = _texts(situation.first)[1]
    if _INSTRUCTION not in texts[:-1]:
        raise ValueError(f"expected a first page with an instruction, got {situation.first!r:.100}")
    task = texts[texts.index(_INSTRUCTION) + 1]
    return compose(ROLE, task, situation, _actions(situation.admissible), partial(_page, task=task))


def _actions(admissible: Sequence[str]) -> Iterator[str]:
    """Yields the actions to list.

    A search is possible on any page, but as in verl-agent only the page with the search bar lists it. That page's
    button is left out: without words it does nothing.
    """
    for action in admissible:
        if action == "click[search]":
            yield _SEARCH
        elif action.startswith("click["):
            yield action


def _page(observation: str, task: str) -> str:
    """Removes the site's name and the instruction from the top of a page."""
    separator, texts = _texts(observation)
    at = next((i for i, pair in enumerate(pairwise(texts)) if pair == (_INSTRUCTION, task)), None)
    if at is None:
        return observation.strip()
    head = [text for text in texts[:at] if text != "WebShop"]
    return separator.join(head + observation.split(separator)[at + 2 :]).strip()


def _texts(observation: str) -> tuple[str, list[str]]:
    """Returns the separator of a page's texts, and the texts without the spaces around them."""
    separator = " [SEP] " if " [SEP] " in observation else "\n"
    return separator, [text.strip() for text in observation.split(separator)]
