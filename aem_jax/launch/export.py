"""`export FOLDER`: a run's latest checkpoint as a model in Hugging Face's files, tokenizer included."""

from dataclasses import replace
from pathlib import Path

from aem_jax.checkpoint import CheckpointError, Checkpoints
from aem_jax.launch import build, runtime
from aem_jax.launch.config import RunConfig
from aem_jax.launch.overrides import ConfigError
from aem_jax.learner import abstract_state, make_optimizer
from aem_jax.models import Policy, save_pretrained
from aem_jax.models.pretrained import check_free
from aem_jax.sharding import make_mesh
from aem_jax.tokenizer import ChatTokenizer


def export(config: RunConfig, folder: Path) -> int:
    """Writes the model of a run; returns the exit status.

    Args:
        config: the run's own.
        folder: to write to; new or empty.

    Raises:
        ConfigError: the run has no checkpoint, or the folder is not free.
    """
    run = Path(config.runs_dir) / config.name
    try:
        check_free(folder)
        runtime.set_up(replace(config.runtime, distributed="off"))  # one process writes it
        chat = ChatTokenizer.from_pretrained(run / "tokenizer", appends=False)
        policy = Policy(build.model_config(config.model, chat.vocab_size))
        optimizer = make_optimizer(config.learner, policy.axes)
        with Checkpoints(run / "checkpoints", config.checkpoint) as checkpoints:
            step = checkpoints.latest
            if step is None:
                raise ConfigError(f"no checkpoint in {run}; train it first")
            params = checkpoints.restore(abstract_state(policy, optimizer, make_mesh(config.mesh))).params
        save_pretrained(
            folder, policy.config, params, dtype=policy.config.dtype, source=run / "tokenizer", stop_ids=chat.stop_ids
        )
    except (CheckpointError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(f"step {step} of {run} -> {folder}")
    return 0
