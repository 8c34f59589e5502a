"""`analyze RUN`: the paper's claims about α and entropy put to the test on a run's policy.

A run keeps no whole trajectories, and those of its last step were not played by the policy that was saved after it. So
a rollout is played from the checkpoint, with the run's own settings and a key of its own: the policy that α, surprisal
and draws are taken from is then one and the same.
"""

import dataclasses
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.advantage import token_advantages
from aem_jax.analysis.claims import SIGNS, choose, circumstances, drift, proxy, whose_entropy
from aem_jax.analysis.draws import Draws, draw_responses
from aem_jax.analysis.states import State, states_of
from aem_jax.batch import Batch, collate, place
from aem_jax.config import components, saved
from aem_jax.config.algorithms import response_advantages
from aem_jax.credit import AemConfig, Credit, make_credit
from aem_jax.errors import ConfigError
from aem_jax.launch.run import on_base, opened, restore
from aem_jax.launch.stage import Stage
from aem_jax.learner import init_state, make_optimizer, make_update
from aem_jax.models import policy_params
from aem_jax.report.analysis import print_analysis, write_analysis
from aem_jax.rollout import check_some_played
from aem_jax.sampler import Sampler
from aem_jax.trajectory import Ending

FOLDER = "analysis"
"""In the folder of the run."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """What is analysed."""

    against: str = ""
    """Folder of another run, whose training curves are laid beside this one's: one without AEM, say."""
    step: int = -1
    """Checkpoint to analyse; -1 takes the latest."""
    states: int = 64
    """States (turns of fresh episodes) that responses are drawn in."""
    draws: int = 64
    """Responses drawn in each state."""
    groups: int = 0
    """Rollout groups that states are taken from; 0 takes the run's rollout.groups_per_step."""
    step_size: float = 0.1
    """Of the update whose drift is measured, in multiples of the run's learning rate: small, for what is predicted is
    the first order alone."""
    min_range: float = -1.0
    """Groups whose response entropies span less (nats) keep alpha = 1; -1 takes the run's aem.min_range."""
    seed: int = 0
    """Of the tasks, the episodes, the choice of states and the draws."""

    def __post_init__(self) -> None:
        for name, least in (("states", 2), ("draws", 2), ("groups", 0), ("step", -1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32 - 1:
            raise ValueError(f"expected seed from 0 to {2**32 - 2}, got {self.seed}")
        if self.step_size <= 0:
            raise ValueError(f"expected step_size > 0, got {self.step_size}")


def analyze(folder: Path, options: AnalyzeConfig) -> int:
    """Writes RUN/analysis: analysis.json, a page, pictures; prints a table.

    Returns:
        The exit status: 0, or 130 or 143 when stopped.

    Raises:
        ConfigError: no such run, no such checkpoint, or no response that α has changed.
    """
    recorded = saved.load(folder)
    if options.against:
        saved.load(Path(options.against))
    config = replace(recorded, name=folder.resolve().name, runs_dir=str(folder.resolve().parent))
    groups = options.groups or config.rollout.groups_per_step
    began = time.perf_counter()
    context: AbstractContextManager[Any] = opened(config, folder)
    with context as (stage, checkpoints):
        if stage.hosts.count > 1:
            raise ConfigError("analyze runs in one process; start it without the others")
        step = None if options.step < 0 else options.step
        if step is not None and step not in checkpoints.steps:
            there = ", ".join(map(str, checkpoints.steps)) or "none"
            raise ConfigError(f"--step: expected a checkpoint of {folder}, got {step}; there are {there}")
        stage = on_base(stage, checkpoints)
        state = restore(stage, checkpoints, step)
        step, params = int(state.step), state.params
        found = _analysis(stage, params, options, groups)
    found = {"run": config.name, "step": step, "options": dataclasses.asdict(options), **found}
    found["seconds"] = round(time.perf_counter() - began)
    page = write_analysis(folder, found, Path(options.against) if options.against else None, folder / FOLDER)
    print_analysis(found)
    print(f"analysis: {page}", flush=True)
    return 0


def _analysis(stage: Stage, params: Any, options: AnalyzeConfig, groups: int) -> dict[str, Any]:
    """Plays, draws, updates and draws again."""
    config, key = stage.config, jax.random.fold_in(stage.key("evaluate"), options.seed + 1)
    play, draw = jax.random.split(key)
    values = stage.make_values()
    trained, params = params, policy_params(stage.trained, params)
    decode = stage.reshard(params)
    picked = np.random.default_rng(options.seed).integers(len(stage.suite.training), size=groups)
    tasks = [stage.suite.training[int(index)] for index in picked]
    stage.report("play", 0, groups * config.rollout.group_size, {})
    trajectories, stats = stage.rollout(decode, tasks, play)
    check_some_played(trajectories, stats, "the analysis")
    whole = [each for each in trajectories if each.ending is not Ending.ENV_ERROR]
    layout = components.batch_layout(config, len(trajectories), 1)
    batch = place(collate(trajectories, layout), stage.mesh)
    # α as the paper has it, also for a run without it or with an ablation of it: that is what is asked about.
    aem = AemConfig(min_range=config.aem.min_range if options.min_range < 0 else options.min_range)
    credit, statistics = make_credit(response_advantages(config.algorithm), aem, groups, stage.mesh)(
        batch, values=values(trained, batch) if values else None
    )
    base, alpha, entropies = (np.asarray(x, np.float64) for x in (credit.base, credit.coefficients, credit.entropies))
    every = states_of(trajectories, config.rollout.response_tokens, config.rollout.context_tokens)
    numbers = np.array([each.response for each in every])
    weights = np.where(alpha[numbers] != 1, 1 + (base[numbers] != 0), 0)
    chosen = choose(weights, options.states, options.seed)
    around = circumstances(
        every, alpha[numbers], entropies[numbers], np.array([each.group for each in every]), aem.min_range
    )
    played = {
        "episodes": len(whole),
        "success": float(np.mean([each.success for each in whole])) if whole else None,
        "positive_share": float(statistics["advantage/positive_share"]),
        "nonzero_share": float(statistics["advantage/nonzero_share"]),
        **around,
    }
    if len(chosen) < 2:
        raise ConfigError(
            f"expected at least 2 responses whose α is not 1, got {len(chosen)}: the entropies of each group span less "
            f"than --min-range {aem.min_range}; take another --step, or lower it"
        )
    states = [every[index] for index in chosen]
    own_alpha, own_base = alpha[numbers[chosen]], base[numbers[chosen]]

    drawing = _Drawing(stage, states, draw, options.draws)
    before = drawing("draw", decode)
    found: dict[str, Any] = {"rollout": played, "proxy": proxy(states, own_alpha, before), "drift": {}}
    found["entropy"] = whose_entropy(before)
    for name, sign in SIGNS.items():
        updated = _updated(stage, params, batch, credit, sign, options)
        after = drawing(f"draw after an update ({name})", stage.reshard(updated))
        found["drift"][name] = drift(states, own_alpha, own_base, before, after, sign)
    return found


def _updated(stage: Stage, params: Any, batch: Batch, credit: Credit, sign: int, options: AnalyzeConfig) -> Any:
    """Parameters after one update on the responses of one sign of A·(α − 1), with their base advantages A."""
    learner = replace(
        components.learner(stage.config),
        learning_rate=stage.config.learner.learning_rate * options.step_size,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        kl_coefficient=0.0,
        num_minibatches=1,
        num_epochs=1,
    )
    optimizer = make_optimizer(learner, stage.policy.axes)
    state = init_state(stage.policy, optimizer, stage.mesh, jax.tree.map(jnp.copy, params))
    kept = jnp.where(jnp.sign(credit.base * (credit.coefficients - 1)) == sign, credit.base, 0.0)
    advantages = token_advantages(kept, jnp.asarray(batch.response_ids))
    state, _ = make_update(stage.policy, learner, stage.mesh)(state, batch, advantages, frozen=stage.frozen)
    return state.params


@dataclass(frozen=True)
class _Drawing:
    """Draws responses to the same states with the same random numbers, whatever the parameters."""

    stage: Stage
    states: list[State]
    key: jax.Array
    draws: int

    def __call__(self, phase: str, params: Any) -> Draws:
        stage, config = self.stage, self.stage.config
        sampler = Sampler(
            components.sampled_policy(config, stage.policy),
            config.sampling,
            stage.chat.stop_ids,
            capacity=config.rollout.context_tokens,
            slack=config.rollout.slack,
            windows=config.rollout.windows,
            mesh=stage.mesh,
        )
        shards = sampler.slot_shards
        draws = -(-self.draws // shards) * shards

        def report(done: int) -> None:
            stage.stop.check()
            stage.report(phase, done, len(self.states), {})

        return draw_responses(sampler, params, self.states, self.key, draws, config.rollout, report)
