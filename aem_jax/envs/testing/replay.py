"""Replays recorded transcripts on this package's engines and compares every step.

    python -m aem_jax.envs.testing.replay alfworld --games DIR --transcripts FILE
    python -m aem_jax.envs.testing.replay webshop --data DIR --transcripts FILE

Prints both sides of every mismatch, then `steps N, mismatches M`; exits 1 if there was any, 2 on bad arguments.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_jax.envs.alfworld.engine import Game, Player
from aem_jax.envs.webshop.engine import Shop, Visit
from aem_jax.envs.webshop.shop import ShopConfig, open_shop
from aem_jax.envs.webshop.taggers import recorded as recorded_tagger
from aem_jax.files import read_json_lines

Step = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""(location in the transcripts, recorded values, values of our engine)."""
WEBSHOP_FIELDS = ("text", "rich", "has_search_bar", "clickables", "reward", "done")


def replay_alfworld(games: Path, episodes: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    """Replays ALFWorld episodes `{game, policy, steps: [{command, observation, admissible, won, done, score}]}`.

    A step whose command is null is the start of the episode.

    Args:
        games: folder of the game files, `<game>.tw-pddl`.
        episodes: the recorded episodes.

    Yields:
        The recorded and our values of every step.
    """
    loaded: dict[str, Game] = {}
    for episode in episodes:
        name = episode["game"]
        if name not in loaded:
            loaded[name] = Game.load(games / f"{name.removesuffix('.tw-pddl')}.tw-pddl")
        player = Player(loaded[name])
        for at, step in enumerate(episode["steps"]):
            if step["command"] is not None:
                player.step(step["command"])
            where = f"{name} {episode.get('policy', '')} step {at} {step['command']!r}"
            ours = alfworld_values(player)
            yield where, {name: step[name] for name in ours}, ours


def alfworld_values(player: Player) -> dict[str, Any]:
    """Returns the state of an episode, by the names of the stock engine. A game ends when it is won."""
    values = {"observation": player.observation, "admissible": player.admissible}
    return values | {"won": player.won, "done": player.won, "score": float(player.won)}


def replay_webshop(data: Path, episodes: Sequence[Mapping[str, Any]]) -> Iterator[Step]:
    """Replays WebShop episodes `{session, policy, steps: [{action, text, rich, clickables, …}]}`; see `WEBSHOP_FIELDS`.

    A step whose action is null is the start of the episode; a field that is null was not recorded. The shop's prices
    and goals come from the default seed, and the reward's nouns from the recordings' tagger.

    Args:
        data: folder of the shop's files.
        episodes: the recorded episodes; the session is the goal's number.

    Yields:
        The recorded and our values of every step.
    """
    shop = Shop(open_shop(ShopConfig(data=str(data))), recorded_tagger)
    for episode in episodes:
        session = episode["session"]
        visit = Visit(shop, shop.catalog.goals[session], str(session))
        for at, step in enumerate(episode["steps"]):
            if step["action"] is not None:
                visit.step(step["action"])
            ours = {"has_search_bar": visit.page.has_search_bar, "clickables": visit.page.clickables}
            ours |= {name: getattr(visit, name) for name in ("text", "rich", "reward", "done")}
            recorded = {name: step[name] for name in WEBSHOP_FIELDS if step[name] is not None}
            where = f"session {session} {episode.get('policy', '')} step {at} {step['action']!r}"
            yield where, recorded, {name: ours[name] for name in recorded}


REPLAYS: dict[str, Callable[[Path, Sequence[Mapping[str, Any]]], Iterator[Step]]] = {
    "alfworld": replay_alfworld,
    "webshop": replay_webshop,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m aem_jax.envs.testing.replay", description="Replay recorded episodes."
    )
    parser.add_argument("environment", choices=sorted(REPLAYS))
    parser.add_argument("--data", "--games", type=Path, required=True, help="folder of what was played: games, a shop")
    parser.add_argument("--transcripts", type=Path, required=True, help="JSON lines, one episode a line")
    options = parser.parse_args(argv)
    if not options.data.is_dir():
        parser.error(f"--data: expected a folder, got {options.data}")
    if not options.transcripts.is_file():
        parser.error(f"--transcripts: expected a file, got {options.transcripts}")
    steps = mismatches = 0
    try:
        episodes = [
            _episode(options.transcripts, number, episode) for number, episode in read_json_lines(options.transcripts)
        ]
        for where, recorded, ours in REPLAYS[options.environment](options.data, episodes):
            steps += 1
            if recorded != ours:
                mismatches += 1
                print(_difference(where, recorded, ours))
    except (KeyError, TypeError, AttributeError) as error:
        parser.error(f"--transcripts: expected episodes of {options.environment}, got one without {error}")
    except (OSError, IndexError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"steps {steps}, mismatches {mismatches}")
    return 1 if mismatches or not steps else 0


def _episode(file: Path, number: int, episode: Any) -> Mapping[str, Any]:
    if not isinstance(episode, dict) or not isinstance(episode.get("steps"), list):
        raise ValueError(
            f"--transcripts: expected episodes with a list 'steps', got {episode!r:.80} in {file} line {number}"
        )
    return episode


def _difference(where: str, recorded: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    lines = [where]
    for key, value in recorded.items():
        if ours[key] != value:
            lines += [f"  {key} recorded: {value!r}", f"  {key} ours:     {ours[key]!r}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
