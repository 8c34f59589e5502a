"""Starting from another run: its tokenizer, and its parameters before reinforcement learning.

Variants that share a start can be compared in pairs, and the warm start is trained once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from aem_jax.checkpoint import Checkpoints
from aem_jax.checkpoint.checksum import first_difference
from aem_jax.config import components, inputs, saved
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.learner import abstract_state
from aem_jax.models import Params, Policy
from aem_jax.models.lora import LoraConfig


def tokenizer(config: RunConfig) -> Path:
    """The folder of the tokenizer of the run that `config` starts from.

    Raises:
        ConfigError: no such folder.
    """
    folder = Path(config.warmstart.init_from) / "tokenizer"
    if not folder.exists():
        raise ConfigError(f"--warmstart.init-from: expected a run's folder with a tokenizer, got none in {folder}")
    return folder


def check(config: RunConfig, policy: Policy, vocab_size: int) -> tuple[RunConfig, Policy]:
    """Checks the run that `config` starts from; returns its config and the policy that it trained.

    Args:
        config: of the new run.
        policy: that the new run trains.
        vocab_size: of the tokenizer.

    Raises:
        ConfigError: no such run, or one that trains another model or adapter.
    """
    run = Path(config.warmstart.init_from)
    other = saved.load(run)
    trained = components.make_policy(other, vocab_size, saved.model_files(other, run))
    ours, theirs = _trained(policy), _trained(trained)
    if names := [name for name in ours if ours[name] != theirs.get(name)]:
        listed = lambda of: ", ".join(f"{name} {of.get(name)}" for name in names)
        raise ConfigError(
            f"--warmstart.init-from: expected a run of a policy with {listed(ours)}, got {listed(theirs)} in {run}; "
            "give the same --model, --lora and --tokenizer"
        )
    return other, trained


def parameters(config: RunConfig, policy: Policy, vocab_size: int, mesh: Mesh) -> Params:
    """Trained parameters at step 0 of the run that `config` starts from, in the train layout, without its value head.

    Args:
        config: of the new run.
        policy: that the new run trains.
        vocab_size: of the tokenizer.
        mesh: to place the parameters on.

    Returns:
        {"base": float32 weights}, or {"adapter": …} with LoRA.

    Raises:
        ConfigError: as in `check`, or the run has no checkpoint of step 0.
    """
    run = Path(config.warmstart.init_from)
    other, trained = check(config, policy, vocab_size)
    # The checkpoint holds the optimizer's state, too, in the form of the other run's learner.
    state = abstract_state(trained, other.learner, mesh).without_frozen()
    with Checkpoints(run / "checkpoints", other.checkpoint) as checkpoints:
        if 0 not in checkpoints.steps:
            raise ConfigError(
                f"--warmstart.init-from: expected a checkpoint of step 0 in {run}, got steps {checkpoints.steps}; "
                "train it with --checkpoint.keep-first True"
            )
        params = checkpoints.restore(state, step=0).trainable
    return {name: part for name, part in params.items() if name != "value"}


def _trained(policy: Policy) -> dict[str, Any]:
    """The options of a policy that the start depends on."""
    lora = policy.lora or LoraConfig()
    adapter = {"rank": lora.rank} | ({"alpha": lora.alpha, "targets": lora.targets} if lora.rank else {})
    return {**vars(policy.config), **{f"LoRA's {name}": value for name, value in adapter.items()}}


def check_frozen(config: RunConfig, ours: Mapping[str, str]) -> None:
    """Checks that the adapter of the run that `config` starts from was trained beside the same frozen weights.

    Args:
        config: of the new run.
        ours: checksums of its frozen weights.

    Raises:
        ConfigError: it was trained beside others, or its record lacks their checksums.
    """
    run = Path(config.warmstart.init_from)
    theirs = inputs.load(run).get(inputs.FROZEN, {})
    if difference := first_difference(theirs, ours):
        raise ConfigError(
            f"--warmstart.init-from: expected an adapter trained beside the weights of --model.path, got that of {run} "
            f"({difference}); give the same --model.path"
        )
