"""`endpoint MODEL`: serves a policy through OpenAI's chat completions, without training. `serve_policy` in Python."""

import logging
import signal
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from jax.sharding import Mesh

from aem_jax.checkpoint import CheckpointError, Checkpoints, Choice
from aem_jax.config import components, inputs, saved
from aem_jax.distributed import runtime
from aem_jax.distributed.config import RuntimeConfig
from aem_jax.errors import ConfigError
from aem_jax.gateway.conversations import Conversations, Endless
from aem_jax.gateway.requests import SampledAs
from aem_jax.gateway.server import Address, Gateway, bind
from aem_jax.gateway.session import Limits
from aem_jax.launch import frozen_weights
from aem_jax.learner import abstract_state
from aem_jax.models import Params, Policy, from_pretrained
from aem_jax.models.pretrained import read_config, resolve
from aem_jax.rollout import Rollout, RolloutConfig, check_cache_memory
from aem_jax.sampler import Sampler, SamplingConfig
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import MeshConfig, make_mesh
from aem_jax.tokenizer import CHATML, ChatTokenizer, TokenizerConfig

log = logging.getLogger(__name__)


def _rollout() -> RolloutConfig:
    return RolloutConfig(
        context="tree",
        mode="continuous",
        group_size=1,
        num_slots=16,
        slot_divisors=(4,),
        max_turns=1000,
        response_tokens=2048,
        context_tokens=8192,
        prompt_tokens=4096,
        decode_chunk=16,
        extend_buckets=(64, 256, 1024),
        windows=(512, 1024, 2048, 4096),
    )


@dataclass(frozen=True)
class EndpointConfig:
    """What is served, and where."""

    host: str = "127.0.0.1"
    """Address to listen on. With any other address, set key: without it, all who reach the endpoint can use it."""
    port: int = 8000
    """Port; 0: any free one."""
    key: str = ""
    """Key that clients need; empty: any."""
    lenient: bool = False
    """Whether requests that ask for other sampling are answered as sampling says, instead of refused."""
    dtype: str = "bfloat16"
    """Dtype of weights and cache: bfloat16 or float32. Of a model only: a run has its own."""
    seed: int = 0
    """Seed of the samples. Conversation i samples with fold i of its key."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """chat_template and thinking. Of a model only: a run has its own."""
    step: Choice = "latest"
    """Of a run only: the checkpoint to serve, its step, latest, or best (of the highest success in an evaluation)."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """The distribution of all responses."""
    rollout: RolloutConfig = field(default_factory=_rollout)
    """Slots (conversations that keep their cache) and lengths."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The device mesh."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """The machine."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"expected port from 0 to {2**16 - 1}, got {self.port}")


class ServedPolicy:
    """A policy behind an endpoint, from `serve_policy`.

    Attributes:
        url: base URL of the API.
    """

    def __init__(self, gateway: Gateway, conversations: Conversations, rollout: threading.Thread) -> None:
        self._gateway, self._conversations, self._rollout = gateway, conversations, rollout
        self.url = gateway.url

    def close(self) -> None:
        """Ends all requests, and stops serving. A second call does nothing."""
        if self._rollout.is_alive():
            self._gateway.loop.call_soon_threadsafe(self._conversations.close)
            self._rollout.join()
        self._gateway.close()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._rollout.is_alive()

    def __enter__(self) -> "ServedPolicy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_policy(model: str | Path, config: EndpointConfig = EndpointConfig()) -> ServedPolicy:
    """Serves a policy in this process until it is closed.

    Args:
        model: a folder of Hugging Face's files, a GGUF file, a name on the Hub, or the folder of a run.
        config: settings.

    Raises:
        ValueError: there is no such model, or its caches do not fit.
        OSError: the address cannot be listened on.
    """
    settings = config.rollout
    if settings.context != "tree" or settings.mode != "continuous":
        raise ValueError(
            "expected rollout.context tree and rollout.mode continuous, whose requests are answered as they come, got "
            f"{settings.context} and {settings.mode}"
        )
    address = bind(config.host, config.port)  # before the model is loaded and compiled
    try:
        return _served(model, config, address)
    except BaseException:
        address.bound.close()
        raise


def _served(model: str | Path, config: EndpointConfig, address: Address) -> ServedPolicy:
    settings, mesh = config.rollout, make_mesh(config.mesh)
    policy, params, chat = _load(Path(model), str(model), config, mesh)
    sampler = Sampler(
        components.sampled_policy(config.sampling, policy),
        config.sampling,
        chat.stop_ids,
        capacity=settings.context_tokens,
        slack=settings.slack,
        windows=settings.windows,
        mesh=mesh,
    )
    log.info(check_cache_memory(sampler, settings, (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")))
    limits = Limits(settings.max_turns, settings.context_tokens)
    conversations = Conversations(chat, limits, settings.num_slots, config.key)
    rollout = Rollout(sampler, chat, conversations, settings)
    rollout.warm_up(params)
    sampled = SampledAs(config.sampling.temperature, config.sampling.top_p, config.lenient, "--lenient True")
    gateway = Gateway(conversations, sampled, address)
    conversations.loop = gateway.loop
    root = jax.random.key(config.seed)
    attempts = Endless(lambda number: np.asarray(jax.random.key_data(jax.random.fold_in(root, number))))

    def play() -> None:
        try:
            rollout.serve(params, attempts, lambda: conversations.is_closed)
        finally:  # if it failed, its clients would wait for ever
            gateway.loop.call_soon_threadsafe(conversations.close)

    thread = threading.Thread(target=play, name="endpoint", daemon=True)
    thread.start()
    return ServedPolicy(gateway, conversations, thread)


def _load(path: Path, name: str, config: EndpointConfig, mesh: Mesh) -> tuple[Policy, Params, ChatTokenizer]:
    """The policy of a model or of a run, its parameters to sample with, and its tokenizer."""
    if (path / inputs.FILE).is_file():  # a model has a config.json, too
        policy, params, chat = _trained(path, config, mesh)
    else:
        if config.step != "latest":
            raise ValueError(f"--step: expected a run's folder, which has checkpoints, got the model {name}")
        source, thinking = resolve(name), config.tokenizer.thinking
        template = {"own": None, "chatml": CHATML}[config.tokenizer.chat_template]
        chat = ChatTokenizer.from_pretrained(source, chat_template=template, appends=False, thinking=thinking)
        sizes = read_config(source, config.dtype)
        if chat.vocab_size > sizes.vocab_size:  # ids beyond the embedding would be read as its last row
            raise ValueError(
                f"{name}: expected a vocabulary of at least {chat.vocab_size} (the tokenizer's), got "
                f"{sizes.vocab_size}; are tokenizer and weights of one model?"
            )
        model = from_pretrained(source, mesh=mesh, dtype=config.dtype)
        policy, params = model.policy, model.params
    return policy, make_reshard(policy, mesh, int8=config.sampling.weights == "int8")(params), chat


def _trained(folder: Path, served: EndpointConfig, mesh: Mesh) -> tuple[Policy, Params, ChatTokenizer]:
    """The chosen checkpoint of a run.

    Raises:
        CheckpointError: the run has no such checkpoint.
        ValueError: it has none, or settings say otherwise what is the run's own.
    """
    if served.dtype != EndpointConfig.dtype or served.tokenizer != TokenizerConfig():
        raise ValueError(
            f"expected a run with its own dtype and tokenizer, got --dtype {served.dtype} and {served.tokenizer} for "
            f"{folder}; leave --dtype and --tokenizer.* out, or export the run and serve the export"
        )
    config = replace(saved.load(folder), name=folder.name, runs_dir=str(folder.parent))
    chat = ChatTokenizer.from_pretrained(folder / inputs.TOKENIZER, appends=False, thinking=config.tokenizer.thinking)
    policy = components.make_policy(config, chat.vocab_size, saved.model_files(config, folder))
    with Checkpoints(folder / "checkpoints", config.checkpoint) as checkpoints:
        if checkpoints.latest is None:
            raise ValueError(f"no checkpoint in {folder}; train it first")
        abstract = abstract_state(policy, config.learner, mesh).without_frozen()
        state = checkpoints.restore(abstract, checkpoints.find(served.step))
    if policy.lora:
        recorded = inputs.load(folder).get(inputs.FROZEN)
        frozen, _ = frozen_weights.load(config, folder, policy.base, mesh, recorded)
        state = replace(state, frozen=frozen)
    return policy, state.params, chat


def run(model: str, config: EndpointConfig) -> int:
    """Serves until SIGINT or SIGTERM; returns the exit status.

    Raises:
        ConfigError: the model cannot be served.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        runtime.set_up(replace(config.runtime, distributed="off"))
        served = serve_policy(model, config)
    except (CheckpointError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # before, while it loads and compiles, a signal ends it at once
        signal.signal(number, lambda *_: stopped.set())
    with served:
        print(f"serving {model} on {served.url} (Ctrl-C to stop); use it with OPENAI_BASE_URL={served.url}", flush=True)
        while not stopped.wait(0.5):
            if not served.is_alive:
                raise ConfigError("the endpoint stopped by itself; its log has the reason")
    return 0
