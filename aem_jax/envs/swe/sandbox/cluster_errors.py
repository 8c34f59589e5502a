"""Errors of a Kubernetes cluster, their messages, and the pauses between attempts."""

import contextlib
import json
import os
import time

from aem_jax.envs.swe.sandbox.workspace import SandboxError

TRIES = 5
"""Number of attempts at a request that fails for a reason that may pass, such as a busy server."""


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


def message_of(error: Exception) -> str:
    """Returns the message of an exception of the client."""
    body = getattr(error, "body", None)
    return status_message(body) if body else str(getattr(error, "reason", "") or error)


def status_message(body: bytes | str) -> str:
    """Returns the message of a `Status` object, or the text of another response."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(body)["message"])
    return body.decode(errors="replace") if isinstance(body, bytes) else body


def pause(attempt: int) -> None:
    """Waits before the next attempt, longer each time; threads that failed together do not return together."""
    time.sleep(min(0.2 * 2**attempt, 5.0) * (0.5 + int.from_bytes(os.urandom(2)) / 2**16))
