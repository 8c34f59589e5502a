"""Weights in Hugging Face's safetensors, tensor by tensor into their shards and back out.

The table `tensors` says where each of their tensors stands in ours; reading and writing go through it and nothing else.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from aem_jax.models.config import ModelConfig
from aem_jax.models.policy import Params, Policy
from aem_jax.sharding import TRAIN, Rules, shardings

Array = jax.Array

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Tensor(NamedTuple):
    """One of their tensors, and the block of one of our arrays that holds it.

        block = tensor.reshape(view).transpose(order).reshape(shape of the block)

    Attributes:
        name: theirs.
        shape: theirs.
        path: keys of our array in the parameter tree.
        start: where the block begins in our array.
        view: their axes, taken apart.
        order: permutation of those, as ours lie.
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
        """The block of a tensor of theirs."""
        return tensor.reshape(self.view).transpose(self.order).reshape(self.block)

    def to_theirs(self, block: np.ndarray) -> np.ndarray:
        """The tensor of a block of ours."""
        apart = block.reshape([self.view[axis] for axis in self.order])
        return np.ascontiguousarray(apart.transpose(np.argsort(self.order)).reshape(self.shape))


def tensors(config: ModelConfig) -> Iterator[Tensor]:
    """All tensors of a model, in the order of its layers."""
    v, d = config.vocab_size, config.hidden_size

    def plain(name: str, path: tuple[str, ...], *shape: int) -> Tensor:
        return Tensor(name, shape, path, (0,) * len(shape), shape, tuple(range(len(shape))), shape)

    yield plain("model.embed_tokens.weight", ("embed",), v, d)
    for layer in range(config.num_layers):
        yield from _layer_tensors(config, layer)
    yield plain("model.norm.weight", ("norm",), d)
    if not config.tied_head:
        yield Tensor("lm_head.weight", (v, d), ("head",), (0, 0), (v, d), (1, 0), (d, v))


def _layer_tensors(config: ModelConfig, layer: int) -> Iterator[Tensor]:
    d, f = config.hidden_size, config.intermediate_size
    kv, r, dh = config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim
    h = kv * r

    def one(name: str, leaf: str, view, order, block, *start: int, shape: tuple[int, ...]) -> Tensor:
        begin = (layer, *start, *(0,) * (len(block) - len(start)))
        return Tensor(f"model.layers.{layer}.{name}", shape, ("layers", leaf), begin, view, order, (1, *block))

    for name, count, first in (("q", r, 0), ("k", 1, r), ("v", 1, r + 1)):
        head, rows, split = f"self_attn.{name}_proj", kv * count * dh, (kv, count, dh)
        yield one(f"{head}.weight", "qkv", (*split, d), (3, 0, 1, 2), (d, *split), 0, 0, first, shape=(rows, d))
        if config.qkv_bias:
            yield one(f"{head}.bias", "qkv_bias", split, (0, 1, 2), split, 0, first, shape=(rows,))
    yield one("self_attn.o_proj.weight", "o", (d, h, dh), (1, 2, 0), (h, dh, d), shape=(d, h * dh))
    for first, name in enumerate(("gate", "up")):
        yield one(f"mlp.{name}_proj.weight", "gate_up", (f, d), (1, 0), (d, 1, f), 0, first, shape=(f, d))
    yield one("mlp.down_proj.weight", "down", (d, f), (1, 0), (f, d), shape=(d, f))
    norms = {"input_layernorm": ("attention_norm", d), "post_attention_layernorm": ("mlp_norm", d)}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": ("q_norm", dh), "self_attn.k_norm": ("k_norm", dh)}
    for name, (leaf, size) in norms.items():
        yield one(f"{name}.weight", leaf, (size,), (0,), (size,), shape=(size,))


class Checkpoint:
    """The safetensors files of a folder, opened: names, shapes, and tensors one at a time.

    Raises:
        ValueError: no weights in the folder, or files that are missing, cut short or no safetensors.
    """

    def __init__(self, folder: Path, stack: ExitStack):
        self.folder = folder
        self._files: dict[str, Any] = {}
        for file in _weight_files(folder):
            try:
                # Not mapped into memory: pages of a mapped file would count as this process's until all is read.
                opened = stack.enter_context(safe_open(file, framework="np", backend="pread"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"expected safetensors in {file}, got {error}; is the download complete?") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._files[name].get_tensor(name)


def load_params(
    folder: Path, policy: Policy, *, mesh: Mesh | None, dtype: str | Params, rules: Rules = TRAIN
) -> Params:
    """Parameters from a folder of safetensors.

    The host holds one tensor at a time, twice at most: each goes to the devices in its shards and is put there into the
    array that it is part of.

    Args:
        folder: with `model.safetensors`, or several files and their index.
        policy: of the config beside them.
        mesh: where to put them; None is the default device.
        dtype: of the parameters: one for all, or a tree of theirs (`Policy.dtypes`).
        rules: which layout.

    Raises:
        ValueError: tensors that are missing, unknown or of another shape (each named, with both shapes); broken files.
    """
    where = None if mesh is None else shardings(mesh, policy.axes, rules, policy.shapes)
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        _check(checkpoint, policy.config)
        params = _zeros(policy, dtype, where)
        for tensor in tensors(policy.config):
            block = tensor.to_ours(checkpoint.read(tensor.name))
            holder, leaf = _holder(params, tensor.path), tensor.path[-1]
            sharding = None if where is None else _holder(where, tensor.path)[leaf]
            start = tuple(np.int32(at) for at in tensor.start)
            holder[leaf] = _put_block(holder[leaf], _place(block, sharding), start, sharding=sharding)
    return params


def save_params(folder: Path, config: ModelConfig, params: Params, *, dtype: str | None, max_file_bytes: int) -> None:
    """Writes parameters as safetensors: one file, or several and their index.

    Args:
        folder: exists.
        config: of the model.
        params: parameters, on any mesh of this process.
        dtype: to save in; None keeps the parameters'.
        max_file_bytes: size at which a new file begins.
    """
    held: dict[str, np.ndarray] = {}
    written: list[list[str]] = []
    total = 0

    def flush() -> None:
        save_file(held, folder / f"part-{len(written)}.safetensors", metadata={"format": "pt"})
        written.append(list(held))
        held.clear()

    for tensor in tensors(config):
        leaf = _holder(params, tensor.path)[tensor.path[-1]]
        block = np.asarray(_take_block(leaf, tuple(np.int32(at) for at in tensor.start), tensor.block))
        found = tensor.to_theirs(block if dtype is None else block.astype(jnp.dtype(dtype)))
        if held and sum(each.nbytes for each in held.values()) + found.nbytes > max_file_bytes:
            flush()
        held[tensor.name] = found
        total += found.nbytes
    flush()
    if len(written) == 1:
        os.replace(folder / "part-0.safetensors", folder / _SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(written):
        file = f"model-{number + 1:05d}-of-{len(written):05d}.safetensors"
        os.replace(folder / f"part-{number}.safetensors", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _weight_files(folder: Path) -> Sequence[Path]:
    index = folder / _INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"expected a weight_map in {index}, got {error!r}") from error
    elif (folder / _SINGLE).exists():
        names = [_SINGLE]
    else:
        raise ValueError(f"expected {_SINGLE} or {_INDEX} in {folder}, found neither; other formats are not read")
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise ValueError(f"expected the files that {_INDEX} names in {folder}, {', '.join(missing)} missing")
    return files


def _check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    wanted = {tensor.name: tensor.shape for tensor in tensors(config)}
    found = checkpoint.shapes()
    problems = [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name not in found]
    problems += [
        f"{name} has shape {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    # A tied head is often saved beside the embedding, and old files hold the rotary frequencies.
    spare = {"lm_head.weight"} if config.tied_head else set()
    problems += [
        f"{name} {list(found[name])} is not known"
        for name in found
        if name not in wanted and name not in spare and not name.endswith("rotary_emb.inv_freq")
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"expected the weights of {checkpoint.folder}'s config.json: {'; '.join(problems[:5])}{more}")


def _zeros(policy: Policy, dtype: str | Params, where: Any) -> Params:
    dtypes = jax.tree.map(lambda leaf: dtype, policy.shapes) if isinstance(dtype, str) else dtype

    def make() -> Params:
        return jax.tree.map(lambda leaf, dtype: jnp.zeros(leaf.shape, dtype), policy.shapes, dtypes)

    return jax.jit(make, out_shardings=where)()


def _holder(tree: Any, path: Sequence[str]) -> dict[str, Any]:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _place(block: np.ndarray, sharding: NamedSharding | None) -> Array:
    """On the devices, each of which gets its part and no more."""
    if sharding is None:
        return jnp.asarray(block)
    return jax.make_array_from_callback(block.shape, sharding, lambda index: np.ascontiguousarray(block[index]))


@partial(jax.jit, static_argnames="sharding", donate_argnums=0)
def _put_block(array: Array, block: Array, start: tuple[Array, ...], sharding: NamedSharding | None) -> Array:
    array = jax.lax.dynamic_update_slice(array, block.astype(array.dtype), start)
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


@partial(jax.jit, static_argnames="sizes")
def _take_block(array: Array, start: tuple[Array, ...], sizes: tuple[int, ...]) -> Array:
    return jax.lax.dynamic_slice(array, start, sizes)
