"""The API of a Kubernetes cluster, by the official client: pods, programs in pods, and the lease that owns the pods.

Responses are read as JSON, and bodies are plain mappings, so nothing depends on the client's classes, which differ from
release to release.
"""

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aem_jax.envs.swe.sandbox.cluster_errors import (
    TRIES,
    ApiError,
    DisconnectedError,
    message_of,
    pause,
    status_message,
)
from aem_jax.envs.swe.sandbox.lease import Lease
from aem_jax.envs.swe.sandbox.pod_exec import Result, command_line, converse
from aem_jax.envs.swe.sandbox.workspace import Limits, SandboxError

CALL_S = 30.0
"""Time limit of one request, seconds."""
CONTAINER = "sandbox"
"""Name of the container that runs commands."""

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_log = logging.getLogger(__name__)


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
        try:  # an extra; importing the client takes a second
            urllib3 = importlib.import_module("urllib3")
            client, config, stream = (
                importlib.import_module(f"kubernetes.{name}") for name in ("client", "config", "stream")
            )
        except ImportError as error:
            raise SandboxError(
                f"expected the package kubernetes: pip install 'aem_jax[kubernetes]' ({error})"
            ) from None
        self._client, self._stream = client, stream.stream
        self._failures = (client.ApiException, urllib3.exceptions.HTTPError, OSError)
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
        self._pods, self._policies = client.CoreV1Api(shared), client.NetworkingV1Api(shared)
        self._lease = Lease(client.CoordinationV1Api(shared), self._call, namespace)

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
        connection = self._connect(pod, command_line(limits, merge=merge))
        try:
            return converse(connection, argv, stdin, limits)
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
                pause(attempt)
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
            raise ApiError(getattr(error, "status", 0) or 0, message_of(error)) from None
        if not 200 <= response.status <= 299:  # some releases of the client do not raise
            raise ApiError(response.status, status_message(response.data))
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
            pause(attempt)
        raise AssertionError

    def release(self) -> None:
        """Gives up the lease: the cluster deletes the pods that are left."""
        self._lease.release()


def _lines(response: Any) -> Iterator[bytes]:
    rest = b""
    for part in response.stream(amt=None, decode_content=False):
        *lines, rest = (rest + part).split(b"\n")
        yield from filter(None, lines)
