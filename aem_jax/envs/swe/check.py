"""Checks tasks by grading them: `python -m aem_jax.envs.swe.check [FILE]`.

The fix must resolve the task, and the empty patch must not; otherwise the reward does not depend on the agent. For
generated tasks, every test of FAIL_TO_PASS must fail and every test of PASS_TO_PASS must pass without the fix.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from aem_jax.envs.protocol import Task
from aem_jax.envs.swe.env import SweConfig
from aem_jax.envs.swe.formats import grade
from aem_jax.envs.swe.grading import Report
from aem_jax.envs.swe.sandbox import choose
from aem_jax.envs.swe.sandbox.bubblewrap import BubblewrapConfig
from aem_jax.envs.swe.sandbox.containers import STORAGES, ContainerConfig
from aem_jax.envs.swe.sandbox.pods import KubernetesConfig
from aem_jax.envs.swe.sandbox.workspace import Limits, Runtime, SandboxError
from aem_jax.envs.swe.tasks import file_tasks, full_payload, generated_tasks, load_task

LIMITS = Limits(seconds=60.0, memory_mib=1024)
_SPLITS = ("train", "valid", "test")


def problems(task: Task, runtime: Runtime, limits: Limits = LIMITS) -> list[str]:
    """Returns the problems of a generated task."""
    gold, empty = _graded(task, runtime, limits)
    reasons = [] if gold.resolved else [f"{task.id}: the fix does not resolve it: {gold.log[-800:]}"]
    passing = [name for name, passes in empty.fail_to_pass.items() if passes]
    failing = _failing(empty.pass_to_pass)
    if empty.resolved or passing or failing:
        reasons.append(f"{task.id}: without a fix {passing} pass and {failing} fail: {empty.log[-800:]}")
    return reasons


def file_problems(task: Task, runtime: Runtime, limits: Limits) -> list[str]:
    """Returns the reasons why the reward of an instance from a file would not depend on the agent."""
    try:
        gold, empty = _graded(task, runtime, limits)
    except (SandboxError, ValueError, OSError, subprocess.SubprocessError, ModuleNotFoundError) as error:
        return [f"{task.id}: cannot be graded: {' '.join(str(error).split())}"]
    reasons = []
    if not gold.applied:
        reasons.append(f"{task.id}: its own patch cannot be applied: {gold.log[-400:]}")
    elif not gold.resolved:
        failing = _failing({**gold.fail_to_pass, **gold.pass_to_pass})
        reasons.append(f"{task.id}: its own patch does not solve it; {len(failing)} tests do not pass, {failing[:5]}")
    if empty.resolved:
        reasons.append(f"{task.id}: the empty patch solves it")
    return reasons


def _graded(task: Task, runtime: Runtime, limits: Limits) -> tuple[Report, Report]:
    """Grades the task's own patch and the empty patch; returns both reports."""
    instance, checkout = load_task(full_payload(task.payload))
    gold, empty = (grade(instance, patch, runtime, checkout, limits=limits) for patch in (instance.patch, ""))
    return gold, empty


def _failing(tests: Mapping[str, bool]) -> list[str]:
    return [name for name, passes in tests.items() if not passes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all tasks, or a sample; prints problems and a summary.

    Returns:
        0 without problems, 1 with some, 2 if there are no tasks or no sandbox.
    """
    parser = argparse.ArgumentParser(
        prog="python -m aem_jax.envs.swe.check",
        description="Grades each task with its own fix, which must solve it, and with the empty patch, which must not.",
    )
    parser.add_argument(
        "file", nargs="?", help="instances (.jsonl, .json, .parquet, a folder of datasets); default: generated tasks"
    )
    parser.add_argument("--repos", default="", help="with FILE: folder of git mirrors; empty: the instances' images")
    parser.add_argument("--splits", nargs="+", default=_SPLITS, choices=_SPLITS, help="of generated tasks")
    parser.add_argument("--sample", type=int, default=0, help="number of tasks in a random sample; 0: all tasks")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="tasks checked at a time")
    parser.add_argument(
        "--seconds", type=float, default=0, help="time limit of one grading; 0: 60, with FILE as in training"
    )
    parser.add_argument("--memory-mib", type=int, default=0, help="its memory limit; 0: 1024, with FILE as in training")
    parser.add_argument("--disk-mib", type=int, default=0, help="size of its workspace; 0: as in training")
    parser.add_argument("--runtime", default="auto", help="auto, bubblewrap, docker, podman or kubernetes")
    parser.add_argument("--image", default="", help="image of containers, for tasks that name none")
    container, bubblewrap = ContainerConfig(), BubblewrapConfig()
    parser.add_argument("--prelude", default=container.prelude, help="bash that containers run before commands")
    parser.add_argument("--processors", type=float, default=container.processors, help="of containers")
    parser.add_argument(
        "--storage",
        default=container.storage,
        choices=STORAGES,
        help="of containers, see --swe.container.storage",
    )
    parser.add_argument("--namespace", default=KubernetesConfig.namespace, help="of the pods of kubernetes")
    parser.add_argument("--context", default="", help="of the kubeconfig, see --swe.kubernetes.context")
    parser.add_argument("--pod-template", default="", help="see --swe.kubernetes.pod-template")
    parser.add_argument("--packages", nargs="*", default=bubblewrap.packages, help="importable packages in bubblewrap")
    parser.add_argument("--read-only", nargs="*", default=(), help="further paths of this machine, for bubblewrap")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else there")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        tasks, check = _tasks(options)
        runtime = choose.choose_runtime(
            options.runtime,
            BubblewrapConfig(packages=tuple(options.packages), read_only=tuple(options.read_only)),
            ContainerConfig(
                image=options.image, prelude=options.prelude, processors=options.processors, storage=options.storage
            ),
            KubernetesConfig(options.namespace, options.context, options.pod_template),
        )
        messages: dict[str, list[str]] = {}
        with ThreadPoolExecutor(options.jobs) as pool:  # threads are enough: the work runs in sandboxes
            for task, lines in zip(tasks, pool.map(lambda task: check(task, runtime), tasks)):
                messages |= {task.id: lines} if lines else {}
                for line in lines:
                    print(line, flush=True, file=sys.stderr if options.json else sys.stdout)
    except (SandboxError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    if options.json:
        print(json.dumps({"tasks": len(tasks), "problems": messages}))
    else:
        by_type = sorted(Counter(task.task_type for task in tasks).items())
        types = ", ".join(f"{count} {task_type}" for task_type, count in by_type)
        mean = options.jobs * seconds / (2 * len(tasks))
        problem_count = sum(map(len, messages.values()))
        print(f"{len(tasks)} tasks ({types}), {problem_count} problems; {seconds:.0f} s, {mean:.2f} s a grading")
    return int(bool(messages))


def _tasks(options: argparse.Namespace) -> tuple[list[Task], Callable[[Task, Runtime], list[str]]]:
    """Returns the tasks that the options select, and the function that checks one."""
    defaults = SweConfig().grade_limits if options.file else LIMITS
    seconds, memory = options.seconds or defaults.seconds, options.memory_mib or defaults.memory_mib
    limits = replace(defaults, seconds=seconds, memory_mib=memory, disk_mib=options.disk_mib or defaults.disk_mib)
    if options.jobs < 1 or options.sample < 0:
        raise ValueError(f"expected --jobs ≥ 1 and --sample ≥ 0, got {options.jobs} and {options.sample}")
    if options.repos and not Path(options.repos).is_dir():
        raise ValueError(f"expected a folder of git mirrors in --repos, got {options.repos!r}")
    if options.file:
        tasks, check = file_tasks("FILE", options.file, options.repos), file_problems
    else:
        tasks, check = [task for split in options.splits for task in generated_tasks(split)], problems
    if options.sample:
        tasks = random.Random(options.seed).sample(tasks, min(options.sample, len(tasks)))
    return tasks, lambda task, runtime: check(task, runtime, limits)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # test names may be non-ASCII
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader closed the pipe (head, less)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
