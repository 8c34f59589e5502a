"""WebShop as an `Environment`: a response becomes a click or a search, and a purchase a reward."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from aem_jax.envs.actions import extract_action
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.webshop import taggers
from aem_jax.envs.webshop.catalog import Catalog
from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.goals import Goal, goal_from_json
from aem_jax.envs.webshop.pages import PAGE_SIZE
from aem_jax.envs.webshop.shop import ShopConfig

WON = 1.0
"""The score of a perfect purchase."""


@dataclass(frozen=True)
class WebshopConfig:
    """The shop, the rules of an episode, and how its pages are shown."""

    NAME: ClassVar[str] = "webshop"

    mode: Literal["text", "text_rich", "html", "url"] = "text_rich"
    """How a page is shown: its texts joined by [SEP]; a line each with buttons marked; HTML of our own; its address."""
    repeat_instruction: bool = True
    """Whether every page repeats the instruction, as WebShop's do, or the search page alone has it: shorter, where an
    agent keeps what it has read."""
    page_size: int = PAGE_SIZE
    """Products on a page of results; WebShop has 10."""
    show_attributes: bool = False
    """Whether items have a page that lists their attributes."""
    tagger: str = "auto"
    """Which words of a title are nouns, for the reward: spacy (WebShop's own, en_core_web_sm), small (a rule of thumb),
    recorded (of golden recordings); auto: spacy where it is installed, else small."""
    max_steps: int = 15
    """Steps after which an episode without a purchase is truncated."""
    reward: Literal["success", "score"] = "success"
    """What a purchase is worth: reward_won if its score is 1 and else nothing, or reward_won times its score."""
    reward_won: float = 10.0
    """Reward of a perfect purchase."""
    reward_invalid: float = -0.1
    """Reward of a response whose action is missing or cannot be done."""
    max_invalid: int = 0
    """Invalid actions after which an episode without a purchase is truncated; 0 sets no limit."""
    shop: ShopConfig = ShopConfig()  # noqa: RUF009 (frozen)
    """What the shop sells, and what its customers want."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}")
        if self.max_invalid < 0:
            raise ValueError(f"expected max_invalid of at least 0 (no limit), got {self.max_invalid}")
        for name, known in (("mode", OBSERVATIONS), ("reward", ("success", "score"))):
            if getattr(self, name) not in known:
                raise ValueError(f"expected {name} of {', '.join(known)}, got {getattr(self, name)!r}")
        taggers.resolve(self.tagger)


def _html(visit: Visit) -> str:
    from aem_jax.envs.webshop.html import render_page  # jinja2 takes memory that other modes need not spend

    return render_page(visit)


OBSERVATIONS: Mapping[str, Callable[[Visit], str]] = {
    "text": lambda visit: visit.text,
    "text_rich": lambda visit: visit.rich,
    "html": _html,
    "url": lambda visit: visit.page.url,
}
"""Mode -> what an agent reads of a visit."""


def shop_front(config: WebshopConfig, catalog: Catalog) -> Shop:
    """What the visits of one process share; says which tagger the rewards depend on."""
    name = taggers.resolve(config.tagger)
    logging.getLogger(__name__).info("shop %s: %d products, tagger %s", catalog.id, len(catalog), name)
    nouns, attributes, instruction = taggers.tagger(name), config.show_attributes, config.repeat_instruction
    return Shop(catalog, nouns, config.page_size, show_attributes=attributes, repeat_instruction=instruction)


def read_task(task: Mapping[str, Any], shop: str) -> Goal:
    """The goal of a payload `{"goal": {…}, "shop": id}`.

    Raises:
        ValueError: there is none, or it belongs to another shop.
    """
    if not isinstance(task.get("goal"), Mapping):
        raise ValueError(f"expected a payload with 'goal', a mapping, got keys {sorted(task)}")
    if task.get("shop", shop) != shop:
        raise ValueError(
            f"expected a task of shop {shop}, got one of {task['shop']!r}; give server and run the same shop"
        )
    return goal_from_json(task["goal"])


class WebshopEnv:
    """One visit at a time.

    `StepResult.info` holds `won` (a score of 1), `valid_action`, `score` (0 to 1), `admissible` (what can be done:
    `click[…]`, and `search[…]` on any page), `bought` (an asin or None).

    Args:
        shop: shared by the environments of a process, see `shop_front`.
        config: rules of an episode.
    """

    def __init__(self, shop: Shop, config: WebshopConfig | None = None):
        self._config = config or WebshopConfig()
        self._shop = shop
        self._visit: Visit | None = None
        self._steps = self._invalid = 0

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of a payload; see `read_task`.

        Raises:
            ValueError: a payload that is none, or of another shop.
        """
        goal = read_task(task, self._shop.catalog.id)
        self._visit, self._steps, self._invalid = Visit(self._shop, goal), 0, 0
        return self._result(self._visit, 0.0, valid=True)

    def step(self, action_text: str) -> StepResult:
        """Answers a response; without an action inside action tags that can be done, the page stays as it is.

        Raises:
            ValueError: no episode is running.
        """
        visit = self._visit
        if visit is None or visit.done or self._limited():
            raise ValueError("expected a running episode, got none; call reset first")
        self._steps += 1
        action = extract_action(action_text)
        if action is not None:
            visit.step(action)
        valid = action is not None and visit.acted
        self._invalid += not valid
        return self._result(visit, self._reward(visit, valid), valid)

    def close(self) -> None:
        """Ends the episode."""
        self._visit = None

    def _reward(self, visit: Visit, valid: bool) -> float:
        if not valid:
            return self._config.reward_invalid
        worth = visit.reward if self._config.reward == "score" else float(visit.reward >= WON)
        return self._config.reward_won * worth if visit.done else 0.0

    def _limited(self) -> bool:
        return self._steps >= self._config.max_steps or 0 < self._config.max_invalid <= self._invalid

    def _result(self, visit: Visit, reward: float, valid: bool) -> StepResult:
        info = {
            "won": visit.done and visit.reward >= WON,
            "valid_action": valid,
            "score": visit.reward,
            "admissible": [] if visit.done else ["search[…]", *(f"click[{each}]" for each in visit.page.clickables)],
            "bought": visit.bought,
        }
        return StepResult(
            OBSERVATIONS[self._config.mode](visit), reward, visit.done, not visit.done and self._limited(), info
        )
