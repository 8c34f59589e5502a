"""Several processes as one run: they find one another, check that they agree, and leave together.

`initialize` runs before anything computes. In a run of one process it only reads a few environment variables.
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

from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup
from aem_jax.distributed.channel import (
    Address,
    ControlChannel,
    PeerDisconnectedError,
    PeerFailure,
    accept,
    call,
    listen,
)
from aem_jax.distributed.clusters import expected_count
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.distributed.signals import StoppedError
from aem_jax.errors import ConfigError

PEER_FAILED = 75
"""Exit status of a process that stops because another was killed, is silent or never came: "try again" in sysexits.h.

Where another process reported an error, all end with the status of that error: a scheduler does not repeat it."""

_OWN = tuple(f"--runtime.{name}" for name in ("coordinator", "num-processes", "process-id", "compilation-cache"))
"""Settings that may differ between the processes of a run."""
_ADDRESS_BYTES = 1024
_GRACE_S = 5.0
_LEAVE_S = 3 * _GRACE_S
_PATIENCE_S = 10.0
_SHARED_WAIT_S = 20.0


def initialize(config: RuntimeConfig) -> None:
    """Initializes JAX's distributed runtime if the run has several processes. Call it before anything computes.

    Raises:
        ConfigError: the other processes cannot be found.
    """
    count = expected_count(config)
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
    # JAX aborts the process at its own timeout, without a message that helps.
    timers = [
        threading.Timer(_PATIENCE_S, _print_error, [f"waiting for the other processes of the run ({who})"]),
        threading.Timer(config.connect_timeout_s, _end_unmet, [who, config.connect_timeout_s]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        jax.distributed.initialize(
            **settings,
            initialization_timeout=round(config.connect_timeout_s) + 30,
            # The control channel detects failures first; these timeouts apply when it cannot.
            heartbeat_timeout_seconds=max(2 * round(config.heartbeat_timeout_s), 10),
            shutdown_timeout_seconds=max(round(config.heartbeat_timeout_s), 10),
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"--runtime.distributed: {error}") from error
    finally:
        for timer in timers:
            timer.cancel()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX treats it as a preemption notice; `signals` handles it


@contextmanager
def open_process_group(config: RuntimeConfig) -> Iterator[ProcessGroup]:
    """The processes of the run, connected by a control channel while the block runs.

    A process that leaves the block with an error reports it, and all processes stop with its exit status: 2 for a
    `ConfigError`, 1 for another one. When a process is killed, or sends nothing for `heartbeat_timeout_s`, the others
    name it and exit with status `PEER_FAILED`. Process 0 leaves last. `StoppedError` is no failure: all processes raise
    it at the same point.

    Raises:
        ConfigError: the channel cannot be opened, or JAX has several processes that the config does not ask for.
    """
    import jax

    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        yield SINGLE_PROCESS
        return
    if not jax.distributed.is_initialized():
        raise ConfigError(f"--runtime.distributed: expected on for one of {count} processes, got {config.distributed}")
    if index:
        logging.getLogger().setLevel(logging.ERROR)  # process 0 logs for all
    try:
        channel = _open_channel(config, index, count)
    except TimeoutError as error:
        raise ConfigError(str(error)) from error
    stopped = None
    try:
        try:
            yield ProcessGroup(index, count, channel.gather)
        except StoppedError as error:
            stopped = error
        channel.close()
        jax.distributed.shutdown()  # now, while all are here: at the exit of the process it waits for the slowest
    except BaseException as error:
        if not _is_own(error, channel):
            time.sleep(10 * _GRACE_S)  # the channel's thread names the failed process, and ends this one
        status = 2 if isinstance(error, ConfigError) else 1
        channel.abort(" ".join(str(error).split()) or type(error).__name__, status, wait_s=_LEAVE_S)
        # JAX would wait for the other processes to shut down, and abort.
        atexit.register(_end_now, status)
        raise
    if stopped:
        raise stopped


def check_same(processes: ProcessGroup, settings: Mapping[str, Any]) -> None:
    """Checks that all processes have the same versions and settings. Collective.

    Args:
        processes: of the run.
        settings: this process's versions and settings by name; JSON values.

    Raises:
        ConfigError: a setting differs; the message names it, two processes, and their values.
    """
    if processes.count == 1:
        return
    own = {name: value for name, value in settings.items() if name not in _OWN}
    gathered = processes.gather_json(json.loads(json.dumps(own)))
    first = gathered[0]
    for process, theirs in enumerate(gathered):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise ConfigError(
                    f"{name}: expected the same in all processes, got {first.get(name)} in process 0 and "
                    f"{theirs.get(name)} in process {process}; start them with the same command"
                )


def check_shared(processes: ProcessGroup, folder: Path) -> None:
    """Checks that all processes see the run's folder, because all of them write and read checkpoints. Collective.

    Raises:
        ConfigError: some do not; the message names them.
    """
    if processes.count == 1:
        return
    probe = folder / f".shared-{processes.broadcast(os.urandom(8).hex())}"
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
    processes.barrier()
    deadline = time.monotonic() + _SHARED_WAIT_S
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    blind = [process for process, sees in enumerate(processes.gather_json(seen)) if not sees]
    if processes.is_first:
        probe.unlink()
    if blind:
        raise ConfigError(
            f"--runs-dir: expected a folder that all processes share, got {folder}, in which process "
            f"{', '.join(map(str, blind))} does not see what process 0 writes; choose one on a shared file system"
        )


def shard_urls(processes: ProcessGroup, urls: Sequence[str]) -> tuple[str, ...]:
    """The servers that this process's pool connects to: every `count`-th. Fewer servers than processes are shared."""
    return tuple(urls[processes.index % len(urls) :: processes.count]) if urls else ()


def without_process(config: RuntimeConfig) -> RuntimeConfig:
    """The settings without those that identify this process in its group."""
    return replace(config, distributed="auto", coordinator="", num_processes=0, process_id=-1)


def _is_own(error: BaseException, channel: ControlChannel) -> bool:
    """Whether this process caused an error itself, rather than a collective that failed with another process.

    A collective may fail before the channel detects the failure, so this waits for it. All processes may find the same
    mistake in the config at the same time, so a failure that was reported does not disown a `ConfigError`.
    """
    if isinstance(error, PeerDisconnectedError):
        return False
    if isinstance(error, ConfigError):
        failure = channel.failure(1.0)
        return failure is None or failure.reported
    return channel.failure(_GRACE_S) is None


def _open_channel(config: RuntimeConfig, index: int, count: int) -> ControlChannel:
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    # Only the channel's own address travels by a collective of JAX.
    server, sent = None, np.zeros(_ADDRESS_BYTES, np.uint8)
    if index == 0:
        server, address = listen([_coordinator_host(config)])
        encoded = json.dumps(asdict(address)).encode()
        sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = json.loads(process_allgather(sent)[0].tobytes().rstrip(b"\0"))
    address = Address(tuple(received["hosts"]), received["port"], received["token"])
    timeout = config.connect_timeout_s
    peers = accept(server, address, count, timeout) if server else call(address, index, timeout)
    return ControlChannel(index, peers, config.heartbeat_timeout_s, _end_after)


def _coordinator_host(config: RuntimeConfig) -> str:
    """Process 0's host under the name that the other processes use; empty where it is unknown."""
    coordinator = config.coordinator
    if not coordinator:
        try:
            from jax._src.distributed import global_state

            coordinator = global_state.coordinator_address or ""
        except (ImportError, AttributeError):
            return ""
    return coordinator.rpartition(":")[0].strip("[]")


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _end_unmet(who: str, waited_s: float) -> None:
    # PEER_FAILED: after a restart the pod or node of another process may come later than this one waits.
    _print_error(
        f"error: --runtime.coordinator: the other processes of the run were not met within {waited_s:g} s ({who}); "
        "are all of them started, process 0 too, and can its host and port be reached from the others?"
    )
    _end_now(PEER_FAILED)


def _end_after(channel: ControlChannel, failure: PeerFailure) -> None:
    if failure.reported:
        time.sleep(_GRACE_S)  # this process often meets the same error in a moment, and shows it itself
    end = "" if str(failure).endswith(("?", ".")) else "."
    then = "once that is solved, the same command resumes it" if failure.reported else "the same command resumes it"
    _print_error(f"\nerror: {failure}{end} This run stops; {then}")
    channel.wait_until_left(_LEAVE_S)
    _end_now(failure.exit_status or PEER_FAILED)


def _end_now(status: int) -> None:
    """Ends the process without JAX's exit handlers, which wait for processes that are gone."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
