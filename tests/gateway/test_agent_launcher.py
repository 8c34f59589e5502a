"""The process that starts agents: what one agent returns does no harm to others."""

import json
import subprocess
import sys

AGENT = """
import resource
import time

def play(task):
    time.sleep(task["seconds"])
    return {"reward": 1.0, "log": "x" * task["bytes"]}

def limit(task):
    time.sleep(1.0)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
"""


def test_a_large_result_is_reported_and_a_larger_one_is_an_error_of_its_own_agent(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    words = [sys.executable, "-m", "aem_jax.gateway.agent_launcher", "--function", f"{tmp_path}/agent.py:play"]
    tasks = {"slow": (0, 0.5), "large": (100_000, 0), "larger": (5 * 2**20, 0)}
    lines = [
        json.dumps({"id": name, "task": {"bytes": size, "seconds": seconds}, "environ": {}, "timeout_s": 20.0})
        for name, (size, seconds) in tasks.items()
    ]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdin and launcher.stdout
        launcher.stdin.write("\n".join([*lines, ""]))
        launcher.stdin.flush()
        assert json.loads(launcher.stdout.readline()) == {"ready": True}
        reports = {report["id"]: report for report in (json.loads(launcher.stdout.readline()) for _ in tasks)}
        launcher.stdin.close()
    assert {report["status"] for report in reports.values()} == {0}
    assert json.loads(reports["slow"]["result"]) == {"reward": 1.0, "log": ""}
    assert json.loads(reports["large"]["result"])["log"] == "x" * 100_000 and not reports["large"]["errors"]
    assert reports["larger"]["result"] == ""
    assert reports["larger"]["errors"] == "expected a result of at most 2097152 bytes of JSON, got more\n"


def test_more_agents_play_than_the_usual_limit_of_open_files_allows(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    words = [sys.executable, "-m", "aem_jax.gateway.agent_launcher", "--function", f"{tmp_path}/agent.py:limit"]
    pipe, few = subprocess.PIPE, ["sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh"]
    with subprocess.Popen([*few, *words], stdin=pipe, stdout=pipe, text=True) as launcher:
        assert launcher.stdin and launcher.stdout
        for number in range(30):
            request = {"id": str(number), "task": {}, "environ": {}, "timeout_s": 20.0}
            launcher.stdin.write(json.dumps(request) + "\n")
        launcher.stdin.flush()
        assert json.loads(launcher.stdout.readline()) == {"ready": True}
        reports = [json.loads(launcher.stdout.readline()) for _ in range(30)]
        launcher.stdin.close()
    assert {(report["status"], report["result"]) for report in reports} == {(0, "64")}  # agents have their own limit
