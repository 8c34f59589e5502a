"""The task suite of WebShop: its tasks, its experts and their texts."""

import dataclasses
import random

import pytest

from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.envs.play import play
from aem_jax.envs.suite import SuiteOptions, TaskSuite, tokenizer_corpus
from aem_jax.envs.webshop.env import WebshopConfig
from aem_jax.envs.webshop.experts import Listing, Shopper, random_agent, read, read_item, read_listings
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.pages import plain, results_page, rich
from aem_jax.envs.webshop.products import Product
from aem_jax.envs.webshop.shop import ShopConfig
from aem_jax.envs.webshop.suite import task_suite as webshop
from aem_jax.evaluate import evaluate_agent
from aem_jax.overrides import override

TURNS = 15


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> WebshopConfig:
    shop = ShopConfig(cache=str(tmp_path_factory.mktemp("cache")), made=GeneratorConfig(products=300))
    return WebshopConfig(shop=shop)


@pytest.fixture(scope="module")
def suite(config: WebshopConfig) -> TaskSuite:
    return webshop(config, SuiteOptions(expert_noise=0.4))


def success(suite: TaskSuite, make_act, turns: int = TURNS):
    tasks, name = suite.evaluation("valid", 40)
    evaluation = evaluate_agent(suite.make_env(), make_act, tasks, max_turns=turns, name=name, split="valid")
    assert evaluation.mean_score is not None
    return evaluation.rate.success, evaluation.mean_score


def test_a_habit_is_refused(config: WebshopConfig):
    with pytest.raises(ValueError, match="expert-habit: expected 0 with webshop, got 0.5"):
        webshop(config, SuiteOptions(expert_habit=0.5))


@pytest.mark.parametrize("mode", ["text", "text_rich"])
def test_experts_win_and_the_random_agent_does_not(config: WebshopConfig, mode: str):
    suite = webshop(dataclasses.replace(config, mode=mode), SuiteOptions())
    assert success(suite, suite.baselines["oracle"]) == (1.0, 1.0)
    won, score = success(suite, suite.baselines["shopper"])
    assert won >= 0.6 and score >= 0.85
    won, score = success(suite, suite.baselines["random"])
    assert won <= 0.1 and 0 < score < 0.3


@pytest.mark.parametrize("mode", ["html", "url"])
def test_agents_that_read_texts_are_offered_for_texts_only(config: WebshopConfig, mode: str):
    suite = webshop(dataclasses.replace(config, mode=mode), SuiteOptions())
    assert suite.demonstrator is None and set(suite.baselines) == {"oracle", "random"}
    assert success(suite, suite.baselines["oracle"]) == (1.0, 1.0)
    assert success(suite, suite.baselines["random"])[0] <= 0.1
    assert len(list(tokenizer_corpus(suite, 2, TURNS))) == 2  # without the shopper, episodes of the oracle
    settings = {"webshop.shop.cache": config.shop.cache, "webshop.mode": mode, "warmstart.episodes": 5}
    with pytest.raises(ValueError, match=r"--warmstart.episodes: expected 0 with webshop, .* --webshop.mode text or"):
        task_suite(override(read_preset("webshop-tiny"), settings))


def test_server_settings_name_the_shop_and_the_tagger(suite: TaskSuite, config: WebshopConfig):
    assert suite.settings["tagger"] in ("spacy", "small")  # auto is resolved on the run's machine
    assert suite.settings["shop"]["made"]["products"] == 300
    assert suite.training[0].payload["shop"] == suite.evaluation("test", 1)[0][0].payload["shop"]
    assert {task.task_type for task in suite.training[:100]} == set(config.shop.made.categories)


def test_the_tiny_shop_can_be_won_in_its_turns(config: WebshopConfig):
    tiny = read_preset("webshop-tiny")
    suite = task_suite(override(tiny, {"webshop.shop.cache": config.shop.cache}))
    assert success(suite, suite.baselines["shopper"], tiny.rollout.max_turns)[0] >= 0.95
    careless = success(suite, suite.demonstrator, tiny.rollout.max_turns)[0]
    assert 0.3 < careless < 0.8
    assert success(suite, suite.baselines["random"], tiny.rollout.max_turns)[0] <= 0.05


def test_demonstrations_have_the_policys_action_format(suite: TaskSuite):
    assert suite.demonstrator
    for task in suite.training[:10]:
        for exchange in play(suite.make_env(), task.payload, suite.demonstrator(task), TURNS):
            assert exchange.response.startswith("<action>") and exchange.response.endswith("</action>")
            assert exchange.result.info["valid_action"]


def test_the_tokenizer_corpus_has_observations_and_responses(suite: TaskSuite):
    texts = [text for episode in tokenizer_corpus(suite, 4, TURNS) for text in episode]
    assert any("Instruction:" in text for text in texts) and any("<action>search[" in text for text in texts)


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


@pytest.mark.parametrize("title", ["$hirt for men", "$5 off lamp", "$5.0", "lamp"])
def test_a_title_that_looks_like_a_price_is_a_title(title: str):
    texts = {"category": "c", "query": "q", "kind": "k", "description": "", "image": "", "price_tag": "$5.0 to $7.5"}
    shown = Product("B000000001", title, bullets=(), prices=(5.0, 7.5), options={}, attributes=(), **texts)
    page = results_page("i want", "u", [shown, dataclasses.replace(shown, asin="B000000002")], 1, 2)
    admissible = ["search[…]", *(f"click[{name}]" for name in page.clickables)]
    for observation in (plain(page), rich(page, ())):
        listings = read_listings(observation, admissible)
        assert listings == [Listing(f"B00000000{number}", title, 5.0) for number in (1, 2)]


def test_the_shopper_compares_before_it_buys():
    """Three imperfect lamps; the second names the colour and is made of steel."""
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
    does("click[a1]", results, clicks)  # the best title within the price limit
    does("click[< prev]", *item("steel lamp", "blue"))
    does("click[a0]", results, clicks)
    does("click[< prev]", *item("lamp", "blue"))
    does("click[a3]", results, clicks)
    does("click[< prev]", *item("lamp", "green"))  # all have been viewed, and another one was better
    does("click[a1]", results, clicks)
    does("click[buy now]", *item("steel lamp", "blue"))


def test_a_random_agent_searches_for_words_that_it_sees():
    rng = random.Random(0)
    searches = {random_agent("red lamp", ["search[…]"], rng) for _ in range(20)}
    assert (
        searches <= {f"search[{one} {other}]" for one in ("red", "lamp") for other in ("red", "lamp")}
        and len(searches) == 4
    )
