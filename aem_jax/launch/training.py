"""A run from its config: warm start, evaluation, training, evaluation, report.

Finished phases are skipped, so rerunning the command resumes the run.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import jax

from aem_jax.batch import Batch
from aem_jax.config import components, saved
from aem_jax.config.algorithms import response_advantages, value_targets
from aem_jax.config.run import RunConfig
from aem_jax.credit import Credit, make_credit
from aem_jax.data import task_groups
from aem_jax.errors import ConfigError
from aem_jax.files import write_text
from aem_jax.launch import evaluation, init_from
from aem_jax.launch.context import RunContext, open_run, values_function
from aem_jax.launch.efficiency import make_live
from aem_jax.launch.initial import initial_state, load_frozen_weights, unfitted_state
from aem_jax.learner import TrainState, make_token_logprobs, make_update
from aem_jax.metrics import MetricsWriter, drop_lines, json_line, read_lines
from aem_jax.report import write_report
from aem_jax.rollout import group_attempts
from aem_jax.selection import StepEpisodes
from aem_jax.train import Metrics, transcripts
from aem_jax.train import train as train_steps
from aem_jax.trajectory import Trajectory


def train(config: RunConfig) -> int:
    """Trains, or resumes where the run was stopped.

    Returns:
        The exit status: 0 when the run is done, 130 or 143 when it was stopped and can be resumed.

    Raises:
        ConfigError: the config cannot be run.
        StoppedError: the run was stopped outside of the training steps, and can be resumed.
    """
    folder = Path(config.runs_dir) / config.name
    with open_run(config, folder, writes=True) as run:
        is_first = run.processes.is_first
        if config.warmstart.init_from and run.checkpoints.latest is None:
            init_from.check(config, run.policy, run.chat.vocab_size)  # before the folder belongs to these settings
        if is_first:
            saved.save(config, folder, begun=run.checkpoints.latest is not None)
        state = _start(run)
        if int(state.step) < config.train.num_steps:
            state = _train(run, state)
        if int(state.step) < config.train.num_steps:
            return run.stop.exit_status
        _score(run, state, run.stop.check)
        _evaluate(run, state, "final", stop=run.stop.check)
    if is_first:
        try:
            report = write_report(folder)
        except OSError as error:
            raise ConfigError(f"{error}; the run is complete, and the same command writes its report again") from error
        records = read_lines(folder / evaluation.FILE)
        evaluation.print_summary(records, evaluation.sampled(config.sampling.temperature))
        print(f"report: {report}", flush=True)
    return 0


def _start(run: RunContext) -> TrainState:
    """The latest checkpoint's state, else an initial one. At step 0 it is evaluated, and so are the baselines: scripted
    agents, and a pretrained model before its warm start."""
    frozen, config = load_frozen_weights(run), run.config
    if run.checkpoints.latest is None:
        if _has_zero_shot(config):
            _evaluate(run, unfitted_state(run, frozen), evaluation.ZERO_SHOT, stop=run.stop.check)
        state = initial_state(run, frozen)
    else:
        state = run.restore(frozen)
    if run.processes.is_first:
        drop_lines(run.folder / evaluation.FILE, int(state.step) + 1)
    if int(state.step) == 0:
        if config.evaluation.baselines:
            evaluation.play_baselines(run)
        _evaluate(run, state, "warmstart", stop=run.stop.check)
    return state


def _has_zero_shot(config: RunConfig) -> bool:
    """Whether a pretrained model is evaluated before its warm start."""
    fitted = config.warmstart.episodes and not config.warmstart.init_from
    return bool(config.evaluation.baselines and config.model.path and fitted)


def _train(run: RunContext, state: TrainState) -> TrainState:
    config, folder, mesh = run.config, run.folder, run.mesh
    num_steps, num_groups = config.train.num_steps, config.rollout.groups_per_step
    num_episodes = num_groups * config.rollout.group_size
    settings = dataclasses.asdict(config)
    is_first, start = run.processes.is_first, int(state.step)
    if start:
        _score(run, state, run.stop.check)  # the run may have been killed while it evaluated this state
    tasks = task_groups(run.suite.training, config.selection.tasks_per_round(num_groups), seed=config.seed)
    carried = run.carried(start, group_attempts(tasks, run.key("train"), config.rollout))
    writer = MetricsWriter(folder, config.metrics, start_step=start, run_config=settings) if is_first else None

    def on_step(state: TrainState, step: int, metrics: Metrics, episodes: StepEpisodes, credit: Credit) -> None:
        nonlocal carried
        done, carried = step + 1, episodes.carried
        if writer:
            writer.write(step, metrics)
        run.report("train", done, num_steps, metrics)
        stopping = run.stop.look()
        if done % config.train.save_every == 0 or _has_score(config, done) or done == num_steps or stopping:
            if writer:
                shown = transcripts(episodes.trajectories, credit, step)
                writer.submit(lambda: write_text(folder / "transcripts.json", json_line(shown)))
                writer.wait()  # the metrics of a checkpoint's steps are on disk before the checkpoint
            run.save(state, carried)
        if not stopping:  # else the resumed run evaluates it
            _score(run, state)

    with writer or nullcontext():
        state = train_steps(
            state,
            rollout=run.rollout,
            tasks=tasks,
            rule=components.selection_rule(config),
            layout=components.batch_layout(config, num_episodes, config.learner.num_minibatches, run.policy.config),
            mesh=mesh,
            reshard=run.reshard,
            credit=make_credit(
                response_advantages(config.algorithm), config.aem, num_groups, mesh, value_targets(config.algorithm)
            ),
            update=make_update(
                run.policy, components.learner(config), mesh, None if carried is None else config.rollout.carry_max_age
            ),
            reference=_reference(run, state),
            values=values_function(run),
            carried=carried,
            prepare=run.suite.prepare,
            measure=_measure(run),
            key=run.key("train"),
            seed=config.seed,
            num_steps=num_steps,
            on_step=on_step,
            should_stop=run.stop.look,
        )
    if run.stop.look() and run.checkpoints.latest != int(state.step):
        run.save(state, carried=carried)  # the signal came after `on_step` had looked
    return state


def _has_score(config: RunConfig, done: int) -> bool:
    """Whether the policy is evaluated after so many steps."""
    every = config.evaluation.every
    return every > 0 and (done % every == 0 or done == config.train.num_steps)


def _score(run: RunContext, state: TrainState, stop: Callable[[], None] = lambda: None) -> None:
    """Evaluates a saved state on the first set if it is due, for the score that decides which checkpoint is the best.

    After the checkpoint, so that a run that is killed during an evaluation loses nothing else.
    """
    done = int(state.step)
    if not _has_score(run.config, done):
        return
    phase = "final" if done == run.config.train.num_steps else "train"
    success = _evaluate(run, state, phase, run.config.evaluation.splits[:1], stop)
    if success is not None:
        run.checkpoints.score(done, success)


def _evaluate(
    run: RunContext,
    state: TrainState,
    phase: str,
    splits: Sequence[str] | None = None,
    stop: Callable[[], None] = lambda: None,
) -> float | None:
    splits = run.config.evaluation.splits if splits is None else splits
    return evaluation.evaluate_splits(run, state.params, int(state.step), phase, splits, stop)


def _measure(run: RunContext) -> Callable[[TrainState, int, Sequence[Trajectory], jax.Array], Metrics]:
    """The measurements of every `metrics.efficiency_every`-th step."""
    every = run.config.metrics.efficiency_every
    live = make_live(run) if every else None

    def measure(state: TrainState, step: int, trajectories: Sequence[Trajectory], key: jax.Array) -> Metrics:
        return live(state, trajectories, key) if live and step % every == 0 else {}

    return measure


def _reference(run: RunContext, state: TrainState) -> Callable[[Batch], jax.Array] | None:
    """batch -> log-probabilities of the policy before reinforcement learning; None without a KL penalty."""
    config, policy = run.config, run.policy
    if not config.learner.kl_coefficient:
        return None
    if components.reference_is_frozen_weights(config):
        policy, params = policy.base, state.frozen
    else:
        params = run.restore(state.frozen, step=0).params
    token_logprobs = make_token_logprobs(policy, config.learner, run.mesh)
    return lambda batch: token_logprobs(params, batch)
