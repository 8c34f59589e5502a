"""The command `endpoint`: a model of files behind OpenAI's interface."""

import socket
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from aem_jax.config import inputs
from aem_jax.launch import endpoint
from aem_jax.launch.endpoint import EndpointConfig, serve_policy
from aem_jax.models import ModelConfig, Policy, save_pretrained
from aem_jax.rollout import RolloutConfig
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.tokenizer import ChatTokenizer, TokenizerConfig
from tests.gateway import agents

ROLLOUT = RolloutConfig(
    context="tree", mode="continuous", group_size=1, num_slots=8, slot_divisors=(), max_turns=4, response_tokens=4,
    context_tokens=128, prompt_tokens=64, decode_chunk=2, extend_buckets=(64,), windows=(128,),
)  # fmt: skip


@pytest.mark.parametrize("weights", ["model", "int8"])
def test_a_model_answers_with_the_weights_that_sampling_says(weights, tmp_path: Path, monkeypatch):
    chat = ChatTokenizer.train(["a cup is on the shelf"] * 4, vocab_size=300)
    chat.save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(320, 32, 64, 1, 2, 2, 16, tied_head=True)
    params = Policy(config).init(jax.random.key(0))
    save_pretrained(tmp_path / "model", config, params, source=tmp_path / "tokenizer", stop_ids=chat.stop_ids)
    policies = []

    def recorded(policy, *args, **settings):
        policies.append(policy)
        return Sampler(policy, *args, **settings)

    monkeypatch.setattr(endpoint, "Sampler", recorded)
    settings = EndpointConfig(port=0, dtype="float32", rollout=ROLLOUT, sampling=SamplingConfig(weights=weights))
    with serve_policy(tmp_path / "model", settings) as served:
        body = {"messages": [{"role": "user", "content": "where is the cup?"}], "logprobs": True}
        answer = agents.post("/chat/completions", body, "any", served.url)
        with pytest.raises(agents.Refused, match="start with --lenient True, which ignores it"):
            agents.post("/chat/completions", {**body, "temperature": 0.5}, "any", served.url)
    logprobs = [token["logprob"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert 1 <= len(logprobs) <= 4 and np.isfinite(logprobs).all()
    assert [policy.int8 for policy in policies] == [weights == "int8"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rollout_that_fails_leaves_no_client_waiting(tmp_path: Path, monkeypatch):
    chat = ChatTokenizer.train(["a cup is on the shelf"] * 4, vocab_size=300)
    chat.save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(320, 32, 64, 1, 2, 2, 16, tied_head=True)
    params = Policy(config).init(jax.random.key(0))
    save_pretrained(tmp_path / "model", config, params, source=tmp_path / "tokenizer", stop_ids=chat.stop_ids)

    def fails(self, *args, **settings):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Sampler, "decode", fails)
    monkeypatch.setattr(endpoint.Rollout, "warm_up", lambda self, params: None)
    settings = EndpointConfig(port=0, dtype="float32", rollout=ROLLOUT)
    body, refused = {"messages": [{"role": "user", "content": "where is the cup?"}]}, []

    def ask():
        with pytest.raises(agents.Refused, match="the endpoint is being closed") as caught:
            agents.post("/chat/completions", body, "any", served.url)
        refused.append(caught.value.status)

    with serve_policy(tmp_path / "model", settings) as served:
        clients = [threading.Thread(target=ask, daemon=True) for _ in range(12)]  # more than slots
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
        deadline = time.monotonic() + 60  # clients are answered just before the thread ends
        while served.is_alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert refused == [503] * 12


def test_a_tokenizer_beyond_the_embedding_is_refused(tmp_path: Path):
    chat = ChatTokenizer.train(["a cup is on the shelf"] * 4, vocab_size=300)
    chat.save_pretrained(tmp_path / "tokenizer")
    config = ModelConfig(chat.vocab_size - 1, 32, 64, 1, 2, 2, 16, tied_head=True)
    params = Policy(config).init(jax.random.key(0))
    save_pretrained(tmp_path / "model", config, params, source=tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=f"at least {chat.vocab_size} .the tokenizer's., got {chat.vocab_size - 1}; "):
        serve_policy(tmp_path / "model", EndpointConfig(port=0, dtype="float32", rollout=ROLLOUT))


def test_a_port_that_is_taken_is_refused_before_the_model_is_loaded(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"):
            serve_policy(tmp_path / "no model", EndpointConfig(port=port, rollout=ROLLOUT))


def test_a_model_has_no_steps(tmp_path: Path):
    with pytest.raises(ValueError, match="--step: expected a run's folder, which has checkpoints, got the model"):
        serve_policy(tmp_path, EndpointConfig(port=0, rollout=ROLLOUT, step=3))


@pytest.mark.parametrize(
    "settings", [{"dtype": "float32"}, {"tokenizer": TokenizerConfig(thinking=False)}], ids=["dtype", "tokenizer"]
)
def test_settings_that_a_run_has_itself_are_refused(settings, tmp_path: Path):
    (tmp_path / inputs.FILE).write_text("{}")
    with pytest.raises(ValueError, match="leave --dtype and --tokenizer.* out, or export the run"):
        serve_policy(tmp_path, EndpointConfig(port=0, rollout=ROLLOUT, **settings))
