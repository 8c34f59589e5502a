"""How the processes of a run are detected, and the settings that they must share."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aem_jax.config.run import RunConfig
from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup, join
from aem_jax.distributed.channel import PeerFailure
from aem_jax.distributed.clusters import detected_count, expected_count
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.signals import StoppedError
from aem_jax.errors import ConfigError
from aem_jax.launch.context import _identity

SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[01-02]", "SLURM_NTASKS": "16", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
}  # fmt: skip


def pair() -> list[ProcessGroup]:
    """The groups of two threads that stand for processes."""
    sent, barrier = [b"", b""], threading.Barrier(2, timeout=60)

    def gather(index: int, data: bytes) -> list[bytes]:
        sent[index] = data
        barrier.wait()
        received = list(sent)
        barrier.wait()
        return received

    return [ProcessGroup(index, 2, lambda data, index=index: gather(index, data)) for index in (0, 1)]


def both(function, arguments) -> list:
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(function, *pairs) for pairs in zip(pair(), arguments, strict=True)]
        return [call.exception() or call.result() for call in calls]


def test_the_expected_count_is_1_without_an_announcement(monkeypatch: pytest.MonkeyPatch):
    assert detected_count() == expected_count(RuntimeConfig()) == 1
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert detected_count() == expected_count(RuntimeConfig()) == 16
    assert expected_count(RuntimeConfig(distributed="off")) == 1
    assert expected_count(RuntimeConfig(distributed="mpi4py")) is None
    explicit = RuntimeConfig(coordinator="a:1", num_processes=2, process_id=0)
    assert expected_count(explicit) == 2
    monkeypatch.setenv("SLURM_NTASKS", "1")  # an interactive shell
    assert expected_count(RuntimeConfig()) == 1


class FakeKubernetes:
    """JAX's detection of an indexed job, in a pod that may not read its job."""

    opt_in_only_method = False
    present = True

    @classmethod
    def is_env_present(cls) -> bool:
        return cls.present

    @classmethod
    def get_process_count(cls) -> int:
        raise RuntimeError("Kubernetes API Error: 403 - Forbidden")


FakeKubernetes.__name__ = "K8sCluster"


def test_a_job_of_unknown_size_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Each pod would train a run of its own."""
    from jax._src.clusters import ClusterEnv, K8sCluster

    assert K8sCluster.__name__ == FakeKubernetes.__name__  # it has no other name
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [FakeKubernetes])
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert expected_count(RuntimeConfig()) == 1  # a pod outside of an indexed job does not ask the cluster
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "2")
    with pytest.raises(ConfigError, match="403 - Forbidden; the pod's service account must be able to get and list"):
        expected_count(RuntimeConfig())
    assert expected_count(RuntimeConfig(distributed="off")) == 1
    monkeypatch.setattr(FakeKubernetes, "present", False)
    with pytest.raises(ConfigError, match=r"pip install 'jax\[k8s\]'"):
        expected_count(RuntimeConfig())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"num_processes": 2}, "give HOST:PORT of process 0"),
        ({"coordinator": "host"}, "expected coordinator HOST:PORT"),
        ({"coordinator": "host:1", "num_processes": 2}, "process_id from 0 to num_processes - 1"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "got 2 and 2"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 0, "distributed": "mpi4py"}, "auto or on beside"),
        ({"heartbeat_timeout_s": 1.0}, "heartbeat_timeout_s of at least 5"),
    ],
)
def test_incomplete_coordinator_settings_are_refused(settings: dict, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        RuntimeConfig(**settings)


def test_a_requested_stop_is_no_failure(monkeypatch: pytest.MonkeyPatch):
    """All processes raise it at the same point, so they leave as after a finished run, with its exit status."""
    calls = []
    channel = SimpleNamespace(
        gather=None,
        close=lambda: calls.append("close"),
        abort=lambda reason, status, wait_s: calls.append(f"abort {status}: {reason}"),
    )
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("jax.distributed.shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(join, "_open_channel", lambda *_: channel)
    monkeypatch.setattr(join, "_is_own", lambda *_: True)
    monkeypatch.setattr(join.atexit, "register", lambda _, status: calls.append(f"at exit {status}"))
    with pytest.raises(StoppedError) as stopped, join.open_process_group(RuntimeConfig()):
        raise StoppedError(143)
    assert stopped.value.exit_status == 143 and calls == ["close", "shutdown"]
    calls.clear()
    with pytest.raises(OSError), join.open_process_group(RuntimeConfig()):
        raise OSError("no space")
    assert calls == ["abort 1: no space", "at exit 1"]
    calls.clear()
    with pytest.raises(ConfigError), join.open_process_group(RuntimeConfig()):
        raise ConfigError("no model")
    assert calls == ["abort 2: no model", "at exit 2"]


@pytest.mark.parametrize(("reported", "status"), [(1, 1), (2, 2), (0, join.PEER_FAILED)])
def test_all_end_with_the_status_of_a_reported_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reported: int, status: int
):
    calls = []
    monkeypatch.setattr(join, "_GRACE_S", 0.0)
    monkeypatch.setattr(join, "_end_now", lambda status: calls.append(status))
    channel: Any = SimpleNamespace(wait_until_left=lambda _: calls.append("wait"))
    join._end_after(channel, PeerFailure(1, "node-07", "its connection closed, was it killed?", reported))
    assert calls == ["wait", status]
    assert "error: process 1 (on node-07) left: its connection closed, was it killed? This" in capsys.readouterr().err


def test_saved_settings_do_not_identify_the_process():
    explicit = RuntimeConfig(coordinator="a:1", num_processes=2, process_id=1, cpu_devices=4)
    assert join.without_process(explicit) == RuntimeConfig(cpu_devices=4)


def test_differing_settings_are_refused_with_both_values():
    config = RunConfig()
    runtimes = [replace(config.runtime, coordinator="a:1", num_processes=2, process_id=index) for index in (0, 1)]
    assert both(join.check_same, [_identity(replace(config, runtime=runtime)) for runtime in runtimes]) == [None, None]
    for error in both(join.check_same, [_identity(config), _identity(replace(config, seed=3))]):
        assert isinstance(error, ConfigError)
        assert str(error).startswith(
            "--seed: expected the same in all processes, got 0 in process 0 and 3 in process 1"
        )


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join, "_SHARED_WAIT_S", 0.5)
    assert both(join.check_shared, [tmp_path / "a", tmp_path / "a"]) == [None, None]
    assert not list((tmp_path / "a").iterdir())
    for error in both(join.check_shared, [tmp_path / "a", tmp_path / "b"]):
        assert isinstance(error, ConfigError) and "process 1 does not see what process 0 writes" in str(error)


def test_server_urls_are_distributed_over_the_processes():
    share = lambda index, count, urls: join.shard_urls(ProcessGroup(index, count, lambda data: [data]), urls)
    assert join.shard_urls(SINGLE_PROCESS, ("a", "b")) == ("a", "b")
    assert [share(index, 2, ("a", "b", "c")) for index in (0, 1)] == [("a", "c"), ("b",)]
    assert [share(index, 3, ("a", "b")) for index in (0, 1, 2)] == [("a",), ("b",), ("a",)]
    assert share(1, 2, ()) == ()
