"""Checks generated tasks, each by really grading it: `python -m aem_jax.envs.swe.check`.

The fix resolves the task. The empty patch does not: every test of FAIL_TO_PASS fails, every test of PASS_TO_PASS
passes.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from aem_jax.envs.swe.containers import ContainerConfig
from aem_jax.envs.swe.grading import grade
from aem_jax.envs.swe.sandbox import Limits, Runtime, SandboxError
from aem_jax.envs.swe.tasks import BugTask, generated_tasks, load_task

LIMITS = Limits(seconds=60.0, memory_mib=1024)


def problems(task: BugTask, runtime: Runtime, limits: Limits = LIMITS) -> list[str]:
    """What is wrong with a task, in words; empty: nothing."""
    instance, checkout = load_task(task.payload)
    found = []
    gold = grade(instance, instance.patch, runtime, checkout, limits=limits)
    if not gold.resolved:
        found.append(f"{task.id}: the fix does not resolve it: {gold.log[-800:]}")
    empty = grade(instance, "", runtime, checkout, limits=limits)
    passing = [name for name, passes in empty.fail_to_pass.items() if passes]
    failing = [name for name, passes in empty.pass_to_pass.items() if not passes]
    if empty.resolved or passing or failing:
        found.append(f"{task.id}: without a fix {passing} pass and {failing} fail: {empty.log[-800:]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks all tasks, or a sample; prints what is wrong and a summary.

    Returns:
        0 if nothing is wrong, 1 if a task is, 2 if there is nothing to check it in.
    """
    parser = argparse.ArgumentParser(prog="python -m aem_jax.envs.swe.check", description="Checks generated tasks.")
    parser.add_argument("--splits", nargs="+", default=["train", "valid", "test"])
    parser.add_argument("--sample", type=int, default=0, help="check only so many tasks, drawn; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time")
    parser.add_argument("--runtime", default="auto", help="auto, bubblewrap, docker or podman")
    parser.add_argument("--image", default="", help="image for docker and podman, which tasks do not bring")
    options = parser.parse_args(arguments)
    from aem_jax.envs.swe.runtimes import choose_runtime

    tasks = [task for split in options.splits for task in generated_tasks(split)]
    if options.sample:
        tasks = random.Random(options.seed).sample(tasks, min(options.sample, len(tasks)))
    start, found = time.monotonic(), []
    try:
        runtime = choose_runtime(options.runtime, container=ContainerConfig(image=options.image))
        with ThreadPoolExecutor(options.jobs) as pool:  # threads do: the work is done in sandboxes
            for wrong in pool.map(lambda task: problems(task, runtime), tasks):
                found += wrong
                for line in wrong:
                    print(line, flush=True)
    except (SandboxError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - start
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(task.kind for task in tasks).items()))
    each = options.jobs * seconds / (2 * len(tasks))
    print(f"{len(tasks)} tasks ({kinds}), {len(found)} problems; {seconds:.0f} s, {each:.2f} s a grading")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
