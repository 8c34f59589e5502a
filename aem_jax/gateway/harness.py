"""Agents as environment sessions: each episode is a process of the agent, and its requests are the observations."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import aem_jax
from aem_jax.envs.harness.suite import HarnessConfig
from aem_jax.envs.protocol import EnvError, LostError, StepResult, describe_raised
from aem_jax.gateway.agent_launcher import load
from aem_jax.gateway.requests import ApiError, SampledAs
from aem_jax.gateway.server import Gateway, bind, parse_reward
from aem_jax.gateway.session import MODEL, Episodes, Limits, Session
from aem_jax.gateway.tree import RequestTokenizer

log = logging.getLogger(__name__)

Reward = Callable[[Any, Sequence[Mapping[str, Any]]], Any]
"""(task, transcript) -> a number, or a mapping with reward, success and score."""

_START_S = 60.0


class _AgentError(EnvError):
    """The agent itself failed, rather than what runs or judges it."""


@dataclass(frozen=True)
class _Played:
    """The episode of a session.

    Attributes:
        key: of its requests.
        task: as the agent gets it.
        session: its requests.
    """

    key: str
    task: Any
    session: Session


class HarnessPool:
    """Sessions 0 … capacity − 1 whose episodes are agents' processes.

    Args:
        config: the agent.
        tokenizer: of the policy.
        sampled: how the run samples.
        limits: bounds of an episode.
        capacity: number of sessions.

    Raises:
        ValueError: the agent or the reward cannot be imported.
        OSError: the endpoint's address cannot be listened on.
    """

    def __init__(
        self, config: HarnessConfig, tokenizer: RequestTokenizer, sampled: SampledAs, limits: Limits, capacity: int
    ) -> None:
        self._config, self.capacity = config, capacity
        self._reward: Reward | None = load(config.reward) if config.reward else None
        self._played: dict[int, _Played] = {}
        self._episodes = Episodes(tokenizer, limits)
        self._gateway = Gateway(self._episodes, sampled, bind(config.host, config.port))
        self._agents = _Agents(config, self._gateway.loop)
        try:
            self._gateway.submit(self._agents.start()).result()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Base URL of the endpoint."""
        return self._gateway.url

    def server_of(self, session: int) -> int:
        """An agent is lost alone."""
        return session

    def reset(self, session: int, payload: Mapping[str, Any]) -> "Future[StepResult]":
        """Starts an agent; the result is its first prompt."""
        self._forget(session)
        key, requests = self._episodes.open(self._gateway.loop)
        played = self._played[session] = _Played(key, payload["task"], requests)
        self._gateway.submit(self._play(played))
        return requests.first()

    def step(self, session: int, text: str) -> "Future[StepResult]":
        """The response is complete; the result is the next prompt, or the end."""
        return self._played[session].session.finish()

    def sampled(self, session: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Tokens of the response, as they are sampled."""
        self._played[session].session.sampled(ids, logprobs)

    def without_response(self, session: int) -> "Future[StepResult]":
        """The next prompt, or the end, of an agent that no longer waits for its response."""
        return self._played[session].session.without_response()

    def close(self) -> None:
        """Ends all agents, and stops serving. A second call does nothing."""
        for session in list(self._played):
            self._forget(session)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._gateway.submit(self._agents.close()).result()
        self._gateway.close()

    def __enter__(self) -> "HarnessPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forget(self, session: int) -> None:
        if played := self._played.pop(session, None):
            played.session.fail(EnvError("the episode was given up"))
            self._episodes.close(played.key)
            self._agents.kill(played.key)

    async def _play(self, played: _Played) -> None:
        """Runs an agent, and ends its episode."""
        environ = {"OPENAI_BASE_URL": self.url, "OPENAI_API_KEY": played.key, "OPENAI_MODEL": MODEL}
        try:
            report = await self._agents.run(played.key, played.task, environ)
            if self._reward is None:
                end = self._ending(played, report)
            else:  # it may take long
                end = await asyncio.to_thread(self._ending, played, report)
        except _AgentError as error:
            if played.session.at_limit and played.session.has_turns:  # the policy came this far: the episode counts
                played.session.end(**(played.session.reward or {"reward": 0.0, "success": False, "score": None}))
            else:
                played.session.fail(error)
        except EnvError as error:
            played.session.fail(error)
        except Exception as error:
            played.session.fail(EnvError(describe_raised(error)))
        else:
            played.session.end(**end)
        self._episodes.close(played.key)

    def _ending(self, played: _Played, report: Mapping[str, Any]) -> dict[str, Any]:
        """The reward of an agent that has ended.

        Raises:
            _AgentError: the agent failed, or gave no valid reward.
            EnvError: the reward's function failed, or returned no valid reward.
        """
        status, tail = report["status"], f"; its errors end with:\n{report['errors']}" if report["errors"] else ""
        if status is None:
            raise _AgentError(f"expected an agent to end in {self._config.timeout_s:g} s (--harness.timeout-s){tail}")
        if status:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            raise _AgentError(f"expected an agent to end with exit status 0, got {how}{tail}")
        if self._reward is not None:
            try:
                value = self._reward(played.task, played.session.transcript)
            except Exception as error:
                raise EnvError(f"--harness.reward failed: {describe_raised(error)}") from error
            return _parsed(value, "the result of --harness.reward", EnvError)
        if played.session.reward is not None:
            return played.session.reward
        if (value := _json(report["result"])) is not None:
            return _parsed(value, "the result of --harness.agent")
        value = _json(report["output"])
        if value is None or isinstance(value, bool | str | list):
            raise _AgentError(
                "expected a reward: POST /v1/episode/reward, the result of --harness.agent, or a number or "
                f'{{"reward": …}} as the last line of the output; got {report["output"]!r:.80}{tail}'
            )
        return _parsed(value, "the last line of the output")


def _json(text: str) -> Any:
    """The value of a JSON text; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parsed(value: Any, where: str, error_type: type[EnvError] = _AgentError) -> dict[str, Any]:
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return parse_reward(value, where)
    except ApiError as error:
        raise error_type(str(error)) from error


def _no_proxy(host: str) -> dict[str, str]:
    """Variables that keep agents' clients from calling the endpoint through the proxy of this machine's environment."""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    hosts = known if known.strip() == "*" else ",".join(filter(None, [host, "127.0.0.1", known]))
    return {"no_proxy": hosts, "NO_PROXY": hosts}


class _Agents:
    """The agents' processes, started by a launcher. All methods but `kill` run in the loop."""

    def __init__(self, config: HarnessConfig, loop: asyncio.AbstractEventLoop) -> None:
        self._config, self._loop = config, loop
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._running: dict[str, asyncio.Future[Mapping[str, Any]]] = {}
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Starts the launcher, if it does not run.

        Raises:
            ValueError: the agent cannot be imported.
            EnvError: the launcher ended.
        """
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            config = self._config
            what = ["--function", config.agent] if config.agent else ["--", *shlex.split(config.command)]
            roots = [str(Path(aem_jax.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "aem_jax.gateway.agent_launcher", *what),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env={**os.environ, **_no_proxy(config.host), "PYTHONPATH": os.pathsep.join(filter(None, roots))},
                start_new_session=True,
                limit=2**24,
            )
            assert process.stdout
            try:
                line = await asyncio.wait_for(process.stdout.readline(), _START_S)
            except TimeoutError:
                process.kill()
                raise EnvError(f"expected the module of {config.agent} to be imported in {_START_S:g} s") from None
            answer = json.loads(line or b'{"failed": "its process ended"}')
            if "failed" in answer:
                await process.wait()
                raise ValueError(f"--harness.agent: {answer['failed']}")
            self._reader = asyncio.ensure_future(self._read(process))

    async def run(self, key: str, task: Any, environ: Mapping[str, str]) -> Mapping[str, Any]:
        """Plays an episode; returns the launcher's report.

        Raises:
            LostError: the launcher ended.
        """
        await self.start()
        report = self._running[key] = self._loop.create_future()
        request = {"id": key, "task": task, "environ": environ, "timeout_s": self._config.timeout_s}
        self._send(request)
        try:
            return await report
        finally:
            del self._running[key]

    def kill(self, key: str) -> None:
        """Ends an episode's process. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(functools.partial(self._send, {"id": key, "kill": True}))

    async def close(self) -> None:
        """Ends the launcher, and with it all agents."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    def _send(self, request: Mapping[str, Any]) -> None:
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        while line := await process.stdout.readline():
            report = json.loads(line)
            if (running := self._running.get(report["id"])) and not running.done():
                running.set_result(report)
        await process.wait()
        for running in self._running.values():
            if not running.done():
                running.set_exception(LostError("the process that starts the agents has ended"))
