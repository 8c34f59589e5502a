"""Environment speed on one core: steps per second with admissible commands, and milliseconds per reset.

    python -m benchmarks.envs [--games ../shared/alfworld] [--seconds 5]

A step chooses a random admissible command, executes it, and reads the sorted admissible commands. A reset parses a file
that is already in memory (domain, problem, grammar) and starts a player. Each game is warmed up once. Times are CPU
time of this process, so other processes on a shared machine do not count. The last line is JSON.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from aem_jax.envs.alfworld.engine import Game, Player

EPISODE = 50


def measure_alfworld(folder: Path, seconds: float, seed: int = 0) -> dict[str, float | int | str]:
    """Measures the ALFWorld engine on every game of a folder.

    Args:
        folder: folder of `*.tw-pddl` files.
        seconds: duration of the measured steps.
        seed: seed of the random policy.

    Returns:
        Numbers by name, with units in the names.
    """
    texts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.tw-pddl"))]
    if not texts:
        raise ValueError(f"expected *.tw-pddl files, got none in {folder}")
    rng, games, resets = random.Random(seed), [], []
    for data in texts:
        parse = lambda data=data: Game(data["pddl_domain"], data["pddl_problem"], data["grammar"])
        parse()
        began = time.process_time()
        games.append(parse())
        Player(games[-1])
        resets.append(1e3 * (time.process_time() - began))
    starts, steps, spent = [], 0, 0.0
    while spent < seconds:
        for game in games:
            began = time.process_time()
            player = Player(game)
            starts.append(1e3 * (time.process_time() - began))
            began = time.process_time()
            for _ in range(EPISODE):
                player.step(rng.choice(player.admissible))
            spent += time.process_time() - began
            steps += EPISODE
    return {
        "environment": "alfworld",
        "games": len(games),
        "steps": steps,
        "steps_per_second": round(steps / spent),
        "reset_ms_mean": round(mean(resets), 3),
        "reset_ms_median": round(median(resets), 3),
        "reset_ms_max": round(max(resets), 3),
        "restart_ms_median": round(median(starts), 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.envs", description="Environment speed on one core.")
    parser.add_argument("--games", type=Path, default=Path("../shared/alfworld"), help="folder of ALFWorld game files")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to step for")
    options = parser.parse_args(argv)
    try:
        numbers = measure_alfworld(options.games, options.seconds)
    except ValueError as error:
        parser.error(str(error))
    print(f"alfworld: {numbers['steps_per_second']} steps/s over {numbers['games']} games,", end=" ")
    print(f"reset {numbers['reset_ms_mean']} ms (a game already parsed: {numbers['restart_ms_median']} ms)")
    print(json.dumps(numbers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
