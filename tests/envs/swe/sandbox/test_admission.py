"""The queue of a host's workspaces: capacities of our own, threads and processes, and a real server that waits."""

import gc
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import pytest
from envs.swe.sandboxes import QUICK, working_bubblewrap

from aem_jax.envs.serving import pool_session
from aem_jax.envs.serving.pool import EnvPool, PoolConfig
from aem_jax.envs.swe.sandbox import admission, host
from aem_jax.envs.swe.sandbox.admission import Admission, HostConfig, Needs
from aem_jax.envs.swe.sandbox.bubblewrap import Bubblewrap
from aem_jax.envs.swe.sandbox.host import Resource, is_orphan, measure, owner, user_folder
from aem_jax.envs.swe.sandbox.workspace import SandboxError

HOST = {
    "cpus": Resource(4, 4),
    "memory_mib": Resource(1000, 1000),
    "disk_mib of /disk": Resource(5000, 2000),
}


def queue(folder: Path, **config) -> Admission:
    return Admission(HostConfig(**config), folder, lambda disk: HOST)


def entries(folder: Path) -> list[dict]:
    (file,) = folder.glob("*.json")
    return json.loads(file.read_text())["entries"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_workspace_waits_until_there_is_room_and_nobody_overtakes(tmp_path):
    room, order = queue(tmp_path), []
    first = room.reserve(Needs(1, 600), "first")

    def enter(name: str, memory: int) -> None:
        with_room = room.reserve(Needs(0, memory), name)
        order.append(name)
        with_room.close()

    threads = []
    for name, memory in (("large", 700), ("small", 10)):  # the small one would fit beside the first
        threads.append(threading.Thread(target=enter, args=(name, memory)))
        threads[-1].start()
        wait_until(lambda: len(entries(tmp_path)) == len(threads) + 1)
    time.sleep(0.1)
    assert order == []
    first.close()
    first.close()
    for thread in threads:
        thread.join(30)
    assert order == ["large", "small"] and entries(tmp_path) == []


@pytest.mark.parametrize(
    ("needs", "count"),
    [
        (Needs(2, 10), 8),  # a processor counts four times
        (Needs(99, 10), 4),  # more processors than there are limit nothing
        (Needs(0, 100), 9),  # a tenth of what is free is left to others
        (Needs(0, 10, 600, "/disk"), 3),
        (Needs(0, 10, 600), 90),  # a disk that is elsewhere
    ],
)
def test_the_capacities_are_those_of_the_host(tmp_path, needs, count):
    room = queue(tmp_path)
    for _ in range(count):
        room.reserve(needs, "one")
    assert all(entry["open"] for entry in entries(tmp_path))
    threading.Thread(target=room.reserve, args=(needs, "one more"), daemon=True).start()
    wait_until(lambda: len(entries(tmp_path)) == count + 1)
    time.sleep(0.05)
    assert not entries(tmp_path)[-1]["open"]
    wider = queue(tmp_path, cpus=500, memory_mib=100_000, disk_mib=100_000)  # no options of the others
    first = entries(tmp_path)[0]["id"]
    admission.Reservation(admission._Ledger(tmp_path), first).close()
    wait_until(lambda: entries(tmp_path)[-1]["open"])
    wider.reserve(needs, "by its own options")


def test_a_workspace_that_is_larger_than_the_host_is_refused_at_once(tmp_path):
    room = queue(tmp_path)
    with pytest.raises(SandboxError, match=r"calc-1: expected memory_mib of at most 1000 .*this host .* got 1001"):
        room.reserve(Needs(1, 1001), "calc-1")
    with pytest.raises(SandboxError, match="expected disk_mib of at most 5000 .*/disk has no more.* got 6000"):
        room.reserve(Needs(1, 1, 6000, "/disk"), "calc-1")
    with pytest.raises(SandboxError, match=r"at most 500 .*option host.memory_mib.* got 501"):
        queue(tmp_path, memory_mib=500).reserve(Needs(1, 501), "calc-1")
    room.reserve(Needs(1, 950), "alone")  # more than a busy host gives to many, but there is only one
    with pytest.raises(ValueError, match="expected memory_mib of at least 0, got -1"):
        HostConfig(memory_mib=-1)


CHILD = """
import sys, time
from pathlib import Path
from aem_jax.envs.swe.sandbox.admission import Admission, HostConfig, Needs
Admission(HostConfig(memory_mib=100), Path(sys.argv[1])).reserve(Needs(0, 60), "child")
print("admitted", flush=True)
time.sleep(600)
"""


def test_processes_share_the_host_and_a_killed_one_leaves_nothing(tmp_path):
    children = []
    try:
        for _ in range(2):
            command = [sys.executable, "-c", CHILD, str(tmp_path)]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        wait_until(lambda: list(tmp_path.glob("*.json")) and len(entries(tmp_path)) == 2)
        holder, waiter = sorted(children, key=lambda child: [e["pid"] for e in entries(tmp_path)].index(child.pid))
        assert holder.stdout.readline() == "admitted\n"
        assert [entry["open"] for entry in entries(tmp_path)] == [True, False]
        holder.kill()
        holder.wait()
        assert waiter.stdout.readline() == "admitted\n"
        waiter.kill()
        waiter.wait()
        Admission(HostConfig(memory_mib=100), tmp_path).reserve(Needs(0, 100), "after them")
        assert len(entries(tmp_path)) == 1
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_an_owner_is_a_process_not_a_number(tmp_path):
    pid, start, space = owner().split("-")
    assert not is_orphan(owner())
    assert is_orphan(f"{pid}-{int(start) + 1}-{space}")  # the number was given again
    assert not is_orphan(f"{pid}-{int(start) + 1}-{int(space) + 1}") and not is_orphan("another-label")
    folder = user_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and folder.name == f"aem_jax-{os.getuid()}"


def test_this_host_is_measured():
    here = measure("/")
    assert 0 < here["cpus"].total <= (os.cpu_count() or 1)
    assert 0 < here["memory_mib"].free <= here["memory_mib"].total
    assert 0 < here["disk_mib of /"].free < here["disk_mib of /"].total
    assert set(measure()) == {"cpus", "memory_mib"}


V2 = {
    "cpu.max": "50000 100000\n",
    "memory.max": f"{300 * 2**20}\n",
    "memory.current": f"{200 * 2**20}\n",
    "memory.stat": f"anon 1\ninactive_file {50 * 2**20}\n",
}
V1 = {
    "cpu.cfs_quota_us": "50000\n",
    "cpu.cfs_period_us": "100000\n",
    "memory.limit_in_bytes": V2["memory.max"],
    "memory.usage_in_bytes": V2["memory.current"],
    "memory.stat": f"inactive_file 1\ntotal_inactive_file {50 * 2**20}\n",
}


@pytest.mark.parametrize("files", [V1, V2], ids=["version 1", "version 2"])
def test_control_groups_bound_what_is_measured(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "cpu.max").write_text("max 100000\n")
    (tmp_path / "open" / "memory.max").write_text("max\n")
    groups = [tmp_path / "open", tmp_path, tmp_path / "no group"]
    monkeypatch.setattr(host, "_control_groups", lambda controller: groups)
    here = measure()
    assert here["cpus"].total == 0.5
    assert (here["memory_mib"].total, here["memory_mib"].free) == (300, 150)


def test_bubblewrap_gives_its_room_back_however_it_ends(tmp_path):
    working_bubblewrap()
    needed = QUICK.memory_mib + QUICK.disk_mib
    runtime = Bubblewrap(admission=Admission(HostConfig(memory_mib=needed), tmp_path))
    with ThreadPoolExecutor(3) as threads:  # one at a time
        for opened in as_completed([threads.submit(runtime.open_empty, QUICK) for _ in range(3)], 60):
            workspace = opened.result()
            assert [entry["open"] for entry in entries(tmp_path)].count(True) == 1
            workspace.close()
    workspace = runtime.open_empty(QUICK)
    workspace._process.kill()
    workspace._process.wait()
    assert workspace.run("true").exit_code is None
    assert entries(tmp_path) == [] and len(runtime._warm._items) == 1  # of 4, one for each that was opened
    ((_, idle),) = runtime._warm._items
    idle.future.result(60)._process.kill()
    idle.future.result()._process.wait()
    workspace = runtime.open_empty(replace(QUICK, seconds=9))  # not that one
    assert workspace.run("true").exit_code == 0 and workspace._limits.seconds == 9
    workspace.close()
    with pytest.raises(SandboxError, match="expected a folder apart"):
        runtime.open_empty(QUICK, (("/usr", 1),))
    assert entries(tmp_path) == []
    (kept,) = (item.future.result(60) for _, item in runtime._warm._items)
    del runtime
    gc.collect()
    assert not kept.is_alive


WAITS = """
import time
from aem_jax.envs.protocol import StepResult, waiting

class Waits:
    def reset(self, task):
        if task["seconds"]:
            with waiting():
                time.sleep(task["seconds"])
        time.sleep(task.get("works", 0))
        return StepResult("ready", info={"won": False, "valid_action": True})
    def step(self, text):
        return StepResult(text, info={"won": False, "valid_action": True})
    def close(self):
        with open(__file__ + ".closed", "a") as log:
            print("closed", file=log)
"""


def test_the_deadline_of_a_call_does_not_run_while_it_waits_for_room(tmp_path):
    file = tmp_path / "waits.py"
    file.write_text(WAITS)
    closed = Path(f"{file}.closed")
    config = PoolConfig(num_servers=1, sessions_per_server=1, reset_deadline_s=2.5, step_deadline_s=30)
    with EnvPool(config, (f"{file}:Waits", {})) as pool:
        call = pool.reset(0, {"seconds": 4})
        wait_until(lambda: pool.waits(0))
        with pytest.raises(ValueError, match="expected no pending call on session 0"):
            pool.release(0)
        assert call.result(60).observation == "ready" and not pool.waits(0)
        assert pool.step(0, "go").result(60).observation == "go"
        before = closed.read_text().count("closed")
        pool.release(0)
        wait_until(lambda: closed.read_text().count("closed") == before + 1)
        assert pool.reset(0, {"seconds": 0}).result(60).observation == "ready"  # in a new session
        assert pool.stats().restarts == (0,)
        with pytest.raises(Exception, match="no answer before its deadline"):
            pool.reset(0, {"seconds": 0, "works": 20}).result(60)


def test_a_call_no_longer_waits_once_it_has_its_room(tmp_path, monkeypatch):
    monkeypatch.setattr(pool_session, "_WAITS_S", 2.0)
    file = tmp_path / "waits.py"
    file.write_text(WAITS)
    with EnvPool(PoolConfig(num_servers=1, sessions_per_server=1), (f"{file}:Waits", {})) as pool:
        call = pool.reset(0, {"seconds": 2, "works": 10})
        wait_until(lambda: pool.waits(0))
        wait_until(lambda: not pool.waits(0))
        assert not call.done()
