"""The WebShop task suite for runs and servers: goals, evaluation sets, the demonstrator and the baselines."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aem_jax.envs.actions import as_action, as_thought
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult, Task
from aem_jax.envs.suite import EnvironmentSpec, Files, SuiteOptions, TaskSuite, check_no_habit
from aem_jax.envs.webshop import taggers
from aem_jax.envs.webshop.env import WebshopConfig, WebshopEnv, shop_front
from aem_jax.envs.webshop.experts import Oracle, Shopper, clickables, random_agent, read_listings
from aem_jax.envs.webshop.goals import goal_from_json
from aem_jax.envs.webshop.prompt import MODES, prompt
from aem_jax.envs.webshop.shop import open_shop
from aem_jax.envs.webshop.tasks import eval_set, training_tasks
from aem_jax.envs.webshop.thoughts import thought


def task_suite(config: WebshopConfig, options: SuiteOptions) -> TaskSuite:
    """Builds the task suite from a generated shop, or from the official files in `config.shop.data`.

    In the servers' settings, `auto` is replaced by this machine's tagger, so rewards do not depend on the servers'
    machines. In the modes `html` and `url` there is no demonstrator and no `shopper`.

    Raises:
        ValueError: the demonstrator shall have a habit, which it cannot.
    """
    check_no_habit(config.NAME, options)
    config = dataclasses.replace(config, tagger=taggers.resolve(config.tagger))
    catalog = open_shop(config.shop)  # built once, before servers open it
    front = shop_front(config, catalog)
    texts = config.mode in MODES  # the shopper and the prompt read texts, neither HTML nor addresses

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        return eval_set(catalog, split, size, config.shop.held_out)

    return TaskSuite(
        name=config.NAME,
        settings=dataclasses.asdict(config),
        training=training_tasks(catalog, options.seed, config.shop.held_out),
        evaluation=evaluation,
        prompt=prompt if texts else None,
        make_env=lambda: WebshopEnv(front, config),
        demonstrator=partial(_noisy_shopper, options.expert_noise, options.expert_thinks) if texts else None,
        baselines={
            "oracle": _oracle,
            **({"shopper": partial(_noisy_shopper, 0.0, False)} if texts else {}),
            "random": _random,
        },
    )


def make(config: WebshopConfig) -> Callable[[], WebshopEnv]:
    """Returns a factory of environments that share one shop."""
    front = shop_front(config, open_shop(config.shop))
    return lambda: WebshopEnv(front, config)


def make_site(config: WebshopConfig) -> Any:
    """Makes the shop's web site."""
    from aem_jax.envs.webshop import site  # imports starlette and jinja2, which environments do not need

    return site.make_site(shop_front(config, open_shop(config.shop)), config.shop.held_out)


def _noisy_shopper(noise: float, thinks: bool, task: Task) -> Act:
    """Makes a shopper that in a fraction `noise` of its turns opens a random product, or buys the open one as it is.

    If it `thinks`, it says before each action why it acts so, also for a random product.
    """
    agent, rng = Shopper(), random.Random(f"careless/{task.id}")
    wording = random.Random(f"thoughts/{task.id}")  # of its own, so that the actions are those of a silent shopper

    def act(result: StepResult) -> str:
        admissible = result.info["admissible"]
        action = agent.act(result.observation, admissible)
        products = [listing.asin.lower() for listing in read_listings(result.observation, admissible)]
        hasty = products or [name for name in clickables(admissible) if name == "buy now"]
        if hasty and rng.random() < noise:
            action = f"click[{rng.choice(hasty)}]"
        response = as_thought(thought(agent.known, action, wording), action) if thinks else as_action(action)
        agent.did(action)
        return response

    return act


def _oracle(task: Task) -> Act:
    agent = Oracle(goal_from_json(task.payload["goal"]))
    return lambda result: as_action(agent.act(result.info["admissible"]))


def _random(task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: as_action(random_agent(result.observation, result.info["admissible"], rng))


def _inputs(config: WebshopConfig) -> Mapping[str, Files]:
    if not config.shop.data:
        return {}
    root = Path(config.shop.data).expanduser()
    return {"shop.data": (root, sorted(root.glob("items_*.json")) if root.is_dir() else [root])}


WEBSHOP = EnvironmentSpec(
    make,
    "shopping by searching and clicking (WebShop)",
    config=WebshopConfig,
    blocking=False,
    suite=task_suite,
    site=make_site,
    paths=lambda config: ("shop.data",),
    inputs=_inputs,
)
