"""The frozen weights of a LoRA run: those of the model's files, or random ones after a warm start.

The latter are saved once in the run's folder, as Hugging Face files, because checkpoints hold only trained parts. An
exported adapter names that folder as its base model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """Whether the run has frozen weights of its own."""
    return (run / FOLDER).exists()


def source(config: RunConfig, run: Path) -> Path:
    """The folder or GGUF file that the frozen weights are read from."""
    return resolve(config.model.path) if config.model.path else run / FOLDER


def load(
    config: RunConfig, run: Path, policy: Policy, mesh: Mesh, recorded: Mapping[str, str] | None
) -> tuple[Params, dict[str, str]]:
    """The frozen weights in `Policy.dtypes` and the train layout, and their checksums.

    Args:
        config: the run's.
        run: its folder.
        policy: of the base.
        mesh: to place them on.
        recorded: the checksums in the run's record (`inputs.FROZEN`), if it has them.

    Raises:
        ConfigError: files that are missing, do not fit, or hold other numbers than the adapter was trained with.
    """
    try:
        params = load_params(source(config, run), policy, mesh=mesh, dtype=policy.dtypes)
    except (ValueError, OSError) as error:
        raise ConfigError(f"the frozen weights of {run} cannot be read: {error}") from error
    sums = checksums(params["base"])
    if recorded is not None and (difference := first_difference(recorded, sums)):
        raise ConfigError(
            f"the weights in {source(config, run)} have changed since {run} began to train its adapter beside them "
            f"({difference}); put the old ones back"
        )
    return params, sums


def save(run: Path, policy: Policy, mesh: Mesh, key: jax.Array, params: Params, stop_ids: Sequence[int]) -> None:
    """Saves frozen weights atomically, rounded to `Policy.dtypes`.

    Args:
        run: its folder, with its tokenizer.
        policy: of the base.
        mesh: they are placed on.
        key: of random weights.
        params: float32 weights; empty for random ones.
        stop_ids: ids that end a response.
    """

    def rounded(key: jax.Array, params: Params) -> Params:
        weights = {**policy.init(key), **params}
        return jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), weights, policy.dtypes)

    weights = jax.jit(rounded, out_shardings=shardings(mesh, policy.axes, TRAIN, policy.shapes))(key, params)
    save_pretrained(run / FOLDER, policy.config, weights, source=run / "tokenizer", stop_ids=stop_ids)
