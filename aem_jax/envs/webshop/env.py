"""WebShop as an `Environment`: a response becomes a click or a search, and a purchase becomes a reward."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from aem_jax.envs.actions import extract_action, has_thought
from aem_jax.envs.protocol import StepResult
from aem_jax.envs.webshop import taggers
from aem_jax.envs.webshop.catalog import Catalog
from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.goals import Goal, goal_from_json
from aem_jax.envs.webshop.pages import PAGE_SIZE
from aem_jax.envs.webshop.shop import ShopConfig

WON = 1.0
"""Score of a perfect purchase."""


@dataclass(frozen=True)
class WebshopConfig:
    """The shop, the rules of an episode, and how its pages are shown."""

    NAME: ClassVar[str] = "webshop"

    mode: Literal["text", "text_rich", "html", "url"] = "text_rich"
    """Format of observations. text: the page's texts joined by [SEP]; text_rich: one text a line, with marked buttons;
    html: aem_jax's own HTML; url: only the address of the page."""
    repeat_instruction: bool = True
    """Whether every page repeats the instruction, as in WebShop. If not, only the search page shows it, and prompts are
    shorter for an agent that keeps its context."""
    page_size: int = PAGE_SIZE
    """Number of products on a page of results; WebShop has 10."""
    show_attributes: bool = False
    """Whether items have a page that lists their attributes."""
    tagger: str = "auto"
    """Tagger that finds the nouns of a title, for the reward. spacy: WebShop's own (en_core_web_sm); small: simple
    rules; recorded: the tagger of the golden recordings; auto: spacy if it is installed, else small."""
    max_steps: int = 15
    """Steps after which an episode without a purchase is truncated."""
    reward: Literal["success", "score"] = "success"
    """Reward of a purchase. success: reward_won if its score is 1, else 0; score: reward_won times its score."""
    reward_won: float = 10.0
    """Reward of a perfect purchase."""
    reward_invalid: float = -0.1
    """Reward of a response whose action is missing or not possible."""
    require_thinking: bool = False
    """Whether a response without <think>…</think> is invalid, too, as in the paper; its action is executed."""
    max_invalid: int = 0
    """Invalid actions after which an episode without a purchase is truncated; 0 sets no limit."""
    shop: ShopConfig = ShopConfig()  # noqa: RUF009 (frozen)
    """The shop's products, and the goals of its customers."""

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
    from aem_jax.envs.webshop.html import render_observation  # jinja2 takes memory that other modes do not need

    return render_observation(visit)


OBSERVATIONS: Mapping[str, Callable[[Visit], str]] = {
    "text": lambda visit: visit.text,
    "text_rich": lambda visit: visit.rich,
    "html": _html,
    "url": lambda visit: visit.page.url,
}
"""Mode -> function that renders a visit as an observation."""


def shop_front(config: WebshopConfig, catalog: Catalog) -> Shop:
    """Returns the data that the visits of one process share. Logs the tagger, because rewards depend on it."""
    name = taggers.resolve(config.tagger)
    logging.getLogger(__name__).info("shop %s: %d products, tagger %s", catalog.id, len(catalog), name)
    nouns, attributes, instruction = taggers.tagger(name), config.show_attributes, config.repeat_instruction
    return Shop(catalog, nouns, config.page_size, show_attributes=attributes, repeat_instruction=instruction)


def read_task(task: Mapping[str, Any], shop: str) -> Goal:
    """Reads the goal from a payload `{"goal": {…}, "shop": id}`.

    Raises:
        ValueError: the payload has no goal, or belongs to another shop.
    """
    if not isinstance(task.get("goal"), Mapping):
        raise ValueError(f"expected a payload with 'goal', a mapping, got keys {sorted(task)}")
    if task.get("shop", shop) != shop:
        raise ValueError(
            f"expected a task of shop {shop}, got one of {task['shop']!r}; give server and run the same shop"
        )
    return goal_from_json(task["goal"])


class WebshopEnv:
    """An environment that plays one visit at a time.

    `StepResult.info` contains `won` (a score of 1), `valid_action`, `score` (0 to 1), `admissible` (possible actions:
    `click[…]`, and `search[…]` on any page), and `bought` (an asin or None).

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
        """Starts an episode from a payload; see `read_task`.

        Raises:
            ValueError: the payload is invalid or belongs to another shop.
        """
        goal = read_task(task, self._shop.catalog.id)
        self._visit, self._steps, self._invalid = Visit(self._shop, goal), 0, 0
        return self._result(self._visit, 0.0, valid=True)

    def step(self, action_text: str) -> StepResult:
        """Executes the action in a response. Without a possible action in action tags, the page does not change.

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
        acted = action is not None and visit.acted
        valid = acted and (has_thought(action_text) or not self._config.require_thinking)
        self._invalid += not valid
        return self._result(visit, self._reward(visit, valid), valid)

    def close(self) -> None:
        """Ends the episode."""
        self._visit = None

    def _reward(self, visit: Visit, valid: bool) -> float:
        config = self._config
        worth = visit.reward if config.reward == "score" else float(visit.reward >= WON)
        earned = config.reward_won * worth if visit.done else 0.0
        return earned if valid else earned + config.reward_invalid

    def _limited(self) -> bool:
        return self._steps >= self._config.max_steps or 0 < self._config.max_invalid <= self._invalid

    def _result(self, visit: Visit, reward: float, valid: bool) -> StepResult:
        info = {
            "won": visit.done and visit.reward >= WON,
            "valid_action": valid,
            "score": visit.reward,
            "admissible": [] if visit.done else ["search[…]", *(f"click[{name}]" for name in visit.page.clickables)],
            "bought": visit.bought,
        }
        return StepResult(
            OBSERVATIONS[self._config.mode](visit), reward, visit.done, not visit.done and self._limited(), info
        )
