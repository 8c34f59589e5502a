"""Clients that other people wrote, against the endpoint with a scripted policy. Each needs its package.

`pip install openai openai-agents smolagents langchain-openai 'pydantic-ai-slim[openai]' mini-swe-agent`
"""

import asyncio
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from aem_jax.envs.protocol import EnvError
from aem_jax.gateway.requests import SampledAs
from aem_jax.gateway.session import Limits
from aem_jax.tokenizer import ChatTokenizer

from .scripted import EpisodesGateway, Rollout, with_template
from .templates import HERMES

LIMITS = Limits(max_requests=20, context_tokens=40_000)
TEXTS = ["<tool_call> name arguments go to a room \n \"'", "user assistant system tool"]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


def call(name: str, **arguments) -> str:
    return f"I call it.\n<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> ChatTokenizer:
    return with_template(tmp_path_factory.mktemp("hermes"), ChatTokenizer.train(TEXTS * 4, vocab_size=400), HERMES)


@pytest.fixture(scope="module")
def strict(chat):
    gateway = EpisodesGateway(chat, SampledAs(), LIMITS)
    yield gateway
    gateway.close()


@pytest.fixture(scope="module")
def lenient(chat):
    """For clients that always send a temperature or a tool_choice."""
    gateway = EpisodesGateway(chat, SampledAs(lenient=True), LIMITS)
    yield gateway
    gateway.close()


@contextmanager
def answering(gateway, chat, *texts: str, rematched: int = 0):
    """A key whose requests get these answers, each of which the next request continues; yields (key, the rollout)."""
    key, session = gateway.open_session()
    rollout = Rollout(session, texts, chat=chat, chunk=4)
    yield key, rollout
    rollout.join(20)
    assert not rollout.is_alive(), "the client asked too seldom"
    assert [result.info["branches"] for result in rollout.results] == [0] * len(texts)
    assert sum(result.info["rematched"] for result in rollout.results) == rematched
    session.fail(EnvError("over"))
    gateway.close_session(key)


def test_openai(strict, chat):
    openai = pytest.importorskip("openai")
    with answering(strict, chat, "Hello you.", call("add", a=1), "Two.") as (key, _):
        client = openai.OpenAI(base_url=strict.url, api_key=key)
        assert client.models.list().data[0].id == "policy"
        messages = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(model="policy", messages=messages, logprobs=True)
        assert answer.choices[0].message.content == "Hello you." and answer.usage.completion_tokens > 3
        assert "".join(token.token for token in answer.choices[0].logprobs.content) == "Hello you."
        messages += [answer.choices[0].message, {"role": "user", "content": "Add"}]
        answer = client.chat.completions.create(model="policy", messages=messages, extra_body={"metadata": {}})
        assert "<tool_call>" in answer.choices[0].message.content  # without tools, it is text
        messages += [answer.choices[0].message, {"role": "user", "content": "Again"}]
        answer = client.chat.completions.create(model="policy", messages=messages, max_tokens=50)
        assert answer.choices[0].message.content == "Two."


def test_openai_tools_and_errors(strict, chat):
    openai = pytest.importorskip("openai")
    with answering(strict, chat, call("add", a=1), "Two.") as (key, _):
        client = openai.OpenAI(base_url=strict.url, api_key=key, max_retries=0)
        messages = [{"role": "user", "content": "Add"}]
        answer = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL], tool_choice="auto")
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls" and message.content == "I call it."
        assert json.loads(message.tool_calls[0].function.arguments) == {"a": 1}
        messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "2"}]
        with pytest.raises(openai.BadRequestError, match="temperature must be 1"):
            client.chat.completions.create(model="policy", messages=messages, temperature=0)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=strict.url, api_key="none", max_retries=0).models.list()
        answer = client.chat.completions.create(model="policy", messages=messages, tools=[TOOL])
        assert answer.choices[0].message.content == "Two."


def test_openai_streams(strict, chat):
    openai = pytest.importorskip("openai")

    async def play(client):
        messages = [{"role": "user", "content": "Hi"}]
        stream = await client.chat.completions.create(model="policy", messages=messages, stream=True, tools=[TOOL])
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Add"}]
        async with client.chat.completions.stream(model="policy", messages=messages, tools=[TOOL]) as stream:
            final = await stream.get_final_completion()
        return text, final.choices[0].message

    with answering(strict, chat, "Hello you, and <b> all.", call("add", a=1)) as (key, _):
        text, message = asyncio.run(play(openai.AsyncOpenAI(base_url=strict.url, api_key=key)))
    assert text == "Hello you, and <b> all."
    assert message.tool_calls[0].function.name == "add" and message.content == "I call it."


FIRST_REQUEST = """
import os, sys
import openai

client = openai.OpenAI(base_url="-", api_key="-")


def play(task):
    known = set(sys.modules)
    policy = client.with_options(base_url=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    policy.chat.completions.create(model="policy", messages=[{"role": "user", "content": "Hi"}])
    return sorted(set(sys.modules) - known)
"""


def test_the_first_request_of_an_episode_imports_nothing(strict, chat, tmp_path):
    """Its imports would cost each episode more CPU time than all else; the launcher has made a first request."""
    pytest.importorskip("openai")
    (tmp_path / "agent.py").write_text(FIRST_REQUEST)
    words = [sys.executable, "-m", "aem_jax.gateway.agent_launcher", "--function", f"{tmp_path}/agent.py:play"]
    with answering(strict, chat, "Hello.") as (key, _):
        environ = {"OPENAI_BASE_URL": strict.url, "OPENAI_API_KEY": key}
        episode = json.dumps({"id": "0", "task": {}, "environ": environ, "timeout_s": 20.0})
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as launcher:
            assert launcher.stdin and launcher.stdout
            assert json.loads(launcher.stdout.readline()) == {"ready": True}
            launcher.stdin.write(episode + "\n")
            launcher.stdin.flush()
            report = json.loads(launcher.stdout.readline())
            launcher.stdin.close()
    assert (report["status"], report["result"], report["errors"]) == (0, "[]", "")


def test_openai_agents(strict, chat):
    agents = pytest.importorskip("agents")
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)

    @agents.function_tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    async def play(agent, streamed):
        if not streamed:
            return await agents.Runner.run(agent, "1 and 2?")
        result = agents.Runner.run_streamed(agent, "1 and 2?")
        async for _ in result.stream_events():
            pass
        return result

    for streamed in (False, True):
        with answering(strict, chat, call("add", a=1, b=2), "Three.") as (key, rollout):
            model = agents.OpenAIChatCompletionsModel("policy", AsyncOpenAI(base_url=strict.url, api_key=key))
            agent = agents.Agent("adder", instructions="Add.", tools=[add], model=model)
            assert asyncio.run(play(agent, streamed)).final_output == "Three."
        assert rollout.results[1].observation == "3"


def test_smolagents(lenient, chat):
    smolagents = pytest.importorskip("smolagents")

    @smolagents.tool
    def add(a: int, b: int) -> int:
        """Adds.

        Args:
            a: a number.
            b: a number.
        """
        return a + b

    texts = call("add", a=1, b=2), call("final_answer", answer="Three.")
    with answering(lenient, chat, *texts, rematched=1) as (key, rollout):
        model = smolagents.OpenAIServerModel("policy", api_base=lenient.url, api_key=key)
        agent = smolagents.ToolCallingAgent(tools=[add], model=model, verbosity_level=0)
        assert agent.run("1 and 2?") == "Three."
    assert "3" in rollout.results[1].observation
    code = "Thought: I add.\n<code>\nfinal_answer(add(1, 2))\n</code>"
    with answering(lenient, chat, code) as (key, _):
        model = smolagents.OpenAIServerModel("policy", api_base=lenient.url, api_key=key)
        assert smolagents.CodeAgent(tools=[add], model=model, verbosity_level=0).run("1 and 2?") == 3


def test_langchain(strict, chat):
    langchain = pytest.importorskip("langchain_openai")
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool

    @tool
    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    with answering(strict, chat, call("add", a=1, b=2), "Three.") as (key, _):
        model = langchain.ChatOpenAI(model="policy", base_url=strict.url, api_key=key).bind_tools([add])
        messages = [HumanMessage("1 and 2?")]
        messages.append(model.invoke(messages))
        (made,) = messages[-1].tool_calls
        messages.append(ToolMessage(str(add.invoke(made["args"])), tool_call_id=made["id"]))
        assert "".join(chunk.text for chunk in model.stream(messages)) == "Three."


def test_pydantic_ai(strict, chat):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    with answering(strict, chat, call("add", a=1, b=2), "Three.") as (key, rollout):
        model = OpenAIChatModel("policy", provider=OpenAIProvider(base_url=strict.url, api_key=key))
        agent = pydantic_ai.Agent(model, instructions="Add.")

        @agent.tool_plain
        def add(a: int, b: int) -> int:
            return a + b

        assert agent.run_sync("1 and 2?").output == "Three."
    assert rollout.results[1].observation == "3"


def test_mini_swe_agent(strict, chat, tmp_path, monkeypatch):
    pytest.importorskip("minisweagent")
    monkeypatch.setenv("MSWEA_COST_TRACKING", "ignore_errors")
    monkeypatch.setenv("MSWEA_SILENT_STARTUP", "1")
    import yaml
    from minisweagent.agents.default import DefaultAgent
    from minisweagent.config import builtin_config_dir
    from minisweagent.environments.local import LocalEnvironment
    from minisweagent.models.litellm_model import LitellmModel

    settings = yaml.safe_load((builtin_config_dir / "default.yaml").read_text())["agent"]
    finish = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT && echo done"
    with answering(strict, chat, call("bash", command=f"echo hi > {tmp_path}/x"), call("bash", command=finish)) as (
        key,
        _,
    ):
        keys = {"api_base": strict.url, "api_key": key}
        model = LitellmModel(model_name="openai/policy", model_kwargs=keys, cost_tracking="ignore_errors")
        agent = DefaultAgent(model, LocalEnvironment(cwd=str(tmp_path), env=dict(os.environ)), **settings)
        result = agent.run("Write hi into x.")
    assert (tmp_path / "x").read_text() == "hi\n"
    assert "Submitted" in str(result)
