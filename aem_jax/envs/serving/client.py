"""An environment on a server, as a blocking `Environment`. Training uses a pool."""

import contextlib
from collections.abc import Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, StepResult, describe
from aem_jax.envs.serving.address import websocket_url, without_password
from aem_jax.envs.serving.field_mapping import (
    FieldMapping,
    decode_data,
    decode_result,
    decode_step,
    encode_reset,
    step_encoder,
)

CONNECTION_ERRORS = (OSError, TimeoutError, InvalidHandshake, ConnectionClosed)
"""Errors of opening or using a connection to a server that is down or failing."""


CONNECT_OPTIONS: Mapping[str, Any] = {
    "compression": None,
    "ping_interval": None,
    "proxy": None,
    "max_size": protocol.MAX_MESSAGE_BYTES,
}
"""Options of a connection. Compression and pings cost more than they gain, and the callers set deadlines."""


def check_size(request: str) -> None:
    """Checks that a server accepts a request of this size; it would close the connection.

    Raises:
        EnvError: the request is too large.
    """
    size = len(request.encode())
    if size > protocol.MAX_MESSAGE_BYTES:
        raise EnvError(
            f"expected a request of at most {protocol.MAX_MESSAGE_BYTES >> 20} MiB (a task, or a response of the "
            f"policy), got {size / 2**20:.1f} MiB: {request[:100]!r}…; send a path or an id in place of large content"
        )


class RemoteEnvironment:
    """An environment on a server, as a blocking `Environment`. For notebooks and tests; training uses a pool.

    Args:
        url: the server, in a form of `websocket_url`.
        mapping: names of the server's fields; None: those of this package's servers.
        deadline_s: maximum duration of a call, seconds.
        headers: HTTP headers of the connection request; `address.bearer` makes headers with a token.

    Raises:
        EnvError: no valid reply before the deadline, or a request that is too large; at construction and in every call.
    """

    def __init__(
        self,
        url: str,
        mapping: FieldMapping | None = None,
        deadline_s: float = 60.0,
        headers: Mapping[str, str] | None = None,
    ):
        self._url, self._mapping, self._deadline_s = websocket_url(url), mapping or FieldMapping(), deadline_s
        self._encode_step = step_encoder(self._mapping)
        self._held = contextlib.ExitStack()
        try:
            opening = connect(
                self._url,
                additional_headers=headers,
                open_timeout=deadline_s,
                **CONNECT_OPTIONS,
            )
            self._socket = self._held.enter_context(opening)
        except CONNECTION_ERRORS as error:
            raise EnvError(
                f"expected an environment server at {without_password(self._url)}: {describe(error)}"
            ) from error

    def reset(self, task: Mapping[str, Any]) -> StepResult:
        """Starts an episode of `task`."""
        return decode_result(self._call(encode_reset(task)), self._mapping)

    def step(self, action_text: str) -> StepResult:
        """Takes a step with the full text of the policy's response."""
        return decode_step(self._call(self._encode_step(action_text)), self._mapping)

    def state(self) -> Mapping[str, Any]:
        """The session's state on the server: at least `episode_id` and `step_count`."""
        return decode_data(self._call(protocol.STATE_REQUEST), "state")

    def close(self) -> None:
        """Ends the session. A second call does nothing."""
        with contextlib.suppress(*CONNECTION_ERRORS):  # already closed
            self._socket.send(protocol.CLOSE_REQUEST)
        self._held.close()

    def _call(self, request: str) -> str | bytes:
        check_size(request)
        try:
            with contextlib.suppress(ConnectionClosed):  # read what it sent before it closed
                self._socket.send(request)
            return self._socket.recv(timeout=self._deadline_s)
        except CONNECTION_ERRORS as error:
            self._held.close()  # a late reply must not count as the reply to the next request
            raise EnvError(f"{without_password(self._url)}: {describe(error)}") from error
