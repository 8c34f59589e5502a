"""WebShop: goals, evaluation sets, demonstrations, baselines."""

import dataclasses
import random
from collections.abc import Sequence
from functools import partial

from aem_jax.config.run import RunConfig
from aem_jax.envs.actions import as_action
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.webshop import taggers
from aem_jax.envs.webshop.env import WebshopEnv, shop_front
from aem_jax.envs.webshop.experts import Oracle, Shopper, clickables, random_agent, read_listings
from aem_jax.envs.webshop.goals import goal_from_json
from aem_jax.envs.webshop.shop import open_shop
from aem_jax.envs.webshop.tasks import eval_set, training_tasks
from aem_jax.launch.domains.domain import Domain, Tasks
from aem_jax.trajectory import Task


def webshop(config: RunConfig) -> Domain:
    """WebShop: a shop of our own, or the official files in `config.shop.data`.

    Servers are told which tagger `auto` is here, so that rewards do not depend on the machine that they run on.
    """
    catalog = open_shop(config.shop)  # made here, once, before servers look for it
    rules = dataclasses.replace(config.webshop, tagger=taggers.resolve(config.webshop.tagger))
    front = shop_front(rules, catalog)

    def evaluation(split: str, size: int) -> tuple[Sequence[Task], str]:
        tasks, name = eval_set(catalog, split, size, config.shop.held_out)
        return Tasks(tasks), name

    return Domain(
        name="webshop",
        settings={**dataclasses.asdict(rules), "shop": dataclasses.asdict(config.shop)},
        training=Tasks(training_tasks(catalog, config.seed, config.shop.held_out)),
        evaluation=evaluation,
        make_env=lambda: WebshopEnv(front, rules),
        demonstrator=partial(_careless, config.warmstart.wander),
        baselines={"oracle": _oracle, "shopper": partial(_careless, 0.0), "random": _random},
    )


def _careless(wander: float, task: Task) -> Act:
    """A shopper that now and then opens any product of a page, or buys an opened one as it is."""
    agent, rng = Shopper(), random.Random(f"careless/{task.id}")

    def act(result: StepResult) -> str:
        admissible = result.info["admissible"]
        action = agent.act(result.observation, admissible)
        shown = [each.asin.lower() for each in read_listings(result.observation, admissible)]
        hasty = shown or [each for each in clickables(admissible) if each == "buy now"]
        if hasty and rng.random() < wander:
            action = f"click[{rng.choice(hasty)}]"
        agent.did(action)
        return as_action(action)

    return act


def _oracle(task: Task) -> Act:
    agent = Oracle(goal_from_json(task.payload["goal"]))
    return lambda result: as_action(agent.act(result.info["admissible"]))


def _random(task: Task) -> Act:
    rng = random.Random(f"random/{task.id}")
    return lambda result: as_action(random_agent(result.observation, result.info["admissible"], rng))
