"""`export FOLDER`: writes a run's checkpoint as a Hugging Face model with its tokenizer, or as an adapter."""

import logging
from dataclasses import replace
from pathlib import Path

from aem_jax.checkpoint import CheckpointError, Checkpoints, Choice
from aem_jax.config import components, inputs, saved
from aem_jax.config.run import RunConfig
from aem_jax.distributed import runtime
from aem_jax.distributed.signals import undone_on_interrupt
from aem_jax.errors import ConfigError
from aem_jax.launch import frozen_weights
from aem_jax.learner import abstract_state
from aem_jax.models import save_pretrained
from aem_jax.models.peft import save_adapter
from aem_jax.models.pretrained import check_free, model_reads_images
from aem_jax.sharding import make_mesh
from aem_jax.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)


def export(config: RunConfig, folder: Path, adapter: bool = False, step: Choice = "latest") -> int:
    """Writes the model of a run; returns the exit status.

    Args:
        config: the run's own.
        folder: to write to; new or empty.
        adapter: write a LoRA run's adapter, in PEFT's files; otherwise it is merged into the weights.
        step: the checkpoint.

    Raises:
        ConfigError: the run has no such checkpoint or no adapter, or the folder is not empty.
    """
    run = Path(config.runs_dir) / config.name
    try:
        check_free(folder)
        runtime.set_up(replace(config.runtime, distributed="off"))  # one process writes the files
        chat, mesh = ChatTokenizer.from_pretrained(run / inputs.TOKENIZER, appends=False), make_mesh(config.mesh)
        policy = components.make_policy(config, chat.vocab_size, saved.model_files(config, run))
        if adapter and policy.lora is None:
            raise ConfigError(f"--adapter: {run} trained all weights, not an adapter (--lora.rank); leave it out")
        with Checkpoints(run / "checkpoints", config.checkpoint) as checkpoints:
            if checkpoints.latest is None:
                raise ConfigError(f"no checkpoint in {run}; train it first")
            abstract = abstract_state(policy, config.learner, mesh).without_frozen()
            state = checkpoints.restore(abstract, checkpoints.find(step))
        if adapter and policy.lora:
            base = config.model.path or str((run / frozen_weights.FOLDER).resolve())
            files = saved.model_files(config, run)  # the run's copy of config.json; the base may be elsewhere by now
            outer = files is not None and model_reads_images(files)
            with undone_on_interrupt():
                save_adapter(folder, policy.config, policy.lora, state.params["adapter"], base=base, reads_images=outer)
        else:
            if policy.lora:
                frozen, _ = frozen_weights.load(config, run, policy.base, mesh, inputs.load(run).get(inputs.FROZEN))
                state = replace(state, frozen=frozen)
            params, used = policy.merge(state.params), policy.config.dtype  # the merged weights that were sampled with
            with undone_on_interrupt():
                save_pretrained(
                    folder, policy.config, params, dtype=used, source=run / inputs.TOKENIZER, stop_ids=chat.stop_ids
                )
            if difference := chat.misread(folder):
                log.warning(
                    f"{difference}. Give such programs {run / inputs.TOKENIZER} as the tokenizer (vLLM: --tokenizer), "
                    "or load it with PreTrainedTokenizerFast.from_pretrained; endpoint and evaluate read it as it is"
                )
    except (CheckpointError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(f"step {int(state.step)} of {run} -> {folder}", flush=True)
    return 0
