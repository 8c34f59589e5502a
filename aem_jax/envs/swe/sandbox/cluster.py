"""The API of a Kubernetes cluster, by the official client: pods, programs in pods, and the lease that owns the pods.

Responses are read as JSON, and bodies are plain mappings, so nothing depends on the client's classes, which differ from
release to release.

Programs run by `exec` over a WebSocket, in version 4 or 5 of its channel protocol. Version 4 cannot close the
program's standard input, and the command line is part of an URL, whose length proxies limit. So the command line is
constant; arguments and input follow through standard input, with their number and length.
"""

import contextlib
import datetime
import json
import logging
import os
import select
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.sandbox.init_process import Cut
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError

CALL_S = 30.0
"""Time limit of one request, seconds."""
TRIES = 5
"""Number of attempts at a request that fails for a reason that may pass, such as a busy server."""
LEASE_S, RENEW_S = 300, 60.0
"""Seconds after which a lease that was not renewed has expired, and seconds between renewals."""
PING_S = 30.0
"""A command without output is pinged after this time, because load balancers close silent connections, seconds."""
LABELS: Mapping[str, str] = {"app.kubernetes.io/managed-by": "aem-jax", "app.kubernetes.io/component": "sandbox"}
"""Labels of the pods and of their leases."""
SELECTOR = ",".join(f"{name}={value}" for name, value in LABELS.items())
CONTAINER = "sandbox"
"""Name of the container that runs commands."""

_INPUT, _OUTPUT, _ERRORS, _STATUS = range(4)  # channels
_CHUNK = 16384
_MESSAGE = 65536
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_log = logging.getLogger(__name__)

# Reads "<n>\0<argument>\0…<length>\0<input>" and runs that program. `ulimit` fails where the limit is lower already.
# The last `kill` is needed for the connection to end: it stays open while any process holds the output open.
_RUN = r"""
IFS= read -r -d '' count; words=()
while [ "${#words[@]}" -lt "$count" ]; do IFS= read -r -d '' word || exit 125; words+=("$word"); done
IFS= read -r -d '' length || exit 125
for limit in $1; do ulimit "-${limit%%=*}" "${limit#*=}" 2> /dev/null; done
if [ -n "$2" ]; then exec 3>&1; else exec 3>&2; fi
exec 2> /dev/null
if [ "$length" = 0 ]; then
  "${words[@]}" 2>&3 3>&- < /dev/null
else
  "${words[@]}" 2>&3 3>&- < <(exec head -c "$length")
fi
code=$?
kill -KILL -1
exit "$code"
"""


class ApiError(SandboxError):
    """The API server refused a request, or could not be reached.

    Attributes:
        status: HTTP status; 0 without a response.
    """

    def __init__(self, status: int, message: str):
        super().__init__(f"the Kubernetes API answered {status or 'nothing'}: {message.strip():.1000}")
        self.status = status


class DisconnectedError(SandboxError):
    """A program could not be started in a pod, or the connection to it ended before the program did."""


@dataclass(frozen=True)
class Result:
    """The result of a program in a pod.

    Attributes:
        exit_code: exit status; None if the deadline passed.
        output: what was kept of stdout.
        errors: what was kept of stderr.
    """

    exit_code: int | None
    output: Cut
    errors: Cut


class Cluster:
    """One namespace of a cluster.

    Args:
        namespace: the namespace.
        context: context of the kubeconfig. Empty: the service account of a pod, unless $KUBECONFIG is set; else the
            current context.

    Raises:
        SandboxError: the client is not installed, or no configuration can be read.
    """

    def __init__(self, namespace: str, context: str = ""):
        try:
            import kubernetes
            from kubernetes import client, config, stream
        except ImportError as error:
            raise SandboxError(
                f"expected the package kubernetes: pip install 'aem_jax[kubernetes]' ({error})"
            ) from None
        self._client, self._stream = client, stream.stream
        self._failures = (
            kubernetes.client.rest.ApiException,
            kubernetes.client.rest.urllib3.exceptions.HTTPError,
            OSError,
        )
        inside = not context and "KUBECONFIG" not in os.environ and _SERVICE_ACCOUNT.exists()
        try:
            if inside:
                self._configuration = client.Configuration()
                config.load_incluster_config(client_configuration=self._configuration)
            else:
                file = os.environ.get("KUBECONFIG")  # the client reads it when it is imported
                self._configuration = config.new_client_from_config(file, context or None).configuration
        except Exception as error:  # its readers raise many types
            raise SandboxError(f"no Kubernetes configuration can be read: {error}") from None
        self._configuration.connection_pool_maxsize = 64
        self._configuration.retries = False
        self.namespace = namespace
        shared = client.ApiClient(self._configuration)
        self._pods, self._leases = client.CoreV1Api(shared), client.CoordinationV1Api(shared)
        self._policies = client.NetworkingV1Api(shared)
        self._lease = _Lease(self)

    def create_pod(self, manifest: Mapping[str, Any]) -> None:
        """Creates a pod that belongs to this process's lease.

        Raises:
            ApiError: the server refused it, for example because of a quota (status 403).
        """
        metadata = {**manifest["metadata"], "ownerReferences": [self._lease.owner()]}
        try:
            self._call(self._pods.create_namespaced_pod, self.namespace, {**manifest, "metadata": metadata})
        except ApiError as error:
            if error.status != 409:  # an earlier attempt reached the server, but its response did not return
                raise

    def pod(self, name: str) -> Mapping[str, Any] | None:
        """Returns a pod; None if it does not exist."""
        try:
            return self._call(self._pods.read_namespaced_pod, name, self.namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def delete_pod(self, name: str) -> None:
        """Ends a pod at once; no error if it does not exist."""
        try:
            self._call(self._pods.delete_namespaced_pod, name, self.namespace, grace_period_seconds=0)
        except ApiError as error:
            if error.status != 404:
                raise

    def watch_pod(self, name: str, seconds: float) -> Iterator[Mapping[str, Any] | None]:
        """Yields a pod's states, beginning with the present one, for some seconds; None when it is deleted."""
        fields = {"field_selector": f"metadata.name={name}", "timeout_seconds": max(1, int(seconds))}
        response = self._open(self._pods.list_namespaced_pod, self.namespace, watch=True, **fields)
        try:
            for line in _lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                yield None if event["type"] == "DELETED" else event["object"]
        except self._failures:
            return  # the caller begins again
        finally:
            response.close()

    def check_access(self) -> None:
        """Raises ApiError if pods of the namespace cannot be listed."""
        self._call(self._pods.list_namespaced_pod, self.namespace, limit=1)

    def network_policies(self) -> list[Mapping[str, Any]]:
        """Returns the namespace's network policies."""
        return self._call(self._policies.list_namespaced_network_policy, self.namespace)["items"]

    def execute(
        self, pod: str, argv: Sequence[str], limits: Limits, stdin: int | None = None, *, merge: bool = False
    ) -> Result:
        """Runs a program in a pod. A program whose deadline passes goes on running.

        Args:
            pod: name of the pod.
            argv: the program and its arguments.
            limits: time, output, and the limits of the single process.
            stdin: descriptor of a regular file, the standard input; None for an empty one.
            merge: whether stderr goes to the output.

        Raises:
            DisconnectedError: see there.
        """
        length = 0 if stdin is None else os.fstat(stdin).st_size - os.lseek(stdin, 0, os.SEEK_CUR)
        header = "".join(f"{word}\0" for word in (str(len(argv)), *argv, str(length))).encode()
        command = ["bash", "-c", _RUN, "run", _ulimits(limits), "merge" if merge else ""]
        connection = self._connect(pod, command)
        try:
            return _converse(connection, header, stdin, limits)
        finally:
            with contextlib.suppress(Exception):
                connection.shutdown()

    def _connect(self, pod: str, command: Sequence[str]) -> Any:
        """Returns the WebSocket of a started program."""
        for attempt in range(1, TRIES + 1):
            # `stream` changes its client while it runs, so each call has a client of its own
            api = self._client.CoreV1Api(self._client.ApiClient(self._configuration))
            try:
                with api.api_client:
                    return self._stream(
                        api.connect_get_namespaced_pod_exec,
                        pod,
                        self.namespace,
                        command=list(command),
                        container=CONTAINER,
                        stdin=True,
                        stdout=True,
                        stderr=True,
                        tty=False,
                        _preload_content=False,
                    ).sock
            except self._failures as error:
                message = str(getattr(error, "reason", "") or error)
                lasting = any(f"status {status}" in message for status in (400, 401, 403, 404))
                if lasting or attempt == TRIES:
                    raise DisconnectedError(f"no program could be started in the pod {pod}: {message:.500}") from None
                _pause(attempt)
        raise AssertionError

    def _open(self, method: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Returns the response of a request, whose content was not read.

        Raises:
            ApiError: the server refused it.
        """
        seconds = CALL_S + options.get("timeout_seconds", 0)
        try:
            response = method(*arguments, _preload_content=False, _request_timeout=seconds, **options)
        except self._failures as error:
            raise ApiError(getattr(error, "status", 0) or 0, _message(error)) from None
        if not 200 <= response.status <= 299:  # some releases of the client do not raise
            raise ApiError(response.status, _status_message(response.data))
        return response

    def _call(self, method: Callable[..., Any], *arguments: Any, tries: int = TRIES, **options: Any) -> Any:
        """Returns the response of a request; repeats it while the server is busy or cannot be reached.

        Raises:
            ApiError: the server refused it.
        """
        for attempt in range(1, tries + 1):
            try:
                return json.loads(self._open(method, *arguments, **options).data)
            except ApiError as error:
                if attempt == tries or error.status not in (0, 429, 500, 502, 503, 504):
                    raise
            except self._failures as error:
                if attempt == tries:
                    raise ApiError(0, str(error)) from None
            _pause(attempt)
        raise AssertionError

    def release(self) -> None:
        """Gives up the lease: the cluster deletes the pods that are left."""
        self._lease.release()


class _Lease:
    """A lease that a thread renews while this process lives. Every pod belongs to it.

    When the process dies, the lease expires. Any other process of the namespace then deletes it, and the cluster
    deletes the pods that belong to it.
    """

    def __init__(self, cluster: Cluster):
        self._cluster = cluster
        self._name = f"aem-swe-{uuid.uuid4().hex[:16]}"
        self._uid = ""
        self._lock = threading.Lock()
        self._released = threading.Event()

    def owner(self) -> Mapping[str, Any]:
        """Returns the reference of owned objects; the first call makes the lease and starts the thread."""
        with self._lock:
            if not self._uid:
                self._renew()
                threading.Thread(target=self._keep, name="kubernetes-lease", daemon=True).start()
            return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "name": self._name, "uid": self._uid}

    def release(self) -> None:
        with self._lock:
            self._released.set()
            if self._uid:
                self._uid = ""
                self._delete(self._name, tries=1)

    def _keep(self) -> None:
        while not self._released.wait(RENEW_S):
            with self._lock:
                if self._released.is_set():
                    return
                try:
                    self._renew()
                except SandboxError as error:
                    _log.warning("the lease of this process's sandboxes could not be renewed: %s", error)

    def _renew(self) -> None:
        """Makes or renews the lease, and deletes expired ones."""
        cluster, api, now = self._cluster, self._cluster._leases, _now()
        body = {
            "metadata": {"name": self._name, "labels": dict(LABELS)},
            "spec": {
                "holderIdentity": f"{socket.gethostname()}-{os.getpid()}",
                "leaseDurationSeconds": LEASE_S,
                "renewTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        try:
            made = cluster._call(api.patch_namespaced_lease, self._name, cluster.namespace, body)
        except ApiError as error:
            if error.status != 404:
                raise
            made = cluster._call(api.create_namespaced_lease, cluster.namespace, body)
        self._uid = made["metadata"]["uid"]
        for lease in cluster._call(api.list_namespaced_lease, cluster.namespace, label_selector=SELECTOR)["items"]:
            renewed = datetime.datetime.fromisoformat(lease["spec"]["renewTime"].replace("Z", "+00:00"))
            if (now - renewed).total_seconds() > lease["spec"]["leaseDurationSeconds"]:
                _log.warning("sandboxes of the dead process %s are deleted", lease["spec"]["holderIdentity"])
                self._delete(lease["metadata"]["name"])

    def _delete(self, name: str, tries: int = TRIES) -> None:
        method, options = self._cluster._leases.delete_namespaced_lease, {"propagation_policy": "Background"}
        try:
            self._cluster._call(method, name, self._cluster.namespace, tries=tries, **options)
        except ApiError as error:
            if error.status != 404:  # another process deleted it
                _log.warning("the lease %s could not be deleted: %s", name, error)


def _converse(connection: Any, header: bytes, stdin: int | None, limits: Limits) -> Result:
    """Sends a program's input and receives its output, until it ends or its deadline passes."""
    import websocket

    deadline = time.monotonic() + limits.seconds
    transport = connection.sock
    # whole messages are sent only while much more than one fits into this buffer, so sending does not block
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * _CHUNK)
    output, errors, status = Cut(limits.output_bytes), Cut(4096), bytearray()
    pending: bytes | None = header
    spoken = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now >= deadline:
                return Result(None, output, errors)
            buffered = isinstance(transport, ssl.SSLSocket) and transport.pending() > 0
            poll = select.poll()
            poll.register(transport, select.POLLIN | (0 if pending is None else select.POLLOUT))
            events = poll.poll(0 if buffered else 1000 * min(deadline - now, PING_S))
            ready = events[0][1] if events else 0
            connection.settimeout(max(deadline - time.monotonic(), 1.0))
            if pending is not None and ready & select.POLLOUT:
                connection.send_binary(bytes([_INPUT]) + pending[:_CHUNK])
                pending = pending[_CHUNK:] or (None if stdin is None else os.read(stdin, _CHUNK) or None)
            if buffered or ready & ~select.POLLOUT:
                operation, frame = connection.recv_data_frame(True)
                if operation == websocket.ABNF.OPCODE_CLOSE:
                    return Result(_exit_code(status), output, errors)
                if operation in (websocket.ABNF.OPCODE_BINARY, websocket.ABNF.OPCODE_TEXT) and frame.data:
                    channel, data = frame.data[0], frame.data[1:]
                    if channel in (_OUTPUT, _ERRORS):
                        (output if channel == _OUTPUT else errors).add(data)
                    elif channel == _STATUS and len(status) < _MESSAGE:
                        status += data
                spoken = time.monotonic()
            if time.monotonic() - spoken > PING_S:
                connection.ping()
                spoken = time.monotonic()
    except websocket.WebSocketTimeoutException:
        return Result(None, output, errors)
    except websocket.WebSocketConnectionClosedException as error:
        if status:
            return Result(_exit_code(status), output, errors)
        raise DisconnectedError(f"the connection to a program ended: {error}") from None
    except (websocket.WebSocketException, OSError) as error:
        raise DisconnectedError(f"the connection to a program ended: {error}") from None


def _exit_code(status: bytes) -> int:
    """Returns the exit code of the status message that ends a connection.

    Raises:
        DisconnectedError: the program did not run to its end.
    """
    try:
        message = json.loads(status)
        if message["status"] == "Success":
            return 0
        causes = message.get("details", {}).get("causes", [])
        codes = [int(cause["message"]) for cause in causes if cause.get("reason") == "ExitCode"]
        if codes:
            return codes[0]
        reason = message.get("message", "")
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = bytes(status).decode(errors="replace")
    raise DisconnectedError(f"a program in a pod did not run to its end: {reason or 'no status':.500}")


def _ulimits(limits: Limits) -> str:
    """Returns the limits of one process for bash's `ulimit`: memory and files in KiB, processor time in seconds."""
    values = {"c": 0, "n": 512, "f": 1024 * limits.file_mib, "d": 1024 * limits.memory_mib}
    if limits.cpu_seconds:
        values["t"] = limits.cpu_seconds
    return " ".join(f"{name}={value}" for name, value in values.items())


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for part in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)


def _message(error: Exception) -> str:
    body = getattr(error, "body", None)
    return _status_message(body) if body else str(getattr(error, "reason", "") or error)


def _status_message(body: bytes | str) -> str:
    """Returns the message of a `Status` object, or the text of another response."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["message"])
    return body.decode(errors="replace") if isinstance(body, bytes) else body


def _pause(attempt: int) -> None:
    """Waits before the next attempt, longer each time; threads that failed together do not return together."""
    time.sleep(min(0.2 * 2**attempt, 5.0) * (0.5 + int.from_bytes(os.urandom(2)) / 2**16))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
