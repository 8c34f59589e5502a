"""The frozen weights of a LoRA run: those of the model's files, or what a warm start made of random ones.

The latter are kept once, beside the checkpoints (which hold the adapter alone), in Hugging Face's files: an exported
adapter has its base there.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from aem_jax.checkpoint.checksum import checksums, first_difference
from aem_jax.config.run import RunConfig
from aem_jax.errors import ConfigError
from aem_jax.models import Params, Policy, save_pretrained
from aem_jax.models.pretrained import resolve
from aem_jax.models.weights import load_params
from aem_jax.sharding import TRAIN, shardings

FOLDER = "frozen_weights"
"""In the folder of the run."""


def is_there(run: Path) -> bool:
    """Whether the run keeps frozen weights of its own."""
    return (run / FOLDER).exists()


def source(config: RunConfig, run: Path) -> Path:
    """The folder of the files that the frozen weights are read from."""
    return resolve(config.model.path) if config.model.path else run / FOLDER


def load(
    config: RunConfig, run: Path, policy: Policy, mesh: Mesh, recorded: Mapping[str, str] | None
) -> tuple[Params, dict[str, str]]:
    """The frozen weights as they are used (`Policy.dtypes`), in the train layout, and their checksums.

    Args:
        config: the run's.
        run: its folder.
        policy: all of the decoder.
        mesh: where they are to lie.
        recorded: the checksums that the run keeps (`inputs.FROZEN`), if it does.

    Raises:
        ConfigError: files that are missing, do not fit, or hold other numbers than those that the adapter stands on.
    """
    try:
        params = load_params(source(config, run), policy, mesh=mesh, dtype=policy.dtypes)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the frozen weights of {run} cannot be read: {error}") from error
    found = checksums(params)
    if recorded is not None and (difference := first_difference(recorded, found)):
        raise ConfigError(
            f"the weights in {source(config, run)} have changed since {run} began to train its adapter beside them "
            f"({difference}); put the old ones back"
        )
    return params, found


def save(run: Path, policy: Policy, mesh: Mesh, source: Any, stop_ids: Sequence[int]) -> None:
    """Keeps frozen weights, whole or not at all, rounded to the dtypes in which they are used.

    Args:
        run: its folder, with its tokenizer.
        policy: all of the decoder.
        mesh: where they lie.
        source: a PRNG key, for random weights, or float32 weights.
        stop_ids: ids that end a response.
    """
    is_key = isinstance(source, jax.Array)

    def used(source: Any) -> Params:
        params = policy.init(source) if is_key else source
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, policy.dtypes)

    params = jax.jit(used, out_shardings=shardings(mesh, policy.axes, TRAIN, policy.shapes))(source)
    save_pretrained(run / FOLDER, policy.config, params, source=run / "tokenizer", stop_ids=stop_ids)
