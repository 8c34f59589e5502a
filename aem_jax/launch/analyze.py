"""`analyze RUN`: tests the paper's claims about α and entropy on a run's policy.

A run does not save its trajectories, and its last ones were played by an earlier policy than the saved one. So the
analysis plays a rollout from the checkpoint, with the run's settings and another key. α, surprisal and draws then come
from one policy.
"""

import dataclasses
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from aem_jax.advantage import token_advantages
from aem_jax.analysis.claims import SIGNS, choose, coefficient_inputs, drift, entropy_decomposition, proxy
from aem_jax.analysis.draws import Draws, draw_responses
from aem_jax.analysis.states import State, states_of
from aem_jax.batch import Batch, collate, place
from aem_jax.checkpoint import Choice
from aem_jax.config import components, saved
from aem_jax.config.algorithms import response_advantages
from aem_jax.credit import AemConfig, Credit, make_credit
from aem_jax.errors import ConfigError
from aem_jax.files import check_writable
from aem_jax.launch import efficiency
from aem_jax.launch.context import RunContext, open_run, values_function
from aem_jax.launch.initial import load_frozen_weights
from aem_jax.learner import init_state, make_update, partition
from aem_jax.models import Params
from aem_jax.report.analysis import print_analysis, write_analysis
from aem_jax.report.efficiency import print_efficiency, write_efficiency
from aem_jax.rollout import check_some_played
from aem_jax.sampler import Sampler

FOLDER = "analysis"
"""In the folder of the run."""
STEPS = 32
"""Training steps whose groups are played for efficiencies, whose noise falls as one over the number of groups."""


@dataclass(frozen=True)
class AnalyzeConfig:
    """Size and choice of an analysis."""

    against: str = ""
    """Folder of another run to compare training curves with, e.g. one without AEM."""
    step: Choice = "latest"
    """Checkpoint to analyse: its step, latest, or best (of the highest success in an evaluation)."""
    states: int = 64
    """Number of states (turns of new episodes) to draw responses in."""
    draws: int = 64
    """Number of responses to draw in each state."""
    groups: int = 0
    """Number of rollout groups to play; 0: the run's rollout.groups_per_step, with efficiency 32 times as many."""
    step_size: float = 0.1
    """Step size of the update whose drift is measured, in multiples of the run's learning rate. The prediction is of
    first order, so it holds for small steps."""
    min_range: float = -1.0
    """Groups whose response entropies span less (nats) keep alpha = 1; -1: the run's aem.min_range."""
    seed: int = 0
    """Seed of the tasks, the episodes, the choice of states and the draws."""
    efficiency: bool = False
    """In place of testing the claims, compare credit rules (base, AEM, its ablations, EMPG, GiGPO) by their gain of
    return per unit of step size; writes RUN/analysis/efficiency.html."""
    rules: tuple[str, ...] = ()
    """efficiency: rules to compare with the base algorithm; empty: all (aem, aem-0.5, aem-2, reversed, shuffled, sign,
    aem-trajectory, aem-batch, empg, gigpo)."""
    geometry: Literal["adam", "plain"] = "adam"
    """efficiency: sizes of steps as Adam scales them, with the run's second moments, or Euclidean."""
    sketch: int = 0
    """efficiency: numbers that a gradient is projected to at random; 0: exact. For large policies, e.g. 65536."""

    def __post_init__(self) -> None:
        for name, least in (("states", 2), ("draws", 2), ("groups", 0), ("sketch", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32 - 1:
            raise ValueError(f"expected seed from 0 to {2**32 - 2}, got {self.seed}")
        if unknown := set(self.rules) - set(efficiency.RULES):
            raise ValueError(f"expected rules of {', '.join(efficiency.RULES)}; got {', '.join(sorted(unknown))}")
        if self.efficiency and self.against:
            raise ValueError("expected efficiency without against, got both; the page of the claims shows other runs")
        alone = {"rules": self.rules, "geometry": self.geometry != "adam", "sketch": self.sketch}
        if not self.efficiency and (given := [name for name, value in alone.items() if value]):
            raise ValueError(f"expected efficiency with {', '.join(given)}, got none; add --efficiency True")
        if self.step_size <= 0:
            raise ValueError(f"expected step_size > 0, got {self.step_size}")


def analyze(folder: Path, options: AnalyzeConfig) -> int:
    """Writes RUN/analysis (analysis.json, a page, pictures) and prints a table.

    Returns:
        The exit status: 0, or 130 or 143 when stopped.

    Raises:
        ConfigError: no such run, no such checkpoint, or no response with α other than 1.
    """
    recorded = saved.load(folder)
    if options.against:
        saved.load(Path(options.against))
    try:
        check_writable(folder / FOLDER)  # before the work, not after it
    except OSError as error:
        raise ConfigError(str(error)) from error
    config = replace(recorded, name=folder.resolve().name, runs_dir=str(folder.resolve().parent))
    groups = options.groups or config.rollout.groups_per_step
    began = time.perf_counter()
    with open_run(config, folder) as run:
        if run.processes.count > 1:
            raise ConfigError("analyze runs in one process; start it without the others")
        chosen = run.checkpoints.find(options.step)
        state = run.restore(load_frozen_weights(run), chosen)
        step = int(state.step)
        if options.efficiency:
            results = efficiency.measure(
                run,
                state,
                groups=options.groups or STEPS * groups,
                chosen=options.rules or efficiency.RULES,
                min_range=config.aem.min_range if options.min_range < 0 else options.min_range,
                seed=options.seed,
                sketch=options.sketch,
                plain=options.geometry == "plain",
            )
        else:
            results = _analysis(run, state.params, options, groups)
    record = {"run": config.name, "step": step, "options": dataclasses.asdict(options), **results}
    record["seconds"] = round(time.perf_counter() - began)
    try:
        if options.efficiency:
            print_efficiency(record)
            page = write_efficiency(record, folder / FOLDER)
        else:
            print_analysis(record)
            page = write_analysis(folder, record, Path(options.against) if options.against else None, folder / FOLDER)
    except OSError as error:
        raise ConfigError(f"{error}; the table above has the numbers") from error
    print(f"analysis: {page}", flush=True)
    return 0


def _analysis(run: RunContext, params: Params, options: AnalyzeConfig, groups: int) -> dict[str, Any]:
    """Plays a rollout, draws responses, updates the policy, and draws again with the same random numbers."""
    config, key = run.config, jax.random.fold_in(run.key("evaluate"), options.seed + 1)
    play, draw = jax.random.split(key)
    values = values_function(run)
    decode = run.reshard(params)
    picked = np.random.default_rng(options.seed).integers(len(run.suite.training), size=groups)
    tasks = [run.suite.training[int(index)] for index in picked]
    run.report("play", 0, groups * config.rollout.group_size, {})
    trajectories, stats = run.rollout(decode, tasks, play)
    check_some_played(trajectories, stats, "the analysis")
    intact = [t for t in trajectories if not t.is_left_out]
    layout = components.batch_layout(config, len(trajectories), 1, run.policy.config)
    batch = place(collate(trajectories, layout), run.mesh)
    # α as in the paper, also for a run without it or with an ablation of it: the claims are about this α.
    aem = AemConfig(min_range=config.aem.min_range if options.min_range < 0 else options.min_range)
    credit, statistics = make_credit(response_advantages(config.algorithm), aem, groups, run.mesh)(
        batch, values=values(params, batch) if values else None
    )
    base, alpha, entropies = (np.asarray(x, np.float64) for x in (credit.base, credit.coefficients, credit.entropies))
    all_states = states_of(trajectories, config.rollout.response_tokens, config.rollout.context_tokens)
    numbers = np.array([state.response for state in all_states])
    weights = np.where(alpha[numbers] != 1, 1 + (base[numbers] != 0), 0)
    chosen = choose(weights, options.states, options.seed)
    around = coefficient_inputs(
        all_states,
        alpha[numbers],
        entropies[numbers],
        np.array([state.group for state in all_states]),
        aem.min_range,
    )
    played = {
        "episodes": len(intact),
        "success": float(np.mean([t.success for t in intact])) if intact else None,
        "positive_share": float(statistics["advantage/positive_share"]),
        "nonzero_share": float(statistics["advantage/nonzero_share"]),
        **around,
    }
    if len(chosen) < 2:
        raise ConfigError(
            f"expected at least 2 responses whose α is not 1, got {len(chosen)}: the entropies of each group span less "
            f"than --min-range {aem.min_range}; take another --step, or lower it"
        )
    states = [all_states[index] for index in chosen]
    own_alpha, own_base = alpha[numbers[chosen]], base[numbers[chosen]]

    drawing = _Drawing(run, states, draw, options.draws)
    before = drawing("draw", decode)
    results: dict[str, Any] = {"rollout": played, "proxy": proxy(states, own_alpha, before), "drift": {}}
    results["entropy"] = entropy_decomposition(before)
    for name, sign in SIGNS.items():
        updated = _updated(run, params, batch, credit, sign, options)
        after = drawing(f"draw after an update ({name})", run.reshard(updated))
        results["drift"][name] = drift(states, own_alpha, own_base, before, after, sign)
    return results


def _updated(
    run: RunContext, params: Params, batch: Batch, credit: Credit, sign: int, options: AnalyzeConfig
) -> Params:
    """Parameters after one update on the responses with one sign of A·(α − 1), with base advantages A.

    Terms of the loss that do not depend on A are left out: Adam's first step moves a parameter as far for a small
    gradient as for a large one.
    """
    learner = replace(
        components.learner(run.config),
        learning_rate=run.config.learner.learning_rate * options.step_size,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        kl_coefficient=0.0,
        entropy_coefficient=0.0,
        balance_coefficient=0.0,
        covariance="off",
        num_minibatches=1,
        num_epochs=1,
    )
    policy = replace(run.policy, value=False)
    trainable, frozen = partition(policy, params)
    copied = {**jax.tree.map(jnp.copy, trainable), **frozen}
    state = init_state(policy, learner, run.mesh, jax.random.key(0), copied)
    kept = jnp.where(jnp.sign(credit.base * (credit.coefficients - 1)) == sign, credit.base, 0.0)
    advantages = jax.jit(token_advantages)(kept, batch.response_ids)
    state, _ = make_update(policy, learner, run.mesh)(state, batch, advantages)
    return {**params, **state.params}


@dataclass(frozen=True)
class _Drawing:
    """Draws responses to the same states with the same random numbers, whatever the parameters."""

    run: RunContext
    states: list[State]
    key: jax.Array
    draws: int

    def __call__(self, phase: str, params: Any) -> Draws:
        run, config = self.run, self.run.config
        sampler = Sampler(
            components.sampled_policy(config.sampling, run.policy),
            config.sampling,
            run.chat.stop_ids,
            capacity=config.rollout.context_tokens,
            slack=config.rollout.slack,
            windows=config.rollout.windows,
            mesh=run.mesh,
        )
        shards = sampler.slot_shards
        draws = -(-self.draws // shards) * shards

        def report(done: int) -> None:
            run.stop.check()
            run.report(phase, done, len(self.states), {})

        return draw_responses(sampler, params, self.states, self.key, draws, config.rollout, report)
