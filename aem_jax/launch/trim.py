"""`trim FOLDER`: writes a config's model with the vocabulary that its environment's episodes use."""

import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from aem_jax.config.environments import task_suite
from aem_jax.config.run import RunConfig
from aem_jax.distributed import runtime
from aem_jax.distributed.signals import undone_on_interrupt
from aem_jax.envs.protocol import EnvError
from aem_jax.errors import ConfigError
from aem_jax.launch.context import load_tokenizer
from aem_jax.models import Params, from_pretrained, save_pretrained
from aem_jax.models.pretrained import check_free
from aem_jax.tokenizer.trim import trim_tokenizer
from aem_jax.warmstart import demonstrations


def trim(config: RunConfig, folder: Path) -> int:
    """Writes model and tokenizer as Hugging Face's files; returns the exit status.

    The episodes are the demonstrator's in the first `max(warmstart.episodes, tokenizer.episodes)` training tasks.

    Args:
        config: of the run that will train the model. The model is that of --model.path.
        folder: to write to; new or empty.

    Raises:
        ConfigError: there is no model or no demonstrator, the tokenizer cannot be trimmed, or the folder is not empty.
    """
    if not config.model.path:
        raise ConfigError("--model.path: expected a model to trim, got none; a run's own tokenizer is small already")
    try:
        check_free(folder)
        runtime.set_up(replace(config.runtime, distributed="off"))
        suite = task_suite(config)
        if suite.demonstrator is None:
            raise ConfigError(
                f"expected an environment with a demonstrator, got {suite.name}; its episodes show what is used "
                "(WebShop has one with --webshop.mode text or text_rich)"
            )
        chat, count = load_tokenizer(config), max(config.warmstart.episodes, config.tokenizer.episodes)
        used = {*chat.stop_ids, chat.pad_id}
        with closing(suite.make_env()) as env:
            for episode in demonstrations(
                env, suite.demonstrator, suite.training[:count], chat, config.rollout, suite.prompt
            ):
                for turn in episode.turns if episode else ():
                    used.update(turn.observation_ids.tolist(), turn.response_ids.tolist())
        model = from_pretrained(config.model.path, dtype=config.model.dtype or "bfloat16")
        with tempfile.TemporaryDirectory() as tokenizer:
            chat.save_pretrained(tokenizer)
            kept = trim_tokenizer(Path(tokenizer), used, model.config.vocab_size)
            params = _rows(model.params, model.policy.axes, np.asarray(kept))
            sizes = replace(model.config, vocab_size=len(kept))
            stops = [kept.index(number) for number in chat.stop_ids]
            with undone_on_interrupt():
                save_pretrained(folder, sizes, params, source=Path(tokenizer), stop_ids=stops)
    except (EnvError, ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    print(
        f"{config.model.path} -> {folder}: {len(kept):,} of {model.config.vocab_size:,} tokens; {len(used):,} are used "
        f"in {count:,} episodes of {suite.name}",
        flush=True,
    )
    return 0


def _rows(tree: Params, axes: Params, ids: np.ndarray) -> Params:
    """The parameters with the given rows of each axis "vocab"."""
    if isinstance(tree, dict):
        return {name: _rows(leaf, axes[name], ids) for name, leaf in tree.items()}
    return jnp.take(tree, ids, axis=axes.index("vocab")) if "vocab" in axes else tree
