"""Conformance checks for any environment server: the checks of its environment, and checks of the protocol.

python -m aem_jax.envs.testing.conformance_wire localhost:8765 --task '{"word": "hi"}' --action try --action hi
"""

import argparse
import contextlib
import json
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from aem_jax.envs import protocol
from aem_jax.envs.protocol import EnvError, RefusedError
from aem_jax.envs.serving.address import bearer, websocket_url
from aem_jax.envs.serving.client import RemoteEnvironment
from aem_jax.envs.serving.field_mapping import FieldMapping, encode_reset, step_encoder
from aem_jax.envs.testing.conformance import Problem, Subject, check_environment, expect, run_checks
from aem_jax.files import parse_mapping
from aem_jax.overrides import override

_TIMEOUT_S = 30.0
_CAPACITY_RETURNS_S = 5.0


@dataclass(frozen=True)
class ServerSubject:
    """A server under test.

    Attributes:
        url: session endpoint.
        tasks: some tasks, at least one.
        actions: responses to give in turn.
        mapping: maps our fields to the server's.
        sessions: capacity to test; None skips the test.
        guarded: whether the server enforces the order reset, step, …, done, and keeps the session after messages that
            are not mappings. Our server does both. OpenEnv's server leaves the order to the environment and ends the
            session after such a message.
        headers: HTTP headers of the connection request.
    """

    url: str
    tasks: Sequence[Mapping[str, Any]]
    actions: Sequence[str]
    mapping: FieldMapping = FieldMapping()  # noqa: RUF009  (frozen)
    sessions: int | None = None
    guarded: bool = True
    headers: Mapping[str, str] | None = field(default=None, repr=False)


class _Channel:
    """Exchanges raw messages on one connection."""

    def __init__(self, socket: ClientConnection, subject: ServerSubject):
        self._socket, self._subject = socket, subject
        self._encode_step = step_encoder(subject.mapping)

    def request(self, request: str | bytes) -> dict[str, Any]:
        with contextlib.suppress(ConnectionClosed):  # a full server reports it and closes the connection
            self._socket.send(request)
        reply = self._socket.recv(timeout=_TIMEOUT_S)
        try:
            message = json.loads(reply)
        except ValueError:
            raise Problem(f"expected JSON in answer to {request!r:.80}, got {reply!r:.80}") from None
        expect(isinstance(message, dict), f"expected a mapping in answer to {request!r:.80}, got {reply!r:.80}")
        expect(isinstance(message.get("data"), dict), f"expected data in answer to {request!r:.80}, got {reply!r:.80}")
        return message

    def expect_reply(self, kind: str, request: str | bytes) -> dict[str, Any]:
        message = self.request(request)
        expect(message.get("type") == kind, f"expected {kind!r} in answer to {request!r:.80}, got {message!r:.300}")
        return message["data"]

    def reset(self, **keywords: Any) -> dict[str, Any]:
        return self.expect_reply("observation", encode_reset({**self._subject.tasks[0], **keywords}))

    def step(self, index: int = 0) -> dict[str, Any]:
        actions = self._subject.actions
        return self.expect_reply("observation", self._encode_step(actions[index % len(actions)]))

    def expect_error(self, code: str, request: str | bytes) -> None:
        data = self.expect_reply("error", request)
        expect(data.get("code") == code, f"expected the code {code} in answer to {request!r:.80}, got {data!r:.200}")
        expect(isinstance(data.get("message"), str), f"expected a message beside the code, got {data!r:.200}")

    def expect_close(self, request: str) -> None:
        self._socket.send(request)
        try:
            reply = self._socket.recv(timeout=_TIMEOUT_S)
        except ConnectionClosed:
            return
        raise Problem(f"expected the connection to end after {request}, got {reply!r:.80}")


@contextlib.contextmanager
def _connected(subject: ServerSubject) -> Iterator[_Channel]:
    opening = connect(
        subject.url,
        additional_headers=subject.headers,
        proxy=None,
        open_timeout=_TIMEOUT_S,
        max_size=protocol.MAX_MESSAGE_BYTES,
    )
    with opening as socket:
        yield _Channel(socket, subject)


def observations_have_the_protocols_fields(subject: ServerSubject) -> None:
    """An observation message has observation, reward, done, and optionally metadata."""
    with _connected(subject) as channel:
        for data in (channel.reset(), channel.step()):
            fields = set(data) - {"metadata"}  # newer OpenEnv servers repeat it here
            expect(fields == {"observation", "reward", "done"}, f"expected observation, reward, done, got {data}")
            expect(isinstance(data["observation"], dict), f"expected an observation mapping, got {data}")
            expect(isinstance(data["done"], bool), f"expected done to be true or false, got {data}")
            expect(data["reward"] is None or isinstance(data["reward"], (int, float)), f"expected a reward, got {data}")


def state_counts_the_steps(subject: ServerSubject) -> None:
    """The state also contains the episode id of the reset."""
    with _connected(subject) as channel:
        channel.reset(episode_id="conformance-1")
        expected = {"episode_id": "conformance-1", "step_count": 0}
        state = channel.expect_reply("state", protocol.STATE_REQUEST)
        expect(expected.items() <= state.items(), f"expected the state {expected}, got {state}")
        channel.step()
        state = channel.expect_reply("state", protocol.STATE_REQUEST)
        expect(state.get("step_count") == 1, f"expected a step_count of 1, got {state}")


def bad_messages_are_refused_and_do_no_harm(subject: ServerSubject) -> None:
    """Each bad message gets its error code; the episode continues unchanged."""
    with _connected(subject) as channel:
        channel.reset()
        for request, code in (
            ("no JSON", protocol.INVALID_JSON),
            ("", protocol.INVALID_JSON),
            ('{"type": "reset"', protocol.INVALID_JSON),
            ('{"type": "dance"}', protocol.UNKNOWN_TYPE),
            ('{"data": {}}', protocol.UNKNOWN_TYPE),
            ('{"type": "step"}', protocol.VALIDATION_ERROR),
            ('{"type": "step", "data": 7}', protocol.VALIDATION_ERROR),
            ('{"type": "step", "data": {"no such field": "x"}}', protocol.VALIDATION_ERROR),
            ('{"type": "reset", "data": []}', protocol.VALIDATION_ERROR),
            ('{"type": "reset", "data": {}, "more": 1}', protocol.VALIDATION_ERROR),
            ('{"type": "state", "data": {}}', protocol.VALIDATION_ERROR),
        ):
            channel.expect_error(code, request)
        if subject.guarded:
            for request in ("[]", "7", "null", '"reset"', b'{"type": "state"}'):
                channel.expect_error(protocol.VALIDATION_ERROR, request)
        channel.step()


def order_is_enforced(subject: ServerSubject) -> None:
    """The server refuses a step before a reset and after the end."""
    if not subject.guarded:
        return
    step = step_encoder(subject.mapping)(subject.actions[0])
    with _connected(subject) as channel:
        channel.expect_error(protocol.EXECUTION_ERROR, step)
        data, index = channel.reset(), 0
        while not data["done"] and index < 100:
            data, index = channel.step(index), index + 1
        if data["done"]:
            channel.expect_error(protocol.EXECUTION_ERROR, step)
            channel.reset()


def close_ends_the_session(subject: ServerSubject) -> None:
    """Checked with and without an episode."""
    with _connected(subject) as channel:
        channel.expect_close(protocol.CLOSE_REQUEST)
    with _connected(subject) as channel:
        channel.reset()
        channel.expect_close(protocol.CLOSE_REQUEST)


def capacity_is_enforced_and_freed(subject: ServerSubject) -> None:
    """A session beyond the capacity is refused with CAPACITY_REACHED; an ended session frees its place."""
    if subject.sessions is None:
        return
    with contextlib.ExitStack() as stack:
        for index in range(subject.sessions):
            reply = stack.enter_context(_connected(subject)).request(protocol.STATE_REQUEST)
            expect(reply["type"] == "state", f"expected room for session {index}, got {reply}")
        with _connected(subject) as channel:
            channel.expect_error(protocol.CAPACITY_REACHED, protocol.STATE_REQUEST)
    deadline = time.monotonic() + _CAPACITY_RETURNS_S
    while True:
        with _connected(subject) as channel:
            reply = channel.request(protocol.STATE_REQUEST)
        if reply["type"] == "state":
            return
        expect(time.monotonic() < deadline, f"expected room when sessions ended, got {reply}")
        time.sleep(0.05)


def pages_exist(subject: ServerSubject) -> None:
    """Checks /health, /metadata and /schema."""
    parts = urlsplit(subject.url)  # it may have a query, which a hosted server needs for every page
    root, scheme = parts.path.removesuffix("/ws"), parts.scheme.replace("ws", "http", 1)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for page, keys in (
        ("health", {"status"}),
        ("metadata", {"name", "description"}),
        ("schema", {"action", "observation", "state"}),
    ):
        address = parts._replace(scheme=scheme, path=f"{root}/{page}").geturl()
        request = urllib.request.Request(address, headers=dict(subject.headers or {}))
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            content = json.load(response)
        expect(keys <= set(content), f"expected {sorted(keys)} in /{page}, got {content!r:.200}")


CHECKS: tuple[Callable[[ServerSubject], None], ...] = (
    observations_have_the_protocols_fields,
    state_counts_the_steps,
    bad_messages_are_refused_and_do_no_harm,
    order_is_enforced,
    close_ends_the_session,
    capacity_is_enforced_and_freed,
    pages_exist,
)


def check_server(subject: ServerSubject) -> list[str]:
    """Runs the checks of an environment and all `CHECKS` on a server; returns the problems."""
    make = lambda: _with_room(subject)
    environment = Subject(make, subject.tasks, subject.actions, alone=subject.sessions == 1)
    return check_environment(environment) + run_checks(CHECKS, subject)


def _with_room(subject: ServerSubject) -> RemoteEnvironment:
    """Opens a session; waits if the server must first remove an ended one."""
    deadline = time.monotonic() + _CAPACITY_RETURNS_S
    while True:
        env = RemoteEnvironment(subject.url, subject.mapping, headers=subject.headers)
        try:
            env.state()
        except RefusedError as error:
            if error.code == protocol.CAPACITY_REACHED and time.monotonic() < deadline:
                env.close()
                time.sleep(0.05)
                continue  # other refusals mean that the session is open, but has no state before the first reset
        return env


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; prints the problems and returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="aem_jax.envs.testing.conformance_wire", description="Checks an environment server."
    )
    parser.add_argument("url")
    parser.add_argument("--task", type=json.loads, action="append", required=True, help="a task as JSON; repeatable")
    parser.add_argument("--action", action="append", required=True, help="a response; repeatable, given in turn")
    parser.add_argument("--sessions", type=int, help="the server's capacity, to be tried out")
    parser.add_argument("--field-mapping", default="{}", help="fields of FieldMapping as JSON, for foreign servers")
    parser.add_argument("--token-variable", default="", help="environment variable with the token of a hosted server")
    parser.add_argument(
        "--unguarded", action="store_true", help="the server leaves the order of calls to its environment"
    )
    options = parser.parse_args(arguments)
    try:
        url = websocket_url(options.url)
        mapping = override(FieldMapping(), parse_mapping(options.field_mapping, "--field-mapping"))
        headers = bearer(options.token_variable)
        RemoteEnvironment(url, mapping, headers=headers).close()
    except (ValueError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    subject = ServerSubject(
        url, options.task, options.action, mapping, options.sessions, not options.unguarded, headers
    )
    problems = check_server(subject)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
