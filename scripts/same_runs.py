"""Records the behaviour that a refactoring must keep, and compares two such records.

    python scripts/same_runs.py record FOLDER     # ten steps of each run below, about ten minutes on two cores
    python scripts/same_runs.py compare OLD NEW [--renamed FILE]

A record contains, for each run, `metrics.jsonl` without times, the transcripts, and the checksums of the checkpoint's
arrays; for three models, `plan --json`; the settings of `--help`; and every message of the source that contains
"expected". FILE is a JSON mapping of old to new names of metrics and settings. Arrays are compared without their names.
"""

import argparse
import ast
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SMALL = str(ROOT / "tests/launch/small.toml")
TEN = ("--train.num-steps", "10", "--train.save-every", "5", "--metrics.tensorboard", "false")
SHORT = (*TEN, "--evaluation.every", "10", "--evaluation.size", "8", "--warmstart.steps", "20")
SHORT += ("--warmstart.episodes", "100")
WINDOWED = ("--rollout.context", "window", "--rollout.mode", "continuous", "--warmstart.episodes", "0")

RUNS: dict[str, tuple[str, ...]] = {
    "alfworld-tiny": ("--preset", "alfworld-tiny", *SHORT),
    "webshop-tiny": ("--preset", "webshop-tiny", *SHORT),
    "swe-tiny": ("--preset", "swe-tiny", *SHORT),
    "lora": ("--preset", SMALL, *TEN, "--lora.rank", "4"),
    "ppo": ("--preset", SMALL, "ppo", *TEN),
    "windowed-continuous": ("--preset", SMALL, *TEN, *WINDOWED),
    "two-processes": ("--preset", SMALL, *TEN, "--mesh.data", "2", "--mesh.fsdp", "4", "--runtime.cpu-devices", "4")
    + ("--env.sessions-per-server", "4"),
}
PLANS = (
    ("--preset", "alfworld-tiny", "--topology", "cpu:1"),
    ("--preset", "alfworld-paper", "qwen2.5-1.5b", "--topology", "gpu:h100:8", "--analytic", "true"),
    ("--preset", "swe-paper", "qwen3-32b", "--topology", "v5p:4x4x2", "--mesh.tensor", "8", "--analytic", "true"),
)


def record(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    runs = {name: run(folder, name, RUNS[name]) for name in names or RUNS}
    static = {"plans": [plan(words) for words in PLANS], "settings": settings(), "refusals": refusals()}
    file = folder / "record.json"
    before = json.loads(file.read_text()) if file.exists() else {"runs": {}}
    file.write_text(json.dumps({"runs": before["runs"] | runs, **static}, indent=1, sort_keys=True))


def run(folder: Path, name: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Trains unless the folder already contains the run; then reads the run's files."""
    common = [*words, "--name", name, "--runs-dir", str(folder)]
    if name == "two-processes":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        together = ["--runtime.coordinator", f"localhost:{port}", "--runtime.num-processes", "2"]
        processes = [launch(folder, name, [*common, *together, "--runtime.process-id", str(i)], i) for i in (0, 1)]
    else:
        processes = [launch(folder, name, common, 0)]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"{name} failed: see {folder / name}-0.log")
    path = folder / name
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [
            {key: value for key, value in line.items() if not key.startswith(("time/", "throughput/"))}
            for line in lines
        ],
        "files": {file.name: json.loads(file.read_text()) for file in sorted(path.glob("transcripts*.json"))},
        "arrays": {step.name: arrays(step) for step in sorted((path / "checkpoints").iterdir()) if step.name.isdigit()},
    }


def launch(folder: Path, name: str, words: list[str], index: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "aem_jax.launch", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with (folder / f"{name}-{index}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def arrays(step: Path) -> list[str]:
    (file,) = step.glob("extra/metadata")
    return sorted(json.loads(file.read_text())["checksums"].values())


def output(*words: str) -> str:
    command = [sys.executable, "-m", "aem_jax.launch", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def plan(words: tuple[str, ...]) -> Any:
    return json.loads(output("plan", "--json", *words))


def settings() -> list[str]:
    """Names of the settings in `--help all`."""
    text = re.sub(r"[│╭╮╰╯─]", " ", output("--help", "all"))
    return sorted(set(re.findall(r"--([a-z0-9-]+(?:\.[a-z0-9-]+)*)", text)))


def refusals() -> list[str]:
    """The strings of the source that contain "expected", with {} in place of values."""
    messages = set()
    for file in sorted((ROOT / "aem_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            if "expected " in text and "\n" not in text:
                messages.add(text)
    return sorted(messages)


def compare(old_file: Path, new_file: Path, renamed: dict[str, str]) -> int:
    old, new = (json.loads(file.read_text()) for file in (old_file, new_file))
    differences = []
    for name, before in old["runs"].items():
        after = new["runs"].get(name)
        if after is None:
            differences.append(f"{name}: not recorded")
            continue
        for step, (was, now) in enumerate(zip(before["metrics"], after["metrics"], strict=True)):
            was = {str(renamed.get(key, key)): value for key, value in was.items()}
            for key in sorted({*was, *now}):
                if was.get(key, "absent") != now.get(key, "absent"):
                    differences.append(f"{name} step {step} {key}: {was.get(key, 'absent')} → {now.get(key, 'absent')}")
        if with_new_names(before["files"], renamed) != after["files"]:
            differences.append(f"{name}: other transcripts")
        both = before["arrays"].keys() & after["arrays"].keys()  # a run with more evaluations saves more often
        if "10" not in both or any(before["arrays"][step] != after["arrays"][step] for step in both):
            differences.append(f"{name}: other arrays in its checkpoints")
    for words, was, now in zip(PLANS, old["plans"], new["plans"], strict=True):
        if was != now:
            differences.append(f"plan {words[1]}: {first_difference(was, now)}")
    lists: dict[str, tuple[set[str], set[str]]] = {
        "setting": ({str(renamed.get(name, name)) for name in old["settings"]}, set(new["settings"])),
        "message": (set(old["refusals"]), set(new["refusals"])),
    }
    for kind, (was, now) in lists.items():
        differences += [f"{kind} gone: {text}" for text in sorted(was - now)]
        differences += [f"{kind} new: {text}" for text in sorted(now - was)]
    print("\n".join(differences) or "equal")
    return 1 if differences else 0


def with_new_names(value: Any, renamed: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {renamed.get(name, name): with_new_names(item, renamed) for name, item in value.items()}
    return [with_new_names(item, renamed) for item in value] if isinstance(value, list) else value


def first_difference(was: Any, now: Any, path: str = "") -> str:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                return first_difference(was.get(key), now.get(key), f"{path}.{key}")
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for index, (one, other) in enumerate(zip(was, now, strict=True)):
            if one != other:
                return first_difference(one, other, f"{path}[{index}]")
    return f"{path}: {str(was)[:80]} → {str(now)[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("runs", nargs="*", help="only these")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    comparing.add_argument("--renamed", type=Path)
    words = parser.parse_args()
    if words.command == "record":
        record(words.folder.resolve(), words.runs)
        return 0
    return compare(words.old, words.new, json.loads(words.renamed.read_text()) if words.renamed else {})


if __name__ == "__main__":
    sys.exit(main())
