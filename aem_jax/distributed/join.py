"""Several processes as one run: how they find one another, that they agree, and how they leave.

`join` is called before anything computes. In a run of one process it looks at a few environment variables and no more.
"""

import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from aem_jax.distributed import ALONE, Hosts
from aem_jax.distributed.channel import Address, LeftError, Line, Loss, accept, call, listen
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError

LEFT_BEHIND = 75
"""Exit status of a process that stops because another has left: sysexits' "try again"."""

_OWN = tuple(f"--runtime.{name}" for name in ("coordinator", "num-processes", "process-id", "compilation-cache"))
"""Settings in which the processes of a run may differ."""
_ADDRESS_BYTES = 1024
_GRACE_S = 5.0
_PATIENCE_S = 10.0
_SHARED_WAIT_S = 20.0


def announced() -> int:
    """How many processes the environment (SLURM, Open MPI, a TPU pod, a Kubernetes job) says this one is among.

    JAX knows how to look but has no public way to ask; where its private one has changed, SLURM and Open MPI are looked
    for in the environment, and for all else there is `--runtime.distributed on`.
    """
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" not in os.environ:
        hidden = ("k8s",)  # a pod, but of no indexed job: jax would ask the cluster's API
    else:
        hidden = ()
    try:
        from jax._src.clusters import ClusterEnv

        known = [each for each in ClusterEnv._cluster_types if not each.opt_in_only_method and each.name not in hidden]
        found = next((each for each in known if each.is_env_present()), None)
        return 1 if found is None else found.get_process_count()
    except Exception:  # its shape is JAX's to change, and what it asks (a cluster's API) may not answer
        in_step = "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ
        return int(os.environ.get("SLURM_NTASKS" if in_step else "OMPI_COMM_WORLD_SIZE", "1"))


def expected(config: RuntimeConfig) -> int | None:
    """How many processes the run will have; None where only JAX can tell."""
    if config.distributed == "off":
        return 1
    if config.coordinator:
        return config.num_processes
    return announced() if config.distributed == "auto" else None


def initialize(config: RuntimeConfig) -> None:
    """Joins JAX's processes to one, if there are to be several. Before anything computes.

    Raises:
        ConfigError: the others cannot be found.
    """
    count = expected(config)
    if count == 1:
        return
    import jax

    settings: dict[str, Any] = {}
    if config.coordinator:
        settings = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    elif config.distributed not in ("auto", "on"):
        settings = {"cluster_detection_method": config.distributed}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    who = f"process {config.process_id} of {count}, at {config.coordinator}" if config.coordinator else "this process"
    # JAX aborts the process when its own time is up, without a word that helps.
    timers = [
        threading.Timer(_PATIENCE_S, _say, [f"waiting for the other processes of the run ({who})"]),
        threading.Timer(config.connect_timeout_s, _end_unmet, [who, config.connect_timeout_s]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=round(config.connect_timeout_s) + 30,
            # Our own line speaks first; these are for when it cannot.
            heartbeat_timeout_seconds=max(2 * round(config.silence_s), 10),
            shutdown_timeout_seconds=max(round(config.silence_s), 10),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"--runtime.distributed: {error}") from error
    finally:
        for timer in timers:
            timer.cancel()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX takes it for a notice of preemption; we answer it ourselves


@contextmanager
def joined(config: RuntimeConfig) -> Iterator[Hosts]:
    """The processes of the run, with a line between them while the block runs.

    Whoever leaves the block with an error tells the others, and all of them stop. One that is killed, or falls silent
    for `silence_s`, is found missing: the others say which it was and end with status `LEFT_BEHIND`.

    Raises:
        ConfigError: the line cannot be laid, or JAX has several processes that nobody asked for.
    """
    import jax

    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        yield ALONE
        return
    if not jax.distributed.is_initialized():
        raise ConfigError(f"--runtime.distributed: expected on for one of {count} processes, got {config.distributed}")
    if index:
        logging.getLogger().setLevel(logging.ERROR)  # what process 0 says is enough
    try:
        line = _lay_line(config, index, count)
    except TimeoutError as error:
        raise ConfigError(str(error)) from error
    try:
        yield Hosts(index, count, line.gather)
        line.leave()
        jax.distributed.shutdown()  # now, while all are here: at the end of the process it waits for the slowest
    except BaseException as error:
        if not _is_own(error, line):
            time.sleep(10 * _GRACE_S)  # the line's thread says who left, and ends the process
        line.fail(" ".join(str(error).split()) or type(error).__name__)
        # JAX would wait for the others to leave, too, and abort.
        atexit.register(_end_now, 2 if isinstance(error, ConfigError) else 1)
        raise


def check_same(hosts: Hosts, settings: Mapping[str, Any]) -> None:
    """Checks that all processes run the same thing.

    Args:
        hosts: the processes.
        settings: what this process runs: versions and every option, by name; JSON values.

    Raises:
        ConfigError: they do not; says what differs, and between which.
    """
    if hosts.count == 1:
        return
    own = {name: value for name, value in settings.items() if name not in _OWN}
    said = hosts.gather_json(json.loads(json.dumps(own)))
    for process, theirs in enumerate(said):
        for name in {**said[0], **theirs}:
            if said[0].get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name}: expected the same in all processes, got {said[0].get(name)} in process 0 and "
                    f"{theirs.get(name)} in process {process}; start them with the same command"
                )


def check_shared(hosts: Hosts, folder: Path) -> None:
    """Whether all processes see the run's folder: checkpoints are written by all of them, and read by all.

    Raises:
        ConfigError: some do not; names them.
    """
    if hosts.count == 1:
        return
    probe = folder / f".shared-{hosts.of_first(os.urandom(8).hex())}"
    if hosts.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
    hosts.wait()
    deadline = time.monotonic() + _SHARED_WAIT_S
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, sees in enumerate(hosts.gather_json(seen)) if not sees]
    if hosts.is_first:
        probe.unlink()
    if blind:
        raise ConfigError(
            f"--runs-dir: expected a folder that all processes share, got {folder}, in which process "
            f"{', '.join(map(str, blind))} does not see what process 0 writes; choose one on a shared file system"
        )


def share_urls(hosts: Hosts, urls: Sequence[str]) -> tuple[str, ...]:
    """The servers that this process's pool connects to: every `count`-th; with fewer than processes, they share."""
    return tuple(urls[hosts.index % len(urls) :: hosts.count]) if urls else ()


def placeless(config: RuntimeConfig) -> RuntimeConfig:
    """The settings without what says which process of which run this is."""
    return replace(config, distributed="auto", coordinator="", num_processes=0, process_id=-1)


def _is_own(error: BaseException, line: Line) -> bool:
    """Whether an error is this process's own, and not what a collective says when another process is gone.

    That may come before the line knows; a mistake in the config, on the other hand, all may find at the same time.
    """
    if isinstance(error, LeftError):
        return False
    if isinstance(error, ConfigError):
        loss = line.loss(1.0)
        return loss is None or loss.told
    return line.loss(_GRACE_S) is None


def _lay_line(config: RuntimeConfig, index: int, count: int) -> Line:
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    # The one thing said by a collective of JAX's: where the line begins.
    server, said = None, np.zeros(_ADDRESS_BYTES, np.uint8)
    if index == 0:
        server, address = listen([_coordinator_host(config)])
        encoded = json.dumps(asdict(address)).encode()
        said[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    heard = process_allgather(said)[0].tobytes().rstrip(b"\0")
    address = _address(json.loads(heard))
    timeout = config.connect_timeout_s
    peers = accept(server, address, count, timeout) if server else call(address, index, timeout)
    return Line(index, peers, config.silence_s, _end_left_behind)


def _address(found: Mapping[str, Any]) -> Address:
    return Address(tuple(found["hosts"]), found["port"], found["token"])


def _coordinator_host(config: RuntimeConfig) -> str:
    """Process 0's host as the others already know it; empty where that cannot be told."""
    coordinator = config.coordinator
    if not coordinator:
        try:
            from jax._src.distributed import global_state

            coordinator = global_state.coordinator_address or ""
        except (ImportError, AttributeError):
            return ""
    return coordinator.rpartition(":")[0].strip("[]")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end_unmet(who: str, waited_s: float) -> None:
    _say(
        f"error: --runtime.coordinator: the other processes of the run were not met within {waited_s:g} s ({who}); "
        "are all of them started, process 0 too, and can its host and port be reached from the others?"
    )
    _end_now(2)


def _end_left_behind(loss: Loss) -> None:
    if loss.told:
        time.sleep(_GRACE_S)  # often the same error is about to be met here
    _say(f"\nerror: {loss}{'' if str(loss).endswith('?') else '.'} This run stops; the same command resumes it")
    _end_now(LEFT_BEHIND)


def _end_now(status: int) -> None:
    """Ends the process without JAX's way out, which waits for processes that are gone."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
