"""SWE-bench's own verdicts on patches: runs its commands and its `get_eval_report`.

`python tests/envs/swe/official.py` (with `swebench` installed) records logs and verdicts in `official.json`, so that
the comparison needs no `swebench`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from envs.swe.samples import CALC, FORGED_CODE, PATCHES, FakeRuntime, calc

from aem_jax.envs.swe.grading import APPLY_FAILED
from aem_jax.envs.swe.instance import SweBenchInstance, to_row
from aem_jax.envs.swe.repos import files_checkout

RECORDED = Path(__file__).with_name("official.json")
DECEIVING = "forges markers and exit code"
COMMANDS = (
    "git apply --verbose",
    "git apply --verbose --3way",
    "git apply --verbose --reject",
    "patch --batch --forward --fuzz=5 -p1 -i",
)


def official_log(instance: SweBenchInstance, patch: str) -> str:
    """The log of SWE-bench's chain of commands and its eval script, run in a folder of this machine."""
    from swebench.harness.run_evaluation import GIT_APPLY_CMDS  # pyright: ignore[reportMissingImports]
    from swebench.harness.utils import make_test_spec  # pyright: ignore[reportMissingImports]

    assert tuple(GIT_APPLY_CMDS) == COMMANDS
    with tempfile.TemporaryDirectory() as root:
        workspace = FakeRuntime(Path(root)).open(instance, files_checkout(CALC))
        file = Path(root) / "patch.diff"
        file.write_text(patch)
        for attempt, command in enumerate(GIT_APPLY_CMDS):
            if attempt:
                workspace.run("git checkout -- . ; git clean -fd")
            if workspace.run(f"{command} {file}").exit_code == 0:
                break
        else:
            if workspace.run(f"git apply --check --reverse {file}").exit_code != 0:
                return APPLY_FAILED
        return workspace.run('eval "$(cat)"', stdin=make_test_spec(to_row(instance)).eval_script.encode()).output


def official_verdict(instance: SweBenchInstance, patch: str | None, log: str) -> dict:
    """The result of `get_eval_report` for a log."""
    from swebench.harness.grading import get_eval_report  # pyright: ignore[reportMissingImports]
    from swebench.harness.utils import make_test_spec  # pyright: ignore[reportMissingImports]

    prediction = {"instance_id": instance.instance_id, "model_name_or_path": "x", "model_patch": patch}
    with tempfile.NamedTemporaryFile("w", suffix=".log") as file:
        file.write(log)
        file.flush()
        report = get_eval_report(make_test_spec(to_row(instance)), prediction, file.name, True)
    return report[instance.instance_id]


def record() -> dict:
    """Logs and verdicts for all patches, by name."""
    instance, recorded = calc(), {}
    for name, patch in {**PATCHES, DECEIVING: FORGED_CODE}.items():
        log = "" if patch is None else official_log(instance, patch)
        recorded[name] = {"log": log, "verdict": official_verdict(instance, patch, log)}
        print(f"{name}: resolved {recorded[name]['verdict']['resolved']}", file=sys.stderr)
    return recorded


if __name__ == "__main__":
    version = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    versions = [line for line in version.splitlines() if line.split("==")[0] in ("swebench", "pytest")]
    RECORDED.write_text(json.dumps({"versions": versions, "patches": record()}, indent=1) + "\n")
