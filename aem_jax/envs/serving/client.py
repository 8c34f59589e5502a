"""One session on an environment server: an asyncio connection, which the pool uses, and a blocking environment."""

import asyncio
import contextlib
import os
import re
from collections.abc import Mapping
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI
from websockets.protocol import State
from websockets.sync.client import connect as connect_blocking

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, StepResult, describe, encode_reset
from aem_jax.envs.serving.address import websocket_url, without_password
from aem_jax.envs.serving.field_mapping import FieldMapping, decode_result, decode_step, step_encoder

CONNECTION_ERRORS = (OSError, TimeoutError, InvalidHandshake, ConnectionClosed)
"""Errors of opening or using a connection to a server that is down or failing."""


def bearer(variable: str) -> Mapping[str, str]:
    """Headers with the token that an environment variable holds, as hosted servers expect it; none for no variable.

    Raises:
        ValueError: the name is not a variable's, or the variable is not set or does not hold a token.
    """
    if not variable:
        return {}
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", variable):  # not shown: it may be the token itself
        raise ValueError("expected the name of an environment variable (capitals, digits, _) with a token, got another")
    token = os.environ.get(variable, "").strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        what = "something else" if token else "nothing"
        raise ValueError(f"expected a token in the environment variable {variable}, found {what}; export {variable}=…")
    return {"Authorization": f"Bearer {token}"}


class Connection:
    """One open session, with one request at a time. Abort it after a request without a reply: a late reply would be
    taken for the next one."""

    def __init__(self, socket: ClientConnection):
        self._socket = socket

    @classmethod
    async def open(cls, url: str, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> "Connection":
        """Connects. Raises one of `CONNECTION_ERRORS`, or ValueError for an invalid URL."""
        try:
            # No compression and no pings: both cost more than they gain, and the caller sets deadlines.
            socket = await connect(
                url,
                additional_headers=headers,
                compression=None,
                ping_interval=None,
                proxy=None,
                open_timeout=timeout_s,
                max_size=protocol.MAX_MESSAGE_BYTES,
            )
        except InvalidURI as error:
            raise ValueError(f"expected a WebSocket URL, got {without_password(url)!r}: {error}") from None
        return cls(socket)

    @property
    def usable(self) -> bool:
        """Whether this side considers the connection open."""
        return self._socket.state is State.OPEN

    async def call(self, request: str) -> str | bytes:
        """Sends one request and waits for its reply."""
        with contextlib.suppress(ConnectionClosed):  # a full server sends its reason and closes: read it
            await self._socket.send(request)
        return await self._socket.recv()

    async def close(self) -> None:
        """Closes the session: sends the protocol's close message, then closes the socket."""
        try:
            async with asyncio.timeout(1.0):
                await self._socket.send(protocol.CLOSE_REQUEST)
                await self._socket.close()
        except CONNECTION_ERRORS:
            self.abort()

    def abort(self) -> None:
        """Cuts the connection at once; a pending call raises ConnectionClosed."""
        self._socket.transport.abort()


class RemoteEnvironment:
    """An environment on a server, as a blocking `Environment`. For notebooks and tests; training uses a pool.

    Args:
        url: the server, in a form of `websocket_url`.
        mapping: names of the server's fields; None suits our own servers.
        deadline_s: seconds that a call may take.
        headers: sent when connecting; `bearer` makes headers with a token.

    Raises:
        EnvError: no valid reply before the deadline; at construction and in every call.
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
            opening = connect_blocking(
                self._url,
                additional_headers=headers,
                compression=None,
                ping_interval=None,
                proxy=None,
                open_timeout=deadline_s,
                max_size=protocol.MAX_MESSAGE_BYTES,
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
        """Takes a step with the policy's whole response text."""
        return decode_step(self._call(self._encode_step(action_text)), self._mapping)

    def state(self) -> Mapping[str, Any]:
        """The session's state on the server: at least `episode_id` and `step_count`."""
        return protocol.decode_data(self._call(protocol.STATE_REQUEST), "state")

    def close(self) -> None:
        """Ends the session; calling it twice is harmless."""
        with contextlib.suppress(*CONNECTION_ERRORS):  # already closed
            self._socket.send(protocol.CLOSE_REQUEST)
        self._held.close()

    def _call(self, request: str) -> str | bytes:
        try:
            with contextlib.suppress(ConnectionClosed):  # read what it sent before it closed
                self._socket.send(request)
            return self._socket.recv(timeout=self._deadline_s)
        except CONNECTION_ERRORS as error:
            self._held.close()  # a late reply must not be taken for the next one's
            raise EnvError(f"{without_password(self._url)}: {describe(error)}") from error
