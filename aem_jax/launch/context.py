"""The context that the phases of a run share: processes, checkpoints, tokenizer, policy, mesh, environment servers."""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.batch import Batch
from aem_jax.checkpoint import CheckpointError, Checkpoints
from aem_jax.config import components, inputs, saved
from aem_jax.config.environments import task_suite
from aem_jax.config.run import RunConfig
from aem_jax.distributed import SINGLE_PROCESS, ProcessGroup, join, runtime
from aem_jax.distributed.signals import StopRequest, stop_on_signals
from aem_jax.envs.harness.suite import HarnessConfig
from aem_jax.envs.protocol import EnvError
from aem_jax.envs.serving.pool import EnvPool
from aem_jax.envs.suite import TaskSuite, tokenizer_corpus
from aem_jax.errors import ConfigError
from aem_jax.gateway.harness import HarnessPool
from aem_jax.launch import frozen_weights, init_from
from aem_jax.launch.progress import Report, open_progress
from aem_jax.learner import TrainState, abstract_state, make_response_values
from aem_jax.metrics import read_lines
from aem_jax.models import ModelConfig, Params, Policy
from aem_jax.models.pretrained import read_config, resolve
from aem_jax.overrides import as_values, flag
from aem_jax.plan.analytic import demand
from aem_jax.plan.workload import workload
from aem_jax.rollout import Carried, OverlongPromptsError, Rollout, check_cache_memory
from aem_jax.rollout.carry import GroupAttempts, from_record, record
from aem_jax.sampler import Sampler
from aem_jax.sampler.reshard import make_reshard
from aem_jax.sharding import MeshConfig, choose_mesh, make_mesh, slot_shards
from aem_jax.tokenizer import CHATML, ChatTokenizer

log = logging.getLogger(__name__)

CARRIED = "carried"
"""Name of the groups under way in the record of a checkpoint."""
PURPOSES = ("init", "train", "evaluate")


@dataclass(frozen=True)
class RunContext:
    """The resources of a run that its phases share.

    Attributes:
        config: the run's.
        folder: the run's.
        processes: of the run.
        checkpoints: of the run.
        stop: whether a signal has asked the run to stop.
        report: shows progress.
        suite: the environment with its tasks, evaluation sets and scripted agents.
        chat: the tokenizer.
        policy: the policy that reinforcement learning trains.
        mesh: the device mesh.
        rollout: plays episodes.
        reshard: the policy's parameters -> the parameters to sample with, in the decode layout.
    """

    config: RunConfig
    folder: Path
    processes: ProcessGroup
    checkpoints: Checkpoints
    stop: StopRequest
    report: Report
    suite: TaskSuite
    chat: ChatTokenizer
    policy: Policy
    mesh: Mesh
    rollout: Rollout
    reshard: Callable[[Params], Params]

    def save(self, state: TrainState, carried: Carried | None = None) -> None:
        """Writes a checkpoint of the state's step, without frozen weights, with the groups under way. Collective."""
        extra = {} if carried is None else {CARRIED: record(carried)}
        self.checkpoints.save(int(state.step), state.without_frozen(), extra=extra)

    def carried(self, step: int, attempts: GroupAttempts) -> Carried | None:
        """The groups under way in the checkpoint of a step; None without carry-over."""
        if not self.config.rollout.carry_min_groups:
            return None
        saved = self.checkpoints.extra(step).get(CARRIED)
        return Carried() if saved is None else from_record(saved, attempts)

    def restore(self, frozen: Params, step: int | None = None) -> TrainState:
        """The state of a step, or of the latest checkpoint that can be read, with these frozen weights. Collective."""
        abstract = abstract_state(self.policy, self.config.learner, self.mesh)
        return replace(self.checkpoints.restore(abstract.without_frozen(), step), frozen=frozen)

    def key(self, purpose: str) -> jax.Array:
        """The run's PRNG key for one of `PURPOSES`."""
        return jax.random.split(jax.random.key(self.config.seed), len(PURPOSES))[PURPOSES.index(purpose)]


@contextmanager
def open_run(config: RunConfig, folder: Path, writes: bool = False) -> Iterator[RunContext]:
    """Sets up the machine and opens a run; failures are `ConfigError`s.

    Args:
        config: the run's.
        folder: the run's.
        writes: whether the run continues. Otherwise nothing in its folder changes, and another process may write to it.
    """
    with ExitStack() as stack:
        try:
            run = _open(config, folder, writes, stack)
        except (CheckpointError, EnvError, ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        try:
            yield run
        except (CheckpointError, EnvError, OSError) as error:
            what_next = "; the same command resumes it"
            if isinstance(error, OverlongPromptsError):  # it would stop again, and a run keeps this setting
                what_next = " in a run with another --name; --warmstart.init-from begins it with this run's policy"
            stopped = f"the run was stopped: {error}{what_next}"
            raise ConfigError(stopped if writes else str(error)) from error


def _open(config: RunConfig, folder: Path, writes: bool, stack: ExitStack) -> RunContext:
    """Opens everything for as long as `stack` is open, in the order in which mistakes are cheapest to find."""
    runtime.set_up(config.runtime, folder.parent)  # before anything computes, as checkpoints do
    processes = stack.enter_context(join.open_process_group(config.runtime))
    join.check_same(processes, _identity(config))
    checkpoints, has_checkpoint = _open_folder(config, folder, writes, processes, stack)
    says = "finishing the step, then saving" if writes else "stopping"
    stop = stack.enter_context(stop_on_signals(processes.max, says))
    report = stack.enter_context(open_progress()) if processes.is_first else _no_report
    suite = task_suite(config)
    suite = replace(suite, evaluation=cache(suite.evaluation))
    for split in config.evaluation.splits:  # an unreadable set is an error now, not after training
        suite.evaluation(split, config.evaluation.size)
    chat = _tokenizer(config, suite, folder / inputs.TOKENIZER, processes, report, stop, has_checkpoint)
    model_files = saved.model_files(config, folder) if has_checkpoint else None
    policy = components.make_policy(config, chat.vocab_size, model_files)
    mesh = open_mesh(config, policy.config, processes)
    rollout = _open_rollout(config, suite, chat, policy, mesh, processes, stack)
    reshard = make_reshard(policy, mesh, int8=config.sampling.weights == "int8")
    return RunContext(config, folder, processes, checkpoints, stop, report, suite, chat, policy, mesh, rollout, reshard)


def values_function(run: RunContext) -> Callable[[Params, Batch], jax.Array] | None:
    """(the policy's parameters, batch) -> values of its responses, f32[R]; None without a value head."""
    return make_response_values(run.policy, run.config.learner, run.mesh) if run.policy.value else None


def _identity(config: RunConfig) -> dict[str, Any]:
    """The versions and settings that all processes of a run have in common."""
    own = {name: value for name, value in runtime.versions().items() if name not in ("cpus", "devices")}
    return own | {flag(name): value for name, value in as_values(config).items()}


def _open_folder(
    config: RunConfig, folder: Path, writes: bool, processes: ProcessGroup, stack: ExitStack
) -> tuple[Checkpoints, bool]:
    """(the run's checkpoints, whether there is one), after a check that the folder belongs to this config."""
    checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint, processes))
    if writes:  # a folder that cannot be written is an error before anything else starts
        join.check_shared(processes, folder)
        checkpoints.claim()
    if writes and processes.is_first and (folder / saved.FILE).exists():  # now that no other process writes there
        _check_or_forget(config, folder)
    has_checkpoint = processes.broadcast(checkpoints.latest is not None)
    if not (has_checkpoint or writes):
        raise ConfigError(f"no checkpoint in {folder}; train it first")
    if has_checkpoint and processes.is_first and not (folder / saved.FILE).exists():
        raise ConfigError(
            f"expected the {saved.FILE} that {folder} was begun with beside its checkpoints, got none; "
            "put a copy back, or give another --name to begin a new run"
        )
    if has_checkpoint and processes.is_first:
        inputs.check_sources(folder, config, "refuse" if writes else "warn")
    elif writes and processes.is_first:
        (folder / inputs.FILE).unlink(missing_ok=True)  # left by an attempt that ended before its first checkpoint
    return checkpoints, has_checkpoint


def _check_or_forget(config: RunConfig, folder: Path) -> None:
    """Checks that a run has the settings that its folder was begun with.

    An attempt that ended before the first checkpoint has nothing to resume. With other settings its files are removed.
    """
    recorded = saved.load(folder)
    try:
        saved.check_resumable(recorded, config, folder)
    except ConfigError:
        checkpoints = [path for path in (folder / "checkpoints").glob("*") if not path.name.startswith(".")]
        if checkpoints or read_lines(folder / "metrics.jsonl"):
            raise
        log.info("the attempt in %s ended before its first checkpoint; its files are replaced", folder)
        for name in (saved.FILE, inputs.FILE, "evaluations.jsonl", "warmstart.jsonl"):
            (folder / name).unlink(missing_ok=True)
        for name in (inputs.TOKENIZER, inputs.MODEL, frozen_weights.FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)


def _no_report(phase: str, done: int, total: int, metrics: Mapping[str, Any]) -> None:
    """Progress of a process that prints nothing."""


def _tokenizer(
    config: RunConfig,
    suite: TaskSuite,
    folder: Path,
    processes: ProcessGroup,
    report: Report,
    stop: StopRequest,
    has_checkpoint: bool,
) -> ChatTokenizer:
    """The run's tokenizer, from its folder; process 0 makes it first where there is none.

    A copy of another tokenizer is made anew until the run has a checkpoint, because the original may have changed. A
    tokenizer without the settings that it was made with is made anew, too.
    """
    load = _loader(config)
    is_copy = bool(config.model.path or config.warmstart.init_from)
    is_known = folder.exists() and (folder.parent / saved.FILE).exists()
    if processes.is_first and not has_checkpoint and (is_copy or not is_known):
        make_tokenizer(config, suite, folder, load, report, stop)
    processes.barrier()
    if not folder.exists():  # process 0 was asked to stop before the tokenizer was trained
        stop.check()
    return load(folder)


def load_tokenizer(config: RunConfig) -> ChatTokenizer:
    """The tokenizer of --model.path, as a run of this config uses it.

    Raises:
        ValueError: there is none, or its chat template does not fit the run's context.
    """
    return _model_tokenizer(config, _loader(config))


def _loader(config: RunConfig) -> Callable[..., ChatTokenizer]:
    rollout = config.rollout
    settings = {
        "appends": rollout.context in ("append", "compact"),
        "thinking": config.tokenizer.thinking,
        "instruction": rollout.instruction,
    }
    return lambda path, **how: ChatTokenizer.from_pretrained(path, **settings, **how)


def _model_tokenizer(config: RunConfig, load: Callable[..., ChatTokenizer]) -> ChatTokenizer:
    template = {"own": None, "chatml": CHATML}[config.tokenizer.chat_template]
    model = resolve(config.model.path)
    try:
        return load(model, chat_template=template)
    except ValueError:
        read_config(model)  # transformers' tokenizers read this file, too, but do not name the mistake in it
        raise


def make_tokenizer(
    config: RunConfig,
    suite: TaskSuite,
    folder: Path,
    load: Callable[..., ChatTokenizer],
    report: Report,
    stop: StopRequest,
) -> None:
    """Saves the tokenizer of the model or of the run to start from, else one trained on texts of the environment."""
    if config.model.path:
        chat = _model_tokenizer(config, load)
    elif config.warmstart.init_from:
        chat = load(init_from.tokenizer(config))
    else:
        sizes, corpus = config.tokenizer, []
        for count, episode in enumerate(tokenizer_corpus(suite, sizes.episodes, config.rollout.max_turns), start=1):
            corpus += episode
            report("tokenizer", count, sizes.episodes, {})
            if stop.requested:
                return
        chat = ChatTokenizer.train(corpus, vocab_size=sizes.vocab_size, whole_words=sizes.whole_words)
    partial = folder.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    chat.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)  # complete, or absent


def open_mesh(config: RunConfig, model: ModelConfig, processes: ProcessGroup = SINGLE_PROCESS) -> Mesh:
    """The run's mesh over all devices; with the default `config.mesh`, `choose_mesh` chooses its sizes. Collective.

    Args:
        config: the run's.
        model: sizes of its decoder.
        processes: of the run; all choose by the smallest device memory of any of them.

    Raises:
        ValueError: sizes whose product is not the number of devices, or that do not divide rows and slots.
    """
    devices = jax.devices()
    if config.mesh != MeshConfig() or len(devices) == 1:
        return make_mesh(config.mesh)
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", math.inf)  # a CPU reports none
    memory = min(processes.gather_json(limit))
    chosen = choose_mesh(demand(workload(config, model=model)), len(devices), memory)
    if processes.is_first:
        log.info(
            "mesh of %d devices: data %d x fsdp %d x tensor %d x expert %d (chosen; --mesh.* sets it)",
            len(devices),
            chosen.data,
            chosen.fsdp,
            chosen.tensor,
            chosen.expert,
        )
    return make_mesh(chosen)


def _open_rollout(
    config: RunConfig,
    suite: TaskSuite,
    chat: ChatTokenizer,
    policy: Policy,
    mesh: Mesh,
    processes: ProcessGroup,
    stack: ExitStack,
) -> Rollout:
    rows = components.microbatch_rows(config)
    if rows % slot_shards(mesh):
        parts = f"mesh.data × mesh.fsdp × mesh.expert = {slot_shards(mesh)}"
        raise ValueError(f"--batch.rows: expected a multiple of {parts}, got {rows}")
    listed = config.rollout.prompt_style == "single"  # prompts list the admissible actions
    if config.env.urls and config.environment.NAME != "openenv" and processes.is_first:
        # OpenEnv's protocol has no message that asks a server for its settings.
        expected = f"serve {suite.name} --settings '{json.dumps(dict(suite.settings))}'{' --send-admissible' * listed}"
        log.warning("servers of --env.urls keep the settings that they were started with; this run's are: %s", expected)
    urls = join.shard_urls(processes, config.env.urls)
    servers = replace(config.env, urls=urls, send_admissible=config.env.send_admissible or listed)
    if isinstance(config.environment, HarnessConfig):
        own = config.rollout.num_cohorts * len(processes.shard(config.rollout.num_slots // config.rollout.num_cohorts))
        pool = stack.enter_context(HarnessPool(config.environment, chat, *components.gateway(config), own))
    else:
        pool = stack.enter_context(EnvPool(servers, (suite.name, suite.settings)))
    sampler = Sampler(
        components.sampled_policy(config.sampling, policy),
        config.sampling,
        chat.stop_ids,
        capacity=config.rollout.context_tokens,
        slack=config.rollout.slack,
        windows=config.rollout.windows,
        mesh=mesh,
        grows=config.rollout.context == "append",
        records_experts=components.replayed_mixture(config, policy.config) is not None,
    )
    device_bytes = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    caches = check_cache_memory(sampler, config.rollout, device_bytes)
    if processes.is_first:
        log.info(caches)
    return Rollout(sampler, chat, pool, config.rollout, processes, suite.prompt)
