"""Prints the tables of docs/plan.md: a plan for each model and number of chips, with the same share of work per chip.

    python scripts/plan_table.py v5p [ROW ...]      # with libtpu installed
    python scripts/plan_table.py h100 [ROW ...]     # with jax's CUDA plugin installed

A row is MODEL:CHIPS, as qwen2.5-7b:16; default all. For N chips the run has 8·N slots and N groups a step.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

TOPOLOGIES: Mapping[str, Mapping[int, str]] = {
    "v5p": {4: "v5p:2x2x1", 16: "v5p:2x2x4", 64: "v5p:4x4x4", 256: "v5p:4x8x8"},
    "h100": {8: "gpu:h100:8", 32: "gpu:h100:8x4", 128: "gpu:h100:8x16"},
}
"""Device -> number of chips -> topology."""

ROWS: Mapping[str, int] = {"qwen2.5-1.5b": 4, "qwen2.5-7b": 4, "gemma-3-12b": 2, "qwen3-30b-a3b": 2, "qwen3-32b": 1}
"""Model -> rows of a microbatch for each chip."""

_OPTIONS: Mapping[tuple[str, str, int], Sequence[str]] = {
    # meshes of the page; others are chosen now
    ("h100", "qwen3-32b", 8): ("--mesh.fsdp", "1", "--mesh.tensor", "8"),
    ("v5p", "qwen3-32b", 4): ("--mesh.fsdp", "1", "--mesh.tensor", "4"),
    ("v5p", "qwen3-32b", 16): ("--mesh.fsdp", "4", "--mesh.tensor", "4", "--batch.rows", "8"),
    ("v5p", "qwen3-32b", 64): ("--batch.rows", "32"),
    ("v5p", "qwen3-32b", 256): ("--batch.rows", "128"),
}
"""Options of single rows; the last of a repeated one counts."""

HEAD = (
    "| model | chips | data × fsdp × tensor | rows | GiB, learning | GiB, sampling | learning, tokens/s | MFU "
    "| bytes, × floor | sampling, tokens/s | bytes, × floor |"
)


def command(device: str, model: str, chips: int) -> list[str]:
    """The command that makes a row, without --json."""
    sizes = {"batch.rows": ROWS[model] * chips, "rollout.num-slots": 8 * chips, "rollout.groups-per-step": chips}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    topology = TOPOLOGIES[device][chips]
    words = ["--preset", "alfworld-paper", model, "--topology", topology, *words]
    return ["-m", "aem_jax.launch", "plan", *words, *_OPTIONS.get((device, model, chips), ())]


def row(plan: Mapping[str, Any], model: str, chips: int, rows: int) -> str:
    """A line of the table."""
    mesh = " × ".join(str(plan["mesh"][name]) for name in ("data", "fsdp", "tensor"))
    expert = plan["mesh"].get("expert", 1)
    cells = [model, str(chips), f"{mesh}, expert {expert}" if expert > 1 else mesh, str(rows)]
    if not plan["fits"]:
        return " | ".join(("", *cells, f"does not fit; first advice: `{plan['advice'][0]}`", "")).strip()
    phases = {name: size / 2**30 for name, size in plan["phases"].items()}
    cells += [f"{phases['update']:.0f}", f"{max(phases['extend'], phases['decode']):.0f}"]
    for name in ("update", "decode"):
        rate = plan["rates"][name]
        cells.append(f"{_count(rate['slowest'])} – {_count(rate['fastest'])}")
        if name == "update":
            cells.append(f"{100 * rate['slowest_mfu']:.0f} – {100 * rate['fastest_mfu']:.0f} %")
        cells.append(f"{plan['costs'][name]['bytes'] / plan['floors'][name]:.2f}")
    return f"| {' | '.join(cells)} |"


def _count(value: float) -> str:
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.{0 if value >= 1e4 else 1}f} k"


def main(words: Sequence[str]) -> int:
    """Prints the rows, each as soon as it is made, and to standard error the seconds of its compilation."""
    if not words or words[0] not in TOPOLOGIES:
        print(f"expected {' or '.join(TOPOLOGIES)}, got {' '.join(words) or 'nothing'}", file=sys.stderr)
        return 2
    device, *names = words
    names = names or [f"{model}:{chips}" for model in ROWS for chips in TOPOLOGIES[device]]
    print(HEAD, "|---" * HEAD.count(" | ") + "|---|", sep="\n", flush=True)
    for name in names:
        model, _, chips = name.rpartition(":")
        run = command(device, model, int(chips))
        result = subprocess.run([sys.executable, *run, "--json"], stdout=subprocess.PIPE, text=True)
        if result.returncode not in (0, 1):
            return result.returncode
        plan = json.loads(result.stdout.splitlines()[-1])
        rows = int(run[len(run) - 1 - run[::-1].index("--batch.rows") + 1])
        print(row(plan, model, int(chips), rows), flush=True)
        seconds = {key: round(program["compiled_in"]) for key, program in plan["programs"].items()}
        print(plan["compiler"], seconds, " ".join(run), file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
