"""What the phases of a run share, opened once: tokenizer, policy, mesh, environment servers, sampler, signals."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.batch import Batch
from aem_jax.config import components, inputs, saved
from aem_jax.config.environments import task_suite
from aem_jax.config.run import RunConfig
from aem_jax.distributed import Hosts
from aem_jax.distributed.join import share_urls
from aem_jax.distributed.signals import StopRequest, stop_on_signals
from aem_jax.envs.serving.pool import EnvPool
from aem_jax.envs.suite import TaskSuite, tokenizer_corpus
from aem_jax.launch import init_from
from aem_jax.launch.mesh import open_mesh
from aem_jax.launch.progress import Report, open_progress
from aem_jax.learner import make_response_values
from aem_jax.models import LoraPolicy, Policy, ValuePolicy, policy_params
from aem_jax.models.pretrained import read_config, resolve
from aem_jax.rollout import Rollout
from aem_jax.rollout.caches import check_caches
from aem_jax.sampler import Sampler
from aem_jax.sampler.layout import make_lora_reshard, make_reshard
from aem_jax.sharding import slot_shards
from aem_jax.tokenizer import CHATML, ChatTokenizer

log = logging.getLogger(__name__)

PURPOSES = ("init", "train", "evaluate")


@dataclass(frozen=True)
class Stage:
    """What the phases of a run share.

    Attributes:
        config: the run's.
        folder: the run's.
        suite: the environment and what there is to do in it.
        chat: the tokenizer.
        policy: the decoder, or adapters of it.
        mesh: the device mesh.
        rollout: plays episodes.
        reshard: the policy's parameters -> decode layout.
        report: shows progress.
        stop: whether somebody asked the run to stop.
        hosts: the processes of the run.
        frozen: with LoRA, the weights beside the adapter, in the train layout (`on`); else None.
    """

    config: RunConfig
    folder: Path
    suite: TaskSuite
    chat: ChatTokenizer
    policy: Policy | LoraPolicy
    mesh: Mesh
    rollout: Rollout
    reshard: Callable[..., Any]
    report: Report
    stop: StopRequest
    hosts: Hosts
    frozen: Any = None

    def on(self, frozen: Any) -> "Stage":
        """This stage with weights for its adapter to stand beside."""
        return replace(self, frozen=frozen, reshard=partial(self.reshard, frozen=frozen))

    @property
    def trained(self) -> Policy | LoraPolicy | ValuePolicy:
        """What reinforcement learning trains: `policy`, and a value head where the algorithm asks for one."""
        return components.trained_policy(self.config, self.policy)

    def laid_out(self, params: Any) -> Any:
        """What is sampled from, of the parameters of `trained`, in the decode layout."""
        return self.reshard(policy_params(self.trained, params))

    def make_values(self) -> Callable[[Any, Batch], jax.Array] | None:
        """(parameters of `trained`, batch) -> values of its responses, f32[R]; None without a value head."""
        trained = self.trained
        if not isinstance(trained, ValuePolicy):
            return None
        values = make_response_values(trained, self.config.learner, self.mesh)
        return lambda params, batch: values(params if self.frozen is None else (params, self.frozen), batch)

    def key(self, purpose: str) -> jax.Array:
        """The run's PRNG key for one of `PURPOSES`."""
        return jax.random.split(jax.random.key(self.config.seed), len(PURPOSES))[PURPOSES.index(purpose)]


def open_stage(config: RunConfig, folder: Path, stack: ExitStack, hosts: Hosts, begun: bool) -> Stage:
    """Everything that the phases need, open for as long as `stack` is.

    Args:
        config: the run's.
        folder: the run's.
        stack: closes what is opened.
        hosts: the processes of the run.
        begun: whether the run has a checkpoint. Then its tokenizer and the config of its model are in its folder, and
            nothing there is changed.

    Raises:
        ValueError: parts of the config that do not go together.
        EnvError: environment servers cannot be started or reached.
        StoppedError: somebody asked for it while a tokenizer was made.
    """
    stop = stack.enter_context(stop_on_signals(hosts.largest))
    report = stack.enter_context(open_progress()) if hosts.is_first else _unseen
    suite = task_suite(config)
    suite = replace(suite, evaluation=cache(suite.evaluation))
    for split in config.evaluation.splits:  # what cannot be read is said now, not after training
        suite.evaluation(split, config.evaluation.size)
    chat = _tokenizer(config, suite, folder / inputs.TOKENIZER, hosts, report, stop, begun)
    policy = components.make_policy(config, chat.vocab_size, saved.model_files(config, folder) if begun else None)
    mesh = open_mesh(config, policy.config, hosts)
    rows = components.microbatch_rows(config)
    if rows % slot_shards(mesh):
        raise ValueError(
            f"--batch.rows: expected a multiple of mesh.data × mesh.fsdp = {slot_shards(mesh)}, got {rows}"
        )
    if config.env.urls and config.environment.NAME != "openenv" and hosts.is_first:
        # What those servers were started with cannot be asked; OpenEnv's protocol has no word for it.
        expected = f"serve {suite.name} --settings '{json.dumps(dict(suite.settings))}'"
        log.warning("servers of --env.urls keep the settings that they were started with; this run's are: %s", expected)
    servers = replace(config.env, urls=share_urls(hosts, config.env.urls))
    pool = stack.enter_context(EnvPool(servers, (suite.name, suite.settings)))
    sampler = Sampler(
        components.sampled_policy(config, policy),
        config.sampling,
        chat.stop_ids,
        capacity=config.rollout.context_tokens,
        slack=config.rollout.slack,
        windows=config.rollout.windows,
        mesh=mesh,
    )
    device_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    caches = check_caches(sampler, config.rollout, device_bytes)
    if hosts.is_first:
        log.info(caches)
    rollout = Rollout(sampler, chat, pool, config.rollout, hosts)
    int8 = config.sampling.weights == "int8"
    adapted = isinstance(policy, LoraPolicy)
    reshard = make_lora_reshard(policy, mesh, int8=int8) if adapted else make_reshard(policy, mesh, int8=int8)
    return Stage(config, folder, suite, chat, policy, mesh, rollout, reshard, report, stop, hosts)


def _unseen(phase: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
    """Progress of a process that nobody looks at."""


def _tokenizer(
    config: RunConfig, suite: TaskSuite, folder: Path, hosts: Hosts, report: Report, stop: StopRequest, begun: bool
) -> ChatTokenizer:
    """The run's tokenizer: the one that it has, or one that process 0 makes and all read.

    A copy of another's is made anew until there is a checkpoint: the other may have changed since.
    """
    appends, thinking = config.rollout.context == "append", config.tokenizer.thinking
    load = lambda path, **how: ChatTokenizer.from_pretrained(path, appends=appends, thinking=thinking, **how)
    is_copy = bool(config.model.path or config.warmstart.begin_from)
    if hosts.is_first and not begun and (is_copy or not folder.exists()):
        _make_tokenizer(config, suite, folder, load, report, stop)
    hosts.wait()
    if not folder.exists():  # process 0 was asked to stop before it had one
        stop.check()
    return load(folder)


def _make_tokenizer(
    config: RunConfig,
    suite: TaskSuite,
    folder: Path,
    load: Callable[..., ChatTokenizer],
    report: Report,
    stop: StopRequest,
) -> None:
    """Saves the model's tokenizer, or that of the run to begin from, else one trained on what is said in episodes."""
    if config.model.path:
        template = {"own": None, "chatml": CHATML}[config.tokenizer.chat_template]
        model = resolve(config.model.path)
        try:
            chat = load(model, chat_template=template)
        except ValueError:
            read_config(model)  # transformers' tokenizers read it, too, and do not name what is wrong in it
            raise
    elif config.warmstart.begin_from:
        chat = load(init_from.tokenizer(config))
    else:
        sizes, said = config.tokenizer, []
        for count, episode in enumerate(tokenizer_corpus(suite, sizes.episodes, config.rollout.max_turns), start=1):
            said += episode
            report("tokenizer", count, sizes.episodes, {})
            if stop.requested:
                return
        chat = ChatTokenizer.train(said, vocab_size=sizes.vocab_size, whole_words=sizes.whole_words)
    partial = folder.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    chat.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)  # whole or not at all
