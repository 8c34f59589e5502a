"""What a run knows of WebShop: its tasks, its experts, and what they say."""

import dataclasses
import random

import pytest

from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.play import play
from aem_jax.envs.webshop.env import WebshopConfig
from aem_jax.envs.webshop.experts import Shopper, random_agent, read, read_item, read_listings
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.shop import ShopConfig
from aem_jax.evaluate import evaluate_agent
from aem_jax.launch.domains import Domain, texts
from aem_jax.launch.domains.webshop import webshop
from aem_jax.warmstart import WarmstartConfig

TURNS = 15


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    shop = ShopConfig(cache=str(tmp_path_factory.mktemp("cache")), made=GeneratorConfig(products=300))
    return RunConfig(environment="webshop", shop=shop, warmstart=WarmstartConfig(wander=0.4))


@pytest.fixture(scope="module")
def domain(config: RunConfig) -> Domain:
    return webshop(config)


def success(domain: Domain, make_act, turns: int = TURNS):
    tasks, name = domain.evaluation("valid", 40)
    found = evaluate_agent(domain.make_env(), make_act, tasks, max_turns=turns, name=name, split="valid")
    return found.rate.success, found.mean_score


@pytest.mark.parametrize("mode", ["text", "text_rich"])
def test_experts_win_and_chance_does_not(config: RunConfig, mode: str):
    domain = webshop(dataclasses.replace(config, webshop=dataclasses.replace(WebshopConfig(), mode=mode)))
    assert success(domain, domain.baselines["oracle"]) == (1.0, 1.0)
    won, score = success(domain, domain.baselines["shopper"])
    assert won >= 0.6 and score >= 0.85
    won, score = success(domain, domain.baselines["random"])
    assert won <= 0.1 and 0 < score < 0.3


def test_servers_are_told_the_shop_and_the_tagger(domain: Domain, config: RunConfig):
    assert domain.settings["tagger"] in ("spacy", "small")  # auto is resolved where the run is
    assert domain.settings["shop"]["made"]["products"] == 300
    assert domain.training[0].payload["shop"] == domain.evaluation("test", 1)[0][0].payload["shop"]
    assert {task.task_type for task in domain.training[:100]} == set(config.shop.made.categories)


def test_the_tiny_shop_can_be_won_in_its_turns(config: RunConfig):
    tiny = read_preset("webshop-tiny")
    domain = webshop(dataclasses.replace(tiny, shop=dataclasses.replace(tiny.shop, cache=config.shop.cache)))
    assert success(domain, domain.baselines["shopper"], tiny.rollout.max_turns)[0] >= 0.95
    careless = success(domain, domain.demonstrator, tiny.rollout.max_turns)[0]
    assert 0.3 < careless < 0.8
    assert success(domain, domain.baselines["random"], tiny.rollout.max_turns)[0] <= 0.05


def test_a_demonstrator_speaks_as_a_policy_should(domain: Domain):
    assert domain.demonstrator
    for task in domain.training[:10]:
        for exchange in play(domain.make_env(), task.payload, domain.demonstrator(task), TURNS):
            assert exchange.response.startswith("<action>") and exchange.response.endswith("</action>")
            assert exchange.result.info["valid_action"]


def test_a_tokenizer_is_given_what_both_sides_say(domain: Domain):
    said = [text for episode in texts(domain, 4, TURNS) for text in episode]
    assert any("Instruction:" in text for text in said) and any("<action>search[" in text for text in said)


RESULTS = "Back to Search [SEP] Page 1 (Total results: 2) [SEP] Next > [SEP] A1 [SEP] red lamp [SEP] $9.5 to $12.0"
PAGE = (
    "[button] Back to Search [button_]\n[button] < Prev [button_]\n"
    "color\n  [button] red [button_]\nred lamp\nPrice: $9.5\n"
)


def test_pages_are_read_as_they_are_shown():
    (listing,) = read_listings(RESULTS, ["search[…]", "click[back to search]", "click[next >]", "click[a1]"])
    assert (listing.asin, listing.title, listing.cost) == ("A1", "red lamp", 9.5)
    assert read(PAGE) == ["Back to Search", "< Prev", "color", "red", "red lamp", "Price: $9.5"]
    item = read_item(PAGE, ["click[red]", "click[< prev]", "click[back to search]"])
    assert item.title == "red lamp" and item.options == {"color": ("red",)}


def test_the_shopper_compares_before_it_buys():
    """Three lamps, none of them perfect; the second names the colour and is steel."""
    shopper = Shopper()
    ask = "WebShop [SEP] Instruction: [SEP] i need a red steel lamp, and price lower than 20.00 dollars [SEP] Search"
    results = "Back to Search [SEP] Page 1 (Total results: 4) [SEP] Next > " + "".join(
        f"[SEP] A{i} [SEP] {title} [SEP] ${cost} " for i, (title, cost) in enumerate(
            [("lamp", 5.0), ("steel lamp", 6.0), ("red steel lamp", 30.0), ("lamp", 7.0)]
        )
    )  # fmt: skip
    clicks = ["search[…]", "click[back to search]", "click[next >]", *(f"click[a{i}]" for i in range(4))]

    def item(title: str, colour: str) -> tuple[str, list[str]]:
        text = f"Back to Search [SEP] < Prev [SEP] color [SEP] {colour} [SEP] {title} [SEP] Price: $5.0 [SEP] Buy Now"
        return text, ["search[…]", "click[back to search]", "click[< prev]", "click[buy now]", f"click[{colour}]"]

    def does(expected: str, observation: str, admissible: list[str]) -> None:
        action = shopper.act(observation, admissible)
        assert action == expected
        shopper.did(action)

    does("search[i need a red steel lamp]", ask, ["search[…]", "click[search]"])
    does("click[a1]", results, clicks)  # the best title of those that are not too dear
    does("click[< prev]", *item("steel lamp", "blue"))
    does("click[a0]", results, clicks)
    does("click[< prev]", *item("lamp", "blue"))
    does("click[a3]", results, clicks)
    does("click[< prev]", *item("lamp", "green"))  # all seen, and another one was better
    does("click[a1]", results, clicks)
    does("click[buy now]", *item("steel lamp", "blue"))


def test_a_random_agent_searches_for_words_that_it_sees():
    rng = random.Random(0)
    said = {random_agent("red lamp", ["search[…]"], rng) for _ in range(20)}
    assert said <= {f"search[{one} {other}]" for one in ("red", "lamp") for other in ("red", "lamp")} and len(said) == 4
