"""Conversion between text and ids, and chat turns as id *deltas*.

A conversation grows at its end: prompt, response, delta, response, delta, … Sampled ids are never changed, and only
observations are tokenised. The markup around an observation comes from the chat template, which must keep earlier turns
unchanged. If every prompt is built from scratch (context `window`), any template is accepted: for one in which roles
must alternate, successive messages of one role become one.
"""

import datetime
import functools
import itertools
import json
import logging
import re
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from aem_jax.files import read_text, valid_text
from aem_jax.gguf_file import is_gguf
from aem_jax.tokenizer.bpe import any_of, check_vocab_size, quiet_libraries, train_bpe
from aem_jax.tokenizer.chat_template import ChatTemplate, first_line, saved_day
from aem_jax.tokenizer.gguf import gguf_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

# Two private-use characters fence a control token inside the text of a message, from rendering to encoding.
_FENCES = "\ue0f0\ue0f1"
_FENCED = re.compile(f"{_FENCES[0]}(.*?){_FENCES[1]}", re.DOTALL)
_NO_FENCES = str.maketrans("", "", _FENCES)

_CACHED_DELTAS = 4096
_ANSWER = "<think>\nHm.\n</think>\n\n(answer)"
"""Stands for a response. Its thought shows which templates drop the thoughts of earlier turns."""
_PROBE = "You see a drawer 12,\tit's 2024!\n\n1. x  Y"
"""A text that layouts split differently: numbers, white space, an apostrophe."""

_FIELDS = {
    *("role", "content", "name", "tool_calls", "tool_call_id", "id", "type", "function", "arguments"),
    *("description", "parameters", "properties", "required", "items", "enum"),
}
"""Names that templates look up in messages, tool calls and schemas. Other keys are a client's texts."""
_TRUSTED = ("system", "assistant")
"""Roles of the user's own instruction and of the policy's responses. Other messages come from the environment."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: the one in --model.path, or one that is trained for the run."""

    chat_template: Literal["own", "chatml"] = "own"
    """With --model.path: the model's own chat template, or plain ChatML. Qwen3's own template drops earlier thoughts,
    so it requires rollout.context window."""
    thinking: bool = True
    """Value of enable_thinking for the chat template. With False, Qwen3 responds without a thought. ChatML does not
    read it."""
    vocab_size: int = 1024
    """Maximum size of a trained vocabulary: bytes, control tokens, and merges learned from the environment's text."""
    whole_words: tuple[str, ...] = ("<action>", "</action>")
    """Strings that are always one token each in a trained tokenizer."""
    episodes: int = 200
    """Number of expert episodes whose text the tokenizer is trained on."""

    def __post_init__(self) -> None:
        check_vocab_size(self.vocab_size, self.whole_words)


class ChatTokenizer:
    """A Hugging Face tokenizer that also encodes the chat turns of its template.

    Control tokens in a message or an observation are plain text, not markup. They are encoded character by character,
    so that an environment cannot forge a response of the policy. The tokenizer's special tokens are control tokens
    everywhere. Other added tokens that the chat template writes (`<|User|>`, `<think>`) are control tokens in messages
    of the environment, and stay tokens in responses and in the system message.

    A template may write the date (`strftime_now`, as in Llama 3.2). The date is the day on which the tokenizer was
    first loaded. `save_pretrained` saves it, so that a run's prompts do not change at midnight.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        appends: bool = True,
        thinking: bool = True,
        day: datetime.date | None = None,
        instruction: str = "",
    ) -> None:
        """Wraps a fast tokenizer that has a chat template.

        Args:
            tokenizer: a tokenizer of transformers, backed by the tokenizers library.
            appends: whether conversations grow by `delta_ids`. If not, the template may change earlier turns.
            thinking: value of `enable_thinking` for the template. With False, Qwen3's template adds an empty thought.
            day: the date for a template that writes one; None: today.
            instruction: the system message of conversations that grow; empty: they have none. A template may move it,
                as Gemma's does, if it then keeps it there.

        Raises:
            ValueError: the tokenizer is slow or has no chat template, or the template cannot render a conversation,
                never closes a response with a control token, or, with `appends`, changes earlier turns.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"expected a fast tokenizer, got {type(tokenizer).__name__}; its files need a tokenizer.json"
            )
        self._tokenizer, self._template = tokenizer, ChatTemplate(tokenizer, thinking=thinking, day=day)
        added = _backend(tokenizer).get_added_tokens_decoder().values()
        control = sorted((token.content for token in added if token.special), key=len, reverse=True)
        written = self._template.written()
        markup = [token.content for token in added if not token.special and token.content in written]
        self._unwritten = {token.content for token in added if token.special and token.content not in written}
        self._control, self._markup_tokens = any_of(control), any_of([*control, *markup])
        self._backend, self._plain = _backends(tokenizer, {*control, *markup})
        self._stop_id = self._encode_fenced(self._template.stop_token(control))[0]
        self._open_delta = functools.lru_cache(_CACHED_DELTAS)(self._encode_delta)
        self._lead, self._joins = self._template.response_lead(), self._template.needs_alternation()
        self.markup = self._template.turn_markup(control, instruction) if appends else None
        if appends:
            self._check_ids(instruction)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        chat_template: str | None = None,
        appends: bool = True,
        thinking: bool = True,
        instruction: str = "",
    ) -> "ChatTokenizer":
        """Loads a tokenizer from Hugging Face's files, or from a GGUF file.

        Args:
            path: folder, GGUF file, or a name on the Hub.
            chat_template: Jinja text to use instead of the tokenizer's own, e.g. `CHATML` for Qwen3.
            appends: see the constructor.
            thinking: see the constructor.
            instruction: see the constructor.

        Raises:
            ValueError: no tokenizer is found, or the constructor refuses it.
        """
        quiet_libraries()
        tokenizer = gguf_tokenizer(Path(path)) if is_gguf(path) else _hugging_face(path)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        if not thinking and "enable_thinking" not in str(tokenizer.chat_template):
            log.warning(
                "--tokenizer.thinking False has no effect: the chat template%s does not read enable_thinking",
                "" if chat_template is None else " that replaces the model's own",
            )
        settings = {"appends": appends, "thinking": thinking, "instruction": instruction}
        return cls(tokenizer, day=saved_day(Path(path)), **settings)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int = 1024,
        whole_words: Sequence[str] = ("<action>", "</action>"),
    ) -> "ChatTokenizer":
        """Trains a small byte-level BPE on an environment's text, with Qwen's control tokens and template.

        Any text can be encoded, because the vocabulary contains all bytes. The same texts give the same tokenizer.

        Args:
            texts: observations of the environment and responses of its experts.
            vocab_size: upper bound; includes 256 bytes, 3 control tokens and `whole_words`. Few texts give fewer.
            whole_words: strings that are always one token each.

        Raises:
            ValueError: vocab_size leaves no room for the bytes, or `texts` is one string.
        """
        return cls(train_bpe(texts, vocab_size, whole_words))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat template, as `AutoTokenizer` reads them.

        If the template writes the date, this tokenizer's day is saved in another file of the folder.
        """
        self._tokenizer.save_pretrained(str(folder))
        self._template.save_day(Path(folder))

    def misread(self, folder: Path) -> str | None:
        """How programs that use `AutoTokenizer` split text otherwise than this tokenizer, in one line; None if alike.

        For some values of `model_type` (qwen2), transformers builds its own tokenizer from the vocabulary of
        tokenizer.json and ignores how the file splits text.

        Args:
            folder: of an exported model, with its config.json and this tokenizer's files.
        """
        from transformers import AutoTokenizer

        try:
            theirs = AutoTokenizer.from_pretrained(str(folder))
            ids = theirs(_PROBE, add_special_tokens=False).input_ids
        except Exception as error:  # as in `_hugging_face`
            return f"AutoTokenizer cannot read {folder}: {first_line(error)}"
        if ids == self.encode(_PROBE):
            return None
        return (
            f"AutoTokenizer reads {folder} as {type(theirs).__name__}, which splits text otherwise than the tokenizer "
            f"that the model was trained with: {theirs.convert_ids_to_tokens(ids)}, not "
            f"{theirs.convert_ids_to_tokens(self.encode(_PROBE))}"
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id of a conversation. An embedding needs at least this many rows.

        Special tokens that the template does not write are in no conversation. Gemma 3 1B has one beyond its embedding.
        """
        ids = self._backend.get_vocab(with_added_tokens=True).items()
        return 1 + max(self.pad_id, *(number for token, number in ids if token not in self._unwritten))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The id with which the template closes a response. No other end-of-text id closes a turn."""
        return (self._stop_id,)

    @property
    def template(self) -> str:
        """The text of the chat template."""
        return self._template.text

    @property
    def pad_id(self) -> int:
        """The id for padding: the pad token, or the stop id if the tokenizer has no pad token."""
        pad = self._tokenizer.pad_token_id
        return self._stop_id if pad is None else int(pad)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Encodes plain text. Nothing is added, and special tokens in it are plain text. Not for sampled text."""
        return self._encode_fenced(self._fence(text, trusted=True))

    def response_ids(self, response: str) -> list[int]:
        """Encodes a response as a policy samples it: with the white space before it, and the stop id."""
        return [*self.encode(self._lead + response), self._stop_id]

    def decode(self, ids: Iterable[int]) -> str:
        """Decodes ids to text, without control tokens."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def prompt_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Encodes a conversation up to the start of the next response.

        Args:
            messages: messages with `role` and `content`, as the template expects them. If it wants roles to alternate,
                successive messages of one role are joined, with a blank line between them.

        Raises:
            ValueError: there are no messages, or the template refuses them.
        """
        if not messages:
            raise ValueError("expected at least one message, got none")
        if self._joins:
            messages = [
                {"role": role, "content": "\n\n".join(message["content"] for message in successive)}
                for role, successive in itertools.groupby(messages, lambda message: message["role"])
            ]
        fenced = [
            {"role": m["role"], "content": self._fence(m["content"], trusted=m["role"] in _TRUSTED)} for m in messages
        ]
        return self._encode_fenced(self._template.render(fenced))

    def request_ids(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> list[int]:
        """Encodes a conversation with tools, up to the start of the next response.

        Args:
            messages: messages of OpenAI's API with texts as contents. Arguments of tool calls are mappings, as
                templates expect them.
            tools: definitions of functions, as in OpenAI's API.

        Raises:
            ValueError: the template refuses the messages.
        """
        text = self._template.render(self._fenced(messages), self._fence_all(list(tools), trusted=True))
        return self._encode_fenced(text)

    def continuation_ids(
        self, messages: Sequence[Mapping[str, Any]], response: int, tools: Sequence[Mapping[str, Any]], *, closed: bool
    ) -> list[int] | None:
        """The ids between a response and the next one, in a conversation as in `request_ids`.

        Args:
            messages: the conversation.
            response: index of the response in it. Its own text is not used.
            tools: as in `request_ids`.
            closed: whether the response ended with the stop id.

        Returns:
            The ids; None if the template changes earlier turns, so that the conversation has to be encoded anew.

        Raises:
            ValueError: the template refuses the messages.
        """
        before, after = self._fenced(messages[:response]), self._fenced(messages[response + 1 :])
        definitions = self._fence_all(list(tools), trusted=True)
        # The answer has no fences: a template that looks for its thought would cut them in two.
        prompt = self._template.render(before, definitions) + self._lead + _ANSWER
        text = self._template.render([*before, {"role": "assistant", "content": _ANSWER}, *after], definitions)
        if not text.startswith(prompt):
            return None
        ids = self._encode_fenced(text[len(prompt) :])
        if not ids or ids[0] != self._stop_id:
            return None
        return ids[1:] if closed else ids

    def _fenced(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages of a request with fenced texts. If roles must alternate, those of the user in a row are joined."""
        if self._joins:  # results of parallel tool calls, for a template without tools
            messages = _joined_users(messages)
        return [
            {**self._fence_all(message, trusted=message["role"] in _TRUSTED), "role": message["role"]}
            for message in messages
        ]

    def _fence_all(self, value: Any, trusted: bool) -> Any:
        """Fences all texts of a JSON value, and the names of arguments and properties in it."""
        if isinstance(value, str):
            return self._fence(value, trusted)
        if isinstance(value, Mapping):
            named = lambda key: key if key in _FIELDS else self._fence(key, trusted)
            return {named(key): self._fence_all(part, trusted) for key, part in value.items()}
        return [self._fence_all(part, trusted) for part in value] if isinstance(value, list) else value

    def delta_ids(self, observation: str, *, closed: bool = True) -> list[int]:
        """Returns the ids between two responses: the observation as a turn, with the markup around it.

        Args:
            observation: the environment's text after the first response.
            closed: whether the response ended with the stop id. If it was truncated, the delta first closes it.

        Raises:
            ValueError: the tokenizer was made for conversations that do not grow (`appends=False`).
        """
        delta = self._open_delta(observation).tolist()
        return delta[1:] if closed else delta

    def _encode_delta(self, observation: str) -> "array[int]":
        """Encodes the delta, which begins with the stop id. An array takes 4 bytes per id, so many can be cached."""
        if self.markup is None:
            raise ValueError("expected a tokenizer made with appends=True, got one for prompts that are built anew")
        text = observation.strip() if self.markup.strips else observation
        fenced = self._fence(text, trusted=False)
        return array("i", self._encode_fenced(self.markup.before + fenced + self.markup.after))

    def _fence(self, text: str, trusted: bool) -> str:
        """Fences control tokens in the text of a message, and removes fences that it already contains.

        Args:
            text: text of a message.
            trusted: whether the text may contain added tokens of the template that are not special, as a response may.
        """
        # Existing fences are removed first, because the pieces around one may form a token.
        text = valid_text(text).translate(_NO_FENCES)
        return (self._control if trusted else self._markup_tokens).sub(
            lambda m: f"{_FENCES[0]}{m[0]}{_FENCES[1]}", text
        )

    def _encode_fenced(self, text: str) -> list[int]:
        pieces = _FENCED.split(text)  # text, control token, text, …
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            if piece:
                encoder = self._plain if index % 2 else self._backend
                ids += encoder.encode(piece, add_special_tokens=False).ids
        return ids

    def _check_ids(self, instruction: str) -> None:
        """Verifies that ids built turn by turn equal the ids of the whole conversation, not only its text."""
        answer, observations = "look around", ("A room.", "You see nothing.", "Bye.")
        messages = [{"role": "system", "content": instruction}] if instruction else []
        messages.append({"role": "user", "content": observations[0]})
        ids = self.prompt_ids(messages)
        for observation in observations[1:]:
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
            ids += self.response_ids(answer) + self.delta_ids(observation)
        expected = self.prompt_ids(messages)
        if ids != expected or self.delta_ids("A room.", closed=False)[0] != self._stop_id:
            ours, theirs = (self._backend.decode(i, skip_special_tokens=False) for i in (ids, expected))
            raise ValueError(
                f"expected ids built turn by turn to be those of the whole conversation, got {ids} ({ours!r}) "
                f"for {expected} ({theirs!r}); the template needs a control token or a line break on each side of a "
                "response"
            )


def _hugging_face(path: str | Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        missing_is_none = dict.fromkeys(_RAISED, False)
        file = cached_file(str(path), "tokenizer.json", **missing_is_none)  # pyright: ignore[reportArgumentType]
        if file and getattr(tokenizer, "is_fast", False) and _splits_otherwise(tokenizer, Path(file)):
            return PreTrainedTokenizerFast.from_pretrained(str(path))
        return tokenizer
    except Exception as error:  # damaged files: tokenizers raises plain Exception, transformers many types
        reason = first_line(error)
        raise ValueError(f"expected a tokenizer in Hugging Face's files, got {str(path)!r}: {reason}") from error


def _joined_users(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages in which successive ones of the user are one, with a blank line between them."""
    joined: list[Mapping[str, Any]] = []
    for role, successive in itertools.groupby(messages, lambda message: message["role"]):
        if role == "user":
            joined.append({"role": role, "content": "\n\n".join(message["content"] for message in successive)})
        else:
            joined += successive
    return joined


def _backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """The tokenizer of the package tokenizers inside; the base class does not declare it."""
    return cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer


_RAISED = ("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors")


def _splits_otherwise(tokenizer: "PreTrainedTokenizerBase", file: Path) -> bool:
    """Whether the tokenizer normalizes or splits text otherwise than its tokenizer.json, as in `misread`."""
    from tokenizers import Tokenizer

    parts = ("normalizer", "pre_tokenizer")
    theirs = json.loads(read_text(file))
    empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    expected = Tokenizer.from_str(json.dumps(empty | {part: theirs.get(part) for part in parts}))
    state = lambda backend, part: (found := getattr(backend, part)) and found.__getstate__()
    backend = _backend(tokenizer)
    return any(state(backend, part) != state(expected, part) for part in parts)


def _backends(tokenizer: "PreTrainedTokenizerBase", markup: Collection[str]):
    """Returns (the tokenizer's backend, a copy that reads added tokens as plain text), without truncation or padding.

    Markup is matched before normalization, so that a normalizer cannot produce it from other characters.
    """
    from tokenizers import Tokenizer

    state = json.loads(_backend(tokenizer).to_str())
    for token in state["added_tokens"]:
        token["normalized"] = token["normalized"] and token["content"] not in markup
    state["truncation"] = state["padding"] = None
    engine = Tokenizer.from_str(json.dumps(state))
    # A post-processor may refer to added tokens. This module's encoding does not use it.
    plain = Tokenizer.from_str(json.dumps(state | {"added_tokens": [], "post_processor": None}))
    return engine, plain
