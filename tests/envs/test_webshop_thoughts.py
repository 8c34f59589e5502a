"""Thoughts of shoppers: true to their knowledge, leading to the action, varied, and of a bounded length."""

import random
import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import pytest
from envs.thoughts import Recorder, bpe_lengths, smollm2_lengths

from aem_jax.envs.actions import extract_action
from aem_jax.envs.play import play
from aem_jax.envs.suite import SuiteOptions
from aem_jax.envs.thoughts import NUMBERS
from aem_jax.envs.webshop import suite as webshop
from aem_jax.envs.webshop.analysis import terms, words
from aem_jax.envs.webshop.env import WebshopConfig
from aem_jax.envs.webshop.experts import Item, Knowledge, Listing
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.shop import ShopConfig
from aem_jax.envs.webshop.thoughts import PHRASES, REMARKS, STEPS, WORDS, thought

TURNS = 15
NUMBER = r"([a-z]+|\d+)"


@dataclass
class Moment:
    """A shopper's knowledge before an action, the action, and the thought."""

    known: Knowledge
    action: str
    text: str

    @property
    def argument(self) -> str:
        return self.action.partition("[")[2][:-1]

    @property
    def listing(self) -> Listing:
        """The product that the action opens."""
        return next(listing for listing in self.known.listings if listing.asin.lower() == self.argument)

    @property
    def matching(self) -> int:
        """Number of wanted terms that the product of the thought is known to match."""
        known, item = self.known, self.known.item
        if item:
            named = [max(found, key=len) for values in item.options.values() if (found := self.named(values))]
            text = " ".join([item.title, *item.options, *named])
        elif self.listing.asin in known.matches:
            return round(known.matches[self.listing.asin] * len(known.wanted))
        else:
            text = self.listing.title
        return len(known.wanted & set(terms(text)))

    def named(self, values: tuple[str, ...]) -> list[str]:
        return [value for value in values if re.search(rf"(^|[^\w-]){re.escape(value)}($|[^\w-])", self.known.wish)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> WebshopConfig:
    made = GeneratorConfig(products=300, categories=("beauty", "garden"))
    return WebshopConfig(shop=ShopConfig(cache=str(tmp_path_factory.mktemp("cache")), made=made))


@pytest.fixture(scope="module")
def moments(config: WebshopConfig) -> list[Moment]:
    moments = []

    def recorded(known: Knowledge, action: str, rng: random.Random) -> str:
        moments.append(Moment(deepcopy(known), action, thought(known, action, rng)))
        return moments[-1].text

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(webshop, "thought", recorded)
        suite = webshop.task_suite(config, SuiteOptions(expert_noise=0.4, expert_thinks=True))
        assert suite.demonstrator
        for task in suite.training[:250]:
            play(suite.make_env(), task.payload, suite.demonstrator(task), TURNS)
    return moments


def chosen(moment: Moment, text: str) -> bool:
    """Whether a text lists chosen values only."""
    for value in sorted(moment.known.chosen.values(), key=len, reverse=True):
        text = text.replace(value, "")
    return re.fullmatch(r"(, )*( and )?", text) is not None


def number(word: str) -> int:
    return NUMBERS.index(word) if word in NUMBERS else int(word)


CHECKS: dict[str, Callable[..., bool]] = {
    r"(?:cost up to|be below|can spend|limit is|budget ends at) \$([\d.]+\d)": lambda m, limit: (
        float(limit) == m.known.limit
    ),
    rf"(?:i see|gave me|there are) {NUMBER} products": lambda m, count: number(count) == len(m.known.listings),
    rf"(?:opened|know) {NUMBER} products?\b": lambda m, count: number(count) == len(m.known.matches),
    rf"{NUMBER} of the {NUMBER} words": lambda m, count, total: (
        (number(count), number(total)) == (m.matching, len(m.known.wanted))
    ),
    rf"all {NUMBER} words": lambda m, total: number(total) == m.matching == len(m.known.wanted),
    r"does not have all|something better": lambda m: m.matching < len(m.known.wanted),
    r"(?:i have chosen|my choice of) (.+?)(?: is made|\.)": chosen,
    r".*(?:^|\. |, because |: )([^.:]+) (?:is|are) chosen": chosen,
    r"costs \$([\d.]+\d)|\$([\d.]+\d) for": lambda m, *cost: float("".join(cost)) == round(m.listing.cost, 2),
    r"within the limit": lambda m: m.listing.cost <= m.known.limit,
    r"before\. |before, so|by now|once more|still a choice|the best of|i return to b|\ban? again\b": lambda m: (
        m.listing.asin in m.known.matches
    ),
    r"the best of those|has more of the words": lambda m: (
        m.known.matches[m.listing.asin] == max(m.known.matches.values())
    ),
    r"nothing is found|no product yet|search page": lambda m: not (m.known.matches or m.known.listings),
    r"the wish names (.+?), so": lambda m, value: m.named((value,)),
    r"(?:this page shows|i am looking at) (.+?)\.": lambda m, title: m.known.item.title.lower().startswith(title),
    r"(?:something with|asks for|counts is|search for|h the words|matter are) (.+?)(?:\. |\.$| should)": (
        lambda m, needs: all(m.known.wanted & set(terms(word)) for word in words(needs) if word != "and")
    ),
}  # fmt: skip


def test_no_statement_is_false(moments: list[Moment]):
    used = set()
    for moment in moments:
        for pattern, holds in CHECKS.items():
            for match in re.finditer(pattern, moment.text.lower()):
                used.add(pattern)
                assert holds(moment, *(group or "" for group in match.groups())), (pattern, moment)
    assert used == set(CHECKS)


def test_a_thought_leads_to_its_action(moments: list[Moment]):
    for moment in moments:
        text, name = moment.text.lower(), moment.argument
        if moment.action.startswith("search"):
            assert "search" in text and any(word in text for word in name.split())
        elif name == "buy now":
            assert "buy" in text
        elif name == "< prev":
            assert re.search(r"\bback\b|return", text)
        else:
            assert name in text, moment


def test_lengths_are_bounded(moments: list[Moment]):
    texts = [moment.text for moment in moments]
    assert all(WORDS[0] <= len(text.split()) <= WORDS[1] for text in texts)
    lengths = bpe_lengths(texts)
    assert 15 <= sum(lengths) / len(lengths) <= 40 and max(lengths) <= 60


def test_lengths_with_smollm2(moments: list[Moment]):
    lengths = smollm2_lengths([moment.text for moment in moments])
    assert min(lengths) >= 15 and max(lengths) <= 60


def test_one_state_has_many_wordings(moments: list[Moment]):
    for moment in random.Random(0).sample(moments, 40):
        rng = random.Random(1)
        drawn = [thought(moment.known, moment.action, rng) for _ in range(200)]
        assert max(Counter(drawn).values()) <= 20 and len(set(drawn)) >= 60, moment
        assert len({text.split()[0] for text in drawn}) >= 5


def test_every_phrasing_is_said(moments: list[Moment]):
    recorder = Recorder(0)
    lost = Moment(Knowledge("red lamp", frozenset(terms("red lamp"))), "click[back to search]", "")
    for moment in [*moments, *[lost] * 60]:
        thought(moment.known, moment.action, recorder)
    silent = {phrasing for part in (REMARKS, STEPS, PHRASES) for texts in part.values() for phrasing in texts}
    assert not silent - recorder.chosen


def test_a_wish_of_fillers_has_thoughts():
    known = Knowledge("i want to buy it", listings=[Listing("A1", "lamp", 9.5)])
    for seed in range(50):
        assert "a1" in thought(known, "click[a1]", random.Random(seed))
    known = Knowledge("i want to buy it", matches={"A1": 0.0}, asin="A1", item=Item("lamp", {}))
    for action in ("click[buy now]", "click[< prev]"):
        assert all("words fit" not in thought(known, action, random.Random(seed)) for seed in range(50))


def test_a_thinking_expert_acts_as_a_silent_one(config: WebshopConfig):
    silent, loud, again = (
        webshop.task_suite(config, SuiteOptions(expert_noise=0.4, expert_thinks=thinks))
        for thinks in (False, True, True)
    )
    form = r"<think>[^a-z][^\n<>]+\.</think>\n<action>.+</action>"
    for task in silent.training[:40]:
        episodes = [play(s.make_env(), task.payload, s.demonstrator(task), TURNS) for s in (silent, loud, again)]  # type: ignore[misc]
        actions = [[extract_action(exchange.response) for exchange in episode] for episode in episodes]
        assert actions[0] == actions[1] == actions[2]
        assert [exchange.result for exchange in episodes[0]] == [exchange.result for exchange in episodes[1]]
        assert episodes[1] == episodes[2]
        assert all(re.fullmatch(form, exchange.response) for exchange in episodes[1])
