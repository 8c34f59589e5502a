"""Prompts in one message: ALFWorld's and WebShop's, as the documentation shows them, and their parts one by one."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from envs.test_alfworld_engine import GOLDEN, needs_golden
from envs.webshop_golden import unpack

from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.envs.actions import as_action, has_thought
from aem_jax.envs.alfworld.env import AlfworldConfig
from aem_jax.envs.alfworld.generator.config import TINY
from aem_jax.envs.alfworld.prompt import prompt as alfworld_prompt
from aem_jax.envs.alfworld.suite import task_suite as alfworld
from aem_jax.envs.play import Act
from aem_jax.envs.prompt import Situation, compose, recorded_action
from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import SuiteOptions, TaskSuite
from aem_jax.envs.webshop.env import WebshopConfig
from aem_jax.envs.webshop.generator.config import GeneratorConfig
from aem_jax.envs.webshop.prompt import prompt as webshop_prompt
from aem_jax.envs.webshop.shop import ShopConfig
from aem_jax.envs.webshop.suite import task_suite as webshop
from aem_jax.files import read_json_lines
from aem_jax.overrides import override
from aem_jax.tokenizer import ChatTokenizer
from scripts.prompt_lengths import lengths, sources

DOCS = Path(__file__).parents[2] / "docs"


def situations(suite: TaskSuite, act: Act, task: Task | None = None, turns: int = 2) -> Iterator[Situation]:
    """The situations of an episode, with the last turns in each; of the first training task by default."""
    env, past = suite.make_env(), []
    result = env.reset((task or suite.training[0]).payload)
    first = result.observation
    while not result.done:
        shown = past[max(len(past) - turns, 0) :]
        yield Situation(first, shown, len(past) + 1, result.observation, result.info["admissible"])
        past.append((result.observation, act(result)))
        result = env.step(past[-1][1])


def shop(tmp_path: Path, **settings) -> TaskSuite:
    made = ShopConfig(cache=str(tmp_path), made=GeneratorConfig(products=40))
    return webshop(WebshopConfig(shop=made, **settings), SuiteOptions())


def in_docs(page: str) -> list[str]:
    """The text blocks of a page."""
    return re.findall(r"^```text\n(.*?)\n```", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def test_alfworlds_page_shows_the_third_prompt_of_a_game():
    suite = alfworld(AlfworldConfig(games=TINY), SuiteOptions())
    _, _, third, *_ = situations(suite, suite.baselines["searcher"](suite.training[0]))
    assert suite.prompt is alfworld_prompt and in_docs("alfworld.md") == [alfworld_prompt(third)]


def test_webshops_page_shows_the_third_prompt_of_a_visit(tmp_path: Path):
    suite = shop(tmp_path, page_size=2, mode="text")
    _, _, third, *_ = situations(suite, suite.baselines["oracle"](suite.training[0]))
    assert suite.prompt is webshop_prompt and in_docs("webshop.md") == [webshop_prompt(third)]


# The parts, one by one.


def test_a_message_has_the_parts_in_order():
    past = [
        ("You see a mug 1.\n", "<think>a mug <action>look</action></think><action>take\nmug 1</action>"),
        ("Got it.", ""),
    ]
    situation = Situation("first", past, 7, " You arrive. ", ["unused"])
    assert compose("Role.", "wash it", situation, ["go", "look"]).split("\n\n") == [
        "Role.\nYour task: wash it",
        "Steps taken so far: 6. The latest of them:\nObservation 5: You see a mug 1.\nAction 5: take mug 1\n"
        "Observation 6: Got it.\nAction 6: ",
        "Now, at step 7, you observe: You arrive.",
        "Your admissible actions:\ngo\nlook",
        "First reason about the situation step by step, between <think> and </think>. "
        "Then choose one admissible action and write it between <action> and </action>.",
    ]


def test_the_first_message_has_no_history_and_a_short_one_the_number_of_steps_alone():
    first = compose("Role.", "t", Situation("a", [], 1, "a", []), [])
    assert "Steps" not in first and "at step 1," in first
    assert "\n\nSteps taken so far: 4.\n\nNow, at step 5," in compose("Role.", "t", Situation("a", [], 5, "b", []), [])


@pytest.mark.parametrize(
    ("response", "shown"),
    [
        ("<think>hm</think><action> go to x </action>", "go to x"),
        ("I would rather go to\nthe kitchen and open the fridge", "he kitchen and open the fridge"),
        ("go", "go"),
        ("", ""),
    ],
)
def test_history_shows_actions_or_else_the_end_of_a_response(response: str, shown: str):
    assert recorded_action(response) == shown and len(shown) <= 30


def test_alfworld_lists_all_but_help():
    message = alfworld_prompt(Situation("A room. Your task is to: put a mug.\n", [], 1, "A room.", ["help", "look"]))
    assert "Your task: put a mug.\n" in message and "Your admissible actions:\nlook\n" in message
    assert "Your task: Tidy up!\n" in alfworld_prompt(Situation("Tidy up!", [], 1, "Tidy up!", []))


@pytest.mark.parametrize("mode", ["text", "text_rich"])
@pytest.mark.parametrize("repeat", [True, False])
def test_webshops_pages_are_shown_without_the_instruction(tmp_path: Path, mode: str, repeat: bool):
    """And otherwise whole: they are the pages of a shop that shows the instruction on the search page alone."""
    suite = shop(tmp_path, mode=mode, repeat_instruction=repeat)
    bare = shop(tmp_path, mode=mode, repeat_instruction=False)
    task = suite.training[3]
    instruction = task.payload["goal"]["instruction"].strip()
    pages = [situation.observation for situation in situations(bare, bare.baselines["oracle"](task), task)]
    visit = list(situations(suite, suite.baselines["oracle"](task), task))
    assert len(pages) == len(visit) >= 4
    for page, situation in zip(pages, visit, strict=True):
        message = webshop_prompt(situation)
        assert message.startswith(f"You shop in an online shop.\nYour task: {instruction}\n")
        assert message.count(instruction) == 1 and "Instruction" not in message and "WebShop" not in message
        if situation.step > 1:
            assert f"you observe: {page.strip()}\n\nYour admissible actions:" in message
    search = {"text": "Search", "text_rich": "[button] Search [button_]"}[mode]
    assert f"at step 1, you observe: {search}\n" in webshop_prompt(visit[0])
    clicked = "You have clicked" in visit[-1].observation
    assert clicked == (mode == "text_rich") == ("You have clicked" in webshop_prompt(visit[-1]))


def test_webshop_lists_a_search_where_the_page_has_the_search_bar(tmp_path: Path):
    suite = shop(tmp_path)
    first, second, *_ = situations(suite, suite.baselines["oracle"](suite.training[0]))
    assert "actions:\nsearch[<your words>]\n\n" in webshop_prompt(first)
    listed = webshop_prompt(second).split("Your admissible actions:\n")[1].split("\n\n")[0].split("\n")
    assert listed == second.admissible[1:] and second.admissible[0] == "search[…]"


def test_an_environment_without_such_a_prompt_says_so(tmp_path: Path):
    assert shop(tmp_path, mode="url").prompt is None
    with pytest.raises(ValueError, match="expected a first page with an instruction"):
        webshop_prompt(Situation("http://127.0.0.1:3000/0", [], 1, "", []))
    run = override(read_preset("webshop-paper", "qwen2.5-1.5b"), {"webshop.shop.cache": str(tmp_path)})
    with pytest.raises(ValueError, match=r"--rollout.prompt-style: expected chat with these settings of webshop"):
        task_suite(override(run, {"webshop.mode": "url", "webshop.shop.made.products": 40}))


def test_a_response_may_have_to_think(tmp_path: Path):
    thought, untagged = "<think>so</think>", "so</think><think>"
    assert has_thought(f"{thought}go") and not has_thought(untagged) and not has_thought("<think>so")
    for required in (False, True):
        suite = alfworld(AlfworldConfig(games=TINY, require_thinking=required), SuiteOptions())
        task, env = suite.training[0], suite.make_env()
        act = suite.baselines["oracle"](task)
        result = env.reset(task.payload)
        while not result.done:
            result = env.step(act(result))
            assert result.info["valid_action"] == (not required)
            expected = 10.0 * result.terminated - 0.1 * required
            assert result.reward == pytest.approx(expected) and result.info["won"] == result.terminated
        env.reset(task.payload)
        assert env.step(thought + as_action("look")).info["valid_action"]
        assert env.step(thought).reward == -0.1
        visit = shop(tmp_path, require_thinking=required)
        env, act = visit.make_env(), visit.baselines["oracle"](visit.training[0])
        result = env.reset(visit.training[0].payload)
        while not result.done:
            result = env.step(act(result))
            assert result.info["valid_action"] == (not required)
            assert result.reward == pytest.approx(10.0 * result.terminated - 0.1 * required)
        env.reset(visit.training[0].payload)
        assert env.step(thought + as_action("search[lamp]")).info["valid_action"]


@pytest.mark.parametrize("preset", ["alfworld-paper", "webshop-paper"])
def test_prompts_are_far_below_the_limit_of_the_papers_presets(tmp_path: Path, monkeypatch, preset: str):
    """Even with two characters a token; SmolLM2's tokenizer has at least 2.2 in these prompts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _, run, choose in sources(preset, 4, None, None):
        suite = task_suite(run)
        assert suite.prompt
        visits = [situations(suite, suite.baselines["random"](task), task) for task in choose(suite)]
        longest = max(len(suite.prompt(situation)) for visit in visits for situation in visit)
        assert 1000 < longest < 2 * run.rollout.prompt_tokens


SMOLLM2 = Path(__file__).parents[2] / "models/smollm2-135m/model.gguf"


@pytest.mark.skipif(not SMOLLM2.is_file(), reason="needs SmolLM2's tokenizer: make smollm2")
@pytest.mark.parametrize(("preset", "most"), [("alfworld-paper", 1100), ("webshop-paper", 2000)])
def test_prompts_in_tokens_of_smollm2(tmp_path: Path, monkeypatch, preset: str, most: int):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chat = ChatTokenizer.from_pretrained(SMOLLM2, appends=False)
    longest = 0
    for _, run, choose in sources(preset, 2, GOLDEN if GOLDEN.is_dir() else None, unpack(tmp_path)):
        suite = task_suite(run)
        tasks = choose(suite)[:2]
        for make_act in suite.baselines.values():
            pairs = list(lengths(suite, run, make_act, tasks, chat))
            assert all(bare <= own <= run.rollout.prompt_tokens for own, bare in pairs)
            longest = max(longest, *(own for own, _ in pairs))
    assert most / 2 < longest < most


# Recorded episodes of the original engines, and their prompts written out anew, step by step.

FORM = (
    "First reason about the situation step by step, between <think> and </think>. "
    "Then choose one admissible action and write it between <action> and </action>."
)


def written(role: str, task: str, pages: list[str], actions: list[str], listed: list[str]) -> str:
    """The message after these pages and actions."""
    step, text = len(pages), f"{role}\nYour task: {task}\n\n"
    if step > 1:
        text += f"Steps taken so far: {step - 1}. The latest of them:\n"
        for number in [step - 2, step - 1][step == 2 :]:
            text += f"Observation {number}: {pages[number - 1]}\nAction {number}: {actions[number - 1]}\n"
        text += "\n"
    text += f"Now, at step {step}, you observe: {pages[-1]}\n\nYour admissible actions:\n"
    return text + "".join(f"{action}\n" for action in listed) + f"\n{FORM}"


def of_record(observations: list[str], actions: list[str], admissible: list[str]) -> Situation:
    past = list(zip(observations[:-1], [f"<think>hm</think>{as_action(a)}" for a in actions], strict=True))[-2:]
    return Situation(observations[0], past, len(observations), observations[-1], admissible)


def test_recorded_visits(tmp_path: Path):
    """A page is split at [SEP], and begins behind the instruction, as verl-agent has it."""
    count = 0
    for _, episode in read_json_lines(unpack(tmp_path) / "transcripts.jsonl"):
        steps = [step for step in episode["steps"] if not step["done"]]
        texts, actions = [step["text"] for step in steps], [step["action"] for step in steps[1:]]
        task = texts[0].split(" [SEP] ")[2]
        pages = [" [SEP] ".join((parts := text.split(" [SEP] "))[parts.index(task) + 1 :]) for text in texts]
        for n, step in enumerate(steps):
            clicks = [f"click[{name}]" for name in step["clickables"]]
            listed = ["search[<your words>]" if step["has_search_bar"] and c == "click[search]" else c for c in clicks]
            situation = of_record(texts[: n + 1], actions[:n], ["search[…]", *clicks])
            expected = written("You shop in an online shop.", task, pages[: n + 1], actions, listed)
            assert webshop_prompt(situation) == expected
            count += 1
    assert count > 600


@needs_golden
def test_recorded_games():
    count = 0
    for _, episode in read_json_lines(GOLDEN / "transcripts.jsonl"):
        steps = [step for step in episode["steps"] if not step["done"]]
        seen, actions = [step["observation"] for step in steps], [step["command"] for step in steps[1:]]
        task = seen[0].split("Your task is to: ")[1].strip()
        shown = [" ".join(command.split()) for command in actions]  # in one line
        for n, step in enumerate(steps):
            listed = [command for command in step["admissible"] if command != "help"]
            expected = written(
                "You act in a household by text commands.", task, [s.strip() for s in seen[: n + 1]], shown, listed
            )
            assert alfworld_prompt(of_record(seen[: n + 1], actions[:n], step["admissible"])) == expected
            count += 1
    assert count > 600
