"""One session of a server: requests and replies as texts, without sockets.

OpenEnv's own server differs in two points. Here, a message that is binary or not a mapping is a VALIDATION_ERROR and
does not end the session. The session enforces the order reset, step, …, done, so environments need not.
"""

import json
import logging
import uuid
from typing import Any

from aem_jax.envs import protocol
from aem_jax.envs.protocol import Environment, StepResult, describe, describe_raised
from aem_jax.envs.serving.plain import checked_result

logger = logging.getLogger(__name__)


class Session:
    """The environment of one connection, and the state of its episode. Answers one request at a time."""

    def __init__(self, env: Environment, *, send_admissible: bool):
        self._env = env
        self._send_admissible = send_admissible
        self._episode_id: str | None = None
        self._step_count = 0
        self._running = False

    def answer(self, raw: str | bytes) -> str | None:
        """Returns the reply to a request; None when the client closes the session. Raises nothing."""
        try:
            message = json.loads(raw)
        except (ValueError, RecursionError) as error:
            return encode_error(protocol.INVALID_JSON, f"Invalid JSON: {error}")
        if not isinstance(message, dict) or isinstance(raw, bytes):
            return encode_error(protocol.VALIDATION_ERROR, "expected a text message with a JSON mapping")
        kind, data = message.get("type", ""), message.get("data", {})
        if kind not in ("reset", "step", "state", "close"):
            return encode_error(protocol.UNKNOWN_TYPE, f"Unknown message type: {kind!r:.100}")
        if set(message) - {"type", "data"} or (kind in ("state", "close") and "data" in message):
            return encode_error(protocol.VALIDATION_ERROR, f"unknown fields in the {kind} message: {sorted(message)}")
        if kind == "close":
            return None
        if kind == "state":
            state = {"episode_id": self._episode_id, "step_count": self._step_count}
            return json.dumps({"type": "state", "data": state})
        try:
            return self._reset(data) if kind == "reset" else self._step(data)
        except _RefusedRequestError as error:
            return encode_error(*error.args)
        except BaseException as error:  # an engine that exits must not end the other sessions
            self._running = False
            logger.warning("the environment failed at a %s", kind, exc_info=True)
            # This package's errors are ValueErrors that explain the problem; for others, the line helps.
            description = describe(error) if isinstance(error, ValueError) else describe_raised(error)
            return encode_error(protocol.EXECUTION_ERROR, description)

    def close(self) -> None:
        """Closes the environment; its errors are logged."""
        try:
            self._env.close()
        except BaseException:
            logger.warning("the environment failed to close", exc_info=True)

    def _reset(self, data: Any) -> str:
        if not isinstance(data, dict):
            raise _invalid(f"expected reset data as a mapping, got {data!r:.100}")
        task = dict(data)
        episode_id = task.pop("episode_id", None)  # a keyword of the protocol, not part of the task
        self._running, self._episode_id, self._step_count = False, None, 0  # also if the reset fails
        reply = self._reply(checked_result(self._env, "reset", self._env.reset(task)))
        self._episode_id = str(uuid.uuid4() if episode_id in (None, "") else episode_id)
        return reply

    def _step(self, data: Any) -> str:
        if not isinstance(data, dict) or not isinstance(data.get("text"), str):
            raise _invalid(f"expected step data with a string in 'text', got {data!r:.100}")
        if set(data) - {"text", "metadata"}:
            raise _invalid(f"expected the action field 'text' alone, got {sorted(data)}")
        if not self._running:
            message = "expected a reset before this step: no episode is running"
            raise _RefusedRequestError(protocol.EXECUTION_ERROR, message)
        reply = self._reply(checked_result(self._env, "step", self._env.step(data["text"])))
        self._step_count += 1
        return reply

    def _reply(self, result: StepResult) -> str:
        reply = encode_result(result, send_admissible=self._send_admissible)
        self._running = not result.done
        return reply


class _RefusedRequestError(Exception):
    """A request that the session refuses; the arguments are the error code and the message."""


def _invalid(message: str) -> _RefusedRequestError:
    return _RefusedRequestError(protocol.VALIDATION_ERROR, message)


def encode_result(result: StepResult, *, send_admissible: bool) -> str:
    """Encodes a `checked_result` as a reply, in the observation fields of our servers.

    Raises:
        ValueError: the result contains values that are not finite JSON, or exceeds the maximum message size.
    """
    info = dict(result.info)
    observation = {
        "text": result.observation,
        "won": bool(info.pop("won", False)),
        "terminated": result.terminated,
        "truncated": result.truncated,
        "valid_action": bool(info.pop("valid_action", True)),
        "admissible": None,
        "info": info,
    }
    admissible = info.pop("admissible", None)
    if send_admissible and admissible is not None:
        observation["admissible"] = list(admissible)
    data = {"observation": observation, "reward": result.reward, "done": result.done}
    try:
        reply = json.dumps({"type": "observation", "data": data}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected plain finite JSON values from the environment, got {data!r:.200}: {error}"
        ) from None
    if len(reply) > protocol.MAX_MESSAGE_BYTES:
        parts = {"the observation": result.observation} | {f"info[{name!r}]": value for name, value in info.items()}
        sizes = {name: len(json.dumps(value)) for name, value in parts.items()}
        largest = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"expected an answer of at most {protocol.MAX_MESSAGE_BYTES >> 20} MiB from the environment, got "
            f"{len(reply) / 2**20:.1f} MiB, {sizes[largest] / 2**20:.1f} MiB of it in {largest}"
        )
    return reply


def encode_error(code: str, message: str, **details: Any) -> str:
    """Encodes the reply to a failed request, with the reason."""
    return json.dumps({"type": "error", "data": {"message": message, "code": code, **details}})
