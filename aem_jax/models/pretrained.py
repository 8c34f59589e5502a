"""Reads models in Hugging Face's files or as GGUF, and writes the former: `from_pretrained`, `save_pretrained`."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError

from aem_jax.files import read_json, read_text, write_text
from aem_jax.gguf_file import is_gguf
from aem_jax.models.config import ModelConfig, dtype_name
from aem_jax.models.families import SAVED_DTYPES, TOKENS, config_from_hf, config_to_hf, reads_images
from aem_jax.models.gguf import config_of
from aem_jax.models.policy import Params, Policy
from aem_jax.models.weights import as_in_files, load_params, save_params
from aem_jax.sharding import TRAIN, Rules

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"
BESIDE = (
    GENERATION,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that are copied unchanged from the model's source."""
_FETCHED = "smollm2-135m"
"""Folder of the model that scripts/fetch_smollm2.py fetches."""
_PARTIAL = ".partial"
_NOTHING = (_PARTIAL, "lost+found")
"""Names that an empty folder may have: the rest of a killed export, and a file system's own folder."""
MAX_FILE_BYTES = 5 * 10**9
"""Size at which a new file starts, as in transformers."""


@dataclass(frozen=True)
class Pretrained:
    """A policy and its parameters.

    Attributes:
        policy: the pure functions.
        params: the parameters.
        source: folder or GGUF file that they were read from, if any.
    """

    policy: Policy
    params: Params
    source: Path | None = None

    @property
    def config(self) -> ModelConfig:
        """Sizes and options."""
        return self.policy.config

    @cached_property
    def _forward(self) -> Any:
        return jax.jit(self.policy.forward)

    def logits(self, tokens: Any) -> jax.Array:
        """float32 logits [B,T,V] of unpadded rows i32[B,T]."""
        return self._forward(self.params, jnp.asarray(tokens, jnp.int32))

    def save_pretrained(self, folder: str | Path, *, dtype: DTypeLike | None = None) -> None:
        """Writes files that transformers loads; see the function `save_pretrained`.

        The tokenizer of a GGUF file is not among them: `ChatTokenizer.save_pretrained` writes it.
        """
        save_pretrained(folder, self.config, self.params, dtype=dtype, source=self.source)


def from_pretrained(
    path_or_repo: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike = "bfloat16", rules: Rules = TRAIN
) -> Pretrained:
    """Reads a model in Hugging Face's files or in a GGUF file, each tensor directly into its shards.

    Args:
        path_or_repo: folder with config.json and safetensors, a GGUF file, or a name on the Hub, which is downloaded.
        mesh: devices of the parameters; None is the default device.
        dtype: bfloat16 or float32, as a name or as a jax or numpy dtype: of parameters and of activations.
        rules: the layout, `TRAIN` or `DECODE`.

    Raises:
        ValueError: no model there, a family or option that the decoder does not have, or weights that do not fit.
    """
    source = resolve(path_or_repo)
    config = read_config(source, dtype)
    policy = Policy(config)
    return Pretrained(policy, load_params(source, policy, mesh=mesh, dtype=dtype, rules=rules), source)


def read_config(source: Path, dtype: DTypeLike = "bfloat16") -> ModelConfig:
    """The config of a folder or a GGUF file, checked against its weights if it has some; see `as_in_files`.

    Raises:
        ValueError: no config.json, options that the decoder does not have, or weights that do not fit.
    """
    dtype, theirs = dtype_name(dtype), _config_in(source)
    try:
        config = config_from_hf(theirs, dtype)
    except ValueError as error:
        raise ValueError(f"{source if is_gguf(source) else source / CONFIG}: {error}") from error
    return as_in_files(source, config)


def _config_in(source: Path) -> Any:
    """The content of a folder's config.json, or that which a GGUF file's fields make."""
    if is_gguf(source):
        return config_of(source)
    if (source / ADAPTER).is_file():
        raise ValueError(f"expected a whole model in {source}, got an adapter ({ADAPTER}); merge it into its model")
    try:
        return read_json(source / CONFIG)
    except OSError as error:
        files = sorted(source.glob("*.gguf"))
        hint = f"; give the path of the file {files[0].name} itself" if files else ""
        raise ValueError(f"expected a {CONFIG} in {source}, got {error.strerror}{hint}") from error


def config_text(source: Path) -> str:
    """The text of a model's config.json, with `tie_word_embeddings` corrected to its weights (some families tie a head
    without that field).

    Raises:
        ValueError: as `read_config`.
        OSError: it cannot be read.
    """
    if is_gguf(source):
        return json.dumps(config_of(source), indent=2) + "\n"
    theirs = read_json(source / CONFIG)
    try:
        tied = config_from_hf(theirs).tied_head
    except ValueError:  # copied as it is: who makes a policy of it says what is wrong
        tied = False
    if tied and not read_config(source).tied_head:
        return json.dumps(theirs | {"tie_word_embeddings": False}, indent=2) + "\n"
    return read_text(source / CONFIG)


def model_reads_images(source: Path) -> bool:
    """Whether the model of a folder or a GGUF file reads images, too; its text part is the policy.

    Raises:
        ValueError: no config.json.
    """
    theirs = _config_in(source)
    return isinstance(theirs, dict) and reads_images(theirs)


def resolve(path_or_repo: str | Path) -> Path:
    """The folder or GGUF file of a model; a name on the Hub is downloaded.

    Raises:
        ValueError: no such folder or file, and no such model to download.
    """
    source = Path(os.path.expanduser(path_or_repo))  # unchanged if there is no such user
    if source.is_dir() or source.is_file():
        return source
    name = str(path_or_repo)
    if is_gguf(source):
        hint = "; make smollm2 fetches it" if source.parent.name == _FETCHED else ""
        raise ValueError(f"expected a GGUF file, got none at {name}{hint}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ValueError(
            f"expected a folder, a GGUF file, or a name on the Hub such as Qwen/Qwen2.5-0.5B-Instruct, got {name!r}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [CONFIG, "*.safetensors", "model.safetensors.index.json", *BESIDE]
        # Some models have their weights a second time, in another form.
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["consolidated*", "*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"expected a folder or a model on the Hub, got {name!r}: {reason}") from error


def check_free(folder: Path) -> None:
    """Checks that a model can be written to a folder.

    Raises:
        ValueError: it is a file, or not empty.
    """
    try:
        target = folder.expanduser().resolve()
        names = [entry.name for entry in target.iterdir()] if target.exists() else []
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise ValueError(f"expected a new or empty folder to write a model to, got {folder}: {error}") from None
    if any(name not in _NOTHING for name in names):
        raise ValueError(f"expected a new or empty folder to write a model to, got {folder}; choose another one")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` when the block ends, and is removed when the block raises.

    A link is followed. An existing folder is kept, since it may be a mount point or a working directory: the files are
    written to a folder inside it and moved at the end, config files last.

    Raises:
        ValueError: the folder is not empty.
        OSError: it cannot be written.
    """
    check_free(folder)
    target = folder.expanduser().resolve()
    is_there = target.exists()
    partial = target / _PARTIAL if is_there else target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if is_there:
            for file in sorted(partial.iterdir(), key=lambda file: (file.name.endswith(CONFIG), file.name)):
                os.replace(file, target / file.name)
            partial.rmdir()
        else:
            os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"cannot write to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save_pretrained(
    folder: str | Path,
    config: ModelConfig,
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    source: Path | None = None,
    stop_ids: Sequence[int] = (),
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json, safetensors, and the tokenizer and generation config of `source`, atomically.

    Args:
        folder: to write to; new or empty. It may be a link or a mount point.
        config: of the model.
        params: parameters, on any mesh of this process.
        dtype: of the files, bfloat16, float32 or float16; None keeps that of the parameters. A model that was read in
            its own dtype is written bit by bit.
        source: folder whose tokenizer and generation config are copied.
        stop_ids: ids that end a response, for the generation config if `source` has none.
        max_file_bytes: size at which a new file of weights starts.

    Raises:
        ValueError: the folder is not empty, or weights are not finite in that dtype.
    """
    saved = dtype_name(str(params["base"]["embed"].dtype) if dtype is None else dtype, SAVED_DTYPES)
    with new_folder(Path(folder)) as partial:
        for name in BESIDE:
            if source and (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        token_ids = {name: number for name, number in _token_ids(partial).items() if number < config.vocab_size}
        write_text(partial / CONFIG, json.dumps(config_to_hf(config, saved, token_ids), indent=2) + "\n")
        save_params(partial, config, params, dtype=dtype, max_file_bytes=max_file_bytes)
        if not (partial / GENERATION).exists():
            stops = {"eos_token_id": list(stop_ids)} if stop_ids else {}
            write_text(partial / GENERATION, json.dumps({"do_sample": True, "temperature": 1.0, **stops}) + "\n")


def _token_ids(folder: Path) -> dict[str, int]:
    """The ids of a tokenizer's special tokens, as far as its files give them, by the fields of config.json."""
    try:
        names, tokenizer = (read_json(folder / name) for name in ("tokenizer_config.json", "tokenizer.json"))
        ids = {token["content"]: int(token["id"]) for token in tokenizer["added_tokens"]}
        tokens = {name: names.get(name.removesuffix("_id")) for name in TOKENS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or one that only others can read
        return {}
    content = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: ids[token] for name, token in content.items() if isinstance(token, str) and token in ids}
