"""Settings that contradict each other."""

from importlib.util import find_spec

from aem_jax.config import components
from aem_jax.config.run import RunConfig
from aem_jax.distributed.clusters import expected_count
from aem_jax.errors import ConfigError
from aem_jax.sampler.reshard import INT8_MERGES


def check(config: RunConfig, trains: bool = True, processes: int | None = None) -> None:
    """Refuses settings that contradict each other, before anything starts.

    Args:
        config: the run's.
        trains: whether the run learns from what it samples.
        processes: of the run, if it will be on other machines; otherwise as many as are started here.

    Raises:
        ConfigError: two settings that contradict each other; the message names both.
    """
    if config.model.name or not config.model.path:
        components.known_model(config.model.name)
    components.check_sizes(config.model)
    if config.warmstart.init_from and config.lora.rank and not config.model.path:
        raise ConfigError(
            f"--warmstart.init-from: expected none with --lora.rank and no --model.path, got "
            f"{config.warmstart.init_from}; the frozen weights of such a run are its own"
        )
    _check_harness(config)
    servers = len(config.env.urls) or config.env.num_servers
    sessions = servers * config.env.sessions_per_server
    # With several processes, each plays its own slots with its own servers; the rollout checks them.
    served = config.environment.NAME != "harness"
    if processes and not config.env.urls:
        sessions *= processes
    if served and sessions < config.rollout.num_slots and (processes or expected_count(config.runtime) == 1):
        raise ConfigError(
            f"--rollout.num-slots: expected at most {sessions} (servers × --env.sessions-per-server), "
            f"got {config.rollout.num_slots}; raise --env.sessions-per-server or "
            f"{'name more --env.urls' if config.env.urls else '--env.num-servers'}"
        )
    sampled = config.sampling.temperature or 1.0  # greedy sampling records log-probabilities at temperature 1
    if config.learner.temperature != sampled:
        raise ConfigError(
            f"--learner.temperature: expected {sampled} with --sampling.temperature {config.sampling.temperature}, "
            f"got {config.learner.temperature}; the learner must see the distribution that was sampled"
        )
    trains = trains and config.train.num_steps > 0
    if trains and not config.sampling.temperature:
        raise ConfigError(
            "--sampling.temperature: expected above 0 to train, got 0; the attempts of a group would be equal, so that "
            "nothing can be learnt from them"
        )
    for name, everything in (("top_k", 0), ("top_p", 1.0)):
        if trains and (value := getattr(config.sampling, name)) != everything:
            raise ConfigError(
                f"--sampling.{name.replace('_', '-')}: expected {everything} (all tokens) to train, got {value}; "
                "log-probabilities and entropies are those of the whole distribution, which the learner differentiates"
            )
    if config.sampling.weights == "int8" and config.lora.rank and not config.lora.merge:
        raise ConfigError(f"--sampling.weights: {INT8_MERGES}")
    if (
        config.learner.kl_coefficient
        and not config.checkpoint.keep_first
        and not components.reference_is_frozen_weights(config)
    ):
        raise ConfigError(
            "--checkpoint.keep-first: expected True with --learner.kl-coefficient above 0, got False;"
            " the reference policy is that of step 0, and a resumed run reads it from there"
        )
    _check_selection(config)
    _check_carry(config)
    components.microbatch_rows(config)
    if components.row_length(config) < config.rollout.context_tokens:
        raise ConfigError(
            f"--batch.row-length: expected at least --rollout.context-tokens = {config.rollout.context_tokens}, "
            f"got {components.row_length(config)}"
        )
    if config.metrics.wandb_project and find_spec("wandb") is None:
        raise ConfigError("--metrics.wandb-project: wandb is not installed; pip install 'aem_jax[wandb]'")


def _check_harness(config: RunConfig) -> None:
    is_harness, context = config.environment.NAME == "harness", config.rollout.context
    if is_harness != (context == "tree"):
        expected = "tree with" if is_harness else "append, compact or window without"
        raise ConfigError(
            f"--rollout.context: expected {expected} --environment harness, whose agents send their prompts, got "
            f"{context}"
        )


def _check_carry(config: RunConfig) -> None:
    if not config.rollout.carry_min_groups:
        return
    if not config.learner.importance_cap:
        raise ConfigError(
            "--learner.importance-cap: expected at least 1 (2 is usual) with --rollout.carry-min-groups, got 0; tokens "
            "that older parameters sampled need the importance weight, and the weight needs a bound"
        )
    selection = config.selection
    if selection.oversample > 1 or selection.max_rounds > 1:
        raise ConfigError(
            "--rollout.carry-min-groups: expected --selection.oversample 1 and --selection.max-rounds 1, got "
            f"{selection.oversample} and {selection.max_rounds}; with carry-over a step has one round of groups"
        )


def _check_selection(config: RunConfig) -> None:
    selection, rollout = config.selection, config.rollout
    if selection.filter_equal_outcomes and rollout.group_size == 1:
        raise ConfigError(
            "--selection.filter-equal-outcomes: expected --rollout.group-size of at least 2, got 1; the outcomes of a "
            "group of one are always equal"
        )
    limit = components.LENGTHS[selection.overlong_of][1]
    if selection.overlong_buffer > getattr(rollout, limit):
        raise ConfigError(
            f"--selection.overlong-buffer: expected at most --rollout.{limit.replace('_', '-')} = "
            f"{getattr(rollout, limit)}, got {selection.overlong_buffer}"
        )
    if selection.overlong_penalty and selection.overlong_of == "episode" and rollout.context != "append":
        raise ConfigError(
            f"--selection.overlong-of: expected response with --rollout.context {rollout.context}, got episode; "
            "only in context append is an episode one sequence, whose length has a limit"
        )
