"""Starting from another run: its tokenizer, and its parameters before reinforcement learning.

Variants that share a start can be compared in pairs, and the warm start is trained once.
"""

from pathlib import Path

from jax.sharding import Mesh

from aem_jax.checkpoint import Checkpoints
from aem_jax.config import components, saved
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.learner import abstract_state
from aem_jax.models import Params, Policy


def tokenizer(config: RunConfig) -> Path:
    """The folder of the tokenizer of the run that `config` starts from.

    Raises:
        ConfigError: no such folder.
    """
    folder = Path(config.warmstart.init_from) / "tokenizer"
    if not folder.exists():
        raise ConfigError(f"--warmstart.init-from: expected a run's folder with a tokenizer, got none in {folder}")
    return folder


def parameters(config: RunConfig, policy: Policy, vocab_size: int, mesh: Mesh) -> Params:
    """float32 parameters at step 0 of the run that `config` starts from, in the train layout, without its value head.

    Args:
        config: of the new run.
        policy: that the new run trains.
        vocab_size: of the tokenizer.
        mesh: to place the parameters on.

    Raises:
        ConfigError: no such run, one that trains another model, or one without a checkpoint of step 0.
    """
    run = Path(config.warmstart.init_from)
    other = saved.load(run)
    trained = components.make_policy(other, vocab_size, saved.model_files(other, run))
    if trained.lora or policy.lora or trained.config != policy.config:
        raise ConfigError(
            f"--warmstart.init-from: expected a run that trains all weights of {policy.config}, got {trained.config} "
            f"in {run}; give the same --model and --tokenizer"
        )
    # The checkpoint holds the optimizer's state, too, in the form of the other run's learner.
    state = abstract_state(trained, other.learner, mesh)
    with Checkpoints(run / "checkpoints", other.checkpoint) as checkpoints:
        if 0 not in checkpoints.steps:
            raise ConfigError(
                f"--warmstart.init-from: expected a checkpoint of step 0 in {run}, got steps {checkpoints.steps}; "
                "train it with --checkpoint.keep-first True"
            )
        return {"base": checkpoints.restore(state, step=0).params["base"]}
