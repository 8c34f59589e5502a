"""Reads Hugging Face's safetensors or a GGUF file, tensor by tensor, into shards, and writes safetensors.

`tensors` derives from the parameter table which block of our arrays each tensor is; reading and writing both use it.
"""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from aem_jax.files import write_text
from aem_jax.gguf_file import is_gguf
from aem_jax.models.checkpoint_files import FLOATS, INDEX, SINGLE, Checkpoint, open_safetensors, write_tensors
from aem_jax.models.config import ModelConfig, dtype_name
from aem_jax.models.gguf import open_gguf
from aem_jax.models.parameters import EMBED, HEAD, Parameter, Part, parameter_table
from aem_jax.models.policy import Params, Policy
from aem_jax.sharding import TRAIN, Rules, shardings

log: logging.Logger = logging.getLogger(__name__)


class Tensor(NamedTuple):
    """A Hugging Face tensor, and the block of one of our arrays that it fills.

        block = tensor.reshape(view).transpose(order).reshape(shape of the block)

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        path: keys of our array in the parameter tree.
        start: of the block in our array.
        view: the tensor's shape with its axes split.
        order: permutation of the split axes to the order of our array.
        block: shape of the block.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    start: tuple[int, ...]
    view: tuple[int, ...]
    order: tuple[int, ...]
    block: tuple[int, ...]

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """The block of our array, from a tensor."""
        return tensor.reshape(self.view).transpose(self.order).reshape(self.block)

    def to_theirs(self, block: np.ndarray) -> np.ndarray:
        """The tensor, from a block of our array."""
        split = block.reshape([self.view[axis] for axis in self.order])
        return np.ascontiguousarray(split.transpose(np.argsort(self.order)).reshape(self.shape))


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a model, layer by layer; one at a time, since a broken config may have any number of layers."""
    for stacked, rows in groupby(parameter_table(config), lambda row: row.stacked):
        parts = [(row, part) for row in rows for part in row.parts]
        for layer in range(config.num_layers if stacked else 1):
            for row, part in parts:
                experts = range(row.dims["experts"]) if row.has_experts else (0,)
                yield from (_tensor(row, part, layer, expert) for expert in experts)


def _tensor(row: Parameter, part: Part, layer: int, expert: int) -> Tensor:
    shape = row.part_shape(part)  # [*inputs, *outputs] here, [outputs, inputs] there
    inputs, outputs = shape[: row.num_inputs], shape[row.num_inputs :]
    flat = tuple(math.prod(side) for side in (outputs, inputs) if side)
    start = [0] * len(shape)
    if part.rows is not None:
        start[-2] = part.rows.start
    stacked = (layer, expert)[: row.num_stacked]
    return Tensor(
        name=part.name.format(layer=layer, expert=expert),
        shape=flat if inputs or part.rows else shape,
        path=("base", "layers", row.name) if row.stacked else ("base", row.name),
        start=(*stacked, *start),
        view=(*outputs, *inputs),
        order=(*range(len(outputs), len(shape)), *range(len(outputs))),
        block=(*(1 for _ in stacked), *shape),
    )


def open_checkpoint(source: Path, stack: ExitStack) -> Checkpoint:
    """Opens a GGUF file or the safetensors of a folder, for as long as `stack` is open.

    Raises:
        ValueError: no weights there, or files that cannot be read.
    """
    return open_gguf(source) if is_gguf(source) else open_safetensors(source, stack)


def as_in_files(source: Path, config: ModelConfig) -> ModelConfig:
    """A config with `tied_head` corrected to the weights of the folder or GGUF file, if it has weights.

    As in transformers, a head that differs from the embedding is kept, whatever `tie_word_embeddings` is. Only the
    files' headers are read, and for a tied model with a head in its files, embedding and head.

    Raises:
        ValueError: the weights do not fit the config, or their files are broken.
    """
    if not any(file.is_file() for file in (source, source / SINGLE, source / INDEX)):
        return config
    with ExitStack() as stack:
        checkpoint = open_checkpoint(source, stack)
        if checkpoint.unread:
            log.warning(
                "%s: weights are read from %s alone, as transformers does; not read: %s",
                *(source, ", ".join(file.name for file in checkpoint.files), ", ".join(checkpoint.unread)),
            )
        if config.tied_head and checkpoint.has_own_head():
            log.warning(
                "%s: config.json has tie_word_embeddings true, but %s differs from %s in the weights; the head is kept "
                "and not tied, as in transformers; set tie_word_embeddings to false",
                *(source, HEAD, EMBED),
            )
            config = replace(config, tied_head=False)
        _check(checkpoint, config)
    return config


def load_params(
    source: Path, policy: Policy, *, mesh: Mesh | None, dtype: DTypeLike | Params, rules: Rules = TRAIN
) -> Params:
    """Parameters from a folder of safetensors or a GGUF file.

    The host holds one tensor at a time, with at most one copy. Each goes to the devices in its shards and is written
    there into its array. A quantised tensor of a GGUF file is de-quantised to float32 first.

    Args:
        source: folder with `model.safetensors`, or several files and their index; or a GGUF file.
        policy: of the source's config, from `as_in_files`.
        mesh: devices of the parameters; None is the default device.
        dtype: of the parameters: one for all, or a tree (`Policy.dtypes`).
        rules: the layout.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape (each named, with both shapes) or not finite;
            an own head for a tied policy; broken files.
    """
    with ExitStack() as stack:
        checkpoint = open_checkpoint(source, stack)
        names = _check(checkpoint, policy.config)
        if policy.config.tied_head and checkpoint.has_own_head():
            raise ValueError(f"expected a policy with tied_head False for {source}, whose {HEAD} is its own, got True")
        kinds = Counter(tensor.kind for tensor in checkpoint.tensors.values() if tensor.kind not in FLOATS)
        if kinds:
            counts = ", ".join(f"{count} of {kind}" for kind, count in sorted(kinds.items()))
            log.info("%s: de-quantised tensors: %s", source, counts)
        where = None if mesh is None else shardings(mesh, policy.axes, rules, policy.shapes)
        params, finite = _zeros(policy, dtype, where), {}
        for tensor in tensors(policy.config):
            block = tensor.to_ours(checkpoint.tensors[names.get(tensor.name, tensor.name)].read(None))
            holder, leaf = _holder(params, tensor.path), tensor.path[-1]
            sharding = None if where is None else _holder(where, tensor.path)[leaf]
            start = tuple(np.int32(at) for at in tensor.start)
            holder[leaf], finite[tensor.name] = _put_block(
                holder[leaf], _place(block, sharding), start, sharding=sharding
            )
    _check_finite(finite, f"the weights of {source}")
    return params


def save_params(
    folder: Path, config: ModelConfig, params: Params, *, dtype: DTypeLike | None, max_file_bytes: int
) -> None:
    """Writes parameters as safetensors: one file, or several and their index.

    Args:
        folder: exists.
        config: of the model.
        params: parameters, on any mesh of this process.
        dtype: of the files; None keeps that of the parameters.
        max_file_bytes: size at which a new file starts.

    Raises:
        ValueError: weights that are not finite, in that dtype.
        OSError: a file cannot be written.
    """
    held: dict[str, np.ndarray] = {}
    written: list[list[str]] = []
    finite: dict[str, Any] = {}
    total = 0

    def flush() -> None:
        write_tensors(folder / f"part-{len(written)}.safetensors", held)
        written.append(list(held))
        held.clear()

    for tensor in tensors(config):
        leaf = _holder(params, tensor.path)[tensor.path[-1]]
        start, saved = tuple(np.int32(at) for at in tensor.start), jnp.dtype(leaf.dtype if dtype is None else dtype)
        block, finite[tensor.name] = _take_block(leaf, start, tensor.block, saved)
        values = tensor.to_theirs(np.asarray(block))
        if held and sum(array.nbytes for array in held.values()) + values.nbytes > max_file_bytes:
            flush()
        held[tensor.name] = values
        total += values.nbytes
    flush()
    _check_finite(finite, f"weights to write to {folder}")
    if len(written) == 1:
        os.replace(folder / "part-0.safetensors", folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        os.replace(folder / f"part-{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _check(checkpoint: Checkpoint, config: ModelConfig) -> Mapping[str, str]:
    """Compares the files' headers with the config; returns tensors that are stored under another name."""
    stored = checkpoint.tensors
    # As in transformers, a tied model whose files have only the head takes it as the embedding.
    names = {EMBED: HEAD} if config.tied_head and EMBED not in stored and HEAD in stored else {}
    # Files of tied models often have the head, too, and old files have the rotary frequencies.
    spare = {HEAD} if config.tied_head else set()
    wanted = set()

    def problems() -> Iterator[str]:
        for tensor in tensors(config):  # lazily: a broken config may have any number of layers
            name = names.get(tensor.name, tensor.name)
            wanted.add(name)
            if name not in stored:
                hint = "; is the head tied (tie_word_embeddings)?" if name == HEAD else ""
                yield f"{name} {list(tensor.shape)} is missing{hint}"
            elif (shape := stored[name].shape) != tensor.shape:
                yield f"{name} has shape {list(shape)} instead of {list(tensor.shape)}"
            elif (kind := stored[name].kind) not in checkpoint.kinds:
                yield f"{name} holds {kind} instead of one of {', '.join(checkpoint.kinds)}"
        for name in stored:
            if name not in wanted and name not in spare and not name.endswith("rotary_emb.inv_freq"):
                yield f"{name} {list(stored[name].shape)} is not known"

    if errors := list(islice(problems(), 6)):
        more = ", and more" if len(errors) > 5 else ""
        config_of = "fields" if is_gguf(checkpoint.source) else "config.json"
        raise ValueError(f"expected the weights of {checkpoint.source}'s {config_of}: {'; '.join(errors[:5])}{more}")
    return names


def _check_finite(finite: Mapping[str, Array], what: str) -> None:
    """Refuses NaN and infinity, which would make every output NaN."""
    if broken := [name for name, is_finite in jax.device_get(finite).items() if not is_finite]:
        more = f", and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"expected finite numbers in {what}, got NaN or infinity in {', '.join(broken[:3])}{more}")


def _zeros(policy: Policy, dtype: DTypeLike | Params, where: Any) -> Params:
    dtypes = dtype if isinstance(dtype, dict) else jax.tree.map(lambda leaf: dtype_name(dtype), policy.shapes)
    make = lambda: jax.tree.map(lambda leaf, dtype: jnp.zeros(leaf.shape, dtype), policy.shapes, dtypes)
    return jax.jit(make, out_shardings=where)()


def _holder(tree: Any, path: Sequence[str]) -> dict[str, Any]:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _place(block: np.ndarray, sharding: NamedSharding | None) -> Array:
    """A block on the devices; each gets only its shard. Axes of which the block has one entry are not split."""
    if sharding is None:
        return jnp.asarray(block)
    spec = PartitionSpec(*(None if n == 1 else axis for n, axis in zip(block.shape, sharding.spec, strict=False)))
    sharding = NamedSharding(sharding.mesh, spec)
    return jax.make_array_from_callback(block.shape, sharding, lambda index: np.ascontiguousarray(block[index]))


@partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _put_block(array: Array, block: Array, start: tuple[Array, ...], sharding: Any) -> tuple[Array, Array]:
    """The array with a block written at `start`, and whether the block is finite."""
    block = block.astype(array.dtype)
    array = jax.lax.dynamic_update_slice(array, block, start)
    array = array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
    return array, jnp.all(jnp.isfinite(block))


@partial(jax.jit, static_argnames=("sizes", "dtype"))
def _take_block(array: Array, start: tuple[Array, ...], sizes: tuple[int, ...], dtype: Any) -> tuple[Array, Array]:
    """A block of the array, and whether it is finite in that dtype."""
    block = jax.lax.dynamic_slice(array, start, sizes).astype(dtype)
    return block, jnp.all(jnp.isfinite(block))
