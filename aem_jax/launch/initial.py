"""The state that training starts from: a checkpoint, another run, a model's files, or a warm start.

A LoRA run without --model.path first trains all weights on demonstrations; these then are its frozen weights.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import jax

from aem_jax.config import components, inputs
from aem_jax.errors import ConfigError
from aem_jax.launch import frozen_weights, init_from
from aem_jax.launch.context import RunContext
from aem_jax.learner import TrainState, abstract_state, init_state, make_supervised_update
from aem_jax.metrics import append_line, drop_lines
from aem_jax.models import Params, Policy
from aem_jax.models.pretrained import resolve
from aem_jax.models.weights import load_params
from aem_jax.trajectory import Trajectory
from aem_jax.warmstart import demonstrations, fitting, warmstart, warn_of_long_responses


def load_frozen_weights(run: RunContext) -> Params:
    """The frozen weights of a LoRA run, in the train layout; empty without LoRA. Makes them if they are missing.

    Raises:
        ConfigError: they are missing and cannot be made, or are not those that the adapter was trained with.
    """
    config, folder, policy, is_first = run.config, run.folder, run.policy, run.processes.is_first
    if not policy.lora:
        return {}
    if components.warm_start_makes_frozen_weights(config) and not frozen_weights.is_there(folder):
        _make_frozen_weights(run, policy.base)
    recorded = run.processes.broadcast(inputs.load(folder).get(inputs.FROZEN) if is_first else None)
    frozen, sums = frozen_weights.load(config, folder, policy.base, run.mesh, recorded)
    if config.warmstart.init_from and run.checkpoints.latest is None:
        init_from.check_frozen(config, sums)
    if recorded is None and run.checkpoints.is_writer and is_first:
        inputs.write(folder, {**inputs.load(folder), inputs.FROZEN: sums})
    return frozen


def _make_frozen_weights(run: RunContext, policy: Policy) -> None:
    if run.processes.count > 1:
        raise ConfigError(
            "--lora.rank: expected --model.path (frozen weights in files) where several processes run, got none; "
            "train with one process first, export the run, and give that folder"
        )
    if run.checkpoints.latest is not None:
        raise ConfigError(
            f"expected the frozen weights of this LoRA run in {run.folder / frozen_weights.FOLDER}, got none"
        )
    params = _fitted(run, policy, {}) if run.config.warmstart.episodes else initial_parameters(run, policy, {})
    frozen_weights.save(run.folder, policy, run.mesh, run.key("init"), params, run.chat.stop_ids)


def initial_state(run: RunContext, frozen: Params) -> TrainState:
    """The state at step 0, which is saved: initial parameters, fitted to demonstrations if there are to be any."""
    config, policy = run.config, run.policy
    run.checkpoints.check_space(abstract_state(policy, config.learner, run.mesh).without_frozen())
    is_fitted = config.warmstart.init_from or components.warm_start_makes_frozen_weights(config)
    if config.warmstart.episodes and not is_fitted:
        params = _fitted(run, replace(policy, value=False), frozen)
        state = init_state(policy, config.learner, run.mesh, run.key("init"), params)
    else:
        state = unfitted_state(run, frozen)
    run.save(state)
    return state


def unfitted_state(run: RunContext, frozen: Params) -> TrainState:
    """The state without a warm start."""
    params = initial_parameters(run, run.policy, frozen)
    return init_state(run.policy, run.config.learner, run.mesh, run.key("init"), params)


def initial_parameters(run: RunContext, policy: Policy, frozen: Params) -> Params:
    """The parts of `policy` that are not random: frozen weights, what another run has trained, or a model's files.

    Raises:
        ConfigError: the other run or the files cannot be used.
    """
    config = run.config
    if config.warmstart.init_from:
        return {**frozen, **init_from.parameters(config, policy, run.chat.vocab_size, run.mesh)}
    if policy.lora:
        return frozen
    if not config.model.path:
        return {}
    try:
        return load_params(resolve(config.model.path), policy.base, mesh=run.mesh, dtype="float32")
    except ValueError as error:
        raise ConfigError(f"--model.path: {error}") from error


def _fitted(run: RunContext, policy: Policy, frozen: Params) -> Params:
    """Parameters of `policy` after supervised learning on the run's demonstrations."""
    config, settings = run.config, run.config.warmstart
    episodes = _demonstrations(run)
    learner = components.warmstart_learner(config)
    lines, is_first = run.folder / "warmstart.jsonl", run.processes.is_first
    if is_first:
        drop_lines(lines, 0)

    def report(step: int, stats: Mapping[str, Any]) -> None:
        run.stop.check()
        values = {f"learner/{name}": float(value) for name, value in jax.device_get(stats).items()}
        if is_first:
            append_line(lines, {"step": step, **values})
        run.report("warm start", step + 1, settings.steps, values)

    params = initial_parameters(run, policy, frozen)
    state = warmstart(
        init_state(policy, learner, run.mesh, run.key("init"), params),
        episodes,
        update=make_supervised_update(policy, learner, run.mesh),
        layout=components.batch_layout(config, settings.batch_episodes, 1),
        mesh=run.mesh,
        config=settings,
        seed=config.seed,
        report=report,
    )
    return state.params


def _demonstrations(run: RunContext) -> Sequence[Trajectory]:
    rollout, settings = run.config.rollout, run.config.warmstart
    assert run.suite.demonstrator is not None, "task_suite refuses a warm start without an expert"
    tasks, episodes = run.suite.training[: settings.episodes], []
    with closing(run.suite.make_env()) as env:
        for episode in demonstrations(env, run.suite.demonstrator, tasks, run.chat, rollout, run.suite.prompt):
            run.stop.check()
            episodes.append(episode)
            run.report("demonstrations", len(episodes), settings.episodes, {})
    # All processes learn from the same episodes: a task that broke in one of them is left out in all.
    own = [number for number, episode in enumerate(episodes) if episode is None]
    broken = set().union(*run.processes.gather_json(own))
    intact = [episode for number, episode in enumerate(episodes) if number not in broken]
    shown = [episode for episode in intact if episode.success or not settings.only_successful]
    learnt = fitting(shown, rollout.context_tokens)
    if not learnt:
        raise ConfigError(
            f"--warmstart.episodes: expected demonstrations to learn from, got none; the expert solved {len(shown)} of "
            f"{len(episodes)} episodes, and none of them has a turn within rollout.context_tokens "
            f"{rollout.context_tokens}"
        )
    warn_of_long_responses(learnt, rollout.response_tokens)
    return learnt
