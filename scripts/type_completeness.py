"""Measures the share of each public package's interface with a known type (`pyright --verifytypes`); fails below 95 %.

    python scripts/type_completeness.py      # part of `make types`

Types of other packages are left out. For `envs`, only the interface for writing and checking an environment is
measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOMS = ("advantage", "losses", "models", "sampler", "envs.protocol", "envs.testing")
LEAST = 0.95


def score(room: str) -> float:
    """Fraction of the package's symbols with a known type."""
    folder = str(Path(sys.executable).parent)
    # pyright looks for the package in the environment of the python that PATH names.
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [f"{folder}/pyright", "--verifytypes", f"aem_jax.{room}", "--ignoreexternal", "--outputjson"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return json.loads(result.stdout)["typeCompleteness"]["completenessScore"]


def main() -> int:
    """Prints a line for each package; returns the exit status."""
    scores = {room: score(room) for room in ROOMS}
    for room, value in scores.items():
        print(f"aem_jax.{room}: {value:.1%} of the public interface has a known type")
    if low := [room for room, value in scores.items() if value < LEAST]:
        print(f"error: expected at least {LEAST:.0%}, got less for {', '.join(low)}", file=sys.stderr)
        print("       `pyright --verifytypes aem_jax.ROOM --ignoreexternal` names the symbols", file=sys.stderr)
    return 1 if low else 0


if __name__ == "__main__":
    sys.exit(main())
