"""Measures the prompts of the paper's presets in tokens, over episodes of scripted agents.

    python scripts/prompt_lengths.py --tokenizer MODEL [--tasks N] [--games FOLDER] [--shop FOLDER]

MODEL is a folder of Hugging Face's files, or a name on the Hub. FOLDERs hold games (`*.tw-pddl`) and the files of a
shop in the official formats; without them the generated ones are played alone. Each agent plays N tasks of each split
(default 50). A response that thinks changes no prompt: the history shows actions alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aem_jax.config.environments import task_suite
from aem_jax.config.presets import read_preset
from aem_jax.config.run import RunConfig
from aem_jax.envs.play import Act
from aem_jax.envs.protocol import Task
from aem_jax.envs.suite import TaskSuite
from aem_jax.overrides import override
from aem_jax.rollout.context import full_prompt
from aem_jax.tokenizer import ChatTokenizer

Tasks = Callable[[TaskSuite], Sequence[Task]]
"""Chooses tasks of a suite."""
LARGEST = {"alfworld.games.receptacles": [25, 40], "alfworld.games.things": [99, 99], "alfworld.games.max_copies": 9}
"""Rooms as large as the generator can make thirty of each kind."""
HEAD = "| tasks | agent | prompts | median | p99 | longest | longest without history | share above {limit:,} |"


def lengths(
    suite: TaskSuite, run: RunConfig, make_act: Callable[[Task], Act], tasks: Iterable[Task], chat: Any
) -> Iterator[tuple[int, int]]:
    """Yields tokens of each prompt of an agent's episodes, with `window_turns` turns and without any.

    Turns that a rollout would leave out of a prompt that is too long are counted.
    """
    whole = replace(run.rollout, context_tokens=1_000_000, windows=())
    no_history = replace(whole, window_turns=0)
    env = suite.make_env()
    for task in tasks:
        act, result = make_act(task), env.reset(task.payload)
        turns: list[tuple[str, str]] = []
        while not result.done and len(turns) < run.rollout.max_turns:
            own, bare = (full_prompt(chat, turns, result, config, suite.prompt) for config in (whole, no_history))
            yield len(own), len(bare)
            response = act(result)
            turns.append((result.observation, response))
            result = env.step(response)


def sources(preset: str, count: int, games: Path | None, shop: Path | None) -> Iterator[tuple[str, RunConfig, Tasks]]:
    """Yields name, config and chosen tasks of each source of tasks of a preset."""
    run = read_preset(preset)
    if preset == "alfworld-paper":
        yield "generated, official sizes", run, _some("train", "valid_seen", "valid_unseen", count=count)
        yield "generated, largest", override(run, LARGEST), _some("train", "valid_seen", "valid_unseen", count=count)
        if games:
            files = sorted(games.rglob("*.tw-pddl"))
            yield (
                f"games of {games.name}",
                run,
                lambda suite: [Task(file.stem, "", {"game": str(file)}) for file in files],
            )
        return
    yield "generated", run, _some("train", "valid", "test", count=count)
    if shop:
        yield (
            f"shop of {shop.name}",
            override(run, {"webshop.shop.data": str(shop)}),
            _some("train", "valid", count=count),
        )


def _some(*splits: str, count: int) -> Tasks:
    return lambda suite: [
        task
        for split in splits
        for task in (suite.training[:count] if split == "train" else suite.evaluation(split, count)[0])
    ]


def row(name: str, agent: str, pairs: Sequence[tuple[int, int]], limit: int) -> str:
    """A line of the table."""
    own, bare = np.asarray(pairs).T
    sizes = [len(own), np.median(own), np.quantile(own, 0.99), own.max(), bare.max()]
    cells = [name, agent, *(f"{size:,.0f}" for size in sizes), f"{(own > limit).mean():.2%}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description="Prompt lengths of the paper's presets.")
    parser.add_argument("--tokenizer", required=True, help="folder or name of a model")
    parser.add_argument("--tasks", type=int, default=50, help="tasks of each split, for each agent")
    parser.add_argument("--games", type=Path, help="folder of ALFWorld games")
    parser.add_argument("--shop", type=Path, help="folder of WebShop's files")
    options = parser.parse_args()
    chat = ChatTokenizer.from_pretrained(options.tokenizer, appends=False)
    for preset in ("alfworld-paper", "webshop-paper"):
        limit = read_preset(preset).rollout.prompt_tokens
        print(f"\n{preset}\n\n{HEAD.format(limit=limit)}\n|{'---|' * 8}")
        for name, run, choose in sources(preset, options.tasks, options.games, options.shop):
            suite = task_suite(run)
            for agent, make_act in suite.baselines.items():
                print(row(name, agent, list(lengths(suite, run, make_act, choose(suite), chat)), limit), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
