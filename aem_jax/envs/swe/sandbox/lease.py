"""The lease that owns the pods of a process."""

import datetime
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from aem_jax.envs.swe.sandbox.cluster_errors import TRIES, ApiError
from aem_jax.envs.swe.sandbox.workspace import SandboxError

LEASE_S, RENEW_S = 300, 60.0
"""Seconds after which a lease that was not renewed has expired, and seconds between renewals."""
LABELS: Mapping[str, str] = {"app.kubernetes.io/managed-by": "aem-jax", "app.kubernetes.io/component": "sandbox"}
"""Labels of the pods and of their leases."""
SELECTOR = ",".join(f"{name}={value}" for name, value in LABELS.items())
_log = logging.getLogger(__name__)


class Lease:
    """A lease that a thread renews while this process lives. Every pod belongs to it.

    When the process dies, the lease expires. Any other process of the namespace then deletes it, and the cluster
    deletes the pods that belong to it.

    Args:
        api: the client's methods for leases.
        call: calls one of them, and returns its response.
        namespace: of the pods.
    """

    def __init__(self, api: Any, call: Callable[..., Any], namespace: str):
        self._api, self._call, self._namespace = api, call, namespace
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
        """Deletes the lease, and with it the pods that are left."""
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
        api, now = self._api, datetime.datetime.now(datetime.UTC)
        body = {
            "metadata": {"name": self._name, "labels": dict(LABELS)},
            "spec": {
                "holderIdentity": f"{socket.gethostname()}-{os.getpid()}",
                "leaseDurationSeconds": LEASE_S,
                "renewTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            },
        }
        try:
            made = self._call(api.patch_namespaced_lease, self._name, self._namespace, body)
        except ApiError as error:
            if error.status != 404:
                raise
            made = self._call(api.create_namespaced_lease, self._namespace, body)
        self._uid = made["metadata"]["uid"]
        for lease in self._call(api.list_namespaced_lease, self._namespace, label_selector=SELECTOR)["items"]:
            renewed = datetime.datetime.fromisoformat(lease["spec"]["renewTime"].replace("Z", "+00:00"))
            if (now - renewed).total_seconds() > lease["spec"]["leaseDurationSeconds"]:
                _log.warning("sandboxes of the dead process %s are deleted", lease["spec"]["holderIdentity"])
                self._delete(lease["metadata"]["name"])

    def _delete(self, name: str, tries: int = TRIES) -> None:
        method, options = self._api.delete_namespaced_lease, {"propagation_policy": "Background"}
        try:
            self._call(method, name, self._namespace, tries=tries, **options)
        except ApiError as error:
            if error.status != 404:  # another process deleted it
                _log.warning("the lease %s could not be deleted: %s", name, error)
