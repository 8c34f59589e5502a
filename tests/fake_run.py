"""A made-up run with the files of a real one, for tests of the report."""

import json
import math
import random
from pathlib import Path

KINDS = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)


def wilson(wins: int, count: int) -> tuple[float, float]:
    """95 % interval of a share."""
    p, z = wins / count, 1.96
    centre, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def evaluation(step: int, phase: str, split: str, success: float, rng: random.Random, count: int = 132) -> dict:
    per_kind = count // len(KINDS)
    wins = {kind: sum(rng.random() < success for _ in range(per_kind)) for kind in KINDS}

    def score(solved: int, of: int) -> dict:
        low, high = wilson(solved, of)
        return {"success": solved / of, "low": low, "high": high, "count": of}

    return {
        "step": step,
        "phase": phase,
        "set": {"valid_seen": "9f2c41d8", "valid_unseen": "07be93aa"}[split],
        "split": split,
        **score(sum(wins.values()), per_kind * len(KINDS)),
        "by_task_type": {kind: score(solved, per_kind) for kind, solved in wins.items()},
        "mean_turns": 14 - 6 * success,
        "mean_return": 10 * success - 0.4,
    }


def transcript(index: int, rng: random.Random) -> dict:
    kind = KINDS[index % len(KINDS)]
    won = index % 3 != 1
    opening = (
        "You are in the middle of a room. Looking quickly around you, you see a cabinet 1, a countertop 1, a fridge 1, "
        "a microwave 1, a shelf 1 and a sinkbasin 1.\n\nYour task is to: put a cool <apple> in microwave."
    )
    sayings = [
        (opening, "go to countertop 1"),
        ("You arrive at countertop 1. On the countertop 1, you see a apple 1, and a knife 2.", "take apple 1"),
        ("You pick up the apple 1 from the countertop 1.", "go to fridge 1"),
        ("You arrive at fridge 1. The fridge 1 is closed.", "cool apple 1 with fridge 1"),
        ("You cool the apple 1 using the fridge 1.", "go to microwave 1"),
        ("You arrive at microwave 1. The microwave 1 is closed.", "open microwave 1"),
        ("You open the microwave 1. The microwave 1 is open.", "move apple 1 to microwave 1"),
    ]
    turns = []
    for number, (observation, action) in enumerate(sayings):
        entropy = abs(rng.gauss(0.5, 0.3))
        valid = rng.random() > 0.1
        last = number == len(sayings) - 1
        alpha = math.exp(-entropy) / 0.62
        turns.append(
            {
                "observation": observation,
                "response": f"<action>{action}</action>" if valid else action,
                "entropy": entropy,
                "alpha": alpha,
                "advantage": alpha * (0.9 if won else -1.1),
                "reward": (10.0 if won and last else 0.0) - (0.0 if valid else 0.1),
                "valid_action": valid,
            }
        )
    ending = "env_error" if index == 7 else "terminated" if won else "truncated"
    return {
        "task_id": f"valid_seen/{index:03d}",
        "task_type": kind,
        "success": won,
        "ending": ending,
        "step": 80,
        "turns": turns,
    }


def write_fake_run(folder: Path, steps: int = 80, seed: int = 0) -> Path:
    """Writes the files of a run of `steps` steps; returns the folder."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    config = {
        "preset": "alfworld-tiny",
        "seed": seed,
        "num_steps": steps,
        "aem": {"strength": 1.0, "min_range": 0.1},
        "learner": {"learning_rate": 3e-4, "clip_low": 0.2, "clip_high": 0.2, "kl": 0.0, "minibatches": 2},
        "policy": {"layers": 4, "embed": 192, "heads": 6, "vocab": 512},
        "env": {"game": {"rooms": ["kitchen"], "movables": 6, "max_steps": 14}, "urls": []},
    }
    (folder / "config.json").write_text(json.dumps(config))
    evaluations = []
    for split, drop in (("valid_seen", 0.0), ("valid_unseen", 0.06)):
        evaluations.append(evaluation(0, "expert", split, 0.97, rng))
        evaluations.append(evaluation(0, "random", split, 0.02, rng))
        evaluations.append(evaluation(0, "warmstart", split, 0.33 - drop, rng))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            progress = 1 / (1 + math.exp(-6 * (step / steps - 0.4)))
            success = min(1.0, max(0.0, 0.3 + 0.45 * progress + rng.gauss(0, 0.06)))
            entropy = 0.55 + 0.15 * math.sin(2.2 * step / steps) - 0.35 * progress + rng.gauss(0, 0.015)
            record = {
                "step": step,
                "rollout/success": success,
                "rollout/return": 10 * success - 0.5,
                "rollout/valid_action": 0.86 + 0.12 * progress + rng.gauss(0, 0.01),
                "rollout/turns": 12 - 5 * success,
                "rollout/mixed_groups": 0.9 - 0.3 * progress,
                **{
                    f"rollout/success/{k}": min(1, max(0, success - 0.05 * i + rng.gauss(0, 0.1)))
                    for i, k in enumerate(KINDS)
                },
                "entropy/token": entropy * 0.8,
                "entropy/response": entropy,
                "aem/alpha_positive": 1.03 + 0.05 * progress + rng.gauss(0, 0.01),
                "aem/alpha_negative": 0.97 - 0.06 * progress + rng.gauss(0, 0.01),
                "aem/alpha_min": 0.55 + rng.gauss(0, 0.02),
                "aem/alpha_max": 1.6 + rng.gauss(0, 0.05),
                **({"aem/efficiency": 1.2, "aem/gain": 0.6, "aem/gain_base": 0.5} if step % 5 == 0 else {}),
                "aem/flat_groups": 0.02 + 0.1 * progress,
                "learner/clip_fraction": 0.01 + abs(rng.gauss(0, 0.005)),
                "learner/ratio_mean": 1.0,
                "learner/kl_sampler": 0.004 + abs(rng.gauss(0, 0.001)),
                "learner/grad_norm": 0.6 + abs(rng.gauss(0, 0.2)),
                "learner/loss": rng.gauss(0, 0.02),
                "parity/max": 10 ** rng.gauss(-5.2, 0.15),
                "parity/mean": 10 ** rng.gauss(-6.6, 0.1),
                "throughput/tokens_per_s": 5200 + rng.gauss(0, 250),
                "time/rollout": 3.1 - success + rng.gauss(0, 0.1),
                "time/rollout_device": 1.5,
                "time/update": 1.6 + rng.gauss(0, 0.05),
                "time/step": 5.0 - success + rng.gauss(0, 0.05),
                "compile/recompiles": 0,
            }
            file.write(json.dumps(record) + "\n")
            if step and step % 20 == 0:
                evaluations.append(evaluation(step, "train", "valid_seen", 0.32 + 0.45 * progress, rng))
    with (folder / "warmstart.jsonl").open("w") as file:
        for step in range(steps):
            record = {"step": step, "learner/loss": 0.2 + 3 * math.exp(-9 * step / steps) + abs(rng.gauss(0, 0.02))}
            file.write(json.dumps(record) + "\n")
    evaluations.append(evaluation(steps, "final", "valid_seen", 0.79, rng))
    evaluations.append(evaluation(steps, "final", "valid_unseen", 0.7, rng))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    (folder / "transcripts.json").write_text(json.dumps([transcript(index, rng) for index in range(10)]))
    return folder
