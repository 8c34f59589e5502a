"""WebShop as an environment: rules of an episode, tasks, splits, the generated shop."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from envs.servers import served
from envs.webshop_golden import item, unpack

from aem_jax.config.presets import read_preset
from aem_jax.envs.actions import extract_action
from aem_jax.envs.prompt import Situation
from aem_jax.envs.registry import environment_spec
from aem_jax.envs.serving.address import websocket_url
from aem_jax.envs.testing.conformance import Subject, check_environment
from aem_jax.envs.testing.conformance_wire import ServerSubject, check_server
from aem_jax.envs.webshop.catalog import FIELDS, Catalog
from aem_jax.envs.webshop.env import WebshopConfig, WebshopEnv, shop_front
from aem_jax.envs.webshop.experts import Oracle, Shopper
from aem_jax.envs.webshop.generator.config import CATEGORIES, GeneratorConfig
from aem_jax.envs.webshop.generator.make import make_shop
from aem_jax.envs.webshop.goals import goal_from_json
from aem_jax.envs.webshop.products import read_products
from aem_jax.envs.webshop.prompt import prompt
from aem_jax.envs.webshop.shop import ShopConfig, open_shop, read_files
from aem_jax.envs.webshop.tasks import SPLITS, eval_set, goal_tasks, split_of, training_tasks

MADE = GeneratorConfig(products=150)
ACTIONS = [
    f"<action>{action}</action>"
    for action in ("search[lamp]", "click[next >]", "click[< prev]", "fly", "click[back to search]", "search[<r>]")
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def catalog(cache: str) -> Catalog:
    return open_shop(ShopConfig(cache=cache, made=MADE))


def env(catalog: Catalog, **settings: Any) -> WebshopEnv:
    config = dataclasses.replace(WebshopConfig(), **settings)
    return WebshopEnv(shop_front(config, catalog), config)


def buy(shop: WebshopEnv, task, *, choose: bool):
    """Buys exactly the requested product, with or without its options."""
    goal = task.payload["goal"]
    shop.reset(task.payload)
    result = shop.step(f"<action>search[{goal['title']}]</action>")
    while f"click[{goal['asin'].lower()}]" not in result.info["admissible"]:
        result = shop.step("<action>click[next >]</action>")
    for click in (goal["asin"], *(goal["options"] if choose else ()), "Buy Now"):
        result = shop.step(f"I think so. <action>click[{click}]</action>")
    return result


def test_webshop_conforms(catalog: Catalog):
    tasks = [task.payload for task in goal_tasks(catalog, "train")[:3]]
    assert check_environment(Subject(lambda: env(catalog), tasks, ACTIONS)) == []
    assert check_environment(Subject(lambda: env(catalog, max_steps=4, mode="text"), tasks, ACTIONS)) == []


def test_a_webshop_server_conforms(catalog: Catalog, cache: str):
    settings = {"max_steps": 5, "shop": {"cache": cache, "made": dataclasses.asdict(MADE)}}
    tasks = [task.payload for task in goal_tasks(catalog, "train")[:2]]
    with served("webshop", "--sessions", "2", settings=settings) as (url, _):
        assert check_server(ServerSubject(websocket_url(url), tasks, ACTIONS, sessions=2)) == []
    with pytest.raises(ValueError, match=r"unknown setting 'rewards'; did you mean 'reward'"):
        environment_spec("webshop").factory({"rewards": 1})
    with pytest.raises(ValueError, match=r"unknown setting 'shop.seeds'; did you mean 'shop.seed'"):
        environment_spec("webshop").factory({"shop": {"seeds": 1}})


def test_every_goal_can_be_won(catalog: Catalog):
    """Every instruction is satisfied by its own product."""
    shop = env(catalog, max_steps=50)
    for task in goal_tasks(catalog, "train")[:120]:
        result = buy(shop, task, choose=True)
        assert result.info["won"] and result.info["score"] == 1.0 and result.reward == 10.0, task.payload
        assert result.terminated and result.info["bought"] == task.payload["goal"]["asin"]


def test_rewards(catalog: Catalog):
    task = next(task for task in goal_tasks(catalog, "train") if len(task.payload["goal"]["options"]) == 2)
    # (attributes + price) of (attributes + 2 options + price)
    count = len(task.payload["goal"]["attributes"])
    worth = (count + 1) / (count + 3)
    result = buy(env(catalog), task, choose=False)
    assert (result.reward, result.info["won"], result.info["score"]) == (0.0, False, worth)
    result = buy(env(catalog, reward="score"), task, choose=False)
    assert result.reward == 10 * worth
    shop = env(catalog, reward_invalid=-0.5, max_invalid=2)
    shop.reset(task.payload)
    first, second = shop.step("no action"), shop.step("<action>click[lamp]</action>")
    assert (first.reward, first.info["valid_action"], first.truncated) == (-0.5, False, False)
    assert (second.reward, second.truncated, second.terminated) == (-0.5, True, False)
    with pytest.raises(ValueError, match="expected a running episode"):
        shop.step("x")


def test_steps_and_modes(catalog: Catalog):
    task = goal_tasks(catalog, "train")[0].payload
    shop = env(catalog, max_steps=2)
    first = shop.reset(task)
    assert first.observation.endswith("[button] Search [button_]\n") and first.info["admissible"][0] == "search[…]"
    assert not shop.step(ACTIONS[0]).truncated and shop.step(ACTIONS[0]).truncated
    assert env(catalog, mode="text").reset(task).observation.endswith(" [SEP] Search")
    assert env(catalog, mode="url").reset(task).observation == "http://127.0.0.1:3000/0"
    assert extract_action("<action>a</action> no, <action> b </action>") == "b" and extract_action("a") is None
    small = env(catalog, page_size=2)
    small.reset(task)
    assert len(small.step("<action>search[<r>]</action>").info["admissible"]) == 5
    for bad in ({"mode": "x"}, {"reward": "x"}, {"max_steps": 0}, {"max_invalid": -1}, {"tagger": "x"}):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(WebshopConfig(), **bad)


def test_tasks_of_another_shop_are_refused(catalog: Catalog):
    payload = dict(goal_tasks(catalog, "train")[0].payload)
    for bad, why in (
        ({}, "'goal'"),
        (payload | {"shop": "x"}, "give server and run the same shop"),
        ({"goal": {"asin": "x"}}, "expected a goal with the fields"),
        ({"goal": payload["goal"] | {"query": 3}}, r"expected text in \['query'\]"),
        (
            {"goal": payload["goal"] | {"attributes": "blue"}},
            "expected attributes as a list of texts in a goal, got 'b",
        ),
        ({"goal": payload["goal"] | {"attributes": [1]}}, r"expected attributes as a list of texts in a goal, got \[1"),
        ({"goal": payload["goal"] | {"options": "red"}}, "expected options as a list or a mapping of texts in a goal"),
        ({"goal": payload["goal"] | {"options": [1]}}, r"expected options as a list or a mapping of texts .* got \[1"),
        ({"goal": payload["goal"] | {"options": {"size": 1}}}, "expected options as a mapping of texts in a goal"),
        ({"goal": {name: value for name, value in payload["goal"].items() if name != "options"}}, "'options'"),
    ):
        with pytest.raises(ValueError, match=why):
            env(catalog).reset(bad)


def test_products_are_found_by_their_fields(catalog: Catalog):
    products = [catalog.product(number) for number in range(len(catalog))]
    held = {
        "category": lambda product: (product.category,),
        "query": lambda product: (product.query,),
        "attributes": lambda product: product.attributes,
    }
    assert set(held) == set(FIELDS)
    for field, values in held.items():
        for value in {*values(products[0]), *values(products[7]), *values(products[-1])}:
            scanned = tuple(number for number, product in enumerate(products) if value in values(product))
            assert scanned and catalog.where(field, value) == scanned
        assert catalog.where(field, "") == catalog.where(field, "no such thing") == ()


def test_splits_share_neither_products_nor_words(catalog: Catalog):
    goals = {split: [task.payload["goal"] for task in goal_tasks(catalog, split)] for split in SPLITS}
    assert sum(map(len, goals.values())) <= len(catalog.goals)
    assert 0.7 < len(goals["train"]) / len(catalog.goals) < 0.9
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        for field in ("asin", "instruction"):
            assert not {goal[field] for goal in goals[one]} & {goal[field] for goal in goals[other]}
    assert all(split_of(goal_from_json(goal)) == split for split, members in goals.items() for goal in members)
    assert training_tasks(catalog, 0)[0] == training_tasks(catalog, 0)[0] != training_tasks(catalog, 1)[0]
    with pytest.raises(ValueError, match="one of test, valid, train"):
        goal_tasks(catalog, "valid_seen")


def test_a_shop_of_alike_products_has_no_training_goal_with_a_held_out_wish(cache: str):
    """The shop of `webshop-tiny`: the same wish at another random price limit is the same wish."""
    config = read_preset("webshop-tiny").environment
    assert isinstance(config, WebshopConfig)
    catalog = open_shop(dataclasses.replace(config.shop, cache=cache))
    goals = {split: [task.payload["goal"] for task in goal_tasks(catalog, split)] for split in SPLITS}
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        for asked in (
            lambda goal: goal["instruction"].partition(", and price")[0],
            lambda goal: (goal["kind"], frozenset(goal["attributes"]), frozenset(goal["options"])),
        ):
            assert not {asked(goal) for goal in goals[one]} & {asked(goal) for goal in goals[other]}
    assert len(goals["valid"]) > 256 < len(goals["test"]) and len(goals["train"]) > 2000


def test_splits_may_share_products_and_no_goal(catalog: Catalog):
    goals = {split: [task.payload["goal"] for task in goal_tasks(catalog, split, "goals")] for split in SPLITS}
    assert 0.7 < len(goals["train"]) / sum(map(len, goals.values())) < 0.9
    for asked in (
        lambda goal: goal["instruction"],
        # the same request in another order or with another price limit is the same goal
        lambda goal: (goal["asin"], frozenset(goal["attributes"]), frozenset(goal["options"])),
    ):
        requests = {split: {asked(goal) for goal in members} for split, members in goals.items()}
        train, valid, test = (requests[split] for split in ("train", "valid", "test"))
        assert not train & (valid | test) and not valid & test
    assert {goal["asin"] for goal in goals["valid"]} & {goal["asin"] for goal in goals["train"]}
    valid, _ = eval_set(catalog, "valid", 99, "goals")
    assert not set(training_tasks(catalog, 0, "goals").numbers) & set(valid.numbers)
    with pytest.raises(ValueError, match="held_out of products, goals, got 'words'"):
        ShopConfig(held_out="words")


def test_an_evaluation_set_is_named_by_its_content(catalog: Catalog, cache: str):
    tasks, name = eval_set(catalog, "valid", 10)
    assert name == eval_set(catalog, "valid", 10)[1] and name.startswith("valid-10-") and len(tasks) == 10
    other = open_shop(ShopConfig(cache=cache, seed=1, made=MADE))
    assert eval_set(other, "valid", 10)[1] != name
    assert len(eval_set(catalog, "test", 10_000)[0]) == len(goal_tasks(catalog, "test"))


def test_a_generated_shop(catalog: Catalog):
    data = make_shop(MADE, 233)
    assert data == make_shop(MADE, 233) != make_shop(MADE, 234)
    assert {item["category"] for item in data.items} == set(CATEGORIES)
    assert len({item["asin"] for item in data.items}) == 150 == len(catalog)
    brief = make_shop(dataclasses.replace(MADE, brief=True, max_options=1, categories=("garden",)), 0)
    assert {item["category"] for item in brief.items} == {"garden"} and len(brief.items[0]["asin"]) == 3
    for bad in (
        {"products": 0},
        {"categories": ("pets",)},
        {"asked": (1, 4)},
        {"attributes": (3, 9)},
        {"max_options": 3},
    ):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(MADE, **bad)


def test_the_index_is_made_once(cache: str, catalog: Catalog, monkeypatch):
    def fail(*_):
        raise AssertionError("made again")

    monkeypatch.setattr("aem_jax.envs.webshop.shop.make_shop", fail)
    assert open_shop(ShopConfig(cache=cache, made=MADE)).id == catalog.id


def test_drafts_of_killed_builds_are_removed(tmp_path: Path):
    config = ShopConfig(cache=str(tmp_path), made=dataclasses.replace(MADE, products=10))
    open_shop(config)
    (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
    draft, other = tmp_path / f"{place.name}-abc", tmp_path / "0123456789abcdef-abc"
    for folder in (draft, other):
        folder.mkdir()
        (folder / "products.jsonl").write_text("a part")
    shutil.rmtree(place)
    open_shop(config)
    assert place.is_dir() and not draft.exists() and other.exists()  # the other one may be in the making


def test_what_is_admissible_is_possible_with_brackets_and_lines(tmp_path: Path):
    """An option with brackets, and an instruction with a line break."""
    sizes = {"customization_options": {"Size": [{"value": "large [pack of 2]"}, {"value": "small"}]}}
    asked = {"instruction": "a lamp\n that is  large", "instruction_attributes": ["red"], "instruction_options": []}
    for name, content in {
        "items_shuffle_1000": [PRODUCT | {"name": "Lamp [new]"} | sizes],
        "items_ins_v2_1000": {"A": {"attributes": ["red"]}},
        "items_human_ins": {"A": [asked | {"instruction_options": ["large [pack of 2]"]}]},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    catalog = open_shop(ShopConfig(data=str(tmp_path), cache=str(tmp_path / "cache")))
    (goal,) = catalog.goals
    assert goal.instruction.startswith("a lamp that is  large, and price lower than ")
    for mode in ("text", "text_rich"):
        shop, oracle, shopper = env(catalog, mode=mode), Oracle(goal), Shopper()
        result = shop.reset({"goal": goal.to_json()})
        assert shopper.act(result.observation, result.info["admissible"]) == "search[a lamp that is  large]"
        situation = Situation(result.observation, [], 1, result.observation, result.info["admissible"])
        assert f"Your task: {goal.instruction}\n" in prompt(situation)
        while not result.done:
            result = shop.step(f"<action>{oracle.act(result.info['admissible'])}</action>")
            assert result.info["valid_action"]
        assert result.info["score"] == 1.0


PRODUCT = item("A", "Lamp", "lamp", "Home")
ANNOTATION = {"attributes": ["red"], "instruction": "Find a lamp", "instruction_attributes": ["red"]}
SAID = {"instruction": "a lamp", "instruction_attributes": ["red"], "instruction_options": []}


@pytest.mark.parametrize(
    ("items", "annotations", "instructions", "why"),
    [
        (["a"], {}, {}, r"items_shuffle_1000.json[0]: expected mapping, got str 'a'"),
        ([PRODUCT, {"asin": "B"}], {}, {}, "items_shuffle_1000.json[1]: expected an entry of WebShop's files, got one "
         "without 'name': {'asin': 'B'}"),
        ([PRODUCT | {"asin": 5}], {}, {}, "[0]: asin: expected text, got int 5"),
        ([PRODUCT | {"query": None}], {}, {}, "[0]: query: expected text, got NoneType None"),
        ([PRODUCT | {"small_description": [1]}], {}, {}, "[0]: small_description[0]: expected text, got int 1"),
        ([PRODUCT | {"pricing": "$$"}], {}, {}, "[0]: expected prices such as '$5.00' or '$5.00$7.50', got '$$'"),
        ([PRODUCT | {"images": "x.jpg"}], {}, {}, "[0]: images: expected list, got str 'x.jpg'"),
        ([PRODUCT | {"customization_options": {"size": ["s"]}}], {}, {},
         "[0]: customization_options['size'][0]: expected mapping, got str 's'"),
        ([PRODUCT], {"A": []}, {}, "items_ins_v2_1000.json['A']: expected mapping, got list []"),
        ([PRODUCT], {"A": ANNOTATION | {"attributes": "red"}}, {}, "['A']: attributes: expected list, got str 'red'"),
        ([PRODUCT], {"A": ANNOTATION | {"instruction": 1}}, {}, "['A']: instruction: expected text, got int 1"),
        ([PRODUCT], {}, {"A": SAID}, "items_human_ins.json['A']: expected list, got dict {'instruction'"),
        ([PRODUCT], {}, {"A": [SAID, "b"]}, "items_human_ins.json['A'][1]: expected mapping, got str 'b'"),
        ([PRODUCT], {}, {"A": [SAID | {"instruction_options": 1}]}, "[0]: instruction_options: expected list, got int"),
    ],
)  # fmt: skip
def test_files_with_unexpected_content_are_named(tmp_path: Path, items, annotations, instructions, why):
    names = ("items_shuffle_1000.json", "items_ins_v2_1000.json", "items_human_ins.json")
    for name, content in zip(names, (items, annotations, instructions)):
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(why)):
        open_shop(ShopConfig(data=str(tmp_path), cache=str(tmp_path / "cache")))


def test_skipped_products_are_not_checked(tmp_path: Path):
    items = [PRODUCT | {"full_description": None, "pricing": None, "customization_options": {"size": None}}]
    files = [tmp_path / name for name in ("items", "annotations", "instructions")]
    quiet = {"instruction_attributes": None}
    for file, content in zip(files, (items + [{"asin": "nan"}], {"A": quiet, "B": 1}, {"A": [quiet, SAID]})):
        file.write_text(json.dumps(content))
    data = read_files(files[0], files[1], files[2])
    assert [product.asin for product in read_products(data.items, data.annotations)] == ["A"]
    assert len(read_files(files[0], files[1], tmp_path / "none", limit=1).items) == 1


def test_official_files(tmp_path: Path, cache: str):
    folder = unpack(tmp_path)
    catalog = open_shop(ShopConfig(data=str(folder), limit=200, cache=cache))
    assert len(catalog) == 200 and all(catalog.find(goal.asin) < 200 for goal in catalog.goals)
    synthetic = open_shop(ShopConfig(data=str(folder), limit=50, goals="synthetic", cache=cache))
    assert len(synthetic.goals) > len(synthetic) and isinstance(synthetic.goals[0].options, dict)
    assert len(goal_tasks(catalog, "train")) > 50
    (folder / "items_human_ins.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected a JSON mapping in .*items_human_ins"):
        open_shop(ShopConfig(data=str(folder), limit=10, cache=cache))
    (folder / "items_human_ins.json").unlink()
    with pytest.raises(ValueError, match="set shop.goals to synthetic"):
        open_shop(ShopConfig(data=str(folder), limit=10, cache=cache))
    (folder / "items_shuffle_1000.json").write_text("{")
    with pytest.raises(ValueError, match=r"items_shuffle_1000.json: expected JSON, got"):
        open_shop(ShopConfig(data=str(folder), goals="synthetic", cache=cache))
    (folder / "items_shuffle_1000.json").unlink()
    with pytest.raises(ValueError, match=r"items_shuffle_1000.json or items_shuffle.json in"):
        open_shop(ShopConfig(data=str(folder)))
    with pytest.raises(ValueError, match="set shop.cache"):
        open_shop(ShopConfig(cache="/proc/nowhere"))
    with pytest.raises(ValueError, match="goals of human, synthetic"):
        ShopConfig(goals="x")
