"""A run from its config: warm start, evaluation, training, evaluation, report.

Whatever of it a resumed run already has is left out, so the same command goes on where it was stopped.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import jax

from aem_jax.batch import collate, place
from aem_jax.checkpoint import CheckpointError, Checkpoints
from aem_jax.config import components, inputs, saved
from aem_jax.config.algorithms import response_advantages, value_targets
from aem_jax.config.options import flag
from aem_jax.config.run import RunConfig
from aem_jax.credit import Credit, make_credit
from aem_jax.data import task_groups
from aem_jax.distributed import join, runtime
from aem_jax.envs.protocol import EnvError
from aem_jax.errors import ConfigError
from aem_jax.evaluate import evaluate_agent, evaluate_policy
from aem_jax.files import write_text
from aem_jax.launch import frozen_weights, init_from
from aem_jax.launch.stage import Stage, open_stage
from aem_jax.launch.summary import print_summary, sampled
from aem_jax.learner import (
    TrainState,
    abstract_state,
    init_state,
    make_optimizer,
    make_supervised_update,
    make_token_logprobs,
    make_update,
)
from aem_jax.metrics import MetricsWriter, append_line, drop_lines, json_line, read_lines
from aem_jax.models import LoraPolicy, ValuePolicy, policy_params
from aem_jax.models.pretrained import resolve
from aem_jax.models.weights import load_params
from aem_jax.overrides import as_values, nested_values
from aem_jax.report import write_report
from aem_jax.selection import play_rounds
from aem_jax.train import Metrics, Parts, transcripts
from aem_jax.train import train as train_steps
from aem_jax.trajectory import Trajectory
from aem_jax.warmstart import demonstrations, fitting, warmstart

EVALUATIONS = "evaluations.jsonl"


def train(config: RunConfig) -> int:
    """Trains, or goes on where the run was stopped.

    Returns:
        The exit status: 0 when it is done, 130 or 143 when it was stopped and can go on.

    Raises:
        ConfigError: what is asked for cannot be done.
        StoppedError: it was stopped outside of the training steps, and can go on.
    """
    folder = Path(config.runs_dir) / config.name
    with opened(config, folder, writes=True) as (stage, checkpoints):
        is_first = stage.hosts.is_first
        if is_first:
            saved.save(config, folder, begun=checkpoints.latest is not None)
        stage = on_base(stage, checkpoints)
        state = _start(stage, checkpoints)
        if int(state.step) < config.train.num_steps:
            state = _train(stage, state, checkpoints)
        if int(state.step) < config.train.num_steps:
            return stage.stop.exit_status
        _evaluate(stage, state, "final", config.evaluation.splits, stop=stage.stop.check)
    if is_first:
        report = write_report(folder)
        print_summary(read_lines(folder / EVALUATIONS), sampled(config.sampling.temperature))
        print(f"report: {report}", flush=True)
    return 0


def evaluate(config: RunConfig) -> int:
    """Evaluates the latest checkpoint of a run on its fixed sets: JSON lines on stdout, a table on stderr.

    Returns:
        The exit status, as of `train`.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    folder = Path(config.runs_dir) / config.name
    with opened(config, folder) as (stage, checkpoints):
        stage = on_base(stage, checkpoints)
        state = restore(stage, checkpoints)
        params, records, is_first = stage.laid_out(state.params), [], stage.hosts.is_first
        for split in config.evaluation.splits:
            tasks, name = stage.suite.evaluation(split, config.evaluation.size)
            found, _ = evaluate_policy(stage.rollout, params, tasks, stage.key("evaluate"), name=name, split=split)
            records.append(found.record(int(state.step), "evaluate"))
            if is_first:
                print(json_line(records[-1]), flush=True)
            if stage.stop.look():
                return stage.stop.exit_status
    if is_first:
        print_summary(records, sampled(config.sampling.temperature), sys.stderr)
    return 0


@contextmanager
def opened(config: RunConfig, folder: Path, writes: bool = False) -> Iterator[tuple[Stage, Checkpoints]]:
    """The machine set up, checkpoints and stage opened; what cannot be had is a `ConfigError`.

    Args:
        config: the run's.
        folder: the run's.
        writes: whether the run goes on. Else nothing in its folder is changed, and another process may write to it.
    """
    with ExitStack() as stack:
        try:
            runtime.set_up(config.runtime)  # before anything computes, and checkpoints do
            hosts = stack.enter_context(join.joined(config.runtime))
            join.check_same(hosts, _identity(config))
            if writes and hosts.is_first and (folder / saved.FILE).exists():
                saved.check_resumable(saved.load(folder), config, folder)
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints", config.checkpoint, hosts))
            if writes:  # The folder next: whoever cannot write there should know before anything else is begun.
                join.check_shared(hosts, folder)
                checkpoints.claim()
            begun = hosts.of_first(checkpoints.latest is not None)
            if not (begun or writes):
                raise ConfigError(f"no checkpoint in {folder}; train it first")
            if begun and hosts.is_first and not (folder / saved.FILE).exists():
                raise ConfigError(
                    f"expected the {saved.FILE} that {folder} was begun with beside its checkpoints, got none; "
                    "put a copy back, or give another --name to begin a new run"
                )
            if begun and hosts.is_first:
                inputs.check_sources(folder, config, "refuse" if writes else "warn")
            elif writes and hosts.is_first:
                (folder / inputs.FILE).unlink(missing_ok=True)  # of a try that ended before anything was decided
            stage = open_stage(config, folder, stack, hosts, begun)
        except (CheckpointError, EnvError, ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        try:
            yield stage, checkpoints
        except (CheckpointError, EnvError, OSError) as error:
            stopped = f"the run was stopped: {error}; the same command resumes it"
            raise ConfigError(stopped if writes else str(error)) from error


def _identity(config: RunConfig) -> dict[str, Any]:
    """What all processes of a run have in common: versions and settings."""
    own = {name: value for name, value in runtime.versions().items() if name not in ("cpus", "devices")}
    return own | {flag(name): value for name, value in as_values(config).items()}


def on_base(stage: Stage, checkpoints: Checkpoints) -> Stage:
    """The stage with the frozen weights of its adapter, which are made first if need be; without LoRA, as it is."""
    config, folder = stage.config, stage.folder
    if not config.lora.rank:
        return stage
    if components.warm_start_makes_base(config) and not frozen_weights.is_there(folder):
        if stage.hosts.count > 1:
            raise ConfigError(
                "--lora.rank: expected --model.path (frozen weights in files) where several processes run, got none; "
                "train with one process first, export the run, and give that folder"
            )
        if checkpoints.latest is not None:
            raise ConfigError(
                f"expected the frozen weights of this LoRA run in {folder / frozen_weights.FOLDER}, got none"
            )
        whole = dataclasses.replace(stage, policy=stage.policy.whole)
        source = _parameters(whole) if config.warmstart.episodes == 0 else _fit(whole, _demonstrations(whole)).params
        frozen_weights.save(folder, stage.policy.whole, stage.mesh, source, stage.chat.stop_ids)
    recorded = stage.hosts.of_first(inputs.load(folder).get(inputs.FROZEN) if stage.hosts.is_first else None)
    frozen, found = frozen_weights.load(config, folder, stage.policy.whole, stage.mesh, recorded)
    if recorded is None and checkpoints.is_writer and stage.hosts.is_first:
        inputs.write(folder, {**inputs.load(folder), inputs.FROZEN: found})
    return stage.on(frozen)


def _start(stage: Stage, checkpoints: Checkpoints) -> TrainState:
    """The state to train from: the latest checkpoint's, else a warm start's, which is saved and evaluated."""
    config = stage.config
    state = _warm_start(stage, checkpoints) if checkpoints.latest is None else restore(stage, checkpoints)
    if stage.hosts.is_first:
        drop_lines(stage.folder / EVALUATIONS, int(state.step) + 1)
    if int(state.step) == 0:
        if config.evaluation.baselines:
            _baselines(stage)
        _evaluate(stage, state, "warmstart", config.evaluation.splits, stop=stage.stop.check)
    return state


def restore(stage: Stage, checkpoints: Checkpoints, step: int | None = None) -> TrainState:
    """The state of a step, or of the latest that can be read."""
    optimizer = make_optimizer(stage.config.learner, stage.trained.axes)
    return checkpoints.restore(abstract_state(stage.trained, optimizer, stage.mesh), step)


def _warm_start(stage: Stage, checkpoints: Checkpoints) -> TrainState:
    """A state at step 0: another run's, or the model's parameters or random ones, fitted to demonstrations if there are
    to be any."""
    config, trained = stage.config, stage.trained
    optimizer = make_optimizer(config.learner, trained.axes)
    checkpoints.check_space(abstract_state(trained, optimizer, stage.mesh))
    begins = bool(config.warmstart.begin_from)
    fits = config.warmstart.episodes > 0 and not begins and not components.warm_start_makes_base(config)
    source = _fit(stage, _demonstrations(stage)).params if fits else _parameters(stage)
    if isinstance(trained, ValuePolicy) and not isinstance(source, jax.Array):  # a key makes all of it
        source = jax.jit(trained.attach)(source)
    state = init_state(trained, optimizer, stage.mesh, source)
    checkpoints.save(0, state)
    return state


def _parameters(stage: Stage) -> Any:
    """What training begins from: float32 parameters of another run or the model's files, or a key for random ones."""
    if isinstance(stage.policy, LoraPolicy):
        return jax.random.fold_in(stage.key("init"), 1)  # the key itself is that of random weights
    if stage.config.warmstart.begin_from:
        return init_from.parameters(stage.config, stage.policy, stage.chat.vocab_size, stage.mesh)
    if not stage.config.model.path:
        return stage.key("init")
    folder = resolve(stage.config.model.path)
    try:
        return load_params(folder, stage.policy, mesh=stage.mesh, dtype="float32")
    except ValueError as error:
        raise ConfigError(f"--model.path: {error}") from error


def _fit(stage: Stage, demonstrations: Sequence[Trajectory]) -> TrainState:
    config, settings = stage.config, stage.config.warmstart
    learner = components.warmstart_learner(config)
    optimizer = make_optimizer(learner, stage.policy.axes)
    lines, is_first = stage.folder / "warmstart.jsonl", stage.hosts.is_first
    if is_first:
        drop_lines(lines, 0)

    def report(step: int, stats: Mapping[str, Any]) -> None:
        stage.stop.check()
        values = {f"learner/{name}": float(value) for name, value in jax.device_get(stats).items()}
        if is_first:
            append_line(lines, {"step": step, **values})
        stage.report("warm start", step + 1, settings.steps, values)

    return warmstart(
        init_state(stage.policy, optimizer, stage.mesh, _parameters(stage)),
        demonstrations,
        update=partial(make_supervised_update(stage.policy, learner, stage.mesh), frozen=stage.frozen),
        place=lambda batch: place(batch, stage.mesh),
        layout=components.batch_layout(config, settings.batch_episodes, 1),
        config=settings,
        seed=config.seed,
        report=report,
    )


def _demonstrations(stage: Stage) -> list[Trajectory]:
    rollout, settings = stage.config.rollout, stage.config.warmstart
    if stage.suite.demonstrator is None:
        raise ValueError(
            f"expected --warmstart.episodes 0 with {stage.suite.name}, got {settings.episodes}; "
            "this environment has no expert to learn from"
        )
    tasks, found = stage.suite.training[: settings.episodes], []
    with closing(stage.suite.make_env()) as env:
        how = {"instruction": rollout.instruction, "max_turns": rollout.max_turns}
        episodes = demonstrations(env, stage.suite.demonstrator, tasks, stage.chat, **how)
        for count, episode in enumerate(episodes, start=1):
            stage.stop.check()
            found.append(episode)
            stage.report("demonstrations", count, settings.episodes, {})
    # A task that broke in one process is left out in all: they learn from the same.
    broken = set().union(*stage.hosts.gather_json([at for at, episode in enumerate(found) if episode is None]))
    shown = [
        each for at, each in enumerate(found) if at not in broken and (each.success or not settings.only_successful)
    ]
    learnt = fitting(shown, rollout.context_tokens)
    if not learnt:
        raise ConfigError(
            f"--warmstart.episodes: expected demonstrations to learn from, got none; the expert solved {len(shown)} of "
            f"{len(found)} episodes, and none of them has a turn within rollout.context_tokens {rollout.context_tokens}"
        )
    return learnt


def _train(stage: Stage, state: TrainState, checkpoints: Checkpoints) -> TrainState:
    config, folder, start = stage.config, stage.folder, int(state.step)
    num_steps, num_groups = config.train.num_steps, config.rollout.groups_per_step
    layout = components.batch_layout(config, num_groups * config.rollout.group_size, config.learner.num_minibatches)
    tasks = task_groups(stage.suite.training, config.selection.tasks_per_round(num_groups), seed=config.seed)
    is_first = stage.hosts.is_first
    settings = nested_values(config)
    writer = MetricsWriter(folder, config.metrics, start_step=start, run_config=settings) if is_first else None

    def finish(
        state: TrainState, step: int, metrics: Metrics, trajectories: Sequence[Trajectory], credit: Credit
    ) -> None:
        done = step + 1
        if writer:
            writer.write(step, metrics)
        stage.report("train", done, num_steps, metrics)
        score = None
        if config.evaluation.every and (done % config.evaluation.every == 0 or done == num_steps):
            # What was trained last is looked at before it is saved: it may be the best.
            phase = "final" if done == num_steps else "train"
            score = _evaluate(stage, state, phase, config.evaluation.splits[:1])
        stopping = stage.stop.look()
        if done % config.train.save_every == 0 or done == num_steps or score is not None or stopping:
            if writer:
                shown = transcripts(trajectories, credit, step)
                writer.later(lambda: write_text(folder / "transcripts.json", json_line(shown)))
                writer.wait()  # a checkpoint never stands beside fewer lines than it has steps
            checkpoints.save(done, state, score=score)

    parts = Parts(
        warm_up=stage.rollout.warm_up,
        play=partial(play_rounds, stage.rollout, tasks, components.selection_rule(config)),
        reshard=stage.laid_out,
        collate=lambda found, step: place(collate(found, layout, seed=(config.seed, step)), stage.mesh),
        credit=make_credit(
            response_advantages(config.algorithm), config.aem, num_groups, stage.mesh, value_targets(config.algorithm)
        ),
        update=partial(make_update(stage.trained, components.learner(config), stage.mesh), frozen=stage.frozen),
        reference=_reference(stage, checkpoints),
        finish=finish,
        stop=stage.stop.look,
        values=stage.make_values(),
    )
    with writer or nullcontext():
        state = train_steps(state, parts, stage.key("train"), num_steps)
    if stage.stop.look() and checkpoints.latest != int(state.step):
        checkpoints.save(int(state.step), state)  # asked between the step's own look and now
    return state


def _reference(stage: Stage, checkpoints: Checkpoints):
    """batch -> logprobs of the policy as it was before reinforcement learning; None where no KL is asked for."""
    if not stage.config.learner.kl_coefficient:
        return None
    if components.reference_is_base(stage.config):
        policy, params = stage.policy.whole, stage.frozen
    else:
        params = policy_params(stage.trained, restore(stage, checkpoints, step=0).params)
        policy, params = stage.policy, params if stage.frozen is None else (params, stage.frozen)
    token_logprobs = make_token_logprobs(policy, stage.config.learner, stage.mesh)
    return lambda batch: token_logprobs(params, batch)


def _evaluate(
    stage: Stage, state: TrainState, phase: str, splits: Sequence[str], stop: Callable[[], None] = lambda: None
) -> float | None:
    """Plays the fixed sets, and writes a line for each that is not there already; returns the last success measured.

    `stop` is called after each, and may raise.
    """
    step, lines = int(state.step), stage.folder / EVALUATIONS
    params = success = None
    for count, split in enumerate(splits, start=1):
        tasks, name = stage.suite.evaluation(split, stage.config.evaluation.size)
        if stage.hosts.of_first(_is_done(lines, phase, name, step)):
            continue
        params = stage.laid_out(state.params) if params is None else params
        found, _ = evaluate_policy(stage.rollout, params, tasks, stage.key("evaluate"), name=name, split=split)
        if stage.hosts.is_first:
            append_line(lines, found.record(step, phase))
        success = found.rate.success if found.rate.count else None
        stage.report(f"evaluate ({phase})", count, len(splits), {"rollout/success": found.rate.success})
        stop()
    return success


def _baselines(stage: Stage) -> None:
    """Plays the fixed sets with the scripted agents: in process 0, for no device is needed."""
    config, lines, env = stage.config, stage.folder / EVALUATIONS, None
    agents = [(split, name) for split in config.evaluation.splits for name in stage.suite.baselines]
    with ExitStack() as stack:
        for count, (split, agent) in enumerate(agents, start=1):
            stage.stop.check()
            tasks, name = stage.suite.evaluation(split, config.evaluation.size)
            if not stage.hosts.is_first or _is_done(lines, agent, name, 0):
                continue
            make_act, max_turns = stage.suite.baselines[agent], config.rollout.max_turns
            env = env or stack.enter_context(closing(stage.suite.make_env()))
            found = evaluate_agent(env, make_act, tasks, max_turns=max_turns, name=name, split=split)
            append_line(lines, found.record(0, agent))
            stage.report("baselines", count, len(agents), {"rollout/success": found.rate.success})


def _is_done(lines: Path, phase: str, name: str, step: int) -> bool:
    wanted = (phase, name, step)
    return any((each.get("phase"), each.get("set"), each.get("step")) == wanted for each in read_lines(lines))
