"""The fixed evaluation sets: played by the policy and by scripted agents, recorded, and shown as a table."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from aem_jax.checkpoint import Choice
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.evaluate import evaluate_agent, evaluate_policy
from aem_jax.launch.context import RunContext, open_run
from aem_jax.launch.initial import load_frozen_weights
from aem_jax.metrics import append_line, json_line, read_lines
from aem_jax.models import Params

FILE = "evaluations.jsonl"
"""In the folder of the run."""
ZERO_SHOT = "zero-shot"
"""Phase of a pretrained model before its warm start; a baseline."""
LABELS = {"warmstart": "before training", "train": "while training", "final": "after training", "evaluate": "evaluated"}
"""Phases of the policy; any other phase is a baseline, named by itself."""


def evaluate(config: RunConfig, step: Choice = "latest") -> int:
    """Evaluates a checkpoint of a run on its fixed sets: JSON lines on stdout, a table on stderr.

    Returns:
        The exit status, as of `train`.

    Raises:
        ConfigError: the run has no such checkpoint, or no split is given.
    """
    if not config.evaluation.splits:
        raise ConfigError("--evaluation.splits: expected at least one split, got none")
    with open_run(config, Path(config.runs_dir) / config.name) as run:
        chosen = run.checkpoints.find(step)
        state = run.restore(load_frozen_weights(run), chosen)
        params, records, is_first = run.reshard(state.params), [], run.processes.is_first
        for split in config.evaluation.splits:
            tasks, name = run.suite.evaluation(split, config.evaluation.size)
            evaluation, _ = evaluate_policy(run.rollout, params, tasks, run.key("evaluate"), name=name, split=split)
            records.append(evaluation.record(int(state.step), "evaluate"))
            if is_first:
                print(json_line(records[-1]), flush=True)
            if run.stop.look():
                return run.stop.exit_status
    if is_first:
        print_summary(records, sampled(config.sampling.temperature), sys.stderr)
    return 0


def evaluate_splits(
    run: RunContext,
    params: Params,
    step: int,
    phase: str,
    splits: Sequence[str],
    stop: Callable[[], None] = lambda: None,
) -> float | None:
    """Plays the sets of `splits` with the policy, and records those that have no record yet.

    Args:
        run: the run.
        params: of `run.policy`.
        step: of the parameters.
        phase: recorded with the numbers.
        splits: whose sets are played.
        stop: called before and after each set that is played; may raise.

    Returns:
        The success on the last set; None without one, or if the environment broke in all of its episodes.
    """
    lines = run.folder / FILE
    decode_params = success = None
    for count, split in enumerate(splits, start=1):
        tasks, name = run.suite.evaluation(split, run.config.evaluation.size)
        recorded = run.processes.broadcast(_recorded(lines, phase, name, step))
        if recorded is not None:
            success = recorded["success"]
            continue
        stop()
        decode_params = run.reshard(params) if decode_params is None else decode_params
        evaluation, _ = evaluate_policy(run.rollout, decode_params, tasks, run.key("evaluate"), name=name, split=split)
        if run.processes.is_first:
            append_line(lines, evaluation.record(step, phase))
        rate = evaluation.rate
        success = rate.success if rate.count else None
        run.report(f"evaluate ({phase})", count, len(splits), {"rollout/success": rate.success})
        stop()
    return success


def play_baselines(run: RunContext) -> None:
    """Plays the fixed sets with the scripted agents. Process 0 plays them alone, because they need no device."""
    config, lines, env = run.config, run.folder / FILE, None
    agents = [(split, name) for split in config.evaluation.splits for name in run.suite.baselines]
    with ExitStack() as stack:
        for count, (split, agent) in enumerate(agents, start=1):
            run.stop.check()
            tasks, name = run.suite.evaluation(split, config.evaluation.size)
            if not run.processes.is_first or _recorded(lines, agent, name, 0) is not None:
                continue
            make_act, max_turns = run.suite.baselines[agent], config.rollout.max_turns
            env = env or stack.enter_context(closing(run.suite.make_env()))
            evaluation = evaluate_agent(env, make_act, tasks, max_turns=max_turns, name=name, split=split)
            append_line(lines, evaluation.record(0, agent))
            run.report("baselines", count, len(agents), {"rollout/success": evaluation.rate.success})


def _recorded(lines: Path, phase: str, name: str, step: int) -> dict[str, Any] | None:
    wanted = (phase, name, step)
    found = (line for line in read_lines(lines) if (line.get("phase"), line.get("set"), line.get("step")) == wanted)
    return next(found, None)


def print_summary(records: Sequence[Mapping[str, Any]], title: str, stream: TextIO | None = None) -> None:
    """Prints success with its 95 % interval, from the latest record of each phase and set.

    Args:
        records: lines of `evaluations.jsonl`.
        title: how actions were chosen, e.g. "sampled at temperature 1".
        stream: standard output by default.
    """
    scores = [record.get("mean_score") for record in records]  # a column of its own where it differs from the success
    has_scores = any(
        score is not None and score != record["success"] for score, record in zip(scores, records, strict=True)
    )
    columns = ("set", "agent", "success", "95 % interval", *(["score"] if has_scores else []), "tasks", "turns")
    table = Table(*columns, title=f"success ({title})")
    latest = {(record["set"], record["phase"]): record for record in records if record["phase"] != "train"}
    baselines_first = sorted(latest.items(), key=lambda item: (item[0][0], item[0][1] in LABELS))
    for (name, phase), record in baselines_first:
        success = _percent(record["success"])  # None where every episode's environment broke
        interval = f"{record['low']:.1%} – {record['high']:.1%}"
        label = LABELS.get(phase, phase)
        score = [_percent(record.get("mean_score"))] if has_scores else []
        table.add_row(name, label, success, interval, *score, str(record["count"]), f"{record['mean_turns']:.1f}")
    Console(file=stream, soft_wrap=True).print(table)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def sampled(temperature: float) -> str:
    """How a policy's tokens are chosen, in words."""
    return f"sampled at temperature {temperature:g}" if temperature else "greedy"
